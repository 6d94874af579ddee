"""Rank 9: `--print_completion`: a script by which a shell completes verbs and settings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser

from sdpo_lightning.cli import CurriculumCLI, EstimateCLI
from sdpo_lightning.data.datamodule import CurriculumDataModule
from sdpo_lightning.module import DPOLitModule
from sdpo_lightning.parser import OneLineParser
from sdpo_lightning.types import ConfigurationError
from sdpo_lightning.verbs import PROGRAM, VERBS, add_words


class _Made(Exception):
    """Carries a parser out of a command line that is to run nothing."""


class _ParserOf:
    """Before `CurriculumCLI` or a subclass among the bases: the parser is made, and no word is read."""

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """The program's own name, and none of Lightning's words."""
        return OneLineParser(prog=PROGRAM, **{**kwargs, "description": ""})

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Hand the parser out."""
        raise _Made(parser)


def print_completion(
    words: Sequence[str],
    check_cli: type[EstimateCLI],
    model_class: type[DPOLitModule] = DPOLitModule,
    datamodule_class: type[CurriculumDataModule] = CurriculumDataModule,
) -> None:
    """Print the script.

    Args:
        words: after `--print_completion`: `shtab-bash`, `shtab-zsh` or `shtab-tcsh`, as jsonargparse calls them.
        check_cli: the command line of `check`.
        model_class: whose settings are completed.
        datamodule_class: likewise.

    Raises:
        ConfigurationError: another shell, or shtab isn't installed.
    """
    shells = ("shtab-bash", "shtab-zsh", "shtab-tcsh")
    if list(words) not in [[shell] for shell in shells]:
        raise ConfigurationError(f"`--print_completion` takes one of {', '.join(shells)}, got {' '.join(words)!r}")
    parser = _parser(CurriculumCLI, model_class, datamodule_class, run=True)
    verbs = parser.verbs
    for verb, cli in (("check", check_cli), ("estimate", EstimateCLI)):
        verbs.add_subcommand(verb, _parser(cli, model_class, datamodule_class, run=False), help=VERBS[verb])
    for verb in ("report", "evaluate", "parity", "demo", "configs", "env"):
        inner = OneLineParser(description="")
        add_words(inner, verb)
        verbs.add_subcommand(verb, inner, help=VERBS[verb])
    try:
        print(parser.get_completion_script(words[0]))
    except (ValueError, ImportError) as error:
        if "shtab" not in str(error):
            raise
        needed = "`--print_completion` needs shtab: pip install 'sdpo-lightning[completion]'"
        raise ConfigurationError(needed) from error


def _parser(cli: type[CurriculumCLI], model_class: Any, datamodule_class: Any, run: bool) -> Any:
    unread = type("Unread", (_ParserOf, cli), {})
    try:
        unread(model_class, datamodule_class, [], run=run)
    except _Made as made:
        return made.args[0]
    raise AssertionError("the command line read its words")
