"""Rank 1: which settings a stage has: by its name, else by its place, else by "*". Pure functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from difflib import get_close_matches
from typing import Any, TypeVar

from sdpo_lightning.types import ConfigurationError, StageSettings

Value = TypeVar("Value")

# Field -> what it may be, in words and as a test.
_RANGES: dict[str, tuple[str, Callable[[float], bool]]] = {
    "lr": ("above 0", lambda value: value > 0),
    "beta": ("above 0", lambda value: value > 0),
    "label_smoothing": ("within [0, 0.5)", lambda value: 0 <= value < 0.5),
    "epochs": ("at least 1", lambda value: value >= 1),
    "batch_size": ("at least 1", lambda value: value >= 1),
    "warmup_ratio": ("within [0, 1]", lambda value: 0 <= value <= 1),
}


def read_stage_settings(values: Mapping[str, Mapping[str, Any]] | None) -> dict[str, StageSettings]:
    """`data.stage_settings` of a parsed config.

    Args:
        values: name, place or "*" -> field -> plain value.
    """
    return {key: StageSettings(**fields_given) for key, fields_given in (values or {}).items()}


def settings_of(given: Mapping[str, StageSettings], index: int, name: str) -> StageSettings:
    """The settings of one stage, field by field the most particular one that is given.

    Args:
        given: `data.stage_settings`; its keys are names, places in the training order as text, and "*".
        index: place of the stage, from 1.
        name: of the stage.

    Returns:
        What is given for the name, else for the place, else for "*"; None where the run's own value stands.
    """
    layers, found = layers_of(given, index, name), {}
    for field in fields(StageSettings):
        values = (getattr(layer, field.name) for layer in layers)
        found[field.name] = next((value for value in values if value is not None), None)
    return StageSettings(**found)


def layers_of(given: Mapping[str, Value], index: int, name: str) -> list[Value]:
    """What is given for a stage, the most particular first.

    Args:
        given: its keys are names, places in the training order as text, and "*".
        index: place of the stage, from 1.
        name: of the stage.
    """
    return [given[key] for key in (name, str(index), "*") if key in given]


def check_stage_keys(setting: str, keys: Sequence[str], names: Sequence[str], mergeable: Sequence[str]) -> None:
    """Check keys that stand for stages.

    Args:
        setting: that has them.
        keys: names, places or "*".
        names: of the stages, in whatever order.
        mergeable: sources whose stages may be joined under names like `a+b`.

    Raises:
        ConfigurationError: a key that is no stage, or may be two.
    """
    places = [str(index) for index in range(1, len(names) + 1)]
    for key in keys:
        where = f"`{setting}[{key}]`"
        if key in names and key in places:
            raise ConfigurationError(f"{where}: {key!r} is the name of a stage and a place; rename the source")
        if key not in (*names, *places, "*") and not set(key.split("+")) <= set(mergeable):
            close = get_close_matches(key, names, 1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            expected = f"one of {list(names)}, a place from '1' to '{len(names)}', or '*'"
            raise ConfigurationError(f"{where}: no stage is called {key!r}{hint}; expected {expected}")


def check_stage_settings(
    given: Mapping[str, StageSettings], names: Sequence[str], mergeable: Sequence[str], by_tokens: bool
) -> None:
    """Check `data.stage_settings` as far as it can be before the stages have their order.

    Args:
        given: the setting.
        names: of the stages, in whatever order.
        mergeable: sources whose stages may be joined under names like `a+b`.
        by_tokens: whether micro-batches are filled by `data.batch_tokens`.

    Raises:
        ConfigurationError: a key that is no stage, a number outside its range, or one without a meaning.
    """
    check_stage_keys("data.stage_settings", list(given), names, mergeable)
    for key, settings in given.items():
        where = f"`data.stage_settings[{key}]`"
        for field, (words, fits) in _RANGES.items():
            value = getattr(settings, field)
            if value is not None and not fits(value):
                raise ConfigurationError(f"{where}: `{field}` is {value}, expected {words}")
        if settings.batch_size is not None and by_tokens:
            raise ConfigurationError(f"{where}: `batch_size` has no meaning beside `data.batch_tokens`; leave one out")


def largest_batch(given: Mapping[str, StageSettings], batch_size: int) -> int:
    """Most pairs of a micro-batch in any stage.

    Args:
        given: `data.stage_settings`.
        batch_size: `data.batch_size`.
    """
    return max(batch_size, *(settings.batch_size or 0 for settings in given.values()), 0)


def count_by_place(given: Mapping[str, StageSettings]) -> bool:
    """Whether passes are given by place, so that their number waits for the order of the stages."""
    return any(key.isdigit() and settings.epochs is not None for key, settings in given.items())
