"""Rank 3: the settings of `data` that make stages of pairs, and what follows from them before any weight is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from torch import Tensor

from sdpo_lightning.data.curriculum import (
    check_epochs,
    check_groups,
    cut_into_chunks,
    epochs_of,
    order_groups,
    stage_names,
)
from sdpo_lightning.data.pair_ranks import PairNumbers
from sdpo_lightning.data.partitions import Partition
from sdpo_lightning.data.reordering import cut_again, easiest_first, order_again
from sdpo_lightning.data.stage_settings import count_by_place, settings_of
from sdpo_lightning.types import Chunk, ConfigurationError, StageSettings

PartitionName = Literal["by_source", "pooled", "random"]
OrderName = Literal["easy_to_hard", "given", "reversed"]
RankedBy = Literal["first", "previous"]


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
        pacing: whether the pool of a stage grows, so that its pairs have to stand in the order of their difficulty.
        ranked_by: what orders the stages: M_0 alone (`first`), or before each stage M_{t-1} those that are left.
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
    pacing: bool = False
    ranked_by: RankedBy = "first"
    made: Sequence[str] = ()

    def __post_init__(self) -> None:
        check_groups(self.sources, self.groups, "pooled" if self.partition == "pooled" else "by_source")
        if self.merge_ties and isinstance(self.partition, Partition):
            raise ConfigurationError(
                f"`data.merge_ties` with `data.partition` {type(self.partition).__name__}: ties are of whole sources; "
                "leave one of them out"
            )
        self._check_ranked_by()
        if self.made and (self.pacing or self.ranked_by == "previous"):
            raise ConfigurationError(
                "`data.pair_sources` with `data.pacing` or `data.ranked_by: previous`, which need scores of pairs that "
                "aren't made yet; leave one of them out"
            )
        check_epochs(self.epochs_per_stage, self.names(), self.sources if self.merge_ties else [])

    def _check_ranked_by(self) -> None:
        if self.ranked_by not in get_args(RankedBy):
            raise ConfigurationError(
                f"`data.ranked_by` is {self.ranked_by!r}, expected one of {list(get_args(RankedBy))}"
            )
        if self.ranked_by == "first":
            return
        found = None
        if isinstance(self.partition, Partition) and not self.partition.cuts_again:
            found = f"`data.partition` {type(self.partition).__name__}: its pairs can't be cut anew"
        elif self.partition in ("pooled", "random"):
            found = f"`data.partition: {self.partition}`, which no difficulty orders"
        elif self.partition == "by_source" and self.order == "given":
            found = "`data.order: given`, which nothing ranks"
        elif self.merge_ties:
            found = "`data.merge_ties`, which joins stages by M_0's ranking"
        elif count_by_place(self.stage_settings):
            found = "epochs by place in `data.stage_settings`: their sum would depend on the order"
        if found is not None:
            raise ConfigurationError(f"`data.ranked_by: previous` with {found}; leave one of them out")

    def names(self) -> list[str]:
        """Of the stages in whatever order they will run, unless ties are merged."""
        if isinstance(self.partition, Partition):
            return [*self.partition.names(self.groups), *self.made]
        return [*stage_names(self.partition, self.groups), *self.made]

    @property
    def judged_groups(self) -> list[list[str]]:
        """Names that train together, as far as they are known; a stage whose pairs are made has none held out."""
        groups = self.groups if self.partition == "by_source" else []
        return [*map(list, groups), *([name] for name in self.made)]

    @property
    def needs_ranking(self) -> bool:
        """Whether M_0 has to score the pairs before the chunks are known."""
        if isinstance(self.partition, Partition) and self.partition.reads_rows:
            return False
        scored = isinstance(self.partition, Partition) and self.partition.needs_scores
        return self.order != "given" or self.merge_ties or scored or self.pacing

    @property
    def knows_epochs(self) -> bool:
        """Whether the epochs of the plan don't depend on what M_0 will say."""
        ordered = self.needs_ranking or self.order == "reversed"
        return not self.merge_ties and not (ordered and count_by_place(self.stage_settings))

    def row_scores(
        self, numbers: Callable[[Sequence[int]], PairNumbers], pair_ids: Mapping[str, Sequence[int]]
    ) -> dict[str, Tensor]:
        """Source name -> `[P]` scores that stand in the rows; empty where the partition goes by none.

        Args:
            numbers: of the pairs of some ids.
            pair_ids: source name -> ids of its distinct training pairs.

        Raises:
            ConfigurationError: rows without the numbers.
        """
        if not isinstance(self.partition, Partition) or not self.partition.reads_rows:
            return {}
        return dict(self.partition.row_scores({name: numbers(ids) for name, ids in pair_ids.items()}))

    @property
    def is_by_source(self) -> bool:
        """Whether each chunk is one group in file order, so that a run that goes on can make later ones again."""
        decided_late = self.pacing or self.ranked_by == "previous"
        return self.partition == "by_source" and not self.merge_ties and not decided_late

    def in_order(self, scores: Mapping[str, Tensor]) -> list[list[str]]:
        """The groups in training order.

        Args:
            scores: source name -> `[P]` scores of its pairs; empty if nothing was ranked.
        """
        if isinstance(self.partition, Partition) and self.partition.reads_rows:
            return [list(group) for group in self.groups]
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
        return cut_into_chunks(partition, groups, pair_ids, self.seed)

    def paced(self, chunks: Sequence[Chunk], scores: Mapping[int, float]) -> list[Chunk]:
        """The chunks with their pairs from easy to hard (with `data.order: reversed` from hard to easy) if paced.

        Args:
            chunks: in training order.
            scores: pair id -> score; empty if nothing was ranked.

        Raises:
            ConfigurationError: a pair without a score.
        """
        if not self.pacing or not scores:
            return list(chunks)
        hardest_first = self.order == "reversed"
        return [Chunk(c.name, easiest_first(c.pair_ids, scores, "`data.pacing`", hardest_first)) for c in chunks]

    def ranked_again(self, chunks: Sequence[Chunk], decided: int, scores: Mapping[int, float]) -> list[Chunk]:
        """The chunks that have not begun, made of the same pairs by the scores of M_{t-1}.

        Args:
            chunks: in training order.
            decided: so many have begun.
            scores: pair id -> score of the others' pairs.

        Raises:
            ConfigurationError: a pair without a score.
        """
        again = cut_again if isinstance(self.partition, Partition) else order_again
        made = again(chunks, decided, scores, self.order == "reversed")
        return [*made[:decided], *self.paced(made[decided:], scores)]

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
            "data.ranked_by": None if self.ranked_by == "first" else self.ranked_by,
            "data.epochs_per_stage": dict(zip(names, self.epochs(names), strict=True)),
            # None too where a run of before this setting is resumed.
            "data.stage_settings": {name: settings for name, settings in own.items() if settings} or None,
        }
