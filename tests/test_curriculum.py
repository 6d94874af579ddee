"""Pair scores -> ordered chunks -> stages: by hand and by property."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sdpo_lightning.data.curriculum import (
    chunk_pooled,
    chunks_by_source,
    chunks_random,
    easy_to_hard,
    reward_accuracy,
    split_by_prompt,
    stage_of_epoch,
    stage_plan,
    steps_per_epoch,
    tied_groups,
)
from sdpo_lightning.types import Chunk, ConfigurationError

FEW = settings(max_examples=60, deadline=None, derandomize=True)


# ---- scores


def test_reward_accuracy_by_hand():
    accuracy, error = reward_accuracy(torch.tensor([3.0, -1.0, 0.0, 0.5]))
    # Wins 1, 0, 1/2, 1: mean 5/8; squared deviations (9 + 25 + 1 + 9) / 64 = 44/64, over 3, root, over 2.
    assert accuracy == 5 / 8
    assert error == pytest.approx(math.sqrt(44 / 64 / 3) / 2, abs=1e-12)


@pytest.mark.parametrize(
    "scores, accuracy, error",
    [
        ([0.0, 0.0, 0.0], 0.5, 0.0),
        ([1.0, 2.0], 1.0, 0.0),
        ([-1.0, 1.0], 0.5, math.sqrt(0.5) / math.sqrt(2)),
        # One pair says nothing about its spread: the largest deviation of a share is assumed.
        ([7.0], 1.0, 0.5),
    ],
)
def test_reward_accuracy_at_the_edges(scores, accuracy, error):
    assert reward_accuracy(torch.tensor(scores)) == pytest.approx((accuracy, error), abs=1e-12)


def test_reward_accuracy_doesnt_depend_on_the_scale():
    scores = torch.randn(101, generator=torch.Generator().manual_seed(0))
    assert reward_accuracy(scores) == reward_accuracy(1e-6 * scores) == reward_accuracy(1e6 * scores)
    wins = [1.0 if score > 0 else 0.0 for score in scores.tolist()]
    share = sum(wins) / 101
    # The deviation of 0 and 1 is sqrt(p (1 - p)), times n / (n - 1) for the sample's.
    assert reward_accuracy(scores)[1] == pytest.approx(math.sqrt(share * (1 - share) / 100), abs=1e-12)


def test_no_pairs_to_rank():
    with pytest.raises(ConfigurationError, match="rank_sample"):
        reward_accuracy(torch.zeros(0))


# ---- order


def test_easy_to_hard_is_descending_and_stable():
    accuracies = {"c": 0.5, "a": 0.9, "b": 0.5, "e": 0.7, "d": 0.5}
    assert easy_to_hard(accuracies) == ["a", "e", "c", "b", "d"]
    assert easy_to_hard(dict(reversed(accuracies.items()))) == ["a", "e", "d", "b", "c"]


@FEW
@given(st.dictionaries(st.text(max_size=3), st.sampled_from([0.1, 0.2, 0.5, 1.0]), max_size=8))
def test_easy_to_hard_sorts(accuracies):
    order = easy_to_hard(accuracies)
    given_order = list(accuracies)
    assert sorted(order) == sorted(accuracies)
    for left, right in zip(order, order[1:], strict=False):
        assert accuracies[left] >= accuracies[right]
        if accuracies[left] == accuracies[right]:
            assert given_order.index(left) < given_order.index(right)


def test_tied_groups_by_hand():
    # Error of a difference: hypot(0.03, 0.04) = 0.05, so 0.1 is the border.
    scores = {"a": (0.9, 0.03), "b": (0.81, 0.04), "c": (0.7, 0.03), "d": (0.6, 0.0), "e": (0.555, 0.03)}
    # a-b: 0.09 < 0.1 tied; b-c: 0.11 not; c-d: 0.1 against 0.06 not; d-e: 0.045 < 0.06 tied.
    assert tied_groups(["a", "b", "c", "d", "e"], scores) == [["a", "b"], ["c"], ["d", "e"]]
    # Ties chain from neighbour to neighbour.
    chain = {name: (0.5 - 0.01 * index, 0.01) for index, name in enumerate("abcd")}
    assert tied_groups(list("abcd"), chain) == [list("abcd")]
    # 0.02 apart against 2 * 0.0141: neighbours decide, whatever the direction of the order.
    assert tied_groups(list("dcba"), chain) == [list("dcba")]
    assert tied_groups([], {}) == []


@FEW
@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 0.5)), max_size=8))
def test_tied_groups_keep_names_and_order(values):
    scores = {f"s{index}": value for index, value in enumerate(values)}
    groups = tied_groups(list(scores), scores)
    assert [name for group in groups for name in group] == list(scores)
    assert all(groups)
    for left, right in zip(groups, groups[1:], strict=False):
        (a, se_a), (b, se_b) = scores[left[-1]], scores[right[0]]
        assert abs(a - b) >= 2 * math.hypot(se_a, se_b)


# ---- chunks


@st.composite
def sources(draw):
    """Names -> pair ids (unique over all sources), and a grouping of the names."""
    sizes = draw(st.lists(st.integers(1, 7), min_size=1, max_size=5))
    pair_ids = {f"s{i}": [(i << 40) + 3 * row for row in range(size)] for i, size in enumerate(sizes)}
    names = draw(st.permutations(list(pair_ids)))
    cuts = sorted(draw(st.sets(st.integers(1, max(1, len(names) - 1)), max_size=3)))
    groups = [names[a:b] for a, b in zip([0, *cuts], [*cuts, len(names)], strict=True)]
    return [group for group in groups if group], pair_ids


def everything(pair_ids):
    return Counter(i for ids in pair_ids.values() for i in ids)


@FEW
@given(sources(), st.integers(0, 2**31))
def test_chunks_hold_each_pair_exactly_once(drawn, seed):
    groups, pair_ids = drawn
    for chunks in (
        chunks_by_source(groups, pair_ids),
        chunks_random(groups, pair_ids, seed),
        chunk_pooled(pair_ids, seed),
    ):
        assert Counter(i for chunk in chunks for i in chunk.pair_ids) == everything(pair_ids)
        assert len({chunk.name for chunk in chunks}) == len(chunks)


@FEW
@given(sources(), st.integers(0, 2**31))
def test_random_chunks_keep_the_sizes_and_depend_on_the_seed_alone(drawn, seed):
    groups, pair_ids = drawn
    by_source, random = chunks_by_source(groups, pair_ids), chunks_random(groups, pair_ids, seed)
    assert [len(chunk.pair_ids) for chunk in random] == [len(chunk.pair_ids) for chunk in by_source]
    assert random == chunks_random(groups, pair_ids, seed)


def test_chunks_by_source_by_hand():
    pair_ids = {"a": [1, 2], "b": [10, 11], "c": [20]}
    assert chunks_by_source([["c"], ["b", "a"]], pair_ids) == [Chunk("c", [20]), Chunk("b+a", [10, 11, 1, 2])]


def test_random_and_pooled_do_shuffle():
    pair_ids = {"a": list(range(40)), "b": list(range(100, 140))}
    (pooled,) = chunk_pooled(pair_ids, 0)
    assert pooled.name == "pooled"
    assert list(pooled.pair_ids) != [*pair_ids["a"], *pair_ids["b"]]
    assert list(pooled.pair_ids) != list(chunk_pooled(pair_ids, 1)[0].pair_ids)
    first, second = chunks_random([["a"], ["b"]], pair_ids, 0)
    assert (first.name, second.name) == ("random-1", "random-2")
    # Both chunks mix both sources.
    for chunk in (first, second):
        assert {i >= 100 for i in chunk.pair_ids} == {True, False}


# ---- stages


@pytest.mark.parametrize(
    "pairs, micro_batch, accumulate, limit, expected",
    [
        (10, 4, 1, 1.0, (3, 3)),  # 4 + 4 + 2
        (10, 4, 2, 1.0, (3, 2)),  # two micro-batches, then one alone
        (8, 4, 2, 1.0, (2, 1)),
        (1, 4, 8, 1.0, (1, 1)),
        (10, 4, 1, 2, (2, 2)),
        (10, 4, 2, 2, (2, 1)),
        (10, 4, 1, 50, (3, 3)),  # a number above the epoch limits nothing
        (10, 4, 1, 1, (1, 1)),  # 1 is a number of batches, 1.0 a share
        (10, 4, 1, 0.5, (1, 1)),  # int(3 * 0.5), as Lightning rounds
        (10, 4, 1, 0.1, (0, 0)),
        (10, 4, 1, 0, (0, 0)),
    ],
)
def test_steps_per_epoch(pairs, micro_batch, accumulate, limit, expected):
    assert steps_per_epoch(pairs, micro_batch, accumulate, limit) == expected


def plan():
    chunks = [Chunk("easy", [1, 2, 3]), Chunk("middle", [4]), Chunk("hard", [5, 6])]
    return stage_plan(chunks, [[3], [1, 1, 1], [2, 3]])


def test_stage_plan_by_hand():
    stages = plan()
    assert [stage.index for stage in stages] == [1, 2, 3]
    assert [stage.first_epoch for stage in stages] == [0, 1, 4]
    assert [stage.num_steps for stage in stages] == [3, 3, 2 + 3]
    assert [stage.epochs for stage in stages] == [1, 3, 2]
    assert [stage.folder_name for stage in stages] == ["01-easy", "02-middle", "03-hard"]
    assert [list(stage.pair_ids) for stage in stages] == [[1, 2, 3], [4], [5, 6]]


def test_stage_of_epoch_and_beyond_the_end():
    stages = plan()
    found = [stage_of_epoch(stages, epoch).name for epoch in range(6)]
    assert found == ["easy", "middle", "middle", "middle", "hard", "hard"]
    # Lightning asks once more after the end.
    assert stage_of_epoch(stages, 6) is stages[-1]
    assert stage_of_epoch(stages, 100) is stages[-1]


@pytest.mark.parametrize("pair_ids, steps", [([], 1), ([1, 2], 0)])
def test_a_stage_without_a_step_is_refused(pair_ids, steps):
    with pytest.raises(ConfigurationError, match="stage 2 'empty'.*limit_train_batches"):
        stage_plan([Chunk("full", [9]), Chunk("empty", pair_ids)], [[1], [1, steps]])


# ---- held-out pairs


@FEW
@given(
    st.lists(st.sampled_from([f"p{n}" for n in range(12)]), min_size=1, max_size=40),
    st.sampled_from([0.0, 0.01, 0.125, 0.2, 0.5, 0.75, 0.99]),
    st.integers(0, 2**31),
)
def test_split_by_prompt(prompts, fraction, seed):
    held = one_split(prompts, fraction, seed)
    assert len(held) == len(prompts)
    inside = {prompt for prompt, is_held in zip(prompts, held, strict=True) if is_held}
    outside = {prompt for prompt, is_held in zip(prompts, held, strict=True) if not is_held}
    assert not inside & outside
    assert one_split(prompts, fraction, seed) == held
    # The share is reached, and not by a prompt too many.
    assert sum(held) >= fraction * len(prompts)
    if inside:
        largest = max(Counter(prompts)[prompt] for prompt in inside)
        assert sum(held) < fraction * len(prompts) + largest
    if fraction == 0:
        assert not any(held)


def test_split_by_prompt_holds_the_share_and_follows_the_seed():
    prompts = [f"p{n}" for n in range(100)]
    assert one_split(prompts, 0.0, 1) == [False] * 100
    assert sum(one_split(prompts, 0.2, 1)) == 20
    assert one_split(prompts, 0.2, 1) != one_split(prompts, 0.2, 2)
    # More of the same shuffle holds what less of it held.
    few, many = (one_split(prompts, fraction, 1) for fraction in (0.1, 0.3))
    assert all(later for earlier, later in zip(few, many, strict=True) if earlier)


def one_split(prompts, fraction, seed):
    return split_by_prompt({"x": prompts}, fraction, seed)["x"]


def test_split_by_prompt_agrees_over_sources():
    first = [f"p{n}" for n in range(20)]
    second = [f"p{n}" for n in range(10, 40)]
    held = split_by_prompt({"first": first, "second": second}, 0.25, 3)
    sides = {}
    for name, prompts in (("first", first), ("second", second)):
        for prompt, is_held in zip(prompts, held[name], strict=True):
            assert sides.setdefault(prompt, is_held) == is_held
        assert sum(held[name]) >= 0.25 * len(prompts)
