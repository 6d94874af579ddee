"""Rank 2: rows of `matrix.json`: what a model M_t makes of each source's held-out pairs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sdpo_lightning.data.difficulty import is_matched
from sdpo_lightning.divergences import k2
from sdpo_lightning.types import LogpTable, PairLogps


def matrix_rows(
    model: int,
    policy: LogpTable,
    source_of: Callable[[int], str],
    m0: LogpTable | None,
    before: LogpTable | None,
) -> list[dict[str, Any]]:
    """Rows of one model, one a source, in the order of the pairs' ids.

    Args:
        model: t of M_t.
        policy: logps of M_t, `[P]`.
        source_of: name of the source of a pair id.
        m0: logps of M_0, to which rewards are taken; None where they aren't known.
        before: of M_{t-1}, likewise.

    Returns:
        `model`, `source`, `pairs`; `gamma` (nats) and `gamma_standard_error`; `accuracy` (share with gamma > 0, ties
        1/2); `reward_accuracy_m0` and `reward_accuracy` against M_0 and M_{t-1} (ties 0; None where one isn't known);
        `kl_estimate_m0` and `kl_estimate` to the same two, each with `..._standard_error` (nats an answer): the mean of
        `divergences.k2` over both answers of all pairs. These are the data's answers and not the model's own, so it is
        a distance on the data; a KL is what `SampleStatistics` measures;
        `chosen_logps_per_token`, `rejected_logps_per_token`; `chosen_length`, `rejected_length` (mean tokens);
        `length_controlled_accuracy` and `length_controlled_pairs`, of pairs whose lengths differ by 10 % at most.
    """
    rows = []
    for index in torch.unique(policy.pair_id >> 40).tolist():
        ids = policy.pair_id[policy.pair_id >> 40 == index]
        logps, _ = policy.lookup(ids)
        row = {"model": model, "source": source_of(int(ids[0])), "pairs": len(ids)} | _of_one_model(logps)
        row["reward_accuracy_m0"] = _reward_accuracy(logps, m0, ids)
        row["reward_accuracy"] = _reward_accuracy(logps, before, ids)
        row |= _kl_estimate("kl_estimate_m0", logps, m0, ids) | _kl_estimate("kl_estimate", logps, before, ids)
        rows.append(row)
    return rows


def _of_one_model(logps: PairLogps) -> dict[str, Any]:
    gamma = logps.gamma.double()
    right = (gamma > 0).double() + 0.5 * (gamma == 0).double()
    like = is_matched(logps)
    return {
        "gamma": gamma.mean().item(),
        "gamma_standard_error": _standard_error(gamma),
        "accuracy": right.mean().item(),
        "chosen_logps_per_token": _mean(logps.chosen / logps.chosen_lengths),
        "rejected_logps_per_token": _mean(logps.rejected / logps.rejected_lengths),
        "chosen_length": _mean(logps.chosen_lengths),
        "rejected_length": _mean(logps.rejected_lengths),
        "length_controlled_accuracy": right[like].mean().item() if bool(like.any()) else None,
        "length_controlled_pairs": int(like.sum()),
    }


def _mean(values: Tensor) -> float:
    return values.double().mean().item()


def _of(table: LogpTable | None, ids: Tensor) -> PairLogps | None:
    """Logps of all these pairs, or None."""
    if table is None:
        return None
    logps, known = table.lookup(ids)
    return logps if bool(known.all()) else None


def _reward_accuracy(policy: PairLogps, table: LogpTable | None, ids: Tensor) -> float | None:
    reference = _of(table, ids)
    if reference is None:
        return None
    return _mean(policy.chosen - reference.chosen > policy.rejected - reference.rejected)


def _kl_estimate(name: str, policy: PairLogps, table: LogpTable | None, ids: Tensor) -> dict[str, float | None]:
    reference = _of(table, ids)
    if reference is None:
        return {name: None, f"{name}_standard_error": None}
    # The two answers of a pair have a prompt in common: one number a pair.
    pairs = k2(policy, reference).mean(0)
    return {name: pairs.mean().item(), f"{name}_standard_error": _standard_error(pairs)}


def _standard_error(values: Tensor) -> float | None:
    return values.std().item() / math.sqrt(len(values)) if len(values) > 1 else None


def merged(rows: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows with those of one model put in; its older rows, and those of later models, are stale and go."""
    first = min((row["model"] for row in new), default=math.inf)
    return [row for row in rows if row["model"] < first] + new
