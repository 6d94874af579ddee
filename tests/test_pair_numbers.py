"""Numbers in the rows that cut chunks: read, kept through the cache, every pair exactly once, and in a run."""

from __future__ import annotations

import json
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch
from helpers import make_rows, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import fit, reproducible

from sdpo_lightning import PreferenceSource, StageCheckpoint
from sdpo_lightning.data.cache import fingerprints
from sdpo_lightning.data.collate import PairTokenizer
from sdpo_lightning.data.loader import PairStore
from sdpo_lightning.data.pair_ranks import PairNumbers, bins, dense_share, grid_scores, place_in_prompt, prompt_keys
from sdpo_lightning.data.partitions import ByColumn, Quantiles, TwoAxes, WithinPrompts, read_partition
from sdpo_lightning.data.prepare import Preparation, prepare_sources
from sdpo_lightning.data.rated import choose_pairs
from sdpo_lightning.data.sources import load_source
from sdpo_lightning.types import ConfigurationError, ResumeError

FEW = settings(max_examples=80, deadline=None, derandomize=True)


def load(tmp_path, rows, **more):
    return load_source(PreferenceSource("x", str(write_jsonl(tmp_path / "rows.jsonl", rows)), **more))


# ---- reading


def test_a_column_two_columns_and_the_gap_of_the_ratings(tmp_path):
    rows = [{"prompt": "q", "chosen": "y", "rejected": "n", "a": 7, "b": "2.5"}]
    one = load(tmp_path, rows, columns={"pair_score": "a", "prompt_score": "b"}).rows
    assert (one["pair_score"][:], one["prompt_score"][:]) == ([7.0], [2.5])
    # Of two columns the first less the second: 7 - 2.5.
    assert load(tmp_path, rows, columns={"pair_score": "a, b"}).rows["pair_score"][:] == [4.5]
    assert load(tmp_path, rows).rows.column_names == ["pair_id", "prompt", "chosen", "rejected"]
    rated = {"prompt": "q", "p": 3, "a": ["w", "x", "y", "z"], "s": [5, 2, 4, 3.5]}
    columns = {"answers": "a", "scores": "s", "prompt_score": "p"}
    found = load(tmp_path, [rated], columns=columns, rated_pairs="best_others").rows
    # The best with the 2nd, 3rd and 4th: 5 - 2, 5 - 4, 5 - 3.5.
    assert list(zip(found["chosen"][:], found["rejected"][:], found["pair_score"][:], strict=True)) == [
        ("w", "x", 3.0),
        ("w", "y", 1.0),
        ("w", "z", 1.5),
    ]
    assert found["prompt_score"][:] == [3.0] * 3


def test_rows_without_a_number_are_counted(tmp_path):
    row = {"prompt": "q", "chosen": "y", "rejected": "n"}
    values = [1.5, None, float("nan"), "high", True, "2"]
    rows = [row | {"s": value} for value in values] + [row]
    loaded = load(tmp_path, rows, columns={"pair_score": "s"})
    # Null, NaN, a word, a truth value and no key at all; "2" is a number.
    assert loaded.dropped == {"missing_pair_score": 5} and loaded.rows["pair_score"][:] == [1.5, 2.0]
    with pytest.raises(ConfigurationError, match="unknown column 'nothing'"):
        load(tmp_path, rows, columns={"prompt_score": "nothing"})
    with pytest.raises(ConfigurationError, match="rows.jsonl:2: missing_pair_score"):
        load_source(
            PreferenceSource("x", str(tmp_path / "rows.jsonl"), columns={"pair_score": "s"}), on_bad_row="error"
        )


@pytest.mark.parametrize(
    ("columns", "text"),
    [
        ({"answers": "a", "scores": "s", "pair_score": "p"}, "`pair_score` beside `answers`, whose gap it is"),
        ({"pair_score": "a, b, c"}, "expected one column or two"),
    ],
)
def test_columns_that_are_refused(columns, text):
    with pytest.raises(ConfigurationError, match=text):
        PreferenceSource("x", "x.jsonl", columns=columns)


@FEW
@given(st.lists(st.one_of(st.none(), st.integers(-2, 2).map(float)), min_size=2, max_size=8), st.sampled_from([0, 1.5]))
def test_best_with_each_other(scores, gap):
    rated = [n for n, score in enumerate(scores) if score is not None]
    found = list(choose_pairs(scores, "best_others", gap))
    if not rated:
        assert found == []
        return
    best = next(n for n in rated if scores[n] == max(scores[m] for m in rated))
    wanted = [(best, n) for n in rated if scores[best] > scores[n] and scores[best] - scores[n] >= gap]
    assert found == wanted


# ---- through the cache


def test_numbers_stay_with_their_pairs(tmp_path, tiny_tokenizer):
    rows = [row | {"s": n / 2, "p": -n} for n, row in enumerate(make_rows(9, 0))]
    # Every other row makes no pair: the answers are the same.
    for row in rows[1::2]:
        row["rejected"] = row["chosen"]
    scored = PreferenceSource("x", str(write_jsonl(tmp_path / "x.jsonl", rows)), columns={"pair_score": "s"})
    both = {"pair_score": "s", "prompt_score": "p"}
    other = PreferenceSource("y", str(write_jsonl(tmp_path / "y.jsonl", rows[::2])), columns=both)
    plain = PreferenceSource("z", str(write_jsonl(tmp_path / "z.jsonl", make_rows(3, 1))))
    tokenize = PairTokenizer(tiny_tokenizer, 64)
    reports, parts = prepare_sources([scored, other, plain], Preparation(tokenize))
    store = PairStore(parts)
    first, second, third = (store.numbers(report.train_ids) for report in reports)
    assert first.pair_score.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0] and np.isnan(first.prompt_score).all()
    assert second.prompt_score.tolist() == [0.0, -2.0, -4.0, -6.0, -8.0]
    assert np.isnan(third.pair_score).all() and len(third.prompt_key) == 3
    # In whatever order they are asked for; the same prompts have the same key in both sources.
    assert store.numbers(reports[0].train_ids[::-1]).pair_score.tolist() == [4.0, 3.0, 2.0, 1.0, 0.0]
    assert first.prompt_key.tolist() == second.prompt_key.tolist()
    # Another column, or another number in it, is another folder of the cache.
    keys = [fingerprints([scored], tokenize, "drop")[0].key]
    changed = PreferenceSource("x", str(scored.path), columns={"pair_score": "p"})
    keys.append(fingerprints([changed], tokenize, "drop")[0].key)
    write_jsonl(tmp_path / "x.jsonl", [row | {"s": 1.0} for row in rows])
    keys.append(fingerprints([scored], tokenize, "drop")[0].key)
    assert len(set(keys)) == 3


# ---- every pair exactly once

# Of each source pairs with a prompt of a few, a gap of a few (ties) and a score of the prompt.
PAIR = st.tuples(st.integers(0, 5), st.sampled_from([0.5, 1.0, 1.5, 4.0]), st.integers(-2, 2).map(float))
SOURCES = st.lists(st.lists(PAIR, min_size=1, max_size=12), min_size=1, max_size=3)


def inputs(drawn):
    ids = {f"s{n}": [(n << 40) + i for i in range(len(part))] for n, part in enumerate(drawn)}
    numbers = {}
    for name, part in zip(ids, drawn, strict=True):
        prompts, gaps, scores = zip(*part, strict=True)
        numbers[name] = PairNumbers(np.array(gaps), np.array(scores), np.array(prompts, dtype=np.int64))
    return [[name] for name in ids], ids, numbers


def cut(partition, drawn):
    groups, ids, numbers = inputs(drawn)
    return partition.cut(groups, ids, partition.row_scores(numbers), 0)


def flat(drawn) -> dict[int, tuple]:
    return {(n << 40) + i: pair for n, part in enumerate(drawn) for i, pair in enumerate(part)}


@FEW
@given(SOURCES, st.integers(1, 5), st.sampled_from(["high", "low"]))
def test_by_column(drawn, stages, easy):
    pairs, chunks = flat(drawn), cut(ByColumn(stages, easy), drawn)
    assert Counter(i for chunk in chunks for i in chunk.pair_ids) == Counter(list(pairs))
    sizes = [len(chunk.pair_ids) for chunk in chunks]
    assert len(sizes) == stages and max(sizes) - min(sizes) <= 1
    gaps = [pairs[i][1] for chunk in chunks for i in chunk.pair_ids]
    assert gaps == sorted(gaps, reverse=easy == "high")


@FEW
@given(SOURCES, st.integers(1, 4))
def test_within_prompts(drawn, stages):
    pairs = flat(drawn)
    per_prompt = Counter(prompt for prompt, _, _ in pairs.values())
    if max(per_prompt.values()) < stages:
        with pytest.raises(ConfigurationError, match=f"`stages` of WithinPrompts is {stages}"):
            cut(WithinPrompts(stages), drawn)
        return
    chunks = cut(WithinPrompts(stages), drawn)
    assert Counter(i for chunk in chunks for i in chunk.pair_ids) == Counter(list(pairs))
    seen = defaultdict(list)
    for number, chunk in enumerate(chunks):
        for i in chunk.pair_ids:
            seen[pairs[i][0]].append((number, pairs[i][1]))
    for prompt, places in seen.items():
        # A later stage has no larger gap of the same prompt, and no stage has two more of its pairs than another.
        assert [gap for _, gap in sorted(places, key=lambda p: (p[0], -p[1]))] == sorted(
            (gap for _, gap in places), reverse=True
        )
        counts = [sum(number == n for number, _ in places) for n in range(stages)]
        assert max(counts) - min(counts) <= 1 and sum(counts) == per_prompt[prompt]


def test_within_prompts_by_hand():
    # Prompt 0 has gaps 1, 3, 2; prompt 1 has 5 alone: stage 1 gets 3 and 5, stage 2 the 2, stage 3 the 1.
    chunks = cut(WithinPrompts(3), [[(0, 1.0, 0.0), (0, 3.0, 0.0)], [(1, 5.0, 0.0), (0, 2.0, 0.0)]])
    second = 1 << 40
    # Within a stage the larger gap comes first.
    assert [list(chunk.pair_ids) for chunk in chunks] == [[second, 1], [second + 1], [0]]
    numbers = PairNumbers(np.array([1.0, 3.0]), np.zeros(2), np.zeros(2, np.int64))
    assert place_in_prompt(numbers, "high", 2).tolist() == [1, 0]
    assert place_in_prompt(numbers, "low", 2).tolist() == [0, 1]


@FEW
@given(SOURCES, st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.sampled_from(["low", "high", "mean"]))
def test_two_axes(drawn, stages, prompt_bins, gap_bins, prompts):
    rule = {"low": "low_score_first", "high": "high_score_first", "mean": "large_mean_gap_first"}[prompts]
    pairs, chunks = flat(drawn), cut(TwoAxes(stages, rule, prompt_bins, gap_bins), drawn)
    assert Counter(i for chunk in chunks for i in chunk.pair_ids) == Counter(list(pairs))
    sizes = [len(chunk.pair_ids) for chunk in chunks]
    assert max(sizes) - min(sizes) <= 1 and len(sizes) == stages
    # By brute force: what a prompt is worth, its bin among the distinct prompts, the bin of the gap.
    means = {p: np.mean([gap for q, gap, _ in pairs.values() if q == p]) for p, _, _ in pairs.values()}
    worth = {"low": lambda p, s: s, "high": lambda p, s: -s, "mean": lambda p, s: -means[p]}[prompts]
    distinct = {(p, worth(p, s)) for p, _, s in pairs.values()}
    sums = []
    for i in (i for chunk in chunks for i in chunk.pair_ids):
        prompt, gap, score = pairs[i]
        easier = sum(key < worth(prompt, score) for _, key in distinct)
        larger = sum(other > gap for _, other, _ in pairs.values())
        ranks = easier * prompt_bins // len(distinct), larger * gap_bins // len(pairs)
        sums.append((sum(ranks), ranks[1], -gap))
    assert sums == sorted(sums)


def test_two_axes_by_hand():
    # Two prompts, easy (0) and hard (1), each with a large (4) and a small gap (1): the walk is
    # easy-large (0 + 0), hard-large (1 + 0, before the other sum of 1: its gap is larger), easy-small, hard-small.
    drawn = [[(0, 4.0, 0.0), (0, 1.0, 0.0), (1, 4.0, 9.0), (1, 1.0, 9.0)]]
    chunks = cut(TwoAxes(4, "low_score_first", 2, 2), drawn)
    assert [list(chunk.pair_ids) for chunk in chunks] == [[0], [2], [1], [3]]
    chunks = cut(TwoAxes(4, "high_score_first", 2, 2), drawn)
    assert [list(chunk.pair_ids) for chunk in chunks] == [[2], [0], [3], [1]]
    numbers = inputs(drawn)[2]["s0"]
    assert grid_scores(numbers, "low_score_first", 2, 2).tolist() == [-0.0, -3.5, -2.0, -5.5]
    assert prompt_keys(numbers, "large_mean_gap_first").tolist() == [-2.5] * 4


@FEW
@given(st.lists(st.sampled_from([-1.0, 0.0, 2.0, 7.0]), min_size=1, max_size=10), st.integers(1, 4), st.randoms())
def test_bins_go_by_values_alone(values, count, shuffler):
    keys = np.array(values)
    found = dict(zip(values, bins(keys, count).tolist(), strict=True))
    mixed = list(values)
    shuffler.shuffle(mixed)
    assert dict(zip(mixed, bins(np.array(mixed), count).tolist(), strict=True)) == found
    assert all(0 <= b < count for b in found.values())
    assert all(found[a] <= found[b] for a in found for b in found if a < b)
    shares = dict(zip(values, dense_share(keys).tolist(), strict=True))
    ordered = sorted(shares)
    assert [shares[value] for value in ordered] == [n / len(ordered) for n in range(len(ordered))]


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: ByColumn(0), "`stages` of ByColumn is 0"),
        (lambda: ByColumn(2, "large"), "`easy` of ByColumn is 'large', expected one of"),
        (lambda: TwoAxes(2, gap_bins=0), "`gap_bins` of TwoAxes is 0"),
        (lambda: TwoAxes(2, "mean"), "`prompts` of TwoAxes is 'mean'"),
    ],
)
def test_settings_that_are_refused(make, text):
    with pytest.raises(ConfigurationError, match=text):
        make()


def test_plain_values():
    path = "sdpo_lightning.data.partitions."
    assert read_partition({"class_path": f"{path}ByColumn", "init_args": {"stages": 2}}) == ByColumn(2)
    assert read_partition({"class_path": f"{path}TwoAxes"}) == TwoAxes()
    assert read_partition({"class_path": f"{path}WithinPrompts"}) == WithinPrompts()
    assert not ByColumn().needs_scores and Quantiles().needs_scores


# ---- in a run


@pytest.fixture(scope="module")
def rated(tmp_path_factory):
    """Six prompts with four answers each of other ratings, and the prompts' own score."""
    folder = tmp_path_factory.mktemp("rated")
    rows = []
    for n, row in enumerate(make_rows(6, 3)):
        answers = [row["chosen"], row["rejected"], f" w{n + 3} w9", f" w{n + 4} w8 w7"]
        ratings = [9, 8 - n * 0.1, 6 - n * 0.1, 3 - n * 0.1]
        rows.append({"prompt": row["prompt"], "answers": answers, "ratings": ratings, "level": n})
    columns = {"answers": "answers", "scores": "ratings", "prompt_score": "level"}
    path = str(write_jsonl(folder / "rated.jsonl", rows))
    return [PreferenceSource("rated", path, columns=columns, rated_pairs="best_others")]


@pytest.mark.parametrize("partition", [ByColumn(3), WithinPrompts(3), TwoAxes(2)], ids=lambda p: type(p).__name__)
def test_a_run_resumes_exactly(tmp_path, tiny_model_dir, rated, partition):
    def run(ckpt_path=None, **more):
        each = StageCheckpoint(every_n_train_steps=1, save_top_k=-1)
        args = {"order": "easy_to_hard", "partition": partition, "batch_size": 3} | more
        return fit(tmp_path / "run", tiny_model_dir, rated, ckpt_path, callbacks=[each], **args)

    trainer, module = run()
    data = trainer.datamodule
    # M_0 isn't asked.
    assert module.m0_logps is None and not (tmp_path / "run" / "references" / "m0.safetensors").exists()
    stages = json.loads((tmp_path / "run" / "curriculum.json").read_text())["stages"]
    assert sum(stage["pairs"] for stage in stages) == 18
    gaps = [data.store.numbers(stage.pair_ids).pair_score for stage in data.stages()]
    if not isinstance(partition, TwoAxes):
        # 9 less 3, 6, 8 and up to half a point more: by all as by prompt the 4th answers come first.
        assert [(gap.min() // 1, len(gap)) for gap in gaps] == [(6.0, 6), (3.0, 6), (1.0, 6)]
    whole = reproducible(tmp_path / "run")
    last = sorted((tmp_path / "run" / "checkpoints").glob("epoch=1-step=*.ckpt"))[0]
    saved = torch.load(last, weights_only=True)["CurriculumDataModule"]
    assert [part.tolist() for part in saved["chunk_ids"]] == [list(stage.pair_ids) for stage in data.stages()]
    run(last)
    assert reproducible(tmp_path / "run") == whole
    with pytest.raises(ResumeError, match="data.partition: .* -> "):
        run(last, partition=ByColumn(3, "low"))


def test_reversed_and_sources_without_numbers(tmp_path, tiny_model_dir, rated):
    trainer, _ = fit(tmp_path / "run", tiny_model_dir, rated, partition=ByColumn(2), order="reversed", batch_size=9)
    assert [stage.name for stage in trainer.datamodule.stages()] == ["quantile-2", "quantile-1"]
    plain = PreferenceSource("plain", str(write_jsonl(tmp_path / "plain.jsonl", make_rows(4, 0))))
    with pytest.raises(ConfigurationError, match=r"source 'plain': 4 of 4 pairs have no `pair_score`.*columns"):
        fit(tmp_path / "other", tiny_model_dir, [*rated, plain], partition=ByColumn(2))
    # Refused before any weights are read.
    assert not (tmp_path / "other").exists()
