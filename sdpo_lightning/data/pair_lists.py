"""Rank 5: the half of the data module that lists pairs: which are trained on, held out, ranked."""

from __future__ import annotations

from collections.abc import Sequence

import lightning.pytorch as pl

from sdpo_lightning.data.declaration import PreferenceSource
from sdpo_lightning.data.prepare import SourceReport
from sdpo_lightning.data.selection import ranked_ids
from sdpo_lightning.types import Stage


class PairLists(pl.LightningDataModule):
    """Ids of pairs. What becomes of the sources is the subclass's.

    Args:
        sources: the preference data sets.
        rank_sample: rank by so many pairs of each source.
        seed: of that draw.
    """

    def __init__(self, sources: Sequence[PreferenceSource], rank_sample: int | None, seed: int) -> None:
        super().__init__()
        self.sources = sources
        self.rank_sample = rank_sample
        self.seed = seed
        self.reports: dict[str, SourceReport] = {}

    def reference_ids(self, stage: Stage) -> list[int]:
        """Ids of the stage's pairs, each once, and of all held-out pairs."""
        return list(dict.fromkeys(stage.pair_ids)) + self.val_ids()

    def ranking_ids(self) -> list[int]:
        """Ids of the pairs that M_0 scores: those that are ranked, and the held-out ones."""
        return [i for ids in self.ranked_ids() for i in ids] + self.val_ids()

    def ranked_ids(self) -> list[Sequence[int]]:
        """The training pairs of each source that M_0 scores."""
        return [ranked_ids(report.train_ids, self.rank_sample, self.seed) for report in self.reports.values()]

    @property
    def val_names(self) -> list[str]:
        """Sources with held-out pairs."""
        return [name for name, report in self.reports.items() if report.val_ids]

    def train_ids(self) -> list[int]:
        """Training pairs, source after source."""
        return [i for report in self.reports.values() for i in report.train_ids]

    def val_ids(self) -> list[int]:
        """Held-out pairs, source after source."""
        return [i for report in self.reports.values() for i in report.val_ids]

    def source_ids(self) -> dict[str, list[int]]:
        """Source name -> its training pairs, each once."""
        return {name: report.train_ids for name, report in self.reports.items()}

    def chunk_ids(self) -> dict[str, list[int]]:
        """Source name -> its training pairs as often as they are trained on in a pass."""
        return {name: report.chunk_ids for name, report in self.reports.items()}

    def source_of(self, pair_id: int) -> str:
        """Name of the source of a pair."""
        return self.sources[pair_id >> 40].name
