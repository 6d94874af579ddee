"""Rank 5: the data of a run that goes on: rows that must be the same, and stages that may be new."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sdpo_lightning.data.curriculum import chunks_by_source, compare_plans
from sdpo_lightning.data.loader import PairStore
from sdpo_lightning.data.prepare import SourceReport
from sdpo_lightning.data.rows import row_number
from sdpo_lightning.loop_progress import with_step_pairs
from sdpo_lightning.types import Chunk, ResumeError

log = logging.getLogger(__name__)

ROWS = "tokenised rows of data.sources"


@dataclass(frozen=True, eq=False)
class DataPlan:
    """All that decides which pair a step sees.

    Attributes:
        rows: source -> `row_hashes`.
        settings: key -> value.
        groups: names of sources that train together.
        flexible: each chunk is one group, so that later ones can be made again and more can follow.
    """

    rows: Mapping[str, Tensor]
    settings: Mapping[str, Any]
    groups: Sequence[Sequence[str]]
    flexible: bool

    def values(self) -> dict[str, Any]:
        """As plain values."""
        rows = {name: hashlib.sha256(hashes.numpy().tobytes()).hexdigest() for name, hashes in self.rows.items()}
        return {f"{ROWS} (sha256)": rows, **self.settings, "data.stages": [list(group) for group in self.groups]}

    def go_on(
        self, state: Mapping[str, Any], chunks: list[Chunk], reports: Mapping[str, SourceReport]
    ) -> list[Chunk]:
        """The chunks of a run that goes on from a checkpoint.

        Args:
            state: of the data module in the checkpoint.
            chunks: of the checkpoint.
            reports: source -> its pairs.

        Raises:
            ResumeError: a setting or a row of a stage that has begun is another one.
        """
        saved, entered = state["plan"], state["entered"]
        count = len(saved["data.stages"]) if self.flexible else len(self.groups)
        given = {**self.settings, "data.stages": [list(group) for group in self.groups[:count]]}
        compare_plans(*with_step_pairs(saved, given))
        altered = _check_rows(state["rows"], self.rows, chunks, entered, self.flexible)
        if not altered and len(self.groups) == count:
            return chunks
        train_ids = {name: report.chunk_ids for name, report in reports.items()}
        return renew_chunks(chunks, entered, self.groups, train_ids)


def row_hashes(store: PairStore, report: SourceReport) -> Tensor:
    """`[2, P]` int64: ids of a source's pairs, ascending, and a hash of each one's tokens and side of the split.

    What training makes of a pair, `repeat` and `weight` of its source, is in the hash.
    """
    found = []
    use = (report.repeat, report.weight)
    train = b"train" + (b"" if use == (1, 1) else str(use).encode())
    for side, ids in ((train, report.train_ids), (b"val", report.val_ids)):
        for start in range(0, len(ids), 1024):
            part = ids[start : start + 1024]
            for pair_id, pair in zip(part, store.get(part), strict=True):
                digest = hashlib.sha256(side + pair.text().encode()).digest()
                found.append((pair_id, int.from_bytes(digest[:8], "little", signed=True)))
    return torch.tensor(sorted(found), dtype=torch.int64).reshape(-1, 2).T.contiguous()


def first_difference(saved: Tensor, given: Tensor) -> int | None:
    """The lowest pair id that was added, left out or altered; None where there is none."""
    before, now = (dict(zip(*rows.tolist(), strict=True)) for rows in (saved, given))
    return min((i for i in before.keys() | now.keys() if before.get(i) != now.get(i)), default=None)


def _check_rows(
    saved: Mapping[str, Tensor], given: Mapping[str, Tensor], chunks: Sequence[Chunk], entered: int, flexible: bool
) -> bool:
    """Refuse altered rows of stages that have begun.

    Args:
        saved: source -> `row_hashes` of the checkpoint.
        given: the same of this run.
        chunks: of the checkpoint.
        entered: index of the stage that it is in.
        flexible: whether the chunks of later stages can be made again.

    Returns:
        Whether rows of later stages are altered.

    Raises:
        ResumeError: naming stage and row.
    """
    later = False
    for name in [name for name in saved if name in given]:
        pair_id = first_difference(saved[name], given[name])
        if pair_id is None:
            continue
        uses = (any(i >> 40 == pair_id >> 40 for i in chunk.pair_ids) for chunk in chunks)
        first = next((number for number, used in enumerate(uses, 1) if used), 1)
        where = f"{name!r}, of stage {first}, first in row {row_number(pair_id)}"
        text = f"{ROWS}, or their `repeat` or `weight`, have changed: {where}"
        if first <= max(entered, 1) or not flexible:
            raise ResumeError(f"{text}, and stage {max(entered, 1)} has begun; restore the file or start a new run")
        log.warning("%s, which has not begun: it will train on the new rows", text)
        later = True
    return later


def renew_chunks(
    chunks: Sequence[Chunk], entered: int, groups: Sequence[Sequence[str]], train_ids: Mapping[str, Sequence[int]]
) -> list[Chunk]:
    """The chunks of a checkpoint, those of later stages made again, and new groups after them.

    Args:
        chunks: of the checkpoint, each of one group.
        entered: index of the stage that it is in.
        groups: names of sources that train together; the checkpoint's, and perhaps more.
        train_ids: source -> ids of its pairs.
    """
    by_name = {"+".join(group): group for group in groups}
    kept = list(chunks[: max(entered, 1)])
    later = [chunk.name for chunk in chunks[len(kept) :]]
    new = [name for name in by_name if name not in {chunk.name for chunk in chunks}]
    if new:
        log.warning("new stages at the end of the plan: %s", ", ".join(new))
    return kept + chunks_by_source([by_name[name] for name in later + new], train_ids)
