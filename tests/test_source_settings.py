"""What a source's settings do: filter, sample, rated lists, repeat, weight; and what a resume makes of a change."""

from __future__ import annotations

import json
import typing
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Optional, Union, get_args

import jsonargparse
import pytest
import torch
from datasets import Dataset
from helpers import make_rows, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import assert_same_weights, fit, losses

from sdpo_lightning import CachedReference, PreferenceSource
from sdpo_lightning.contamination import ContaminationGuard
from sdpo_lightning.data.collate import PaddedCollator
from sdpo_lightning.data.loader import PairStore, StageLoader
from sdpo_lightning.data.pair_lists import PairLists
from sdpo_lightning.data.rated import MOST_ANSWERS, choose_pairs, pair_number, scores_of, values_of
from sdpo_lightning.data.rows import VAL_FIRST_ROW, pair_id_of, row_number
from sdpo_lightning.data.selection import sampled
from sdpo_lightning.data.sources import SourceRows, load_source
from sdpo_lightning.parser import OneLineParser
from sdpo_lightning.types import ConfigurationError, LogpTable, PairLogps, PreferenceBatch, ResumeError

FEW = settings(max_examples=60, deadline=None, derandomize=True)


def load(tmp_path: Path, rows: list[Any], **given: Any) -> SourceRows:
    return load_source(PreferenceSource("x", str(write_jsonl(tmp_path / "rows.jsonl", rows)), **given))


def row(n: int, **more: Any) -> dict[str, Any]:
    return {"prompt": f"q{n}", "chosen": f"y{n}", "rejected": f"n{n}", **more}


def rows_of(loaded: SourceRows) -> list[int]:
    return [row_number(pair_id) for pair_id in loaded.rows["pair_id"][:]]


# ---- the declaration


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"path": None}, "path` is missing.*preset"),
        ({"preset": "no_such"}, "preset` is 'no_such', expected one of.*'hh_rlhf'"),
        ({"sample": 0}, "sample` is 0"),
        ({"sample": 1.5}, "sample` is 1.5"),
        ({"sample": 0.0}, "sample` is 0.0"),
        ({"sample": True}, "sample` is True"),
        ({"repeat": 0}, "repeat` is 0"),
        ({"weight": 0.0}, "weight` is 0.0"),
        ({"weight": float("nan")}, "weight` is nan"),
        ({"min_gap": -1.0}, "min_gap` is -1.0"),
        ({"filter": {"a": {"least": 3}}}, "filter` has .*'least'"),
        ({"filter": {"a": []}}, r"filter` has \[\]"),
        ({"filter": {"a": {"min": "3"}}}, "filter` has"),
        ({"chat_template_kwargs": {"tools": []}}, r"chat_template_kwargs` has \['tools'\]"),
        ({"columns": {"answers": "a"}}, "names .*'answers'.*expected `answers` with one of"),
        ({"columns": {"scores": "a"}}, "names .*'scores'.*expected `answers` with one of"),
        ({"columns": {"answers": "a", "scores": "s", "ranks": "r"}}, "expected `answers` with one of"),
        ({"columns": {"answers": "a", "scores": "s", "chosen": "c"}}, "leave one out"),
    ],
)
def test_settings_without_a_meaning_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"data.sources\[x\].*{message}"):
        PreferenceSource(**{"name": "x", "path": "a.jsonl"} | given)


@pytest.mark.parametrize("first", [float, int])
def test_settings_keep_their_kinds_on_the_command_line(first: type) -> None:
    # `typing` answers with the equal union that was made first, here or in an import.
    for forget in typing._cleanups:
        forget()
    assert get_args(Optional[Union[first, *({int, float} - {first}), None]])[0] is first  # noqa: UP007, UP045
    jsonargparse._typehints._cached_class_parsers.clear()
    parser = OneLineParser()
    parser.add_argument("--sources", type=list[PreferenceSource])
    given = [
        {"name": "a", "path": "a", "sample": 5, "filter": {"lang": "en", "n": [1, 2], "s": {"min": 4.5}, "ok": True}},
        {"name": "b", "preset": "hh_rlhf", "sample": 0.5, "chat_template_kwargs": {"enable_thinking": False}},
        {"name": "c", "preset": "hh_rlhf", "sample": 1.0, "weight": 2, "repeat": 3},
    ]
    first, second, third = parser.instantiate_classes(parser.parse_args([f"--sources={json.dumps(given)}"])).sources
    assert first.filter == given[0]["filter"] and type(first.filter["ok"]) is bool and type(first.sample) is int
    assert (second.path, second.split, second.sample) == ("Anthropic/hh-rlhf", "train", 0.5)
    assert second.chat_template_kwargs == {"enable_thinking": False}
    assert (type(third.sample), third.weight, third.repeat) == (float, 2.0, 3)


# ---- filter and sample


def test_conditions_of_a_filter(tmp_path: Path) -> None:
    rows = [row(1, lang="en", score=4), row(2, lang="de", score=5.5), row(3, lang=None, score=True), row(4, score="5")]
    for condition, expected in (
        ({"lang": "en"}, [1]),
        ({"lang": ["en", "de"]}, [1, 2]),
        ({"score": {"min": 4}}, [1, 2]),
        ({"score": {"min": 4, "max": 4}}, [1]),
        ({"score": {"max": 100}, "lang": "de"}, [2]),
        ({"score": 4.0}, [1]),
        ({"score": True}, [3]),
        ({"score": [True, "5"]}, [3, 4]),
    ):
        loaded = load(tmp_path, rows, filter=condition)
        assert rows_of(loaded) == expected
        # Pair ids are those without a filter; what it leaves out isn't dropped.
        assert loaded.rows["pair_id"][:] == [n - 1 for n in expected]
        assert (loaded.left_out, loaded.dropped, loaded.total) == ({"filter": 4 - len(expected)}, {}, len(expected))
    with pytest.raises(ConfigurationError, match=r"unknown column 'langs'.*change `data.sources\[x\].filter`"):
        load(tmp_path, rows, filter={"langs": "en"})
    with pytest.raises(ConfigurationError, match=r"no row that passes, of 4.*change `data.sources\[x\].filter`"):
        load(tmp_path, rows, filter={"lang": "fr"})


def test_limit_then_filter_then_bad_rows_then_sample(tmp_path: Path) -> None:
    rows = [row(n, keep=n % 2, **({"chosen": ""} if n == 5 else {})) for n in range(12)]
    # Of rows 0 to 9 the filter leaves 1, 3, 5, 7, 9, of which row 5 has no answer: two of four are drawn.
    loaded = load(tmp_path, rows, limit=10, filter={"keep": 1}, sample=2)
    assert set(rows_of(loaded)) < {2, 4, 8, 10} and len(loaded.rows) == 2
    assert (loaded.total, loaded.dropped) == (5, {"empty_chosen": 1})
    assert loaded.left_out == {"filter": 5, "sample": 2}
    assert loaded.notes[-1][1] == "source 'x': left out 5 by `filter`, 2 by `sample`"


def test_a_sample_is_a_function_of_its_seed(tmp_path: Path) -> None:
    rows = [row(n) for n in range(40)]
    for sample, count in ((7, 7), (0.25, 10), (1.0, 40), (0.001, 1), (40, 40)):
        first, again = (rows_of(load(tmp_path, rows, sample=sample)) for _ in range(2))
        assert first == again == sorted(first) and len(first) == count
    assert rows_of(load(tmp_path, rows, sample=7, sample_seed=1)) != rows_of(load(tmp_path, rows, sample=7))
    too_many = load(tmp_path, rows, sample=41)
    assert len(too_many.rows) == 40
    assert "sample` is 41, but there are 40 pairs" in too_many.notes[0][1]


@FEW
@given(count=st.integers(1, 50), sample=st.integers(1, 60), seed=st.integers(0, 5))
def test_samples_grow_with_their_size(count: int, sample: int, seed: int) -> None:
    places = sampled(count, sample, seed).tolist()
    assert places == sorted(set(places)) and len(places) == min(count, sample)
    assert set(places) <= set(sampled(count, sample + 1, seed).tolist())


def test_the_held_out_file_is_filtered_and_not_sampled(tmp_path: Path) -> None:
    path = str(write_jsonl(tmp_path / "val.jsonl", [row(n, keep=n % 2) for n in range(6)]))
    source = PreferenceSource("x", path, val_path=path, filter={"keep": 1}, sample=1)
    assert len(load_source(source).rows) == 1
    assert rows_of(load_source(source, path=path, first_row=VAL_FIRST_ROW)) == [2, 4, 6]


# ---- rated lists

SCORED = {"columns": {"answers": "a", "scores": "s"}}


@pytest.mark.parametrize(
    ("columns", "more", "pairs"),
    [
        ({"answers": "a", "scores": "s"}, {"a": ["x", "y", "z"], "s": [1, 3, 2]}, [("y", "x")]),
        ({"answers": "a", "scores": "s"}, {"a": ["x", "y", "z"], "s": ["1", None, "N/A"]}, "unrated"),
        ({"answers": "a", "scores": "s"}, {"a": ["x", "y", "z"], "s": [2, None, "3.5"]}, [("z", "x")]),
        ({"answers": "a", "scores": "s"}, {"a": ["x", "y"], "s": [1, 1]}, "tied"),
        ({"answers": "a", "scores": "s"}, {"a": ["x", "y"], "s": [1]}, "unrated"),
        ({"answers": "a", "scores": "s"}, {"a": ["x"], "s": [1]}, "missing_answers"),
        ({"answers": "a", "scores": "s"}, {"a": ["x"] * 17, "s": [1] * 17}, "too_many_answers"),
        ({"answers": "a", "scores": "s"}, {"a": ["x", "x"], "s": [1, 2]}, "identical"),
        ({"answers": "a", "scores": "s"}, {"a": ["x", ""], "s": [1, 2]}, "empty_chosen"),
        ({"answers": "a.t", "ranks": "a.r"}, {"a": [{"t": "x", "r": 2}, {"t": "y", "r": 1}]}, [("y", "x")]),
        ({"answers": "a, b", "scores": "c,d"}, {"a": "x", "b": "y", "c": 2, "d": 7}, [("y", "x")]),
        ({"answers": "a, b", "preference": "p"}, {"a": "x", "b": "y", "p": -2}, [("x", "y")]),
        ({"answers": "a, b", "preference": "p"}, {"a": "x", "b": "y", "p": 1}, [("y", "x")]),
        ({"answers": "a, b", "preference": "p"}, {"a": "x", "b": "y", "p": 0}, "tied"),
        ({"answers": "a, b", "best": "p"}, {"a": "x", "b": "y", "p": 1}, [("y", "x")]),
        ({"answers": "a, b", "best": "p"}, {"a": "x", "b": "y", "p": 2}, "unrated"),
    ],
)
def test_verdicts(tmp_path: Path, columns: dict[str, str], more: dict[str, Any], pairs: Any) -> None:
    good = {"prompt": "q", "a": ["x", "y"], "s": [1, 2]}
    if isinstance(pairs, str):
        loaded = load(
            tmp_path,
            [{"prompt": "q", **more}, good]
            if columns == SCORED["columns"]
            else [
                {"prompt": "q", **more},
                {"prompt": "q", "a": "x", "b": "y", "p": -1 if "preference" in columns else 0},
            ],
            columns=columns,
        )
        assert loaded.dropped == {pairs: 1}
        return
    loaded = load(tmp_path, [{"prompt": "q", **more}], columns=columns)
    assert [(r["chosen"], r["rejected"]) for r in loaded.rows] == pairs


def test_answers_beside_messages_are_the_assistants(tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "q"}]
    rated = {"prompt": talk, "a": ["x", [{"role": "assistant", "content": "y"}]], "s": [1, 2]}
    (pair,) = load(tmp_path, [rated], **SCORED).rows
    assert pair["prompt"] == talk
    assert [pair[side][0]["content"] for side in ("chosen", "rejected")] == ["y", "x"]


def test_an_answer_of_another_form_drops_its_own_pairs_only(tmp_path: Path) -> None:
    # Beside a string prompt: x and z are strings, y is messages, so of three pairs only z > x is left.
    answers = ["x", [{"role": "assistant", "content": "y"}], "z"]
    loaded = load(tmp_path, [{"prompt": "q", "a": answers, "s": [1, 2, 3]}], rated_pairs="all", **SCORED)
    assert [(r["chosen"], r["rejected"]) for r in loaded.rows] == [("z", "x")]
    assert (loaded.total, loaded.dropped) == (3, {"wrong_type": 2})


def test_every_pair_of_a_row_has_its_own_stable_id(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "a": ["w", "x"], "s": [0, 1]}, {"prompt": "q", "a": ["x", "y", "z"], "s": [1, 5, 2]}]
    every = load(tmp_path, rows, rated_pairs="all", **SCORED)
    found = {(r["chosen"], r["rejected"]): r["pair_id"] for r in every.rows}
    # Places (0, 1) have the number 0, (0, 2) 1, (1, 2) 2; the rows are 0 and 1.
    assert found == {("x", "w"): 0, ("y", "x"): 1, ("y", "z"): (2 << 32) + 1, ("z", "x"): (1 << 32) + 1}
    assert sorted(rows_of(every)) == [1, 2, 2, 2] and every.total == 4
    wide = load(tmp_path, rows, rated_pairs="all", min_gap=2.0, **SCORED)
    assert {(r["chosen"], r["rejected"]): r["pair_id"] for r in wide.rows} == {
        pair: found[pair] for pair in (("y", "x"), ("y", "z"))
    }
    assert wide.dropped == {"tied": 1}


@FEW
@given(
    scores=st.lists(st.one_of(st.none(), st.integers(-3, 3).map(float)), min_size=2, max_size=MOST_ANSWERS),
    gap=st.sampled_from([0.0, 1.0, 2.5]),
)
def test_pairs_by_brute_force(scores: list[float | None], gap: float) -> None:
    rated = [n for n, score in enumerate(scores) if score is not None]
    wanted = {(a, b) for a in rated for b in rated if scores[a] > scores[b] and scores[a] - scores[b] >= gap}
    assert set(choose_pairs(scores, "all", gap)) == wanted
    best = list(choose_pairs(scores, "best_worst", gap))
    assert len(best) == bool(wanted) and set(best) <= wanted
    assert all(scores[a] == max(scores[n] for n in rated) for a, _ in best)


def test_numbers_of_pairs_and_ids_never_meet() -> None:
    numbers = [pair_number(a, b) for a, b in combinations(range(MOST_ANSWERS), 2)]
    assert sorted(numbers) == list(range(120)) and pair_number(7, 3) == pair_number(3, 7)
    ids = {
        pair_id_of((source << 40) + first, place, number)
        for source in (0, 1)
        for first in (0, VAL_FIRST_ROW)
        for place in (0, 1, (1 << 32) - 1)
        for number in (0, 1, 119)
    }
    assert len(ids) == 2 * 2 * 3 * 3
    assert {row_number(i) for i in ids} == {1, 2, 1 << 32} and {i >> 40 for i in ids} == {0, 1}


def test_values_in_other_shapes() -> None:
    # How `datasets` gives a list of structs, and how JSON does.
    assert values_of({"c": {"r": ["x", "y"]}}, "c.r") == values_of({"c": [{"r": "x"}, {"r": "y"}]}, "c.r") == ["x", "y"]
    assert values_of({"c": "x"}, "c") is None
    assert scores_of("scores", [True, float("inf"), "1e999", 2], 4) == [None, None, None, 2.0]


# ---- repeat and weight


@pytest.fixture
def two(tmp_path: Path) -> list[PreferenceSource]:
    return [
        PreferenceSource(name, str(write_jsonl(tmp_path / f"{name}.jsonl", make_rows(count, 1, name))))
        for name, count in (("a", 5), ("b", 6))
    ]


def test_repeated_pairs_come_exactly_so_often(tmp_path: Path, tiny_model_dir: Path, two: list) -> None:
    sources = [replace(two[0], repeat=3), two[1]]
    trainer, _ = fit(tmp_path / "run", tiny_model_dir, sources, stages=[["a", "b"]], val_fraction=0.2)
    data = trainer.datamodule
    (stage,) = data.stages()
    (a, b) = data.reports.values()
    assert (a.pairs, a.val_pairs) == (4, 1)
    assert sorted(stage.pair_ids) == sorted(a.train_ids * 3 + b.train_ids)
    assert [i for i in data.reference_ids(stage)] == a.train_ids + b.train_ids + a.val_ids + b.val_ids
    seen = [i for run in data._passes(data.collator).training(stage, 0).run_ids() for i in run]
    assert sorted(seen) == sorted(stage.pair_ids)
    # 4 * 3 + 4 or 5 pairs, two a step.
    assert len(losses(tmp_path / "run")) == -(-len(stage.pair_ids) // 2)


def test_a_cached_reference_knows_repeated_pairs(tmp_path: Path, tiny_model_dir: Path, two: list) -> None:
    sources = [replace(two[0], repeat=2), two[1]]
    fit(tmp_path / "resident", tiny_model_dir, sources)
    fit(tmp_path / "cached", tiny_model_dir, sources, reference=CachedReference())
    assert losses(tmp_path / "cached") == pytest.approx(losses(tmp_path / "resident"), abs=1e-5)


def pairs_of(sizes: tuple[int, ...]) -> tuple[PairStore, list[int]]:
    ids = [(source << 40) + n for source, size in enumerate(sizes) for n in range(size)]
    columns = {name: [[n + 1, 2] for n in range(len(ids))] for name in ("prompt_ids", "chosen_ids", "rejected_ids")}
    return PairStore([Dataset.from_dict({"pair_id": ids, **columns})]), ids


def test_weights_of_a_step_add_up_to_its_pairs_over_ranks_and_micro_batches() -> None:
    store, ids = pairs_of((3, 5))
    loaders = [StageLoader(store, PaddedCollator(0), ids, 2, rank, 2, 2, weights={0: 3.0, 1: 1.0}) for rank in range(2)]
    batches = [batch for loader in loaders for batch in loader]
    # One step of 2 micro-batches on 2 ranks takes all 8 pairs: weights 3 3 3 1 1 1 1 1 with the mean 14 / 8.
    found = {i: w for batch in batches for i, w in zip(batch.pair_id.tolist(), batch.weights.tolist(), strict=True)}
    assert [found[i] for i in ids] == pytest.approx([3 * 8 / 14] * 3 + [8 / 14] * 5)
    assert sum(found.values()) == pytest.approx(8) and {batch.step_pairs for batch in batches} == {8}
    # So the loss of the step, as `training_step` makes it, is sum(w l) / sum(w).
    values = torch.arange(8.0)
    mean = sum(found[i] * value for i, value in zip(ids, values, strict=True)) / 8
    assert float(mean) == pytest.approx((3 * (0 + 1 + 2) + (3 + 4 + 5 + 6 + 7)) / 14)


def test_fillers_weigh_nothing_and_equal_weights_change_no_bit() -> None:
    store, ids = pairs_of((2, 1))
    loader = StageLoader(store, PaddedCollator(0), ids, 2, 1, 2, 2, weights={0: 3.0})
    assert [batch.weights.tolist() for batch in loader] == [[pytest.approx(3 / 7)]]
    (filler,) = StageLoader(store, PaddedCollator(0), ids, 3, 1, 2, 1, weights={0: 3.0})
    assert filler.weights.tolist() == [0.0]
    (same,) = StageLoader(store, PaddedCollator(0), ids, 3, weights={0: 0.3, 1: 0.3})
    assert same.weights.tolist() == [1.0, 1.0, 1.0]


def test_weights_change_a_run_only_where_they_differ(tmp_path: Path, tiny_model_dir: Path, two: list) -> None:
    for name, weights in (("plain", (1.0, 1.0)), ("equal", (0.25, 0.25)), ("other", (4.0, 1.0))):
        sources = [replace(source, weight=weight) for source, weight in zip(two, weights, strict=True)]
        fit(tmp_path / name, tiny_model_dir, sources, stages=[["a", "b"]])
    model = Path("stages") / "01-a+b"
    assert_same_weights(tmp_path / "plain" / model, tmp_path / "equal" / model)
    with pytest.raises(AssertionError):
        assert_same_weights(tmp_path / "plain" / model, tmp_path / "other" / model)


def test_a_run_with_all_settings_resumes_bit_for_bit(tmp_path: Path, tiny_model_dir: Path, two: list) -> None:
    sources = [replace(two[0], repeat=2, weight=3.0, sample=4), replace(two[1], sample=0.5)]
    given = {"stages": [["a", "b"]], "bucket_window": 2}
    fit(tmp_path / "whole", tiny_model_dir, sources, **given)
    fit(tmp_path / "cut", tiny_model_dir, sources, trainer_args={"max_steps": 3}, **given)
    (checkpoint,) = (tmp_path / "cut" / "checkpoints").glob("stopped-step=3.ckpt")
    # 4 * 2 + 3 pairs, two a step: six steps.
    assert len(losses(tmp_path / "whole")) == 6
    for change in ({"repeat": 3}, {"weight": 1.0}):
        changed = [replace(sources[0], **change), sources[1]]
        with pytest.raises(ResumeError, match="`repeat` or `weight`, have changed: 'a'"):
            fit(tmp_path / "cut", tiny_model_dir, changed, ckpt_path=checkpoint, **given)
    with pytest.raises(ResumeError, match="tokenised rows"):
        fit(tmp_path / "cut", tiny_model_dir, [sources[0], two[1]], ckpt_path=checkpoint, **given)
    fit(tmp_path / "cut", tiny_model_dir, sources, ckpt_path=checkpoint, **given)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert_same_weights(*(tmp_path / name / "stages" / "01-a+b" for name in ("cut", "whole")))


def test_the_repeat_of_a_later_stage_may_change(tmp_path: Path, tiny_model_dir: Path, two: list) -> None:
    fit(tmp_path, tiny_model_dir, two, trainer_args={"max_steps": 2})
    (checkpoint,) = (tmp_path / "checkpoints").glob("stopped-step=2.ckpt")
    later = [two[0], replace(two[1], repeat=2)]
    trainer, _ = fit(tmp_path, tiny_model_dir, later, ckpt_path=checkpoint)
    assert [len(stage.pair_ids) for stage in trainer.datamodule.stages()] == [5, 12]
    # ceil(5 / 2) + 12 / 2 steps.
    assert len(losses(tmp_path)) == 3 + 6


def test_repeats_make_no_pair_look_memorised_twice() -> None:
    table = LogpTable.build(torch.tensor([0, 1]), PairLogps(*torch.zeros(2, 2), *torch.ones(2, 2, dtype=torch.int64)))
    reference = PairLogps(torch.tensor([1.0, 2.0]), torch.zeros(2), *torch.ones(2, 2, dtype=torch.int64))
    batch = SimpleNamespace(pair_id=torch.tensor([0, 1]), weights=torch.tensor([3.0, 3.0]))
    found = []
    for repeat in (1, 2):
        trainer = SimpleNamespace(datamodule=PairLists([SimpleNamespace(name="a", repeat=repeat)], None, 0, []))
        module = SimpleNamespace(m0_logps=table, last_logps=(None, reference), trainer=trainer)
        guard = ContaminationGuard()
        for _ in range(repeat):
            guard._add("train", module, batch)
        found.append(guard._sums["train", 0].tolist())
    # Two pairs, 1 + 2, 1 + 4.
    assert found == [[2.0, 3.0, 5.0]] * 2


def test_what_is_left_out_and_repeated_stands_in_curriculum_json(
    tmp_path: Path, tiny_model_dir: Path, two: list
) -> None:
    fit(tmp_path, tiny_model_dir, [replace(two[0], repeat=2, sample=3, weight=0.5), two[1]])
    report = json.loads((tmp_path / "curriculum.json").read_text())
    first, second = report["sources"]
    assert (first["pairs"], first["repeat"], first["weight"], first["left_out"]) == (3, 2, 0.5, {"sample": 2})
    assert (second["pairs"], second["repeat"], second["left_out"]) == (6, 1, {})
    assert [stage["pairs"] for stage in report["stages"]] == [6, 6]


def test_a_batch_says_what_its_weights_are() -> None:
    assert "step_pairs" in (PreferenceBatch.__doc__ or "")
