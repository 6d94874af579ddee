"""Rank 4: the parser of the verbs that have a Trainer: errors are one line, and say what was probably meant."""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from operator import or_
from typing import Any, NoReturn, Union, get_args, get_origin

from lightning.pytorch.cli import LightningArgumentParser

from sdpo_lightning.parser_errors import name_key, name_words, shorten
from sdpo_lightning.types import ConfigurationError


class _NamingParser(LightningArgumentParser):
    # jsonargparse makes one for each class that a config names: `known` are then that class's settings.
    def validate(self, *args: Any, **kwargs: Any) -> None:
        """Name the key that was probably meant, where one is unknown."""
        try:
            super().validate(*args, **kwargs)
        except KeyError as error:
            said = name_key(str(error), _keys(self))
            if said == str(error):
                raise
            raise type(error)(said) from error

    def add_class_arguments(self, *args: Any, **kwargs: Any) -> list[str]:
        """As jsonargparse's, with `1` read as an int where an int or a float is taken.

        A number of batches or pairs is no share of them, and `typing` gives an equal union that was made before, so
        which stands first depends on what was imported.
        """
        added = super().add_class_arguments(*args, **kwargs)
        for action in self._actions:
            kind = vars(action).get("_typehint")
            kinds = list(get_args(kind)) if get_origin(kind) is Union else []
            if {int, float} <= set(kinds) and kinds.index(float) < kinds.index(int):
                kinds.remove(int)
                kinds.insert(kinds.index(float), int)
                # Written with `|`, a union is made anew.
                vars(action)["_typehint"] = reduce(or_, kinds)
        return added


class OneLineParser(_NamingParser):
    """An argument parser whose errors are one line without usage.

    Attributes:
        verbs: what `add_subcommands` gave, to which further verbs can be added.
    """

    verbs: Any = None

    # jsonargparse also takes what argparse does; Lightning gives none of it.
    def add_subcommands(self, required: bool = True, dest: str = "subcommand") -> Any:  # type: ignore[override]
        """As jsonargparse's."""
        self.verbs = super().add_subcommands(required, dest)
        return self.verbs

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise instead of exiting.

        Raises:
            ConfigurationError: always.
        """
        raise ConfigurationError(name_words(shorten(str(message)), _options(self))) from ex


def _keys(parser: LightningArgumentParser) -> Iterator[str]:
    for option in _options(parser):
        yield option.lstrip("-")


def _options(parser: LightningArgumentParser) -> Iterator[str]:
    """Of the parser and, where it has verbs, of each of them."""
    for action in parser._actions:
        yield from action.option_strings
        if isinstance(action.choices, dict):
            for inner in action.choices.values():
                yield from _options(inner)
