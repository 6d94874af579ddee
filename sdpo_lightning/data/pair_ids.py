"""Rank 5: which pairs there are, by source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from sdpo_lightning.data.declaration import PreferenceSource
from sdpo_lightning.data.prepare import SourceReport


class MadeStages(Protocol):
    """The stages of `data.pair_sources`."""

    def name_of(self, index: int) -> str:
        """The stage of a place in pair ids."""


class PairIds:
    """Ids of pairs, of a data module that has `sources`, `made` and `reports`."""

    sources: Sequence[PreferenceSource]
    made: MadeStages
    reports: Mapping[str, SourceReport]

    @property
    def val_names(self) -> list[str]:
        """Sources with held-out pairs."""
        return [name for name, report in self.reports.items() if report.val_ids]

    def train_ids(self, limit: int | None = None) -> list[int]:
        """Training pairs, source after source, at most `limit` of each; without those of `pair_sources`."""
        return [i for report in self.reports.values() for i in report.train_ids[:limit]]

    def val_ids(self) -> list[int]:
        """Held-out pairs, source after source."""
        return [i for report in self.reports.values() for i in report.val_ids]

    def source_of(self, pair_id: int) -> str:
        """Name of the source of a pair."""
        index = pair_id >> 40
        return self.sources[index].name if index < len(self.sources) else self.made.name_of(index)

    def _chunk_ids(self) -> dict[str, list[int]]:
        return {name: report.chunk_ids for name, report in self.reports.items()}
