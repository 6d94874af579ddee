"""Rank 5: the half of the data module that looks things up: which pairs are for what, what a stage has of its own."""

from __future__ import annotations

from collections.abc import Sequence

import lightning.pytorch as pl

from sdpo_lightning.data.declaration import PreferenceSource
from sdpo_lightning.data.prepare import SourceReport
from sdpo_lightning.data.selection import ranked_ids
from sdpo_lightning.data.staging import Staging
from sdpo_lightning.types import Chunk, Stage, StageSettings


class PairLists(pl.LightningDataModule):
    """Ids of pairs, and the stages by their place. What becomes of the sources is the subclass's.

    Args:
        sources: the preference data sets.
        rank_sample: rank by so many pairs of each source.
        seed: of that draw.
        made: names of the stages whose pairs are made, whose places in pair ids follow those of the sources.
    """

    staging: Staging
    # Score the sources even where the order doesn't depend on it.
    ranking_requested = False
    _chunks: list[Chunk] | None = None

    def __init__(
        self, sources: Sequence[PreferenceSource], rank_sample: int | None, seed: int, made: Sequence[str]
    ) -> None:
        super().__init__()
        self.sources = sources
        self.rank_sample = rank_sample
        self.seed = seed
        self._names = [*(source.name for source in sources), *made]
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
        """Training pairs, source after source; without those of `pair_sources`."""
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
        """Name of the source of a pair, or of the stage that it was made for."""
        return self._names[pair_id >> 40]

    # ---- stages

    @property
    def is_ranked(self) -> bool:
        """Whether the chunks are decided."""
        return self._chunks is not None

    def settings_of(self, index: int) -> StageSettings:
        """What the stage at that place has to itself; nothing before the chunks are decided."""
        names = [chunk.name for chunk in self._chunks or ()]
        return self.staging.settings(names)[index - 1] if names else StageSettings()

    def name_of(self, index: int) -> str:
        """Name of the stage at that place; empty before the chunks are decided."""
        return self._chunks[index - 1].name if self._chunks else ""

    def total_epochs(self) -> int:
        """Epochs of the whole plan, as if no stage had ended early; see `Staging.knows_epochs`."""
        chunks = self._chunks
        return sum(self.staging.epochs(self.staging.names() if chunks is None else [c.name for c in chunks]))

    @property
    def needs_ranking(self) -> bool:
        """Whether M_0 has to score the pairs before the chunks are known."""
        return self.staging.needs_ranking or self.ranking_requested
