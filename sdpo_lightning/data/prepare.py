"""Rank 4: sources -> tokenised training and held-out pairs, and reports of what became of their rows."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from datasets import Dataset, concatenate_datasets
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from sdpo_lightning.data.cache import Fingerprint, cached_folder, compare_nodes, data_digest, fingerprints, read_content
from sdpo_lightning.data.collate import PairTokenizer
from sdpo_lightning.data.curriculum import split_by_prompt
from sdpo_lightning.data.declaration import PreferenceSource
from sdpo_lightning.data.rows import VAL_FIRST_ROW, row_number
from sdpo_lightning.data.sources import Note, read_source
from sdpo_lightning.data.tokenizing import Tokenized, processes, tokenize_rows
from sdpo_lightning.ranks import side_by_side, together
from sdpo_lightning.types import ConfigurationError

log = logging.getLogger(__name__)


@dataclass
class SourceReport:
    """What became of one source; a row of `curriculum.json`."""

    name: str
    pairs: int
    val_pairs: int
    dropped: dict[str, int]
    marks: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)
    repeat: int = 1
    weight: float = 1.0
    reward_accuracy: float | None = None
    standard_error: float | None = None
    mean_logps_accuracy: float | None = None
    mean_logps_standard_error: float | None = None
    shorter_chosen: float | None = None
    length_matched_pairs: int | None = None
    length_matched_accuracy: float | None = None
    length_correlation: float | None = None
    train_ids: list[int] = field(default_factory=list, repr=False)
    val_ids: list[int] = field(default_factory=list, repr=False)
    prompt_keys: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64), repr=False)

    def row(self) -> dict[str, Any]:
        """What `curriculum.json` says of the source."""
        return {key: value for key, value in vars(self).items() if key not in ("train_ids", "val_ids", "prompt_keys")}

    @property
    def chunk_ids(self) -> list[int]:
        """The training pairs as often as they are trained on in a pass."""
        return self.train_ids * self.repeat

    def scores(self) -> dict[str, float | None]:
        """The figures of the ranking, for a checkpoint."""
        parts = ("accuracy", "error", "length", "shorter")
        return {key: value for key, value in self.row().items() if any(part in key for part in parts)}

    def take_scores(self, scores: Mapping[str, float | None]) -> None:
        """Take over the figures of a checkpoint."""
        for key, value in scores.items():
            setattr(self, key, value)


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase:
    """Read a tokenizer without running anybody's code.

    Raises:
        ConfigurationError: there is none.
    """
    missing = f"no tokenizer at {name_or_path!r}; set `data.tokenizer` or `model.model_name_or_path`: "
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigurationError(missing + str(error).splitlines()[0]) from error
    # Of a model whose folder has no files of one, transformers may make it from the special tokens alone.
    if tokenizer.get_vocab().keys() <= set(tokenizer.all_special_tokens):
        raise ConfigurationError(f"{missing}what is there has special tokens only")
    return tokenizer


@dataclass(frozen=True)
class Preparation:
    """How sources become tokenised pairs.

    Attributes:
        tokenize: tokenizer and length limit.
        on_bad_row: `drop` and count, or `error`.
        num_proc: processes that tokenise one source; None chooses.
        node_rank: of the machine that this process runs on.
        local_rank: of this process on its machine; 0 works for all that run there.
        local_ranks: processes on this machine.
        stages: names of the stages in the order given, for errors.
    """

    tokenize: PairTokenizer
    on_bad_row: Literal["drop", "error"] = "drop"
    num_proc: int | None = None
    node_rank: int = 0
    local_rank: int = 0
    local_ranks: int = 1
    stages: Sequence[str] = ()

    def stage_of(self, source: str) -> str:
        """The stage of a source in words; empty where stages are cut from a pool."""
        named = (f"stage {n} {name!r}, " for n, name in enumerate(self.stages, 1) if source in name.split("+"))
        return next(named, "")


def prepare_sources(
    sources: Sequence[PreferenceSource], how: Preparation
) -> tuple[list[SourceReport], list[Dataset]]:
    """Read, check and tokenise all sources, once a machine, or find them in the cache.

    A collective: local rank 0 of each machine works and the others wait, without a time-out.

    Args:
        sources: in the order of `data.sources`, part of their pair ids.
        how: settings and ranks.

    Returns:
        The reports, and the tokenised pairs, memory-mapped: `pair_id`, `prompt_ids`, `chosen_ids`, `rejected_ids`,
        `prompt_key`.

    Raises:
        ConfigurationError: on all ranks: a file that can't be read, no pairs left, machines with different data.
    """
    leads = how.local_rank == 0
    given = (sources, how.tokenize, how.on_bad_row)
    told = together((lambda: (how.node_rank, fingerprints(*given))) if leads else None)
    by_node = dict(item for item in told if item is not None)
    compare_nodes([source.name for source in sources], by_node)
    keys = by_node[how.node_rank]
    found = together((lambda: (how.node_rank, _folders(sources, keys, how))) if leads else None)
    folders = dict(item for item in found if item is not None)[how.node_rank]
    loaded = side_by_side(lambda: [_load(folder) for folder in folders])
    for source, (report, _) in zip(sources, loaded, strict=True):
        # No part of the key of the cache: the tokenised pairs are the same.
        report.repeat, report.weight = source.repeat, source.weight
    return [report for report, _ in loaded], [part for _, parts in loaded for part in parts]


def _folders(sources: Sequence[PreferenceSource], prints: Sequence[Fingerprint], how: Preparation) -> list[Path]:
    """The folder of each source in the cache, where it is made if need be."""

    def folder(index: int) -> Path:
        source, before = sources[index], prints[index]

        def build(staging: Path) -> dict[str, Any]:
            content = build_source(index, source, how, staging)
            if data_digest(source) != before.data:
                changed = f"source {source.name!r} changed while it was read, expected files that stay as they are"
                raise ConfigurationError(f"{changed}; see `data.sources[{source.name}].path`")
            return content

        return cached_folder(before.key, build)

    return [folder(index) for index in range(len(sources))]


def build_source(index: int, source: PreferenceSource, how: Preparation, folder: Path) -> dict[str, Any]:
    """Read, check and tokenise one source.

    Args:
        index: place of the source in `data.sources`, part of its pair ids.
        source: where its rows are.
        how: settings.
        folder: for the Arrow files.

    Returns:
        What is to be kept beside the files, as plain values.

    Raises:
        ConfigurationError: a file that can't be read, or no pairs left.
    """
    train, dropped, left_out, notes = _build_part(index, source, None, how, folder / "train")
    content: dict[str, Any] = {"name": source.name, "dropped": dropped, "marks": train.marks, "left_out": left_out}
    content |= {"notes": notes, "parts": [_names(train)]}
    if source.val_path is None:
        return content
    val, val_dropped, val_left_out, val_notes = _build_part(index, source, source.val_path, how, folder / "val")
    content["parts"].append(_names(val))
    content["dropped"] |= {f"val_{reason}": count for reason, count in val_dropped.items()}
    content["marks"] |= {f"val_{mark}": count for mark, count in val.marks.items()}
    content["left_out"] |= {f"val_{key}": count for key, count in val_left_out.items()}
    content["notes"] += val_notes
    return content


def _load(folder: Path) -> tuple[SourceReport, list[Dataset]]:
    content = read_content(folder)
    for level, text in content["notes"]:
        log.log(level, "%s", text)
    parts = [_join([folder / name for name in names]) for names in content["parts"]]
    report = SourceReport(content["name"], len(parts[0]), 0, content["dropped"], content["marks"], content["left_out"])
    report.train_ids, report.prompt_keys = _column(parts[0], "pair_id").tolist(), _column(parts[0], "prompt_key")
    if len(parts) == 2:
        report.val_ids, report.val_pairs = _column(parts[1], "pair_id").tolist(), len(parts[1])
    return report, parts


def _names(part: Tokenized) -> list[str]:
    return [path.name for path in part.files]


def _join(files: Sequence[Path]) -> Dataset:
    return concatenate_datasets([Dataset.from_file(str(path)) for path in files])


def _column(rows: Dataset, name: str) -> np.ndarray:
    return rows.data.column(name).to_numpy()


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
    if not fraction:
        return
    held = split_by_prompt({report.name: report.prompt_keys.tolist() for report in whole}, fraction, seed)
    for report in whole:
        marked = list(zip(report.train_ids, held[report.name], strict=True))
        report.train_ids = [i for i, is_val in marked if not is_val]
        report.val_ids = [i for i, is_val in marked if is_val]
        report.pairs, report.val_pairs = len(report.train_ids), len(report.val_ids)
        if not report.train_ids:
            raise ConfigurationError(f"source {report.name!r}: every pair is held out; lower `data.val_fraction`")


def _build_part(
    index: int, source: PreferenceSource, val_path: str | None, how: Preparation, out: Path
) -> tuple[Tokenized, dict[str, int], dict[str, int], list[Note]]:
    """The pairs of `source.path` or `source.val_path`, rows dropped by reason, rows left out, lines for the log."""
    rows = out.with_suffix(".rows")
    loaded = read_source(source, index, val_path, how.on_bad_row, VAL_FIRST_ROW if val_path else 0, rows)
    tokenize = how.tokenize.with_variables(source.chat_template_kwargs)
    if loaded.conversational:
        tokenize.check_template(source.name)
    count = processes(how.num_proc, len(loaded.rows), how.local_ranks)
    strict = how.on_bad_row == "error"
    done = tokenize_rows(rows, len(loaded.rows), tokenize, strict, count, out, source.name)
    rows.unlink()
    if done.bad is not None:
        number, rule = row_number(done.bad[0]), "on_bad_row" if strict else "on_long_prompt"
        raise ConfigurationError(f"source {source.name!r}, row {number}: {done.bad[1]} (`data.{rule}: error`)")
    # A reason may be found in the text or only in the ids.
    total = dict(Counter(loaded.dropped) + Counter(done.dropped))
    if not done.pairs:
        raise ConfigurationError(
            f"{how.stage_of(source.name)}source {source.name!r}: 0 of {loaded.total} pairs left "
            f"({_listed(total)}); change `data.max_length` or `data.sources`"
        )
    notes = list(loaded.notes)
    if loaded.conversational and (unnamed := tokenize.unnamed_variables()):
        text = f"the chat template doesn't name {', '.join(unnamed)}; see `data.sources[{source.name}]"
        notes.append((logging.WARNING, f"source {source.name!r}: {text}.chat_template_kwargs`"))
    if done.dropped:
        lost = sum(done.dropped.values())
        level = logging.WARNING if lost > 0.01 * loaded.total else logging.INFO
        text = f"source {source.name!r}: {lost} of {loaded.total} pairs dropped: {_listed(done.dropped)}"
        notes.append((level, text))
    lost_fields = {mark: count for mark, count in done.marks.items() if mark.startswith("unrendered_")}
    for level, marks in ((logging.INFO, done.marks), (logging.WARNING, lost_fields)):
        if marks:
            notes.append((level, f"source {source.name!r}: of {done.pairs} pairs {_listed(marks)}"))
    return done, total, loaded.left_out, notes


def _listed(dropped: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in sorted(dropped.items()))
