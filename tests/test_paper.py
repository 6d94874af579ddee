"""`benchmarks/paper`: the language, the statistics, and every step of a run at a size that says nothing."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from runs import metrics

from benchmarks.paper import __main__ as command
from benchmarks.paper.evaluation import clustered, kl_of_answers, sample
from benchmarks.paper.language import (
    ANSWER_TOKENS,
    SOURCES,
    SPLITS,
    WORDS,
    Rater,
    draw_answer,
    make_pairs,
    parsed,
    preference,
    prompts_of,
    quality,
    quality_shares,
    writer_of,
    wrong_share,
)
from benchmarks.paper.results import choose, columns, difference, main_rows
from benchmarks.paper.rows import BETAS, LEARNING_RATES, Inputs, Settings, grid, make_rows, sdpo_grid
from benchmarks.paper.statistics import at_kl, mean_and_error, paired, t_quantile, t_tail
from benchmarks.paper.table import interval, markdown
from benchmarks.paper.units import Bench, fit, quiet
from sdpo_lightning import PreferenceSource

PROMPT = "anxious sailors ask about foxes :"


# ---- the language


def test_splits_share_no_prompt_and_all_words():
    sets = {split: set(prompts_of(split)) for split in SPLITS}
    assert {split: len(prompts) for split, prompts in sets.items()} == {"train": 512, "validation": 128, "test": 128}
    assert not sets["train"] & sets["test"] and not sets["train"] & sets["validation"]
    assert not sets["validation"] & sets["test"]
    words = [{word for prompt in prompts for word in prompt.split()} for prompts in sets.values()]
    assert words[0] == words[1] == words[2] and len(words[0]) == 8 + 8 + 12 + 3
    assert len(set(WORDS)) == len(WORDS) < 100
    # Both kinds of readers in each split.
    assert {len({writer_of(prompt) for prompt in prompts}) for prompts in sets.values()} == {2}


@pytest.mark.parametrize(
    ("answer", "points"),
    [
        # 20 + 24 + 24 + 16 + 16.
        (" kindly gentle foxes burrow cheers", 100),
        (" kindly well just gentle foxes burrow cheers", 100 - 2 * 5),
        (" so gentle foxes burrow done", 10 + 24 + 24 + 16 + 8),
        # Another mood's register, another topic; its detail is the named topic's, not the prompt's.
        (" kindly grand rivers bank cheers", 20 + 16),
        (" ugh dry bees hive enough", 0),
        (" ugh really dry bees hive enough", 0),
        (" kindly gentle foxes burrow", 0),
        (" kindly gentle well foxes burrow cheers", 0),
        (" gentle kindly foxes burrow cheers", 0),
        ("", 0),
    ],
)
def test_quality(answer, points):
    assert quality(PROMPT, answer) == points


def test_form():
    # 0 points, and yet of the form.
    assert parsed(" ugh dry bees hive enough") == (2, 0, 3, "bees", "hive", 2)
    assert parsed(" ugh dry bees hive hive") is None and parsed(" kindly gentle foxes burrow cheers cheers") is None


def test_preference_is_exact():
    shares = quality_shares(writer_of(PROMPT))
    assert sum(shares.values()) == pytest.approx(1)
    below = sum(share for points, share in shares.items() if points < 100)
    assert preference(PROMPT, " kindly gentle foxes burrow cheers") == pytest.approx(below + shares[100] / 2)
    # Against itself the distribution wins half of the time.
    wins = sum(s * (sum(t for q, t in shares.items() if q < p) + s / 2) for p, s in shares.items())
    assert wins == pytest.approx(0.5)
    rng = random.Random(0)
    drawn = [quality(PROMPT, draw_answer(rng, PROMPT, writer_of(PROMPT))) for _ in range(4000)]
    mean, error = mean_and_error(drawn)
    assert abs(mean - sum(p * s for p, s in shares.items())) < 4 * error
    assert all(len(draw_answer(rng, PROMPT, writer_of(PROMPT)).split()) < ANSWER_TOKENS for _ in range(100))


def test_sources_differ_in_noise():
    wrong = {source: wrong_share(make_pairs(source, 2000, 7)) for source in SOURCES}
    # Of `orca` 5 % are turned round: 4 standard errors are 2 points. The rater of `feedback` errs far more often.
    assert abs(wrong["orca"] - 0.05) < 0.02 and 0.2 < wrong["feedback"] < 0.4
    assert wrong_share(make_pairs("feedback", 500, 7, "test")) == 0
    exact = Rater(noise=0.2, filler_bias=0)
    assert wrong_share([r for r in make_pairs("feedback", 300, 7, rater=exact) if _gap(r)]) == 0
    assert make_pairs("orca", 3, 1) == make_pairs("orca", 3, 1) != make_pairs("orca", 3, 2)
    assert all(row["chosen"] != row["rejected"] for row in make_pairs("feedback", 500, 3))
    with pytest.raises(ValueError, match="expected one of"):
        make_pairs("orcas", 1, 0)


def _gap(row: dict) -> int:
    return quality(row["prompt"], row["chosen"]) - quality(row["prompt"], row["rejected"])


# ---- evaluation


class Coin:
    """A model of two tokens, of which 1 ends an answer, with the same chance of it everywhere."""

    def __init__(self, end: float) -> None:
        self.logits = torch.tensor([1 - end, end]).log()

    def __call__(self, input_ids, past_key_values=None, use_cache=False, logits_to_keep=0):
        width = logits_to_keep or input_ids.shape[1]
        return SimpleNamespace(logits=self.logits.expand(len(input_ids), width, 2), past_key_values=None)


def test_kl_counts_positions_up_to_the_end():
    prompts, answers = torch.zeros(2, 3, dtype=torch.long), torch.tensor([[1, 1, 1], [0, 0, 1]])
    one = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    found = kl_of_answers(Coin(0.5), Coin(0.1), prompts, answers, eos=1)
    assert found.tolist() == pytest.approx([one, 3 * one], rel=1e-5)
    assert kl_of_answers(Coin(0.5), Coin(0.5), prompts, answers, eos=1).abs().max() == 0


def test_kl_by_samples_is_that_of_the_distributions():
    # Answers of at most 2 tokens: `1`, `01`, `00`. The second position is reached with 1/2.
    prompts = torch.zeros(4000, 3, dtype=torch.long)
    answers = sample(Coin(0.5), prompts, eos=1, seed=0, tokens=2)
    exact = 0.5 * math.log(0.5 / 0.1) + 0.25 * math.log(0.25 / 0.09) + 0.25 * math.log(0.25 / 0.81)
    values = kl_of_answers(Coin(0.5), Coin(0.1), prompts, answers, eos=1).tolist()
    mean, error = mean_and_error(values)
    assert abs(mean - exact) < 4 * error < 0.05
    # What follows an end is the end.
    assert answers[answers[:, 0] == 1][:, 1].tolist() == [1] * int((answers[:, 0] == 1).sum())


def test_standard_error_goes_by_prompt():
    # Two prompts with means 0 and 1 around 1/2: the sums of the residuals are -1 and 1; sqrt(2 * 2 / 1) / 4.
    assert clustered([0, 0, 1, 1], ["a", "a", "b", "b"]) == pytest.approx((0.5, 0.5))


# ---- statistics


def test_students_distribution():
    assert [t_quantile(n) for n in (1, 2, 4, 19)] == pytest.approx([12.7062, 4.3027, 2.7764, 2.0930], abs=1e-4)
    # Two degrees of freedom have a closed form: 1 - t / sqrt(2 + t^2).
    assert t_tail(1.5, 2) == pytest.approx(1 - 1.5 / math.sqrt(2 + 1.5**2), abs=1e-9)
    assert t_tail(0.0, 5) == pytest.approx(1)


def test_paired():
    found = paired([1.0, 2.0, 3.0])
    # Mean 2, standard error 1 / sqrt(3), t = 2 sqrt(3) with two degrees of freedom.
    assert (found.seeds, found.mean) == (3, 2.0)
    assert found.half_width == pytest.approx(4.3027 / math.sqrt(3), abs=1e-3)
    assert found.p == pytest.approx(1 - math.sqrt(12 / 14), abs=1e-9)
    assert paired([1.5]).row() == {"seeds": 1, "mean": 1.5, "half_width": None, "p": None}
    assert interval(paired([1.5]).row()) == "+1.5" and interval(found.row()) == "+2.0 ± 2.5"


def test_line_over_kl():
    line = [(2.0, 70.0), (0.0, 50.0), (1.0, 66.0)]
    assert [at_kl(line, kl) for kl in (0.0, 0.5, 1.0, 1.75, 2.0)] == [50, 58, 66, 69, 70]
    assert at_kl(line, 2.1) is None and at_kl(line, -0.1) is None


def unit(preference: float, kl: float, validation: float | None = None) -> dict:
    """With what the columns need."""
    test = {"preference": [preference, 0.01], "kl": [kl, 0.1], "quality": [50.0, 1.0], "malformed": [0.0, 0.0]}
    found = {"test": test, "accuracy": 0.7, "gamma_ref": 1.0, "steps": 4, "pairs": 64}
    return found | ({} if validation is None else {"validation": {"preference": [validation, 0.01]}})


def test_columns_and_differences():
    # Plain DPO reaches 0.70 at KL 1: at KL 0.5 0.60. sDPO has 0.65 there, 5 points less than DPO and 5 above its line.
    rows = {"s": unit(0.5, 0.0), "dpo": unit(0.7, 1.0), "sdpo": unit(0.65, 0.5), "replay": unit(0.8, 1.5)}
    table = columns({0: rows, 1: rows}, Settings())
    assert table["sdpo"][0]["excess"] == pytest.approx(5) and table["dpo"][0]["excess"] == pytest.approx(0)
    assert table["replay"][0]["excess"] is None
    assert difference(table, "preference", "sdpo", "dpo")["mean"] == pytest.approx(-5)
    assert difference(table, "excess", "replay", "dpo") is None


def test_choice_is_by_validation_alone():
    units = {0: {"a": unit(0.9, 1, 0.5), "b": unit(0.1, 1, 0.6)}, 1: {"a": unit(0.9, 1, 0.9)}}
    # Seed 1 hasn't all of them and doesn't count.
    assert choose(units, ["a", "b"]) == "b" and choose({1: units[1]}, ["a", "b"]) is None


# ---- rows and units


def test_rows_and_their_order():
    settings = Settings()
    assert len(grid(settings)) + 1 == len(BETAS) * len(LEARNING_RATES) == 12 == len(sdpo_grid(settings)) + 1
    assert len(main_rows(settings)) == 14 and main_rows(settings)[:2] == ["s", "dpo"]
    rows = make_rows(settings)
    assert rows["dpo_beta_t"].beta == settings.beta / 2 and settings.steps == 2 * (10 + 50)
    # Every row's settings differ from every other's.
    assert len({json.dumps(row.settings(settings)) for row in rows.values()}) == len(rows)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A smoke run: its folder and what it found."""
    work = tmp_path_factory.mktemp("paper")
    return work, command.smoke(work)


def test_smoke(small):
    work, found = small
    rows = found["summary"]["rows"]
    # (48 + 32) / 16 steps, at equal pairs, and KL 0 for S.
    assert {rows[name]["steps"] for name in command.SMOKE_ROWS[1:]} == {5}
    assert {rows[name]["pairs"] for name in command.SMOKE_ROWS[1:]} == {80}
    assert rows["s"]["kl"] == (0.0, 0.0) and rows["dpo"]["kl"][0] > 0 and rows["dpo"]["seeds"] == 2
    units = {unit["row"]: unit for unit in found["units"] if unit["seed"] == 0}
    first = {name: units[name]["stages"][-1]["loss_first"] for name in ("sdpo", "fixed", "target_s")}
    assert first["sdpo"] == pytest.approx(math.log(2), abs=1e-6)
    # Policy and reference differ at the start of the last stage: by M_1's training, in both.
    assert all(abs(first[name] - math.log(2)) > 1e-6 for name in ("fixed", "target_s"))
    assert json.loads((work / "results.json").read_text())["seeds"] == [0, 1]
    kept = [json.loads(line) for line in (work / "units.jsonl").read_text().splitlines()]
    assert len(kept) == len(command.SMOKE_ROWS) + 2 and kept[0]["row"] == "s"
    assert (work / "table.md").read_text() == markdown(found["summary"], command.SMOKE)
    assert all((work / f"{name}.png").stat().st_size > 5000 for name in ("figure_2", "figure_3", "preference_kl"))


def test_a_rerun_skips_what_is_there(small):
    work, _ = small
    files = {path: path.stat().st_mtime_ns for path in work.glob("units/*/*.json")}
    assert len(files) == len(command.SMOKE_ROWS) + 2
    bench = Bench(work, command.SMOKE)
    assert bench.run(0, "sdpo") == bench.kept(0, "sdpo")
    assert files == {path: path.stat().st_mtime_ns for path in work.glob("units/*/*.json")}
    assert Bench(work, replace(command.SMOKE, beta=0.2)).kept(0, "sdpo") is None


def test_one_optimizer_for_all_stages(small, tmp_path):
    work, _ = small
    bench, settings = Bench(work, command.SMOKE), command.SMOKE
    folder, inputs = bench.folder(0), Inputs(bench.folder(0) / "model", bench.folder(0) / "external")
    sources = [
        PreferenceSource(n, str(folder / f"{n}.jsonl"), val_path=str(folder / f"{n}.test.jsonl")) for n in SOURCES
    ]
    rates = {}
    for name in ("order_only", "fixed"):
        with quiet():
            fit(bench.rows[name], settings, inputs, sources, 0, tmp_path / name)
        rates[name] = [float(row["train/lr"]) / settings.lr for row in metrics(tmp_path / name)]
    # A tenth of 5 steps rounds up to one step of warm-up; with restarts each stage has its own.
    first = [int(float(row["stage/index"])) for row in metrics(tmp_path / "fixed")].count(1)
    assert first in (2, 3)
    assert rates["order_only"] == pytest.approx([0, 1, 3 / 4, 2 / 4, 1 / 4])
    assert rates["fixed"] == pytest.approx([*factors(first), *factors(5 - first)])


def factors(steps: int) -> list[float]:
    """Of a stage with one step of warm-up: 0, 1 for two steps, 0, 1, 1/2 for three."""
    return [0.0, *((steps - step) / (steps - 1) for step in range(1, steps))]
