"""Rank 2: what the pairs of a run have in common that they shouldn't, as lines."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Literal, Protocol

import numpy as np
from datasets import Dataset, concatenate_datasets

from sdpo_lightning.data.findings import (
    Finding,
    PairKeys,
    contradictions,
    opposed_pairs,
    pair_keys,
    repeats,
    shared_pairs,
    shared_prompts,
)
from sdpo_lightning.types import ConfigurationError

log = logging.getLogger(__name__)

OverlapRule = Literal["error", "warn"]


class Sides(Protocol):
    """A source and the ids of its pairs, those trained on and the held-out ones; a `SourceReport` is one."""

    name: str
    train_ids: list[int]
    val_ids: list[int]


def survey(parts: Sequence[Dataset], sources: Sequence[Sides], on_val_overlap: OverlapRule) -> list[Finding]:
    """Repeated and contradictory pairs within and across sources, and prompts both trained on and held out.

    Args:
        parts: tokenised pairs with `pair_id`, `prompt_key`, `chosen_ids` and `rejected_ids`.
        sources: which pairs are whose.
        on_val_overlap: `data.on_val_overlap`.
    """
    rows = concatenate_datasets(list(parts)).data.table
    ids = rows.column("pair_id").to_numpy()
    order = np.argsort(ids, kind="stable")
    keys = pair_keys(rows.column("prompt_key").to_numpy(), rows.column("chosen_ids"), rows.column("rejected_ids"))

    def of(wanted: Sequence[int]) -> PairKeys:
        return keys.at(order[np.searchsorted(ids, np.asarray(wanted, np.int64), sorter=order)])

    train = {source.name: of(source.train_ids) for source in sources}
    val = {source.name: of(source.val_ids) for source in sources}
    return [*_within(train), *_across(train), *_overlap(train, val, on_val_overlap)]


def _within(train: Mapping[str, PairKeys]) -> list[Finding]:
    found = []
    for name, keys in train.items():
        if count := repeats(keys):
            text = f"source {name!r}: {count} of {len(keys.pair)} pairs repeat others of it; each is trained on"
            found.append(Finding("warning", text))
        if count := contradictions(keys):
            text = f"source {name!r}: {count} pairs stand there both ways round (a > b and b > a)"
            found.append(Finding("warning", text))
    return found


def _across(train: Mapping[str, PairKeys]) -> list[Finding]:
    found = []
    for (left, ours), (right, theirs) in combinations(train.items(), 2):
        if count := shared_pairs(ours, theirs):
            text = f"sources {left!r} and {right!r} share {count} pairs: trained on in both, they may be overfitted"
            found.append(Finding("warning", text))
        if count := opposed_pairs(ours, theirs):
            text = f"sources {left!r} and {right!r} contradict each other in {count} pairs (a > b and b > a)"
            found.append(Finding("warning", text))
    return found


def _overlap(train: Mapping[str, PairKeys], val: Mapping[str, PairKeys], rule: OverlapRule) -> list[Finding]:
    count = shared_prompts(train.values(), val.values())
    if not count:
        return []
    pairs = [(a, b) for a in val for b in train if shared_prompts([val[a]], [train[b]])]
    where = ", ".join(f"held out by {a!r} and trained on in {b!r}" for a, b in pairs[:3])
    found = f"{count} prompts are both trained on and held out ({where}{', ...' if len(pairs) > 3 else ''})"
    if rule == "warn":
        return [Finding("warning", found)]
    expected = "expected none: validation would measure memory; remove them or set `data.on_val_overlap: warn`"
    return [Finding("error", f"{found}; {expected}")]


def act_on(findings: Sequence[Finding]) -> None:
    """Log the warnings, and stop at errors.

    Raises:
        ConfigurationError: all errors.
    """
    for finding in findings:
        if finding.level == "warning":
            log.warning("%s", finding.text)
    if errors := [finding.text for finding in findings if finding.level == "error"]:
        raise ConfigurationError("; ".join(errors))
