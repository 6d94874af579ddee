"""Rank 3: one source -> tokenised training and held-out pairs, and the report of what became of its rows."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from datasets import Dataset

from sdpo_lightning.data.collate import PairTokenizer
from sdpo_lightning.data.curriculum import split_by_prompt
from sdpo_lightning.data.sources import PreferenceSource, SourceRows, load_source
from sdpo_lightning.types import ConfigurationError

log = logging.getLogger(__name__)

# Held-out files count their rows from here, so that their ids never meet those of the training file.
_VAL_FIRST_ROW = 1 << 39


@dataclass
class SourceReport:
    """What became of one source; a row of `curriculum.json`."""

    name: str
    pairs: int
    val_pairs: int
    dropped: dict[str, int]
    reward_accuracy: float | None = None
    standard_error: float | None = None
    mean_logps_accuracy: float | None = None
    mean_logps_standard_error: float | None = None
    train_ids: list[int] = field(default_factory=list, repr=False)
    val_ids: list[int] = field(default_factory=list, repr=False)

    def row(self) -> dict[str, Any]:
        """What `curriculum.json` says of the source."""
        return {key: value for key, value in vars(self).items() if key not in ("train_ids", "val_ids")}

    def scores(self) -> dict[str, float | None]:
        """The figures of the ranking, for a checkpoint."""
        return {key: value for key, value in self.row().items() if key.endswith(("accuracy", "error"))}

    def take_scores(self, scores: Mapping[str, float | None]) -> None:
        """Take over the figures of a checkpoint."""
        for key, value in scores.items():
            setattr(self, key, value)


@dataclass(frozen=True)
class PrepareRules:
    """What is the same for all sources.

    Attributes:
        tokenize: tokenizer and length limit.
        on_bad_row: `drop` and count, or `error`.
        val_fraction: share of the pairs held out where a source has no `val_path`.
        seed: of that choice.
    """

    tokenize: PairTokenizer
    on_bad_row: Literal["drop", "error"]
    val_fraction: float
    seed: int


def prepare_source(
    index: int, source: PreferenceSource, rules: PrepareRules
) -> tuple[SourceReport, list[Dataset]]:
    """Read, check and tokenise one source.

    Args:
        index: place of the source in `data.sources`, part of its pair ids.
        source: where its rows are.
        rules: what is the same for all sources.

    Returns:
        The report, and the tokenised pairs: `pair_id`, `prompt_ids`, `chosen_ids`, `rejected_ids`.

    Raises:
        ConfigurationError: a file that can't be read, or no pairs left.
    """
    loaded = load_source(source, index, on_bad_row=rules.on_bad_row)
    pairs, dropped = _tokenize(source.name, loaded, rules)
    parts, ids = [pairs], pairs["pair_id"][:]
    if source.val_path is not None:
        val_rows = load_source(
            source, index, path=source.val_path, on_bad_row=rules.on_bad_row, first_row=_VAL_FIRST_ROW
        )
        val, val_dropped = _tokenize(source.name, val_rows, rules)
        parts.append(val)
        train_ids, val_ids = ids, val["pair_id"][:]
        dropped |= {f"val_{reason}": count for reason, count in val_dropped.items()}
    else:
        prompts = [str(prompt) for prompt in pairs["prompt_ids"][:]]
        held = split_by_prompt(prompts, rules.val_fraction, rules.seed)
        train_ids = [i for i, is_val in zip(ids, held, strict=True) if not is_val]
        val_ids = [i for i, is_val in zip(ids, held, strict=True) if is_val]
    if not train_ids:
        raise ConfigurationError(f"source {source.name!r}: every pair is held out; lower `data.val_fraction`")
    report = SourceReport(source.name, len(train_ids), len(val_ids), dropped)
    report.train_ids, report.val_ids = list(train_ids), list(val_ids)
    return report, parts


def _tokenize(name: str, loaded: SourceRows, rules: PrepareRules) -> tuple[Dataset, dict[str, int]]:
    if loaded.conversational:
        rules.tokenize.check_template(name)
    columns: dict[str, list[Any]] = {"pair_id": [], "prompt_ids": [], "chosen_ids": [], "rejected_ids": []}
    dropped: dict[str, int] = {}
    for row in loaded.rows:
        pair = rules.tokenize(row["prompt"], row["chosen"], row["rejected"])
        if isinstance(pair, str):
            if rules.on_bad_row == "error":
                number = (row["pair_id"] & (_VAL_FIRST_ROW - 1)) + 1
                raise ConfigurationError(f"source {name!r}, row {number}: {pair} (`data.on_bad_row: error`)")
            dropped[pair] = dropped.get(pair, 0) + 1
            continue
        for key, value in zip(columns, (row["pair_id"], *vars(pair).values()), strict=True):
            columns[key].append(value)
    total = loaded.dropped | dropped
    if not columns["pair_id"]:
        raise ConfigurationError(
            f"source {name!r}: 0 of {loaded.total} pairs left ({_listed(total)}); change `data.max_length` or "
            "`data.sources`"
        )
    if dropped:
        count = sum(dropped.values())
        level = logging.WARNING if count > 0.01 * loaded.total else logging.INFO
        log.log(level, "source %r: %d of %d pairs dropped: %s", name, count, loaded.total, _listed(dropped))
    return Dataset.from_dict(columns), total


def _listed(dropped: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in sorted(dropped.items()))
