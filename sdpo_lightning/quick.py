"""Rank 4: what the command line answers without Lightning: `--help`, `report`, `configs`, `env`."""

from __future__ import annotations

from collections.abc import Sequence

from sdpo_lightning.configs_command import run_configs
from sdpo_lightning.env_command import run_env
from sdpo_lightning.report_command import run_report
from sdpo_lightning.types import ConfigurationError
from sdpo_lightning.verbs import PROGRAM, VERBS, help_text, refuse_unknown_verb, verb_parser
from sdpo_lightning.versions import versions


def answered(words: Sequence[str]) -> bool:
    """Do what the words ask for, if it needs no Trainer.

    Args:
        words: after the program's name, without `--debug`.

    Returns:
        Whether it is done; False: the words are for `cli`.

    Raises:
        ConfigurationError: no verb, an unknown one, or wrong words after it.
    """
    if not words:
        raise ConfigurationError(f"no verb; `{PROGRAM} --help` lists them")
    verb, rest = words[0], words[1:]
    if verb in ("-h", "--help", "help"):
        print(help_text())
    elif verb == "--version":
        print(f"{PROGRAM} {versions([PROGRAM]).get(PROGRAM, '(not installed)')}")
    elif verb == "report":
        run_report(rest)
    elif verb == "configs":
        run_configs(rest)
    elif verb == "env":
        run_env(rest)
    elif verb == "demo" and ("-h" in rest or "--help" in rest):
        verb_parser("demo").print_help()
    elif not verb.startswith("-") and verb not in VERBS:
        refuse_unknown_verb(verb)
    else:
        return False
    return True
