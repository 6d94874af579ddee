"""Rank 2: ways to cut all pairs into chunks that `data.partition` takes by class_path. Pure functions."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor

from sdpo_lightning.data.curriculum import chunks_by_source, stage_names
from sdpo_lightning.data.pair_ranks import (
    EasyEnd,
    PairNumbers,
    PromptRule,
    check_count,
    check_numbers_of,
    check_word,
    column_scores,
    dense_share,
    grid_scores,
    place_in_prompt,
    split_scores,
)
from sdpo_lightning.types import Chunk, ConfigurationError

Pairs = Mapping[str, Sequence[int]]
Scores = Mapping[str, Tensor]


class Partition(ABC):
    """How pairs become chunks. A subclass is a dataclass whose fields are its settings.

    Attributes:
        needs_scores: M_0 scores all training pairs first, whatever `data.order` is.
        orders_pairs: the chunks go from easy to hard by themselves; `data.order: reversed` turns them round.
        reads_rows: the scores are those of `row_scores`, not of M_0.
        cuts_again: pairs that no stage has had can be cut anew by the scores of a later model (`data.ranked_by`).
    """

    needs_scores: ClassVar[bool] = False
    orders_pairs: ClassVar[bool] = False
    reads_rows: ClassVar[bool] = False
    cuts_again: ClassVar[bool] = False

    @abstractmethod
    def names(self, groups: Sequence[Sequence[str]]) -> list[str]:
        """Names of the chunks.

        Args:
            groups: source names that train together.
        """

    @abstractmethod
    def sizes(self, groups: Sequence[Sequence[str]], pair_ids: Pairs) -> list[int]:
        """Fewest pairs of each chunk, in any order of the groups.

        Args:
            groups: source names that train together.
            pair_ids: source name -> ids.
        """

    @abstractmethod
    def cut(self, groups: Sequence[Sequence[str]], pair_ids: Pairs, scores: Scores, seed: int) -> list[Chunk]:
        """All pairs as chunks, in training order.

        Args:
            groups: source names that train together, in training order.
            pair_ids: source name -> ids; a source that is repeated has each id several times, one pass after another.
            scores: source name -> `[P]` scores of its P distinct pairs, higher = easier; before the ranking empty, and
                then only the sizes of the chunks mean something.
            seed: of what is drawn.
        """

    def row_scores(self, numbers: Mapping[str, PairNumbers]) -> Scores:
        """Scores made of what stands in the rows, where `reads_rows`.

        Args:
            numbers: source name -> those of its P distinct pairs.

        Returns:
            Source name -> `[P]` float64, higher = easier.

        Raises:
            ConfigurationError: rows without the numbers.
        """
        raise NotImplementedError(f"{type(self).__name__}.row_scores")

    def settings(self) -> dict[str, Any]:
        """Plain values that a resumed run must agree on."""
        return {"class": f"{type(self).__module__}.{type(self).__qualname__}", **asdict(self)}  # type: ignore[call-overload]


@dataclass(frozen=True)
class Quantiles(Partition):
    """All pairs by their score, cut into equal parts, the easiest first; whatever source they are from.

    Attributes:
        stages: parts.
    """

    needs_scores = True
    orders_pairs = True
    cuts_again = True
    stages: int = 3

    def __post_init__(self) -> None:
        check_count(self, "stages")

    def names(self, groups: Sequence[Sequence[str]]) -> list[str]:
        """`quantile-1`, the easiest, and so on."""
        return [f"quantile-{number}" for number in range(1, self.stages + 1)]

    def sizes(self, groups: Sequence[Sequence[str]], pair_ids: Pairs) -> list[int]:
        """Equal but for one pair."""
        total = sum(len(ids) for ids in pair_ids.values())
        return [(number + 1) * total // self.stages - number * total // self.stages for number in range(self.stages)]

    def cut(self, groups: Sequence[Sequence[str]], pair_ids: Pairs, scores: Scores, seed: int) -> list[Chunk]:
        """Each pair once; pairs of like score keep their order."""
        ordered = [pair_id for _, pair_id, _ in _easiest_first(groups, pair_ids, scores)]
        chunks, start = [], 0
        for name, size in zip(self.names(groups), self.sizes(groups, pair_ids), strict=True):
            chunks.append(Chunk(name, ordered[start : start + size]))
            start += size
        return chunks


@dataclass(frozen=True)
class ByColumn(Quantiles):
    """As `Quantiles`, by a number in the rows: a column, or the gap of the ratings (Curri-DPO, arXiv 2403.07230).

    Attributes:
        stages: parts.
        easy: whether pairs with a high number, as a large gap, are the easy ones, or those with a low one.
    """

    needs_scores = False
    reads_rows = True
    cuts_again = False
    easy: EasyEnd = "high"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_word(self, "easy", get_args(EasyEnd))

    def row_scores(self, numbers: Mapping[str, PairNumbers]) -> Scores:
        """The number itself, or its negative."""
        check_numbers_of(numbers, "pair_score")
        return {name: torch.from_numpy(column_scores(own, self.easy)) for name, own in numbers.items()}


@dataclass(frozen=True)
class WithinPrompts(ByColumn):
    """Several pairs a prompt: stage t has of each prompt those at place t by their number (Curri-DPO).

    Of the pairs best-4th, best-3rd and best-2nd answer of a prompt, which `rated_pairs: best_others` makes, each stage
    has one, the largest gap first (arXiv 2403.07230, Fig. 1). `pair_ranks.place_in_prompt` says where prompts with
    other numbers of pairs stand.

    Attributes:
        stages: T.
        easy: as for `ByColumn`.
    """

    def names(self, groups: Sequence[Sequence[str]]) -> list[str]:
        """`pair-1`, the easiest of each prompt, and so on."""
        return [f"pair-{number}" for number in range(1, self.stages + 1)]

    def sizes(self, groups: Sequence[Sequence[str]], pair_ids: Pairs) -> list[int]:
        """At least one pair each, or the plan is refused."""
        return [1] * self.stages

    def row_scores(self, numbers: Mapping[str, PairNumbers]) -> Scores:
        """-(the stage, from 0), less a share below 1 by the number of the pair among all."""
        check_numbers_of(numbers, "pair_score")
        whole = PairNumbers.joined(list(numbers.values()))
        share = dense_share(-column_scores(whole, self.easy))
        return split_scores(-(place_in_prompt(whole, self.easy, self.stages) + share), numbers)

    def cut(self, groups: Sequence[Sequence[str]], pair_ids: Pairs, scores: Scores, seed: int) -> list[Chunk]:
        """Each pair once."""
        chunks: list[list[int]] = [[] for _ in range(self.stages)]
        for score, pair_id, _ in _easiest_first(groups, pair_ids, scores):
            chunks[math.floor(-score)].append(pair_id)
        if scores and not chunks[-1]:
            raise ConfigurationError(
                f"`stages` of WithinPrompts is {self.stages}, but no prompt has so many pairs; lower it, or have more "
                "made by `data.sources[...].rated_pairs`"
            )
        return [Chunk(name, ids) for name, ids in zip(self.names(groups), chunks, strict=True)]


@dataclass(frozen=True)
class TwoAxes(Quantiles):
    """A grid of prompt rank x gap rank, walked from easy to hard, cut into equal parts (2D-Curri-DPO).

    From that paper (arXiv 2504.07856, withdrawn over its measure of complexity, the spread of perplexities of sampled
    answers): the two axes, complexity of the prompt, which a column has to bring, and distance of the two answers'
    ratings, and a grid of them.
    Ours, since we couldn't check the paper's walks against its text: the order by the sum of the two ranks, of cells
    with a like sum the one with the larger gap first, within a cell the larger gap first; equal values share a rank;
    the walk is cut into equal parts.

    Attributes:
        stages: parts.
        prompts: by the rows' `prompt_score`, low or high ones first, or by the mean gap of the prompt's pairs.
        prompt_bins: ranks of prompts.
        gap_bins: ranks of gaps.
    """

    needs_scores = False
    reads_rows = True
    cuts_again = False
    prompts: PromptRule = "low_score_first"
    prompt_bins: int = 3
    gap_bins: int = 3

    def __post_init__(self) -> None:
        for name in ("stages", "prompt_bins", "gap_bins"):
            check_count(self, name)
        check_word(self, "prompts", get_args(PromptRule))

    def row_scores(self, numbers: Mapping[str, PairNumbers]) -> Scores:
        """See `pair_ranks.grid_scores`."""
        check_numbers_of(numbers, "pair_score")
        if self.prompts != "large_mean_gap_first":
            check_numbers_of(numbers, "prompt_score")
        whole = PairNumbers.joined(list(numbers.values()))
        return split_scores(grid_scores(whole, self.prompts, self.prompt_bins, self.gap_bins), numbers)


@dataclass(frozen=True)
class DropHardest(Partition):
    """By source, without the hardest pairs of all (Selective DPO, Gao et al. 2025, arXiv 2502.09650).

    Attributes:
        share: of all pairs, that is left out.
    """

    needs_scores = True
    share: float = 0.2

    def __post_init__(self) -> None:
        if not 0 <= self.share < 1:
            raise ConfigurationError(f"`share` of DropHardest is {self.share}, expected within [0, 1)")

    def names(self, groups: Sequence[Sequence[str]]) -> list[str]:
        """As by source."""
        return stage_names("by_source", groups)

    def sizes(self, groups: Sequence[Sequence[str]], pair_ids: Pairs) -> list[int]:
        """At least one pair each, or the plan is refused."""
        return [1] * len(groups)

    def cut(self, groups: Sequence[Sequence[str]], pair_ids: Pairs, scores: Scores, seed: int) -> list[Chunk]:
        """Each pair once, or not at all."""
        ordered = _easiest_first(groups, pair_ids, scores)
        gone = {place for _, _, place in ordered[len(ordered) - math.floor(self.share * len(ordered)) :]}
        return [
            Chunk("+".join(group), [i for s in group for n, i in enumerate(pair_ids[s]) if (s, n) not in gone])
            for group in groups
        ]


@dataclass(frozen=True)
class Replay(Partition):
    """By source, with pairs of earlier chunks among those of each later one.

    The plan, the reference and the contamination guard count them as pairs of their stage. A stage is shuffled, so a
    batch holds that share on average.

    Attributes:
        share: of each chunk but the first, drawn without repeats from all earlier chunks' own pairs; all of them where
            they are fewer.
    """

    share: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.share < 1:
            raise ConfigurationError(f"`share` of Replay is {self.share}, expected within [0, 1)")

    def names(self, groups: Sequence[Sequence[str]]) -> list[str]:
        """As by source."""
        return stage_names("by_source", groups)

    def sizes(self, groups: Sequence[Sequence[str]], pair_ids: Pairs) -> list[int]:
        """Those of the sources: the first chunk has no more."""
        return [sum(len(pair_ids[name]) for name in group) for group in groups]

    def cut(self, groups: Sequence[Sequence[str]], pair_ids: Pairs, scores: Scores, seed: int) -> list[Chunk]:
        """Each pair once in its own chunk, and at most once in each later one."""
        own = chunks_by_source(groups, pair_ids)
        chunks: list[Chunk] = []
        earlier: list[int] = []
        for number, chunk in enumerate(own):
            wanted = round(self.share / (1 - self.share) * len(chunk.pair_ids))
            generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
            drawn = torch.randperm(len(earlier), generator=generator)[:wanted].tolist()
            chunks.append(Chunk(chunk.name, [*chunk.pair_ids, *(earlier[place] for place in drawn)]))
            earlier += chunk.pair_ids
        return chunks


_OWN = (Quantiles, ByColumn, WithinPrompts, TwoAxes, DropHardest, Replay)


def read_partition(value: str | Mapping[str, Any]) -> Any:
    """`data.partition` of plain values; another project's class, whose code isn't run, counts as by source.

    Args:
        value: a name, or `class_path` and `init_args`.

    Raises:
        ConfigurationError: settings outside their range.
    """
    if isinstance(value, str):
        return value
    own = {f"{c.__module__}.{c.__qualname__}": c for c in _OWN}
    made = own.get(value["class_path"])
    return "by_source" if made is None else made(**value.get("init_args") or {})


def _easiest_first(
    groups: Sequence[Sequence[str]], pair_ids: Pairs, scores: Scores
) -> list[tuple[float, int, tuple[str, int]]]:
    """Score and id of every pair with its (source, place), by falling score; ties keep their order.

    Raises:
        ConfigurationError: a pair without a score.
    """
    names = [name for group in groups for name in group]
    found = []
    for name in names:
        own = scores.get(name)
        distinct = len(set(pair_ids[name]))
        if own is not None and (len(own) < distinct or bool(own.isnan().any())):
            raise ConfigurationError(
                f"source {name!r}: M_0 has scored {int((~own.isnan()).sum())} of {distinct} pairs, expected all, to "
                "cut them by score; leave `data.rank_sample` out, and take a `data.difficulty` that counts every pair"
            )
        values = [0.0] * distinct if own is None else own.tolist()
        found += [(values[n % distinct], pair_id, (name, n)) for n, pair_id in enumerate(pair_ids[name])]
    found.sort(key=lambda row: -row[0])
    return found
