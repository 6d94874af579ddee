"""Rank 3: one source -> tokenised training and held-out pairs, and the report of what became of its rows."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase

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
    prompts: list[str] = field(default_factory=list, repr=False)

    def row(self) -> dict[str, Any]:
        """What `curriculum.json` says of the source."""
        return {key: value for key, value in vars(self).items() if key not in ("train_ids", "val_ids", "prompts")}

    def scores(self) -> dict[str, float | None]:
        """The figures of the ranking, for a checkpoint."""
        return {key: value for key, value in self.row().items() if key.endswith(("accuracy", "error"))}

    def take_scores(self, scores: Mapping[str, float | None]) -> None:
        """Take over the figures of a checkpoint."""
        for key, value in scores.items():
            setattr(self, key, value)


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase:
    """Read a tokenizer without running anybody's code.

    Raises:
        ConfigurationError: there is none.
    """
    try:
        return AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"no tokenizer at {name_or_path!r}; set `data.tokenizer` or `model.model_name_or_path`: "
            f"{str(error).splitlines()[0]}"
        ) from error


def row_number(pair_id: int) -> int:
    """The row, counted from 1, of its file."""
    return (pair_id & (_VAL_FIRST_ROW - 1)) + 1


def prepare_source(
    index: int, source: PreferenceSource, tokenize: PairTokenizer, on_bad_row: Literal["drop", "error"]
) -> tuple[SourceReport, list[Dataset]]:
    """Read, check and tokenise one source.

    Args:
        index: place of the source in `data.sources`, part of its pair ids.
        source: where its rows are.
        tokenize: tokenizer and length limit.
        on_bad_row: `drop` and count, or `error`.

    Returns:
        The report, and the tokenised pairs: `pair_id`, `prompt_ids`, `chosen_ids`, `rejected_ids`.

    Raises:
        ConfigurationError: a file that can't be read, or no pairs left.
    """
    loaded = load_source(source, index, on_bad_row=on_bad_row)
    pairs, prompts, dropped = _tokenize(source.name, loaded, tokenize, on_bad_row)
    report = SourceReport(source.name, len(pairs), 0, dropped)
    report.train_ids, report.prompts = list(pairs["pair_id"][:]), prompts
    if source.val_path is None:
        return report, [pairs]
    val_rows = load_source(source, index, path=source.val_path, on_bad_row=on_bad_row, first_row=_VAL_FIRST_ROW)
    val, val_prompts, val_dropped = _tokenize(source.name, val_rows, tokenize, on_bad_row)
    report.val_ids, report.val_pairs = list(val["pair_id"][:]), len(val)
    report.dropped |= {f"val_{reason}": count for reason, count in val_dropped.items()}
    both = len(set(prompts) & set(val_prompts))
    if both:
        log.warning("source %r: %d prompts stand in its training and its held-out file", source.name, both)
    return report, [pairs, val]


def hold_out(reports: Sequence[SourceReport], fraction: float, seed: int) -> None:
    """Move a share of the pairs of each source without a held-out file to its held-out side.

    Args:
        reports: of all sources; changed in place.
        fraction: `data.val_fraction`.
        seed: of the choice.

    Raises:
        ConfigurationError: a source whose pairs are all held out.
    """
    whole = [report for report in reports if not report.val_ids]
    held = split_by_prompt({report.name: report.prompts for report in whole}, fraction, seed)
    for report in whole:
        marked = list(zip(report.train_ids, held[report.name], strict=True))
        report.train_ids = [i for i, is_val in marked if not is_val]
        report.val_ids = [i for i, is_val in marked if is_val]
        report.pairs, report.val_pairs = len(report.train_ids), len(report.val_ids)
        if not report.train_ids:
            raise ConfigurationError(f"source {report.name!r}: every pair is held out; lower `data.val_fraction`")


def _tokenize(
    name: str, loaded: SourceRows, tokenize: PairTokenizer, on_bad_row: str
) -> tuple[Dataset, list[str], dict[str, int]]:
    """The pairs, the prompt of each as text, and the dropped rows by reason."""
    if loaded.conversational:
        tokenize.check_template(name)
    prompts: list[str] = []
    columns: dict[str, list[Any]] = {"pair_id": [], "prompt_ids": [], "chosen_ids": [], "rejected_ids": []}
    dropped: dict[str, int] = {}
    for row in loaded.rows:
        pair = tokenize(row["prompt"], row["chosen"], row["rejected"])
        if isinstance(pair, str):
            if on_bad_row == "error":
                number = row_number(row["pair_id"])
                raise ConfigurationError(f"source {name!r}, row {number}: {pair} (`data.on_bad_row: error`)")
            dropped[pair] = dropped.get(pair, 0) + 1
            continue
        for key, value in zip(columns, (row["pair_id"], *vars(pair).values()), strict=True):
            columns[key].append(value)
        prompts.append(str(row["prompt"]))
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
    return Dataset.from_dict(columns), prompts, total


def _listed(dropped: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in sorted(dropped.items()))
