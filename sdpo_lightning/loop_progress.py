"""Rank 1: where a checkpoint stands within an epoch, in the micro-batches of the run that goes on from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sdpo_lightning.types import ResumeError

# Pairs that all ranks take at a time, and how often before a step.
AT_ONCE = "data.batch_size x processes"
ACCUMULATE = "trainer.accumulate_grad_batches"
_LIMIT = "trainer.limit_train_batches"
_STEP = f"pairs a step ({AT_ONCE} x {ACCUMULATE})"


def with_step_pairs(
    saved: Mapping[str, Any], given: Mapping[str, Any]
) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Two plans such that what makes the same steps compares as equal.

    Ranks, micro-batch and accumulation may be traded against each other where the pairs of a step stay the same.
    They don't where something counts in micro-batches: by tokens, in buckets of like length, or up to a limit.

    Args:
        saved: settings of a checkpoint's run.
        given: settings of this run.

    Returns:
        Both: without the two factors where a step has the same pairs, else with their product, to be named. The limit
        of micro-batches is in words: 1 is one, and 1.0, which Python takes for equal, is all of them.
    """
    saved, given = ({**plan, _LIMIT: _in_words(plan[_LIMIT])} for plan in (saved, given))
    counts = given["data.batch_tokens"] is not None or bool(given["data.bucket_window"])
    whole = given[_LIMIT] == _in_words(1.0)
    before, now = saved[AT_ONCE] * saved[ACCUMULATE], given[AT_ONCE] * given[ACCUMULATE]
    if before == now and whole and not counts:
        return saved, {key: value for key, value in given.items() if key not in (AT_ONCE, ACCUMULATE)}
    return {**saved, _STEP: before}, {**given, _STEP: now}


def _in_words(limit: float) -> str:
    return f"{limit} micro-batches a pass" if isinstance(limit, int) else f"{100 * limit:g} % of a pass"


def go_by_epochs_(fit_loop: Any) -> None:
    """Have Lightning's loop take a finished epoch for finished, also where `trainer.max_steps` is set.

    With `max_steps` it would go on within that epoch: no step of the next stage is taken, and yet it counts as done.
    """
    fit_loop._iteration_based_training = lambda: False


def end_pass_(fit_loop: Any) -> None:
    """Have Lightning's loop take the micro-batch under way for the last one of its epoch."""
    fit_loop.epoch_loop.batch_progress.is_last_batch = True


def validates_next(fit_loop: Any) -> bool:
    """Whether a validation follows the micro-batch that has just been trained on."""
    return bool(fit_loop.epoch_loop._should_check_val_fx(fit_loop._data_fetcher))


def rescale_(fit_loop: dict[str, Any], before: int, now: int) -> None:
    """Count the place within an unfinished epoch by another accumulation, in place.

    Args:
        fit_loop: Lightning's state of its loops, as a checkpoint holds it.
        before: micro-batches a rank and optimizer step of the checkpoint's run.
        now: the same of this run.

    Raises:
        ResumeError: the checkpoint lies between the micro-batches of a step.
    """
    epoch, batches = fit_loop["epoch_progress"]["current"], fit_loop["epoch_loop.batch_progress"]
    taken = batches["current"]["ready"]
    # A finished epoch begins the next one at 0, whatever stands here.
    if before == now or epoch["ready"] == epoch["processed"]:
        return
    if taken % before:
        raise ResumeError(
            f"`{ACCUMULATE}: {before} -> {now}`: the checkpoint was saved after micro-batch {taken % before} of a "
            f"step's {before}; go on with {before}, or from another checkpoint"
        )
    moved = taken // before * now - taken
    for counters in (batches["current"], batches["total"]):
        counters.update({name: count + moved for name, count in counters.items()})
    for loader in fit_loop["state_dict"].get("combined_loader", ()):
        loader["position"] += moved
