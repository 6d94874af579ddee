"""Rank 1: the verbs, and the words of those that need no Trainer. Imports nothing heavy."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NoReturn

from sdpo_lightning.spelling import did_you_mean
from sdpo_lightning.types import ConfigurationError

PROGRAM = "sdpo-lightning"
VERBS = {
    "fit": "train all stages",
    "validate": "measure a checkpoint on the held-out pairs",
    "test": "the same, by Lightning's other name",
    "predict": "logps of every pair, as predictions.csv",
    "rank": "score the sources by M_0 and print their order, without training",
    "check": "read settings and every row before any weights load",
    "estimate": "memory and disk that a run would need",
    "report": "one HTML page of a run; of several, a comparison",
    "evaluate": "public benchmarks of M_0 ... M_T, by lm-eval or a judge",
    "parity": "the first steps of a run beside an installed TRL",
    "demo": "stepwise DPO on generated data, in minutes on a CPU",
    "configs": "list the shipped recipes, copy one",
    "env": "versions of what is installed, for a bug report",
}


class VerbParser(argparse.ArgumentParser):
    """A parser whose errors are one line and exit code 2."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of exiting.

        Raises:
            ConfigurationError: always.
        """
        raise ConfigurationError(f"{self.prog.removeprefix(f'{PROGRAM} ')}: {message}")


def verb_parser(verb: str) -> VerbParser:
    """The parser of `report`, `demo`, `configs` or `env`."""
    parser = VerbParser(f"{PROGRAM} {verb}", description=VERBS[verb][:1].upper() + VERBS[verb][1:] + ".")
    add_words(parser, verb)
    return parser


def add_words(parser: argparse.ArgumentParser, verb: str) -> None:
    """Add what such a verb takes.

    Args:
        parser: argparse's or jsonargparse's.
        verb: its name.
    """
    if verb == "report":
        parser.add_argument("runs", nargs="+", metavar="RUN", type=Path, help="run directories")
        parser.add_argument("--out", type=Path, help="default: RUN/report.html; of several runs comparison.html here")
    elif verb == "demo":
        parser.add_argument("--root", help="run directory (default runs/demo, runs/demo-control)")
        parser.add_argument("--control", action="store_true", help="shuffled labels: nothing can be learned")
        parser.add_argument("--seed", type=int, default=0)
    elif verb == "configs":
        parser.add_argument("action", choices=["ls", "cp"], help="list the recipes, or copy one; overwrites nothing")
        parser.add_argument("name", nargs="?", metavar="NAME", help="cp: as `ls` gives it")
        parser.add_argument("to", nargs="?", metavar="TO", help="cp: file or folder (default: here)")


def help_text() -> str:
    """What `--help` prints."""
    width = max(map(len, VERBS))
    return "\n".join(
        [
            f"usage: {PROGRAM} VERB ...",
            "",
            "Stepwise DPO (arXiv 2403.19270): several preference sets, one fit.",
            "",
            *(f"  {verb:{width}}  {text}" for verb, text in VERBS.items()),
            "",
            f"`{PROGRAM} VERB --help` names a verb's settings, `{PROGRAM} fit --print_config` prints all with their",
            "values. --version; --debug (tracebacks); --print_completion shtab-bash (or zsh, tcsh: docs/cli.md).",
            "Exit codes: 0 done; 1 a fault; 2 configuration or data; 3 resume refused; 143 SIGTERM; 130 SIGINT.",
        ]
    )


def refuse_unknown_verb(word: str) -> NoReturn:
    """Say which verb may have been meant.

    Raises:
        ConfigurationError: always.
    """
    hint = did_you_mean(word, VERBS) or f"; `{PROGRAM} --help` lists the verbs"
    raise ConfigurationError(f"there is no verb {word!r}{hint}")
