"""`sdpo-lightning` and `python -m sdpo_lightning`: Lightning is imported only for verbs that need it."""

from __future__ import annotations

import sys

from sdpo_lightning.exits import exit_codes
from sdpo_lightning.quick import answered


def main() -> None:
    """Run the command line on `sys.argv`.

    Raises:
        SystemExit: with the exit codes of `cli`, other than 0.
    """
    words = sys.argv[1:]
    with exit_codes("--debug" in words):
        if answered([word for word in words if word != "--debug"]):
            return
    from sdpo_lightning.cli import main as run

    run(words)


if __name__ == "__main__":
    main()
