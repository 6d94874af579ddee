"""Rank 1: what a user says of a source."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from sdpo_lightning.data.messages import RESERVED
from sdpo_lightning.data.presets import PRESETS
from sdpo_lightning.data.rated import CANONICAL, VERDICTS, PairRule
from sdpo_lightning.data.selection import Sample, is_condition, is_sample
from sdpo_lightning.types import ConfigurationError


@dataclass
class PreferenceSource:
    """One named preference data set.

    Raises:
        ConfigurationError: a name that can't be a folder's, no path, a number outside its range, an unknown key in
            `columns`, an unknown preset, a condition without a meaning.
    """

    name: str
    """Names the stage and its folder: letters, digits, '.', '_' and '-', no leading '.'."""
    path: str | None = None
    """A .jsonl, .jsonl.gz or .parquet file, a `save_to_disk` folder, or the name of a hub data set."""
    split: str | None = None
    """Split of a hub data set or of a saved `DatasetDict` (default `train`); files have none."""
    columns: dict[str, str] | None = None
    """prompt, chosen, rejected, system, tools, chat_template_kwargs; of rated lists answers with one of scores, ranks,
    preference, best; numbers pair_score, prompt_score for a curriculum -> column of the file. `system`, the numbers and
    those of rated lists are read only if they stand here."""
    limit: int | None = None
    """Only the first N rows of the file (`path`, `val_path`), counted before any row is dropped."""
    val_path: str | None = None
    """Held-out pairs, in the same form and columns as `path`."""
    preset: str | None = None
    """A set of `docs/datasets.md`: gives path, split and columns where they aren't given here."""
    system_prompt: str | None = None
    """Stands in front of prompts that have no system turn; plain strings become a dialogue."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Variables of the chat template, as `{enable_thinking: false}`; a row's own win."""
    filter: dict[str, Any] | None = None
    """Column -> value, list of values or `{min: ..., max: ...}`; other rows are left out (`val_path` too)."""
    sample: Sample | None = None
    """So many of the pairs of `path`, or such a share of them (a float), drawn once before tokenising."""
    sample_seed: int = 0
    """Of `sample`."""
    repeat: int = 1
    """How often each pair stands in its chunk. Held-out pairs stand once."""
    weight: float = 1.0
    """Of the pairs in the mean loss of a step; matters where sources share a stage."""
    rated_pairs: PairRule = "best_worst"
    """Of a list of rated answers: the best with the worst, with the `best_others`, or `all` pairs of other scores."""
    min_gap: float = 0.0
    """Least difference of the scores of such a pair."""

    def __post_init__(self) -> None:
        key = f"`data.sources[{self.name}]"
        if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", self.name):
            raise ConfigurationError(
                f"`data.sources` holds the name {self.name!r}, expected letters, digits, '.', '_' and '-' "
                "without a leading '.': it becomes a folder's name"
            )
        if self.preset is not None:
            self._take_preset(key, self.preset)
        if self.path is None:
            raise ConfigurationError(f"{key}.path` is missing, expected a path, or a name in {key}.preset`")
        self.split = self.split or "train"
        _check_numbers(self, key)
        _check_columns(self.columns or {}, key)
        if taken := sorted(RESERVED & set(self.chat_template_kwargs or {})):
            raise ConfigurationError(f"{key}.chat_template_kwargs` has {taken}, expected variables of the template")
        for column, condition in (self.filter or {}).items():
            if not is_condition(condition):
                raise ConfigurationError(
                    f"{key}.filter` has {condition!r} for {column!r}, expected a value, a list of values or "
                    "`{min: ..., max: ...}`"
                )

    def _take_preset(self, key: str, name: str) -> None:
        preset = PRESETS.get(name)
        if preset is None:
            raise ConfigurationError(f"{key}.preset` is {name!r}, expected one of {sorted(PRESETS)}")
        self.path, self.split = self.path or preset.path, self.split or preset.split
        self.columns = {**preset.columns, **(self.columns or {})} or None


def _check_numbers(source: PreferenceSource, key: str) -> None:
    if source.limit is not None and source.limit < 1:
        raise ConfigurationError(f"{key}.limit` is {source.limit}, expected at least 1 or null")
    if source.sample is not None and not is_sample(source.sample):
        raise ConfigurationError(
            f"{key}.sample` is {source.sample!r}, expected a number of pairs, or a share with a decimal point up to 1.0"
        )
    if source.repeat < 1:
        raise ConfigurationError(f"{key}.repeat` is {source.repeat}, expected at least 1")
    if not 0 < source.weight < float("inf"):
        raise ConfigurationError(f"{key}.weight` is {source.weight}, expected a number above 0")
    if not 0 <= source.min_gap < float("inf"):
        raise ConfigurationError(f"{key}.min_gap` is {source.min_gap}, expected at least 0")


def _check_columns(columns: dict[str, str], key: str) -> None:
    if unknown := sorted(set(columns) - set(CANONICAL)):
        raise ConfigurationError(f"{key}.columns` names {unknown}, known are {list(CANONICAL)}")
    verdicts = [name for name in VERDICTS if name in columns]
    if ("answers" in columns) != bool(verdicts) or len(verdicts) > 1:
        given = [name for name in ("answers", *VERDICTS) if name in columns]
        raise ConfigurationError(f"{key}.columns` names {given}, expected `answers` with one of {list(VERDICTS)}")
    if verdicts and "pair_score" in columns:
        raise ConfigurationError(f"{key}.columns` names `pair_score` beside `answers`, whose gap it is; leave it out")
    if columns.get("pair_score", "").count(",") > 1:
        raise ConfigurationError(f"{key}.columns` names {columns['pair_score']!r}, expected one column or two")
    if verdicts and {"chosen", "rejected"} & set(columns):
        raise ConfigurationError(f"{key}.columns` names both `answers` and `chosen` or `rejected`; leave one out")
