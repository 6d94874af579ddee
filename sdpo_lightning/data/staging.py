"""Rank 3: the settings of `data` that make stages of pairs, and what follows from them before any weight is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor

from sdpo_lightning.data.curriculum import (
    check_epochs,
    check_groups,
    cut_into_chunks,
    epochs_of,
    order_groups,
    stage_names,
)
from sdpo_lightning.data.partitions import Partition
from sdpo_lightning.data.stage_settings import count_by_place, settings_of
from sdpo_lightning.types import Chunk, ConfigurationError, StageSettings

PartitionName = Literal["by_source", "pooled", "random"]
OrderName = Literal["easy_to_hard", "given", "reversed"]


@dataclass(frozen=True, eq=False)
class Staging:
    """How pairs become stages.

    Attributes:
        sources: names, in the order of `data.sources`.
        groups: names of sources that train together.
        partition: how all pairs are cut into chunks.
        order: of the groups.
        merge_ties: groups closer than two standard errors become one.
        epochs_per_stage: passes over a chunk, or a map of stage name -> passes.
        stage_settings: name, place or "*" -> settings of those stages.
        seed: of the cuts.
        made: names of the stages after all others, whose pairs are made just before them.

    Raises:
        ConfigurationError: names that don't fit together.
    """

    sources: Sequence[str]
    groups: Sequence[Sequence[str]]
    partition: PartitionName | Partition
    order: OrderName
    merge_ties: bool
    epochs_per_stage: int | Mapping[str, int]
    stage_settings: Mapping[str, StageSettings]
    seed: int
    made: Sequence[str] = ()

    def __post_init__(self) -> None:
        check_groups(self.sources, self.groups, "pooled" if self.partition == "pooled" else "by_source")
        if self.merge_ties and isinstance(self.partition, Partition):
            raise ConfigurationError(
                f"`data.merge_ties` with `data.partition` {type(self.partition).__name__}: ties are of whole sources; "
                "leave one of them out"
            )
        check_epochs(self.epochs_per_stage, self.names(), self.sources if self.merge_ties else [])

    def names(self) -> list[str]:
        """Of the stages in whatever order they will run, unless ties are merged."""
        if isinstance(self.partition, Partition):
            return [*self.partition.names(self.groups), *self.made]
        return [*stage_names(self.partition, self.groups), *self.made]

    @property
    def needs_ranking(self) -> bool:
        """Whether M_0 has to score the pairs before the chunks are known."""
        scored = isinstance(self.partition, Partition) and self.partition.needs_scores
        return self.order != "given" or self.merge_ties or scored

    @property
    def knows_epochs(self) -> bool:
        """Whether the epochs of the plan don't depend on what M_0 will say."""
        return not self.merge_ties and not (self.needs_ranking and count_by_place(self.stage_settings))

    def in_order(self, scores: Mapping[str, Tensor]) -> list[list[str]]:
        """The groups in training order.

        Args:
            scores: source name -> `[P]` scores of its pairs; empty if nothing was ranked.
        """
        return order_groups(self.groups, scores, self.order, self.merge_ties)

    def cut(
        self,
        groups: Sequence[Sequence[str]],
        pair_ids: Mapping[str, Sequence[int]],
        scores: Mapping[str, Tensor] | None = None,
    ) -> list[Chunk]:
        """All pairs as chunks.

        Args:
            groups: source names that train together, in training order.
            pair_ids: source name -> ids.
            scores: source name -> `[P]`; None before the ranking, when only the sizes are asked for.
        """
        partition = self.partition
        if isinstance(partition, Partition):
            chunks = partition.cut(groups, pair_ids, scores or {}, self.seed)
            return chunks[::-1] if partition.orders_pairs and self.order == "reversed" else chunks
        return cut_into_chunks(self.partition, groups, pair_ids, self.seed)

    def pools(self, pair_ids: Mapping[str, Sequence[int]]) -> list[tuple[list[int], int]]:
        """For each chunk the ids that it will be cut from, and how many it takes, before the order is known.

        Args:
            pair_ids: source name -> ids.
        """
        if isinstance(self.partition, Partition):
            everything = [i for ids in pair_ids.values() for i in ids]
            return [(everything, size) for size in self.partition.sizes(self.groups, pair_ids)]
        groups = [list(pair_ids)] if self.partition == "pooled" else self.groups
        chunks = [[i for name in group for i in pair_ids[name]] for group in groups]
        everything = [i for chunk in chunks for i in chunk]
        return [(everything if self.partition == "random" else chunk, len(chunk)) for chunk in chunks]

    def settings(self, names: Sequence[str]) -> list[StageSettings]:
        """What each stage has to itself, its passes apart.

        Args:
            names: of the chunks, in training order.
        """
        own = [settings_of(self.stage_settings, index, name) for index, name in enumerate(names, 1)]
        return [replace(settings, epochs=None) for settings in own]

    def epochs(self, names: Sequence[str]) -> list[int]:
        """Passes over each chunk.

        Args:
            names: of the chunks, in training order.
        """
        own = [settings_of(self.stage_settings, index, name).epochs for index, name in enumerate(names, 1)]
        return [given or epochs_of(self.epochs_per_stage, name) for given, name in zip(own, names, strict=True)]

    def plan(self, names: Sequence[str], world_size: int) -> dict[str, Any]:
        """What a resumed run must agree on.

        Args:
            names: of the chunks, in training order.
            world_size: processes.
        """
        own = {name: settings.given() for name, settings in zip(names, self.settings(names), strict=True)}
        for settings in own.values():
            if "batch_size" in settings:
                settings["batch_size x processes"] = settings.pop("batch_size") * world_size
        return {
            "data.partition": self.partition.settings() if isinstance(self.partition, Partition) else self.partition,
            "data.order": self.order,
            "data.epochs_per_stage": dict(zip(names, self.epochs(names), strict=True)),
            # None too where a run of before this setting is resumed.
            "data.stage_settings": {name: settings for name, settings in own.items() if settings} or None,
        }
