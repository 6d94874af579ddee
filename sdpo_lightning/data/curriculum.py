"""Rank 1: pair scores -> ordered chunks -> stages. Pure functions."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from sdpo_lightning.types import Chunk, ConfigurationError, ResumeError, Stage, StageSettings

log = logging.getLogger(__name__)


def reward_accuracy(scores: Tensor) -> tuple[float, float]:
    """Share of pairs that a model scores the right way round, without a reference.

    The paper (arXiv 2403.19270, section 3.2) sorts sources by "reward accuracy of M_0"; with M_0 as its own
    reference every reward is 0, so the score is gamma_{M_0}, the log-ratio below Eq. 1.

    Args:
        scores: `[P]`, gamma of each pair; a tie (0) counts 1/2, NaN not at all.

    Returns:
        The accuracy in [0, 1] and its standard error, the sample standard deviation over sqrt(P),
        P being the pairs that count.

    Raises:
        ConfigurationError: without pairs, or with an infinite score.
    """
    scores = scores[~scores.isnan()]
    if scores.numel() == 0:
        raise ConfigurationError("no pairs to rank; raise `data.rank_sample` or check the source")
    if bool(scores.isinf().any()):
        raise ConfigurationError("M_0 gives a score that isn't finite; check `model.model_name_or_path`")
    wins = (scores > 0).double() + 0.5 * (scores == 0).double()
    deviation = wins.std(unbiased=True).item() if wins.numel() > 1 else 0.5
    return wins.mean().item(), deviation / math.sqrt(wins.numel())


def easy_to_hard(accuracies: Mapping[str, float]) -> list[str]:
    """Source names by descending reward accuracy (arXiv 2403.19270, section 3.2); ties keep their order."""
    return sorted(accuracies, key=lambda name: -accuracies[name])


def tied_groups(order: Sequence[str], scores: Mapping[str, tuple[float, float]]) -> list[list[str]]:
    """Group neighbours of an order that lie closer than two standard errors of their difference.

    Args:
        order: source names.
        scores: name -> (accuracy, standard error).

    Returns:
        The names in the same order, each group a run of neighbours that are tied one to the next.
    """
    groups: list[list[str]] = []
    for name in order:
        if groups:
            (a, se_a), (b, se_b) = scores[groups[-1][-1]], scores[name]
            if a == b or abs(a - b) < 2 * math.hypot(se_a, se_b):
                groups[-1].append(name)
                continue
        groups.append([name])
    return groups


def order_groups(
    groups: Sequence[Sequence[str]],
    scores: Mapping[str, Tensor],
    order: Literal["easy_to_hard", "given", "reversed"],
    merge_ties: bool,
) -> list[list[str]]:
    """The groups of sources in training order.

    Args:
        groups: source names that train together.
        scores: source name -> `[P]` pair scores; empty if nothing was ranked, and then the order is as given.
        order: by accuracy of a whole group, as given, or hard to easy.
        merge_ties: join neighbours closer than two standard errors.
    """
    named = {"+".join(group): list(group) for group in groups}
    if not scores:
        return list(named.values())
    measured = {name: reward_accuracy(torch.cat([scores[s] for s in group])) for name, group in named.items()}
    names = list(named)
    if order != "given":
        names = easy_to_hard({name: accuracy for name, (accuracy, _) in measured.items()})
    if order == "reversed":
        names.reverse()
    runs = tied_groups(names, measured)
    for run in runs:
        if len(run) > 1 and not merge_ties:
            log.info("closer than two standard errors: %s (`data.merge_ties` trains them together)", run)
    if not merge_ties:
        runs = [[name] for name in names]
    return [[source for name in run for source in named[name]] for run in runs]


def chunks_by_source(groups: Sequence[Sequence[str]], pair_ids: Mapping[str, Sequence[int]]) -> list[Chunk]:
    """One chunk a group of sources, pairs in file order, source after source."""
    return [Chunk("+".join(group), [i for name in group for i in pair_ids[name]]) for group in groups]


def chunk_pooled(pair_ids: Mapping[str, Sequence[int]], seed: int) -> list[Chunk]:
    """All pairs as one shuffled chunk: plain DPO, the paper's baseline (section 4.3)."""
    pooled = [i for ids in pair_ids.values() for i in ids]
    return [Chunk("pooled", _shuffled(pooled, seed))]


def chunks_random(
    groups: Sequence[Sequence[str]], pair_ids: Mapping[str, Sequence[int]], seed: int
) -> list[Chunk]:
    """All pairs pooled, then cut at random into the sizes of `chunks_by_source` (Table 3, "sDPO Rand.")."""
    pooled = _shuffled([i for ids in pair_ids.values() for i in ids], seed)
    sizes = [sum(len(pair_ids[name]) for name in group) for group in groups]
    chunks, start = [], 0
    for index, size in enumerate(sizes, 1):
        chunks.append(Chunk(f"random-{index}", pooled[start : start + size]))
        start += size
    return chunks


def cut_into_chunks(
    partition: Literal["by_source", "pooled", "random"],
    groups: Sequence[Sequence[str]],
    pair_ids: Mapping[str, Sequence[int]],
    seed: int,
) -> list[Chunk]:
    """All pairs as the chunks of `data.partition`.

    Args:
        partition: which way.
        groups: source names that train together, in training order.
        pair_ids: source name -> ids.
        seed: of the shuffles.
    """
    if partition == "pooled":
        return chunk_pooled(pair_ids, seed)
    if partition == "random":
        return chunks_random(groups, pair_ids, seed)
    return chunks_by_source(groups, pair_ids)


def _shuffled(items: Sequence[int], seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return [items[i] for i in torch.randperm(len(items), generator=generator).tolist()]


def steps_per_epoch(num_runs: int, world_size: int, accumulate: int, limit_batches: float) -> tuple[int, int]:
    """Micro-batches and optimizer steps of one pass over a chunk; the last, smaller ones count.

    Args:
        num_runs: what the chunk is cut into, each for one micro-batch of one rank.
        world_size: runs that the ranks take at a time.
        accumulate: `trainer.accumulate_grad_batches`.
        limit_batches: `trainer.limit_train_batches`; an int is a number, a float a share.

    Returns:
        Micro-batches a rank, optimizer steps.
    """
    batches = math.ceil(num_runs / world_size)
    if isinstance(limit_batches, int):
        batches = min(batches, limit_batches)
    else:
        batches = int(batches * limit_batches)
    return batches, math.ceil(batches / accumulate)


def stage_plan(
    chunks: Sequence[Chunk], epoch_steps: Sequence[Sequence[int]], settings: Sequence[StageSettings] | None = None
) -> list[Stage]:
    """The stages of a run.

    Args:
        chunks: in training order.
        epoch_steps: optimizer steps of each pass over each chunk.
        settings: that each stage has to itself; None is nothing for all.

    Returns:
        One `Stage` a chunk, index from 1.

    Raises:
        ConfigurationError: a chunk without pairs or without a step, or whose name can't be a folder's.
    """
    stages, first_epoch = [], 0
    own = [StageSettings()] * len(chunks) if settings is None else settings
    for index, (chunk, steps, its_own) in enumerate(zip(chunks, epoch_steps, own, strict=True), 1):
        # An own `partition` may give any name; an export must not fail, or leave the run, after hours of training.
        if not re.fullmatch(r"[A-Za-z0-9_+-][A-Za-z0-9._+-]{0,199}", chunk.name):
            raise ConfigurationError(
                f"stage {index} has the name {chunk.name!r}, expected at most 200 letters, digits, '.', '_', '+' and "
                "'-' without a leading '.': it becomes a folder's name; see `data.sources`, `data.stages`"
            )
        if not len(chunk.pair_ids) or min(steps) < 1:
            raise ConfigurationError(
                f"stage {index} {chunk.name!r}: {len(chunk.pair_ids)} pairs make no optimizer step; "
                "check `data.sources` and `trainer.limit_train_batches`"
            )
        stages.append(Stage(index, chunk.name, chunk.pair_ids, tuple(steps), first_epoch, its_own))
        first_epoch += len(steps)
    return stages


def stage_of_epoch(stages: Sequence[Stage], epoch: int) -> Stage:
    """The stage of a Trainer epoch; beyond the plan's end, the last stage.

    Lightning asks for a loader once more after the end of a finished run.
    """
    for stage in stages:
        if epoch < stage.first_epoch + stage.epochs:
            return stage
    return stages[-1]


def split_by_prompt(
    prompts: Mapping[str, Sequence[str | int]], fraction: float, seed: int
) -> dict[str, list[bool]]:
    """Choose held-out pairs such that no prompt stands on both sides, in whatever source.

    Args:
        prompts: source name -> one prompt a pair, or a number that stands for it.
        fraction: wanted share of each source's pairs; whole prompts are taken until it is reached.
        seed: of the choice.

    Returns:
        Source name -> True for each held-out pair.
    """
    held: set[str | int] = set()
    for texts in prompts.values():
        sizes: dict[str | int, int] = {}
        for text in texts:
            sizes[text] = sizes.get(text, 0) + 1
        wanted = fraction * len(texts) - sum(size for text, size in sizes.items() if text in held)
        unique = list(sizes)
        for index in _shuffled(range(len(unique)), seed):
            if wanted <= 0:
                break
            if unique[index] not in held:
                held.add(unique[index])
                wanted -= sizes[unique[index]]
    return {name: [text in held for text in texts] for name, texts in prompts.items()}


def stage_names(partition: Literal["by_source", "pooled", "random"], groups: Sequence[Sequence[str]]) -> list[str]:
    """Names of the stages in whatever order they will run, unless ties are merged."""
    if partition == "pooled":
        return ["pooled"]
    if partition == "random":
        return [f"random-{index}" for index in range(1, len(groups) + 1)]
    return ["+".join(group) for group in groups]


def epochs_of(setting: int | Mapping[str, int], name: str) -> int:
    """Passes over the chunk of that name; "*" stands for the names that aren't given."""
    return setting if isinstance(setting, int) else setting.get(name, setting.get("*", 1))


def check_groups(names: Sequence[str], groups: Sequence[Sequence[str]], partition: str) -> None:
    """Check `data.sources` against `data.stages`.

    Raises:
        ConfigurationError: names that aren't unique, or groups that don't name each source once.
    """
    if not names or len(set(names)) != len(names):
        raise ConfigurationError(f"`data.sources` needs one or more unique names, found {list(names)}")
    grouped = sorted(name for group in groups for name in group)
    if grouped != sorted(names):
        raise ConfigurationError(f"`data.stages` must name each source once: found {grouped}, sources {list(names)}")
    if partition == "pooled" and len(groups) != len(names):
        raise ConfigurationError("`data.stages` has no meaning with `data.partition: pooled`; leave one out")


def check_numbers(batch_size: int, val_fraction: float, rank_sample: int | None) -> None:
    """Check the numbers of `data`.

    Raises:
        ConfigurationError: one outside its range.
    """
    if batch_size < 1:
        raise ConfigurationError(f"`data.batch_size` is {batch_size}, expected at least 1")
    if not 0 <= val_fraction < 1:
        raise ConfigurationError(f"`data.val_fraction` is {val_fraction}, expected within [0, 1)")
    if rank_sample is not None and rank_sample < 2:
        raise ConfigurationError(f"`data.rank_sample` is {rank_sample}, expected at least 2")


def check_epochs(setting: int | Mapping[str, int], names: Sequence[str], mergeable: Sequence[str]) -> None:
    """Check `data.epochs_per_stage`.

    Args:
        setting: a number, or stage name -> number.
        names: of the stages.
        mergeable: sources whose stages may be joined under names like `a+b`.

    Raises:
        ConfigurationError: a name that is no stage, or a number below 1.
    """
    for name, value in ({"*": setting} if isinstance(setting, int) else setting).items():
        known = name in ("*", *names) or set(name.split("+")) <= set(mergeable)
        if value < 1 or not known:
            raise ConfigurationError(
                f"`data.epochs_per_stage` holds {name!r}: {value}, expected at least 1 for '*' or one of {list(names)}"
            )


def compare_plans(saved: Mapping[str, object], given: Mapping[str, object]) -> None:
    """Refuse to resume under another plan. 1 and 1.0 are the same value: the type of a number says nothing here.

    Raises:
        ResumeError: listing `key: saved -> given`.
    """
    changed = [f"{key}: {saved.get(key)} -> {value}" for key, value in given.items() if saved.get(key) != value]
    if changed:
        raise ResumeError(f"the checkpoint's run had other settings, saved -> given: {'; '.join(changed)}")
