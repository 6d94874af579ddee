"""Difficulty of a pair, and what of it is length: by hand, by property, and through the verb `rank`."""

from __future__ import annotations

import json
import random

import pytest
import torch
from helpers import make_rows, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import command_line
from transformers import AutoModelForCausalLM

from sdpo_lightning import PairLogps
from sdpo_lightning.cli import main
from sdpo_lightning.data import difficulty as d
from sdpo_lightning.data.selection import ranked_ids
from sdpo_lightning.types import ConfigurationError

pytestmark = pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")
FEW = settings(max_examples=60, deadline=None, derandomize=True)


def logps(gammas, chosen, rejected):
    return PairLogps(torch.tensor(gammas), torch.zeros(len(gammas)), torch.tensor(chosen), torch.tensor(rejected))


@st.composite
def tables(draw):
    size = draw(st.integers(1, 12))
    numbers = st.lists(st.integers(-40, 40), min_size=size, max_size=size)
    lengths = st.lists(st.integers(1, 30), min_size=size, max_size=size)
    return logps([float(g) for g in draw(numbers)], draw(lengths), draw(lengths))


def test_like_length_by_hand():
    # 10 against 9: 1 of 10, just 10 %. 9 against 10 likewise. 10 against 8: 20 %. 19 against 21: 2 of 21 < 10 %.
    table = logps([1.0, -1.0, 5.0, 3.0], [10, 9, 10, 19], [9, 10, 8, 21])
    assert d.is_matched(table).tolist() == [True, True, False, True]
    scores = d.length_matched(table)
    assert scores[[0, 1, 3]].tolist() == [1.0, -1.0, 3.0] and bool(scores[2].isnan())
    figures = d.length_figures(table)
    # Chosen shorter: no, yes, no, yes; right of like length: 1, 0, 1.
    assert (figures.shorter_chosen, figures.length_matched_pairs) == (0.5, 3)
    assert figures.length_matched_accuracy == pytest.approx(2 / 3)


@FEW
@given(tables())
def test_length_matched_keeps_gamma_or_counts_nothing(table):
    scores = d.length_matched(table)
    columns = (scores, table.gamma, table.chosen_lengths, table.rejected_lengths)
    for score, gamma, a, b in zip(*(column.tolist() for column in columns), strict=True):
        assert score == gamma if 10 * abs(a - b) <= max(a, b) else score != score


def test_residual_by_hand():
    # Differences 0, 1, 2, mean 1; gammas 1, 0, 5, mean 2; slope (-1 * -1 + 0 + 1 * 3) / 2 = 2: fits 0, 2, 4.
    assert d.residual(logps([1.0, 0.0, 5.0], [5, 6, 7], [5, 5, 5])).tolist() == [1.0, -2.0, 1.0]
    # Equal differences explain nothing: gamma less its mean.
    assert d.residual(logps([1.0, 3.0], [5, 9], [3, 7])).tolist() == [-1.0, 1.0]


@FEW
@given(tables(), st.floats(-3, 3), st.randoms())
def test_residual_sees_no_length_and_no_order(table, slope, shuffler):
    found = d.residual(table)
    difference = d.length_difference(table).float()
    assert found.mean().item() == pytest.approx(0, abs=1e-3)
    assert (found * difference).mean().item() == pytest.approx(0, abs=1e-2)
    # What is a line in the length changes nothing.
    tilted = PairLogps(table.chosen + slope * difference, table.rejected, table.chosen_lengths, table.rejected_lengths)
    if len(difference.unique()) > 1:
        assert torch.allclose(d.residual(tilted), found, atol=1e-3)
    order = list(range(len(found)))
    shuffler.shuffle(order)
    columns = (table.chosen, table.rejected, table.chosen_lengths, table.rejected_lengths)
    assert torch.allclose(d.residual(PairLogps(*(c[order] for c in columns))), found[order], atol=1e-4)


def test_rank_correlation_by_hand():
    # Ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4: products 2.25 + 0 + 0 + 2.25 over sqrt(4.5 * 5).
    value = d.rank_correlation(torch.tensor([1.0, 2.0, 2.0, 9.0]), torch.tensor([0.0, 1.0, 5.0, 6.0]))
    assert value == pytest.approx(4.5 / (4.5 * 5) ** 0.5)
    assert d.rank_correlation(torch.tensor([1.0, 2.0, 7.0]), torch.tensor([3.0, 2.0, -1.0])) == pytest.approx(-1)
    assert d.rank_correlation(torch.ones(3), torch.arange(3)) is None


def test_the_sentence():
    shares = {"a": 0.7, "b": 0.5, "c": 0.5}
    assert "`data.difficulty`" in d.length_sentence(["a", "b", "c"], shares)
    assert "`data.difficulty`" in d.length_sentence(["a", "c", "b"], shares)
    assert d.length_sentence(["b", "a", "c"], shares) == ""
    assert d.length_sentence(["a"], shares) == "" == d.length_sentence(["a", "b"], {"a": 0.7, "b": None})


@pytest.mark.parametrize("setting", ["sum_logp", "no function.x", "nowhere_at_all.f", "math.nothing", "math.pi"])
def test_no_such_difficulty(setting):
    with pytest.raises(ConfigurationError, match="`data.difficulty` is "):
        d.check_difficulty(setting)
        d.find_difficulty(setting)


def short_first(logps):
    return (logps.rejected_lengths - logps.chosen_lengths).float()


@pytest.fixture
def arguments(tmp_path, tiny_model_dir):
    return ["rank", *command_line(tmp_path, tiny_model_dir, {"a": 30, "b": 30, "c": 30})]


def ranked(arguments, tmp_path, more):
    main([*arguments, *more])
    found = json.loads((tmp_path / "run" / "curriculum.json").read_text())
    return found, {row["name"]: row for row in found["sources"]}


def test_length_alone_is_said(arguments, tmp_path, capsys):
    found, rows = ranked(arguments, tmp_path, [f"--data.difficulty={__name__}.short_first"])
    # The accuracy of such a score is the share itself.
    assert all(row["reward_accuracy"] == pytest.approx(row["shorter_chosen"]) for row in rows.values())
    assert "length alone would give it" in found["length_order"] in capsys.readouterr().out
    for name, seed in (("a", 0), ("b", 1), ("c", 2)):
        signs = [len(r["rejected"].split()) - len(r["chosen"].split()) for r in make_rows(30, seed, name)]
        assert rows[name]["shorter_chosen"] == pytest.approx(sum((s > 0) + 0.5 * (s == 0) for s in signs) / 30)


@given(count=st.integers(1, 60), sample=st.integers(2, 60) | st.none(), seed=st.integers(0, 9))
def test_a_sample_is_a_pure_draw_of_so_many(count, sample, seed):
    ids = [7 * i for i in range(count)]
    drawn = list(ranked_ids(ids, sample, seed))
    assert drawn == list(ranked_ids(ids, sample, seed)) == sorted(set(drawn) & set(ids))
    assert len(drawn) == min(count, sample or count)


def test_ranking_over_a_sample_says_its_standard_error(arguments, tmp_path):
    """Files whose easy rows all stand at the front, so that the first N rows would say 1."""
    for seed, name in enumerate(("a", "b", "c")):
        rows = make_rows(30, seed, name)
        rows.sort(key=lambda row: len(row["chosen"].split()) - len(row["rejected"].split()))
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    more = [f"--data.difficulty={__name__}.short_first", "--data.rank_sample=8"]
    _, rows = ranked(arguments, tmp_path, more)
    for row in rows.values():
        accuracy = row["reward_accuracy"]
        # Of 8 pairs, ties 1/2; without ties the deviation of a share is sqrt(p (1 - p) 8 / 7), and p = 8 / 8 is none.
        assert (16 * accuracy) % 1 == 0 and 0 < accuracy < 1
        assert 0 < row["standard_error"] <= (accuracy * (1 - accuracy) * 8 / 7 / 8) ** 0.5 + 1e-9
    _, others = ranked(arguments, tmp_path, [*more, "--data.seed=1"])
    assert [row["reward_accuracy"] for row in others.values()] != [row["reward_accuracy"] for row in rows.values()]


def test_each_difficulty_ranks(arguments, tmp_path):
    seen = {}
    for name in ("sum_logps", "mean_logps", "length_matched", "residual"):
        _, rows = ranked(arguments, tmp_path, [f"--data.difficulty={name}"])
        seen[name] = [row["reward_accuracy"] for row in rows.values()]
        if name == "length_matched":
            assert seen[name] == [row["length_matched_accuracy"] for row in rows.values()]
            assert all(0 < row["length_matched_pairs"] < 30 for row in rows.values())
        if name == "mean_logps":
            assert seen[name] == [row["mean_logps_accuracy"] for row in rows.values()]
    assert len({tuple(values) for values in seen.values()}) == 4


def test_rewards_against_another_model(arguments, tmp_path, tiny_model_dir, tiny_tokenizer):
    # Against itself every reward is 0, and every pair a tie.
    _, rows = ranked(arguments, tmp_path, [f"--data.difficulty_reference={tiny_model_dir}"])
    assert [row["reward_accuracy"] for row in rows.values()] == [0.5] * 3
    other = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    torch.manual_seed(random.Random(1).randint(0, 99))
    for parameter in other.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    other.save_pretrained(tmp_path / "other")
    tiny_tokenizer.save_pretrained(tmp_path / "other")
    _, plain = ranked(arguments, tmp_path, [])
    _, rewards = ranked(arguments, tmp_path, [f"--data.difficulty_reference={tmp_path / 'other'}"])
    _, turned = ranked(
        arguments,
        tmp_path,
        [f"--data.difficulty_reference={tiny_model_dir}", f"--model.model_name_or_path={tmp_path / 'other'}"],
    )
    for name in plain:
        # gamma - gamma_ref turns its sign where the two change places.
        assert rewards[name]["reward_accuracy"] == pytest.approx(1 - turned[name]["reward_accuracy"])
    assert [r["reward_accuracy"] for r in rewards.values()] != [r["reward_accuracy"] for r in plain.values()]
