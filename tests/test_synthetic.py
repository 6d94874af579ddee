"""The generated language of the demo: known rule, graded difficulty, clean tokenisation, determinism."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sdpo_lightning import synthetic
from sdpo_lightning.synthetic import (
    SOURCE_NAMES,
    held_out_accuracy,
    make_pairs,
    preference_rate,
    satisfies,
    train_sft,
    write_inputs,
)

EASY_TO_HARD = ("courtesy", "topic", "closing")


@pytest.fixture(scope="module")
def sft():
    state = torch.get_rng_state()
    model, tokenizer = train_sft(0)
    assert torch.equal(torch.get_rng_state(), state), "train_sft moved the global random state"
    return model, tokenizer


def read_rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("source", SOURCE_NAMES)
@pytest.mark.parametrize("held_out", [False, True])
def test_chosen_satisfies_the_rule_and_rejected_does_not(source: str, held_out: bool):
    rows = make_pairs(source, 200, seed=1, held_out=held_out)
    assert len(rows) == 200
    for row in rows:
        assert row.keys() == {"prompt", "chosen", "rejected"}
        assert satisfies(source, row["prompt"], row["chosen"])
        assert not satisfies(source, row["prompt"], row["rejected"])
        assert len(row["chosen"].split()) == len(row["rejected"].split()), "length must not decide"


@pytest.mark.parametrize(
    ("source", "answer", "good"),
    [
        ("courtesy", " sure well foxes just still enough", True),
        ("courtesy", " ugh sure foxes just still cheers", False),
        ("topic", " ugh well foxes just still enough", True),
        ("topic", " ugh well hens just still cheers", False),
        ("topic", " ugh foxes hens just still cheers", False),
        ("topic", " sure well just still cheers", False),
        ("closing", " ugh well hens just still cheers", True),
        ("closing", " sure cheers foxes just still enough", False),
        ("closing", "", False),
    ],
)
def test_rule_on_answers_written_by_hand(source: str, answer: str, good: bool):
    assert satisfies(source, "tell busy poets about foxes today :", answer) is good


def test_unknown_source_is_refused():
    with pytest.raises(ValueError, match="unknown source 'tone'"):
        make_pairs("tone", 1, seed=0)
    with pytest.raises(ValueError, match="unknown source"):
        satisfies("tone", "", "")


def test_other_aspects_are_independent_of_the_label():
    rows = make_pairs("topic", 2000, seed=0)
    for aspect in ("courtesy", "closing"):
        shares = [
            sum(satisfies(aspect, row["prompt"], row[side]) for row in rows) / len(rows)
            for side in ("chosen", "rejected")
        ]
        # Standard error of the difference is below sqrt(2 * 0.25 / 2000) = 0.016.
        assert abs(shares[0] - shares[1]) < 0.05


def test_pairs_are_a_function_of_the_seed():
    assert make_pairs("topic", 50, seed=3) == make_pairs("topic", 50, seed=3)
    assert make_pairs("topic", 50, seed=3) != make_pairs("topic", 50, seed=4)


def test_held_out_prompts_are_distinct_and_never_trained_on():
    held_out = [row["prompt"] for row in make_pairs("closing", 300, seed=0, held_out=True)]
    trained = {row["prompt"] for source in SOURCE_NAMES for row in make_pairs(source, 3000, seed=0)}
    assert len(set(held_out)) == 300
    assert not trained & set(held_out)
    with pytest.raises(ValueError, match="held-out prompts"):
        make_pairs("closing", 100_000, seed=0, held_out=True)


def test_shuffled_labels_swap_half_of_the_same_pairs():
    straight = make_pairs("closing", 400, seed=0)
    shuffled = make_pairs("closing", 400, seed=0, shuffle_labels=True)
    swapped = 0
    for row, other in zip(straight, shuffled, strict=True):
        assert row["prompt"] == other["prompt"]
        assert {row["chosen"], row["rejected"]} == {other["chosen"], other["rejected"]}
        swapped += row["chosen"] != other["chosen"]
    assert swapped == 200


def test_tokens_of_the_prompt_are_a_prefix_and_no_word_is_unknown(sft):
    _, tokenizer = sft
    for source in SOURCE_NAMES:
        for row in make_pairs(source, 50, seed=0):
            prompt_ids = tokenizer(row["prompt"])["input_ids"]
            for side in ("chosen", "rejected"):
                ids = tokenizer(row["prompt"] + row[side] + tokenizer.eos_token)["input_ids"]
                assert ids[: len(prompt_ids)] == prompt_ids
                assert ids[-1] == tokenizer.eos_token_id
                assert tokenizer.unk_token_id not in ids
                assert tokenizer.decode(ids, skip_special_tokens=True) == row["prompt"] + row[side]


def test_difficulty_is_graded_for_m0(sft):
    pairs = {source: make_pairs(source, 400, seed=0, held_out=True) for source in EASY_TO_HARD}
    accuracies = [held_out_accuracy(*sft, pairs[source]) for source in EASY_TO_HARD]
    rates = [preference_rate(*sft, pairs[source], source, samples=2) for source in EASY_TO_HARD]
    for easier, harder in zip((*accuracies[:-1], *rates[:-1]), (*accuracies[1:], *rates[1:]), strict=True):
        assert easier[0] - harder[0] > 5 * math.hypot(easier[1], harder[1])
    assert SOURCE_NAMES not in (EASY_TO_HARD, EASY_TO_HARD[::-1])


def test_m0_samples_have_the_form_of_the_data(sft):
    model, tokenizer = sft
    prompts = [row["prompt"] for row in make_pairs("topic", 200, seed=0, held_out=True)]
    answers = synthetic._sample_answers(model, tokenizer, prompts, seed=0)
    assert sum(len(answer.split()) == 6 for answer in answers) >= 195


def test_preference_rate_is_seeded_and_leaves_the_global_state_alone(sft):
    rows = make_pairs("closing", 40, seed=0, held_out=True)
    state = torch.get_rng_state()
    first = preference_rate(*sft, rows, "closing", seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    assert preference_rate(*sft, rows, "closing", seed=5) == first
    assert preference_rate(*sft, rows, "closing", seed=6) != first


def test_accuracy_agrees_with_a_pair_by_pair_computation(sft):
    model, tokenizer = sft
    rows = make_pairs("courtesy", 20, seed=0, held_out=True)

    def logps(prompt: str, answer: str) -> float:
        start = len(tokenizer(prompt)["input_ids"])
        ids = torch.tensor([tokenizer(prompt + answer + "</s>")["input_ids"]])
        with torch.no_grad():
            table = model(input_ids=ids).logits[0].log_softmax(-1)
        return sum(table[i - 1, ids[0, i]].item() for i in range(start, ids.shape[1]))

    wins = [logps(row["prompt"], row["chosen"]) > logps(row["prompt"], row["rejected"]) for row in rows]
    mean, error = held_out_accuracy(model, tokenizer, rows)
    assert mean == pytest.approx(sum(wins) / 20)
    # 20 prompts of one pair each: the clustered error is the plain one.
    assert error == pytest.approx(math.sqrt(mean * (1 - mean) / 19))


def test_ties_count_one_half(sft):
    rows = [row | {"rejected": row["chosen"]} for row in make_pairs("topic", 10, seed=0)]
    assert held_out_accuracy(*sft, rows) == (0.5, 0.0)


def test_standard_error_is_clustered():
    # Two prompts, four equal samples each: as good as two draws, variance 0.25 * 2 / (2 - 1) / 2.
    mean, error = synthetic._clustered_mean([1.0] * 4 + [0.0] * 4, ["a"] * 4 + ["b"] * 4)
    assert (mean, error) == (0.5, pytest.approx(0.5))
    assert math.isnan(synthetic._clustered_mean([1.0, 0.0], ["a", "a"])[1])


def test_training_is_a_function_of_the_seed():
    weights = []
    for seed in (0, 0, 1):
        random.seed(len(weights))
        torch.manual_seed(len(weights))
        weights.append(train_sft(seed, steps=3)[0].state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not torch.equal(weights[0]["lm_head.weight"], weights[2]["lm_head.weight"])


@pytest.mark.parametrize("control", [False, True])
def test_written_inputs_load_and_held_out_labels_stay_right(tmp_path, monkeypatch, sft, control: bool):
    monkeypatch.setattr(synthetic, "train_sft", lambda seed: sft)
    write_inputs(tmp_path / "inputs", seed=0, train_pairs=60, val_pairs=100, control=control)
    for source in SOURCE_NAMES:
        rows = read_rows(tmp_path / "inputs" / f"{source}.jsonl")
        right = sum(satisfies(source, row["prompt"], row["chosen"]) for row in rows)
        assert (len(rows), right) == (60, 30 if control else 60)
        held_out = read_rows(tmp_path / "inputs" / f"{source}.val.jsonl")
        assert len(held_out) == 100
        assert all(satisfies(source, row["prompt"], row["chosen"]) for row in held_out)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "inputs" / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "inputs" / "model")
    assert (tmp_path / "inputs" / "model" / "model.safetensors").exists()
    assert model.dtype == torch.float32
    assert model.generation_config.max_new_tokens == 10
    assert tokenizer.eos_token_id == model.config.eos_token_id
    assert held_out_accuracy(model, tokenizer, held_out) == held_out_accuracy(*sft, held_out)
