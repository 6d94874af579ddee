"""Rank 5: which pairs of the sources are for what; the half of the data module that only looks things up."""

from __future__ import annotations

import lightning.pytorch as pl

from sdpo_lightning.data.declaration import PreferenceSource
from sdpo_lightning.data.prepare import SourceReport
from sdpo_lightning.types import Stage


class PairLists(pl.LightningDataModule):
    """Ids of pairs, once the sources are prepared.

    Args:
        sources: the preference data sets.
        rank_limit: rank by the first N kept pairs of each source.
    """

    def __init__(self, sources: list[PreferenceSource], rank_limit: int | None) -> None:
        super().__init__()
        self.sources = sources
        self.rank_limit = rank_limit
        self.reports: dict[str, SourceReport] = {}

    @property
    def val_names(self) -> list[str]:
        """Sources with held-out pairs."""
        return [name for name, report in self.reports.items() if report.val_ids]

    def train_ids(self, limit: int | None = None) -> list[int]:
        """Training pairs, source after source, at most `limit` of each."""
        return [i for report in self.reports.values() for i in report.train_ids[:limit]]

    def val_ids(self) -> list[int]:
        """Held-out pairs, source after source."""
        return [i for report in self.reports.values() for i in report.val_ids]

    def source_of(self, pair_id: int) -> str:
        """Name of the source of a pair."""
        return self.sources[pair_id >> 40].name

    def reference_ids(self, stage: Stage) -> list[int]:
        """Ids of the stage's pairs, each once, and of all held-out pairs."""
        return list(dict.fromkeys(stage.pair_ids)) + self.val_ids()

    def ranking_ids(self) -> list[int]:
        """Ids of the pairs that M_0 scores: those that are ranked, and the held-out ones."""
        return self.train_ids(self.rank_limit) + self.val_ids()
