"""Micro-batches by tokens, pairs of like length together: every pair once, exact steps, exact means, exact resume."""

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers import free_port, make_rows, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import assert_same_weights, fit, made_sources, metrics, reproducible, weights

from sdpo_lightning import CurriculumDataModule, DPOLitModule, PreferenceSource, StageCheckpoint
from sdpo_lightning.backbone import load_policy
from sdpo_lightning.data.batching import bucket_order, check_batching, cut_by_pairs, cut_by_tokens, fewest_runs
from sdpo_lightning.data.collate import PackedCollator, PaddedCollator, SharedPrefixCollator, TokenizedPair
from sdpo_lightning.data.curriculum import steps_per_epoch
from sdpo_lightning.data.loader import PairStore, StageLoader, bucketed_order, epoch_order
from sdpo_lightning.data.passes import Batching, Passes
from sdpo_lightning.logprobs import pair_logps
from sdpo_lightning.losses import dpo_loss
from sdpo_lightning.reference import ReferencePolicy
from sdpo_lightning.schedules import learning_rate_factor, warmup_steps
from sdpo_lightning.types import Chunk, ConfigurationError, PairLogps, ResumeError

FEW = settings(max_examples=100, deadline=None, derandomize=True)
LAYOUTS = [SharedPrefixCollator, PackedCollator, PaddedCollator]
TOKENS = st.lists(st.integers(1, 30), min_size=1, max_size=40)

# ---- cutting


def runs_of(tokens, limit, pads):
    bounds = cut_by_tokens(np.array(tokens, dtype=np.int64), limit, pads).tolist()
    return [tokens[start:end] for start, end in zip(bounds[:-1], bounds[1:], strict=True)]


def test_cut_by_hand():
    # 3 + 4 + 3 = 10 fits; 9 is beyond 10 with any neighbour; 12 is beyond it alone.
    assert runs_of([3, 4, 3, 9, 2, 12, 1, 1], 10, False) == [[3, 4, 3], [9], [2], [12], [1, 1]]
    # Padded, each pair costs what the largest of its run does: 2 * 4 fits, 3 * 4 doesn't.
    assert runs_of([3, 4, 3, 9, 2, 12, 1, 1], 10, True) == [[3, 4], [3], [9], [2], [12], [1, 1]]
    assert cut_by_pairs(7, 3).tolist() == [0, 3, 6, 7]
    assert cut_by_pairs(6, 3).tolist() == [0, 3, 6]
    assert cut_by_pairs(0, 3).tolist() == runs_of([], 3, False) + [0]


@FEW
@given(TOKENS, st.integers(1, 60), st.booleans())
def test_runs_are_as_long_as_the_limit_allows(tokens, limit, pads):
    def cost(run):
        return len(run) * max(run) if pads else sum(run)

    runs = runs_of(tokens, limit, pads)
    assert [t for run in runs for t in run] == tokens
    for run, following in zip(runs, [*runs[1:], None], strict=True):
        assert run and (cost(run) <= limit or len(run) == 1)
        assert following is None or cost([*run, following[0]]) > limit
    # No order makes fewer.
    assert fewest_runs(np.array(tokens, dtype=np.int64), limit) <= len(runs)
    assert fewest_runs(np.array(tokens, dtype=np.int64), limit) <= len(runs_of(sorted(tokens), limit, pads))


# ---- lengths


def log_normal_pairs(count: int, seed: int = 0) -> list[TokenizedPair]:
    """Lengths as spread as those of real answers; the two of a pair are alike."""
    generator = np.random.default_rng(seed)
    prompts, answers = generator.lognormal(2.0, 0.6, count), generator.lognormal(2.0, 0.8, count)
    sides = [answers * generator.lognormal(0, 0.3, count) for _ in range(2)]
    lengths = np.ceil(np.minimum([prompts, *sides], 60)).astype(int)
    return [TokenizedPair(*([int(i % 60) + 7] * n for n in row)) for i, row in enumerate(lengths.T)]


PAIRS = dict(enumerate(log_normal_pairs(60), start=100))


IDS = ("prompt_ids", "chosen_ids", "rejected_ids")


def store_of(pairs: dict[int, TokenizedPair]) -> PairStore:
    columns = {name: [getattr(pair, name) for pair in pairs.values()] for name in IDS}
    return PairStore([Dataset.from_dict({"pair_id": list(pairs), **columns})])


@pytest.fixture(scope="module")
def store() -> PairStore:
    return store_of(PAIRS)


def test_store_knows_the_lengths(store):
    asked = [130, 101, 159]
    expected = [[len(getattr(PAIRS[i], name)) for name in IDS] for i in asked]
    assert store.lengths(asked).T.tolist() == expected
    assert store.lengths([]).shape == (3, 0)


@pytest.mark.parametrize("multiple", [1, 8])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_pair_tokens_are_what_the_model_runs_on(store, layout, multiple):
    collator, ids = layout(0, multiple), list(PAIRS)[:7]
    tokens = collator.pair_tokens(store.lengths(ids))
    batch = collator(ids, store.get(ids), [1.0] * 7, 7)
    if layout is PaddedCollator:
        assert batch.input_ids.numel() == 7 * tokens.max()
    else:
        assert batch.input_ids.numel() == -(-tokens.sum() // multiple) * multiple
    p, c, r = store.lengths(ids)[:, 0].tolist()
    by_hand = {
        SharedPrefixCollator: p + c + r,
        PackedCollator: 2 * p + c + r,
        PaddedCollator: 2 * (-(-(p + max(c, r)) // multiple) * multiple),
    }
    assert tokens[0] == by_hand[layout]


# ---- the loader


def loaders(store, ids, limit, world_size, accumulate, layout=SharedPrefixCollator, multiple=1, max_batches=None):
    return [
        StageLoader(
            store, layout(0, multiple), ids, 999, rank, world_size, accumulate, max_batches, batch_tokens=limit
        )
        for rank in range(world_size)
    ]


def real_ids(batch) -> list[int]:
    return batch.pair_id[batch.weights > 0].tolist()


SHAPES = st.tuples(
    st.integers(1, 60), st.integers(8, 400), st.integers(1, 3), st.integers(1, 3), st.sampled_from(LAYOUTS)
)


@FEW
@given(SHAPES, st.sampled_from([1, 8]))
def test_each_pair_once_over_ranks_and_micro_batches(store, shape, multiple):
    pairs, limit, world_size, accumulate, layout = shape
    ids = epoch_order(list(PAIRS)[:pairs], 0, "s", 0)
    split = loaders(store, ids, limit, world_size, accumulate, layout, multiple)
    ranks = [list(loader) for loader in split]
    count = len(split[0])
    assert [len(loader) for loader in split] == [len(batches) for batches in ranks] == [count] * world_size
    # Run after run: the (k * world_size + r)-th is micro-batch k of rank r.
    assert [i for k in range(count) for batches in ranks for i in real_ids(batches[k])] == ids
    assert {loader.num_steps for loader in split} == {-(-count // accumulate)}
    for start in range(0, count, accumulate):
        window = [batch for batches in ranks for batch in batches[start : start + accumulate]]
        real = sum(len(real_ids(batch)) for batch in window)
        assert {batch.step_pairs for batch in window} == {real} and real >= 1
    for batch in (batch for batches in ranks for batch in batches):
        assert batch.input_ids.numel() <= limit or batch.num_pairs == 1
        assert batch.weights.tolist() in ([1.0] * batch.num_pairs, [0.0])


@FEW
@given(SHAPES, st.one_of(st.integers(1, 6), st.floats(0.2, 1.0)))
def test_limit_batches_counts_only_what_is_used(store, shape, limit_batches):
    pairs, limit, world_size, accumulate, layout = shape
    ranks = loaders(store, list(PAIRS)[:pairs], limit, world_size, accumulate, layout, max_batches=limit_batches)
    whole = len(ranks[0])
    # As Lightning counts.
    batches = min(whole, limit_batches) if isinstance(limit_batches, int) else int(whole * limit_batches)
    assert ranks[0].num_steps == -(-batches // accumulate)
    used = [list(loader)[:batches] for loader in ranks]
    for start in range(0, batches, accumulate):
        window = [batch for taken in used for batch in taken[start : start + accumulate]]
        assert {batch.step_pairs for batch in window} == {sum(len(real_ids(batch)) for batch in window)}


def test_resume_at_every_position(store):
    ids = epoch_order(list(PAIRS), 3, "s", 1)
    for rank in range(2):
        whole = list(loaders(store, ids, 150, 2, 2)[rank])
        assert len(whole) > 5
        for position in range(len(whole) + 1):
            resumed = loaders(store, ids, 150, 2, 2)[rank]
            resumed.load_state_dict({"position": position})
            rest = list(resumed)
            assert [batch.pair_id.tolist() for batch in rest] == [b.pair_id.tolist() for b in whole[position:]]
            assert [batch.step_pairs for batch in rest] == [b.step_pairs for b in whole[position:]]


# ---- steps


def passes(store, batching, rank=0, world_size=1, accumulate=1, limit=1.0, layout=SharedPrefixCollator) -> Passes:
    return Passes(store, layout(0, batching.pad_to_multiple_of), batching, rank, world_size, accumulate, limit)


def by_tokens(limit, shuffle=True, seed=0) -> Batching:
    return Batching(4, limit, 0, 1, shuffle, seed)


def bucketed(batch_size=4, window=3, seed=0) -> Batching:
    return Batching(batch_size, None, window, 1, True, seed)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("world_size, accumulate, limit", [(1, 1, 1.0), (2, 2, 1.0), (3, 2, 4), (1, 3, 0.6)])
def test_steps_known_beforehand_are_those_of_each_epoch(store, layout, world_size, accumulate, limit):
    chunk = Chunk("some", list(PAIRS))
    plan = passes(store, by_tokens(170), 0, world_size, accumulate, limit, layout)
    steps = plan.epoch_steps(chunk, 6)
    for epoch, expected in enumerate(steps):
        loader = plan.training(chunk, epoch)
        batches, _ = steps_per_epoch(len(list(loader)), 1, 1, limit)
        assert -(-batches // accumulate) == expected
    if (world_size, accumulate) == (1, 1):
        # The order of an epoch decides how many it has.
        assert len(set(steps)) > 1
    assert len(set(passes(store, by_tokens(170, shuffle=False)).epoch_steps(chunk, 3))) == 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_epoch_is_shorter_than_was_said(store, layout):
    ids = list(PAIRS)
    for limit in (60, 170, 400):
        plan = passes(store, by_tokens(limit), world_size=2, layout=layout)
        shortest = plan.fewest_batches(ids, len(ids))
        found = [len(plan.training(Chunk("some", ids), epoch)) for epoch in range(5)]
        assert 0.5 * min(found) < shortest <= min(found)
        # Any half of them: the shortest ones make the fewest.
        half = plan.fewest_batches(ids, len(ids) // 2)
        assert half <= min(len(plan.loader(part)) for part in (ids[::2], ids[1::2], ids[:30], ids[30:]))


# ---- pairs of like length together


def test_bucket_order_by_hand():
    lengths = np.array([5, 1, 4, 2, 3, 9, 7])
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        order = bucket_order(lengths, run_pairs=2, window_runs=2, generator=generator).tolist()
        # The window 5 1 4 2 gives the runs (1, 2) and (4, 5); the other has 9, 3, 7, of which one comes last.
        first = [lengths[order[:2]].tolist(), lengths[order[2:4]].tolist()]
        assert sorted(first) == [[1, 2], [4, 5]]
        second = lengths[order[4:]].tolist()
        assert second in ([3, 7, 9], [7, 9, 3])


@FEW
@given(st.integers(1, 60), st.integers(1, 9), st.integers(1, 5), st.integers(0, 10**6))
def test_a_bucketed_pass_is_a_pure_permutation(store, pairs, run_pairs, window_runs, seed):
    ids = list(PAIRS)[:pairs]
    order = bucketed_order(store, ids, run_pairs, window_runs, seed, "stage", 0)
    assert sorted(order) == ids
    assert bucketed_order(store, ids, run_pairs, window_runs, seed, "stage", 0) == order
    # It moves pairs within their window of the plain order only.
    plain, window = epoch_order(ids, seed, "stage", 0), run_pairs * window_runs
    for start in range(0, pairs, window):
        assert sorted(order[start : start + window]) == sorted(plain[start : start + window])
    # Within a run the lengths ascend, and of two runs of a window one has all the longer pairs.
    sides = [len(PAIRS[i].prompt_ids) + max(len(PAIRS[i].chosen_ids), len(PAIRS[i].rejected_ids)) for i in order]
    for start in range(0, pairs, window):
        part = sides[start : start + window]
        runs = [part[i : i + run_pairs] for i in range(0, len(part), run_pairs)]
        assert all(run == sorted(run) for run in runs)
        runs.sort(key=lambda run: (run[0], run[-1]))
        assert all(a[-1] <= b[0] for a, b in zip(runs[:-1], runs[1:], strict=True))


def test_bucketed_epochs_differ(store):
    ids = list(PAIRS)
    keys = ((0, "a", 0), (1, "a", 0), (0, "b", 0), (0, "a", 1))
    assert len({tuple(bucketed_order(store, ids, 4, 3, *key)) for key in keys}) == 4


def padding(plan: Passes, loader) -> float:
    """Share of the model's tokens that are padding, by arithmetic: 1 - real tokens / (rows * longest row)."""
    real = spent = 0
    for batch in loader:
        lengths = plan.store.lengths(batch.pair_id.tolist())
        prompt, chosen, rejected = lengths
        real += (2 * prompt + chosen + rejected).sum()
        spent += 2 * lengths.shape[1] * (prompt + np.maximum(chosen, rejected)).max()
    return 1 - real / spent


def test_padding_goes_down():
    store = store_of(dict(enumerate(log_normal_pairs(600, seed=5))))
    chunk = Chunk("all", list(range(600)))
    plain = passes(store, bucketed(window=0), accumulate=4, layout=PaddedCollator)
    windows = passes(store, bucketed(window=8), accumulate=4, layout=PaddedCollator)
    before, after = (padding(plan, plan.training(chunk, 0)) for plan in (plain, windows))
    least = padding(plain, plain.longest_first(list(range(600))))
    assert before > 0.35 and after < 0.2 and least < after
    # As many steps, of as many pairs.
    assert plain.epoch_steps(chunk, 2) == windows.epoch_steps(chunk, 2) == [38, 38]


def test_ranks_see_like_lengths_at_the_same_time(store):
    ids = list(PAIRS)
    spread = []
    for window in (0, 10):
        plans = [passes(store, bucketed(2, window), rank, 3) for rank in range(3)]
        ranks = [[batch.num_tokens for batch in plan.training(Chunk("x", ids), 0)] for plan in plans]
        spread.append(sum(max(tokens) - min(tokens) for tokens in zip(*ranks, strict=True)))
    assert spread[1] < 0.6 * spread[0]


@pytest.mark.parametrize("batching", [by_tokens(120), bucketed()])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_longest_first_has_each_pair_once(store, layout, batching):
    ids = list(PAIRS)[:17]
    ranks = [list(passes(store, batching, rank, 2, 1, 1.0, layout).longest_first(ids)) for rank in range(2)]
    assert len(ranks[0]) == len(ranks[1])
    assert sorted(i for batches in ranks for batch in batches for i in real_ids(batch)) == ids
    assert all(batch.step_pairs >= 1 for batches in ranks for batch in batches)
    assert ranks[0][0].num_tokens >= ranks[1][-1].num_tokens


# ---- settings


@pytest.mark.parametrize(
    "given, expected",
    [
        ({"pad_to_multiple_of": 0}, "`data.pad_to_multiple_of` is 0, expected at least 1"),
        ({"batch_tokens": 0}, "`data.batch_tokens` is 0, expected at least"),
        ({"batch_tokens": 63, "pad_to_multiple_of": 64}, "`data.batch_tokens` is 63"),
        ({"bucket_window": -1}, "`data.bucket_window` is -1, expected at least 0"),
        ({"bucket_window": 2, "batch_tokens": 64}, "leave one out"),
        ({"bucket_window": 2, "shuffle": False}, "`data.shuffle` is false"),
    ],
)
def test_bad_settings(given, expected):
    with pytest.raises(ConfigurationError, match=expected):
        CurriculumDataModule([PreferenceSource("a", "a.jsonl")], **given)
    good = {"batch_tokens": None, "bucket_window": 0, "pad_to_multiple_of": 1, "shuffle": True}
    check_batching(**good)


# ---- whole runs

SMALL = {"batch_tokens": 56, "pad_to_multiple_of": 8}
EPOCHS = {"b": 2, "*": 1}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return made_sources(tmp_path_factory.mktemp("sources"), {"a": 9, "b": 13, "c": 7})


class FixedReference(ReferencePolicy):
    """Logps far enough from the policy's that pairs weigh differently."""

    starts_at_policy = False

    def advance(self, policy, stage, inputs):
        pass

    def restore(self, load_weights, stage, inputs):
        pass

    def logps(self, batch):
        row = batch.pair_id % 7
        return PairLogps(-20.0 - row % 3, -20.0 + row % 5, *batch.completion_lengths.chunk(2))


class NotesSteps(DPOLitModule):
    """Notes the pairs of each optimizer step."""

    steps: dict[int, list[int]]

    def training_step(self, batch, batch_idx):
        self.steps = getattr(self, "steps", {})
        self.steps.setdefault(self.trainer.global_step, []).extend(real_ids(batch))
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("layout", ["shared_prefix", "packed", "padded"])
@pytest.mark.parametrize("limit", [1.0, 5])
def test_each_step_is_the_plain_mean_over_its_pairs(tmp_path, tiny_model_dir, sources, layout, limit):
    trainer, module = fit(
        tmp_path,
        tiny_model_dir,
        sources[1:2],
        reference=FixedReference(),
        module_class=NotesSteps,
        # The weights stay M_0, so each step's loss and gradient can be had in one piece.
        module_args={"optimizer": lambda params: torch.optim.SGD(params, lr=0.0)},
        trainer_args={"accumulate_grad_batches": 3, "limit_train_batches": limit},
        layout=layout,
        epochs_per_stage=2,
        **SMALL,
    )
    data, rows = trainer.datamodule, metrics(tmp_path)
    if limit == 1.0:
        for first in (0, data.stages()[0].epoch_steps[0]):
            length = data.stages()[0].epoch_steps[0 if first == 0 else 1]
            assert sorted(i for s in range(first, first + length) for i in module.steps[s]) == data.train_ids()
    assert len(rows) == len(module.steps) == data.stages()[0].num_steps
    assert len({len(ids) for ids in module.steps.values()}) > 1
    backbone = load_policy(str(tiny_model_dir))
    for row, ids in zip(rows, module.steps.values(), strict=True):
        batch = PaddedCollator(0)(ids, data.store.get(ids), [1.0] * len(ids), len(ids))
        loss = dpo_loss(pair_logps(backbone(batch), batch), FixedReference().logps(batch), 0.1).mean()
        backbone.zero_grad()
        loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in backbone.parameters()])
        assert float(row["train/loss"]) == pytest.approx(loss.item(), abs=1e-5)
        assert float(row["train/grad_norm"]) == pytest.approx(norm.item(), rel=1e-4)
        assert abs(loss.item() - 0.6931) > 1e-3


def test_the_schedule_of_each_stage_ends_with_it(tmp_path, tiny_model_dir, sources):
    trainer, _ = fit(tmp_path, tiny_model_dir, sources, epochs_per_stage=3, **SMALL)
    stages = json.loads((tmp_path / "curriculum.json").read_text())["stages"]
    assert [stage["steps"] for stage in stages] == [stage.num_steps for stage in trainer.datamodule.stages()]
    # Some stage has passes of different lengths, or this would show little.
    assert any(len(set(stage.epoch_steps)) > 1 for stage in trainer.datamodule.stages())
    for stage in stages:
        rates = [float(row["train/lr"]) for row in metrics(tmp_path) if row["stage/index"] == str(stage["index"])]
        steps = stage["steps"]
        expected = [learning_rate_factor("linear", k, steps, warmup_steps(steps, 0.2)) * 1e-3 for k in range(steps)]
        assert rates == pytest.approx(expected)


def test_a_stage_of_one_step_trains_be_it_the_first(tmp_path, tiny_model_dir):
    paths = [str(write_jsonl(tmp_path / f"{name}.jsonl", make_rows(2, seed, name))) for seed, name in enumerate("ab")]
    sources = [PreferenceSource(name, path) for name, path in zip("ab", paths, strict=True)]
    fit(tmp_path / "run", tiny_model_dir, sources, batch_size=2)
    # No warm-up, and 1e-3 * (1 - 0) / 1.
    assert [float(row["train/lr"]) for row in metrics(tmp_path / "run")] == [1e-3, 1e-3]
    first = weights(next((tmp_path / "run" / "stages").glob("01-*")))
    assert any(not torch.equal(tensor, first[name]) for name, tensor in weights(tiny_model_dir).items())


def run(run_dir, model_dir, sources, ckpt_path=None, accumulate=2, **data):
    return fit(
        run_dir,
        model_dir,
        sources,
        ckpt_path,
        callbacks=[StageCheckpoint(every_n_train_steps=1, save_top_k=-1)],
        trainer_args={"accumulate_grad_batches": accumulate},
        epochs_per_stage=EPOCHS,
        order="easy_to_hard",
        val_fraction=0.2,
        **data,
    )


@pytest.mark.parametrize("data", [SMALL, {"bucket_window": 2}], ids=["batch_tokens", "bucket_window"])
def test_resume_from_every_checkpoint(tmp_path, tiny_model_dir, sources, data):
    whole = tmp_path / "whole"
    trainer, _ = run(whole, tiny_model_dir, sources, **data)
    checkpoints = sorted((whole / "checkpoints").glob("*.ckpt"))
    assert len(checkpoints) >= trainer.global_step > 6
    folders = sorted(path.name for path in (whole / "stages").iterdir())
    for checkpoint in checkpoints:
        resumed = tmp_path / f"from-{checkpoint.stem}"
        shutil.copytree(whole, resumed, ignore=shutil.ignore_patterns("checkpoints"))
        # M_t is written by the resumed run itself from the stage of the checkpoint on.
        entered = torch.load(checkpoint, weights_only=True)["stage_record"]["entered"]
        for folder in folders[max(entered - 1, 0) :]:
            shutil.rmtree(resumed / "stages" / folder)
        run(resumed, tiny_model_dir, sources, checkpoint, **data)
        for folder in folders:
            assert_same_weights(whole / "stages" / folder, resumed / "stages" / folder)
        assert reproducible(resumed) == reproducible(whole), checkpoint.name
        shutil.rmtree(resumed)


def test_a_resume_under_another_cut_is_refused(tmp_path, tiny_model_dir, sources):
    fit(tmp_path, tiny_model_dir, sources, trainer_args={"max_steps": 2}, **SMALL)
    checkpoint = tmp_path / "checkpoints" / "stopped-step=2.ckpt"
    for change, words in (
        ({"batch_tokens": 64}, "data.batch_tokens: 56 -> 64"),
        ({"batch_tokens": None}, "data.batch_tokens: 56 -> None"),
        ({"pad_to_multiple_of": 4}, "data.pad_to_multiple_of: 8 -> 4"),
        ({"batch_tokens": None, "bucket_window": 1}, "data.bucket_window: 0 -> 1"),
        ({"layout": "padded"}, "counted `data.batch_tokens` by SharedPrefixCollator, this one by PaddedCollator"),
    ):
        with pytest.raises(ResumeError, match=words):
            fit(tmp_path, tiny_model_dir, sources, ckpt_path=checkpoint, **SMALL | change)
    # It counts for nothing here.
    fit(tmp_path, tiny_model_dir, sources, ckpt_path=checkpoint, **SMALL | {"batch_size": 7})


def test_pairs_beyond_the_limit_are_counted_once(tmp_path, tiny_model_dir, sources, caplog):
    caplog.set_level(logging.INFO)
    trainer, _ = fit(
        tmp_path, tiny_model_dir, sources, epochs_per_stage=2, val_fraction=0.2, batch_tokens=17, pad_to_multiple_of=1
    )
    data = trainer.datamodule
    beyond = int((data.store.lengths(data.train_ids()).sum(0) > 17).sum())
    total = len(data.train_ids())
    assert 0 < beyond < total
    assert caplog.text.count(f"{beyond} of {total} pairs are beyond `data.batch_tokens`") == 1


def test_a_validation_beyond_the_shortest_stage_is_refused_early(tmp_path, tiny_model_dir, sources):
    def start(interval):
        arguments = {"val_check_interval": interval}
        return fit(tmp_path / str(interval), tiny_model_dir, sources, trainer_args=arguments, val_fraction=0.3, **SMALL)

    with pytest.raises(ConfigurationError, match="`trainer.val_check_interval` is 9 batches.*use at most"):
        start(9)
    trainer, _ = start(1)
    shortest = min(min(stage.epoch_steps) for stage in trainer.datamodule.stages())
    assert 1 <= trainer.datamodule.shortest_epoch() <= shortest


def test_predict_and_validate_take_every_pair_once(tmp_path, tiny_model_dir, sources):
    trainer, module = fit(tmp_path, tiny_model_dir, sources, val_fraction=0.3, **SMALL)
    data = trainer.datamodule
    seen = [i for loader in data.val_dataloader() for batch in loader for i in real_ids(batch)]
    assert seen == data.val_ids()
    assert [i for batch in data.predict_dataloader() for i in real_ids(batch)] == data.train_ids() + data.val_ids()
    assert all(b.input_ids.numel() <= 56 or b.num_pairs == 1 for b in data.batches(data.train_ids()))
    rows = [row for batch in trainer.predict(module, datamodule=data) for row in batch]
    assert [row["pair_id"] for row in rows] == data.train_ids() + data.val_ids()


SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
from runs import fit
from sdpo_lightning import CachedReference, PreferenceSource

if __name__ == "__main__":
    _, tests, run_dir, model_dir, *paths = sys.argv
    sources = [PreferenceSource(Path(path).stem, path) for path in paths]
    data = {"batch_tokens": 56, "pad_to_multiple_of": 8, "val_fraction": 0.2}
    trainer = {"devices": 2, "strategy": "ddp"}
    fit(Path(run_dir), model_dir, sources, reference=CachedReference(), trainer_args=trainer, **data)
"""


def test_two_ranks_equal_one_that_accumulates(tmp_path, tiny_model_dir, sources):
    (tmp_path / "script.py").write_text(SCRIPT)
    paths = [source.path for source in sources[:2]]
    words = [sys.executable, "script.py", str(Path(__file__).parent), str(tmp_path / "two"), str(tiny_model_dir)]
    environment = os.environ | {"MASTER_PORT": free_port(), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [*words, *paths], capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=240
    )
    assert done.returncode == 0, done.stderr[-2000:]
    # Two runs of pairs make a step: on two ranks at once, or on one rank one after the other.
    fit(
        tmp_path / "one",
        tiny_model_dir,
        sources[:2],
        trainer_args={"accumulate_grad_batches": 2},
        val_fraction=0.2,
        **SMALL,
    )
    for folder in ("01-a", "02-b"):
        ours, theirs = (weights(tmp_path / name / "stages" / folder) for name in ("two", "one"))
        for name, tensor in ours.items():
            torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=1e-5)
    two, one = (metrics(tmp_path / name) for name in ("two", "one"))
    assert [row["train/pairs_seen"] for row in two] == [row["train/pairs_seen"] for row in one]


def test_one_micro_batch_is_not_all_of_them_on_resume(tmp_path, tiny_model_dir, sources):
    trainer_args = {"limit_train_batches": 1, "max_steps": 1}
    fit(tmp_path, tiny_model_dir, sources[1:2], trainer_args=trainer_args, epochs_per_stage=2)
    [path] = (tmp_path / "checkpoints").glob("*.ckpt")
    # In Python 1 == 1.0, but the one is a number and the other a share.
    said = "1 micro-batches a pass -> 100 % of a pass"
    with pytest.raises(ResumeError, match=said):
        fit(tmp_path, tiny_model_dir, sources[1:2], ckpt_path=path, epochs_per_stage=2)
