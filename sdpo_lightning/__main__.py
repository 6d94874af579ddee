"""`python -m sdpo_lightning`."""

from sdpo_lightning.cli import main

if __name__ == "__main__":
    main()
