"""The command `brevity-dpo`: all verbs of sdpo-lightning with our module."""

from brevity_dpo.module import BrevityModule
from sdpo_lightning import cli


def main() -> None:
    """Run it."""
    cli.main(model_class=BrevityModule)
