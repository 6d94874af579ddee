"""Rank 4: the half of the data module that looks things up: which pairs are for what, what a stage has of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

import lightning.pytorch as pl
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sdpo_lightning.data.collate import PreferenceCollator
from sdpo_lightning.data.declaration import PreferenceSource
from sdpo_lightning.data.endings import StageEnd
from sdpo_lightning.data.loader import PairStore, StageLoader
from sdpo_lightning.data.selection import ranked_ids
from sdpo_lightning.data.staging import Staging
from sdpo_lightning.exactness import LayoutName
from sdpo_lightning.types import Chunk, ConfigurationError, LogpTable, PairLogps, Stage, StageSettings


class Report(Protocol):
    """What became of a source; a `SourceReport` is one."""

    name: str
    dropped: dict[str, int]
    marks: dict[str, int]
    train_ids: list[int]
    val_ids: list[int]

    @property
    def chunk_ids(self) -> list[int]:
        """The training pairs as often as they are trained on in a pass."""


class Rows(Protocol):
    """How rows become micro-batches; a `Batching` is one."""

    @property
    def batch_size(self) -> int:
        """Pairs per rank and micro-batch."""

    @property
    def pad_to_multiple_of(self) -> int:
        """Of row lengths."""


class PairsToCome(Protocol):
    """Stages whose pairs are made just before them; `MadePairs` are some."""

    @property
    def names(self) -> list[str]:
        """Of the stages."""

    def name_of(self, index: int) -> str:
        """Name of the stage whose pairs have that place in their ids."""


class Planned(Protocol):
    """What a resumed run must agree on; a `DataPlan` is one."""

    def values(self) -> dict[str, Any]:
        """As plain values."""


class PairLists(pl.LightningDataModule):
    """Ids of pairs, and the stages by their place. What becomes of the sources is the subclass's.

    So are the attributes that are only declared here, for callbacks, and the methods without a body.

    Args:
        sources: the preference data sets.
        rank_sample: rank by so many pairs of each source.
        seed: of that draw.
        made: names of the stages whose pairs are made, whose places in pair ids follow those of the sources.
    """

    staging: Staging
    store: PairStore
    collator: PreferenceCollator
    batching: Rows
    layout: LayoutName
    tokenizer: PreTrainedTokenizerBase
    pad_token_id: int
    difficulty_reference: str | None
    on_bad_row: Literal["drop", "error"]
    made: PairsToCome
    ends: dict[int, StageEnd]
    accepted: list[str]
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
        self.reports: Mapping[str, Report] = {}

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

    # ---- what the subclass does with them

    def stages(self) -> list[Stage]:
        """See `CurriculumDataModule`."""
        raise NotImplementedError

    def batches(self, pair_ids: list[int]) -> StageLoader:
        """See `CurriculumDataModule`."""
        raise NotImplementedError

    def pair_scores(self, logps: PairLogps) -> Tensor:
        """See `CurriculumDataModule`."""
        raise NotImplementedError

    def rank(self, m0: LogpTable | None, reference: LogpTable | None = None) -> None:
        """See `CurriculumDataModule`."""
        raise NotImplementedError

    def end_stage(self, stage: Stage, batches: int, reason: str) -> None:
        """See `CurriculumDataModule`."""
        raise NotImplementedError

    def take_ends(self, ends: Mapping[int, StageEnd]) -> None:
        """See `CurriculumDataModule`."""
        raise NotImplementedError

    def shortest_epoch(self) -> int:
        """See `CurriculumDataModule`."""
        raise NotImplementedError

    def curriculum(self) -> dict[str, Any]:
        """See `CurriculumDataModule`."""
        raise NotImplementedError

    def plan(self) -> Planned:
        """See `CurriculumDataModule`."""
        raise NotImplementedError

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


def data_of(trainer: pl.Trainer) -> PairLists:
    """Our data module, which Lightning sets without declaring it.

    Raises:
        ConfigurationError: there is none.
    """
    data = trainer.datamodule  # type: ignore[attr-defined]
    if not isinstance(data, PairLists):
        found = "none" if data is None else f"a {type(data).__name__}"
        raise ConfigurationError(
            f"a DPOLitModule takes its stages from a CurriculumDataModule, and the Trainer has {found}: call "
            "`trainer.fit(module, datamodule=CurriculumDataModule(...))`"
        )
    return data
