"""The warning where the chosen answers fall below S."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from helpers import make_rows, write_jsonl
from runs import fit, metrics, reproducible

from sdpo_lightning import (
    CachedFixedReference,
    CachedReference,
    DPOLitModule,
    LikelihoodGuard,
    PreferenceSource,
    ResidentReference,
    StageEvaluation,
    UpdatingReference,
)
from sdpo_lightning.likelihood import chosen_change
from sdpo_lightning.objectives import DPOPLoss
from sdpo_lightning.stage_losses import StageLosses
from sdpo_lightning.types import ConfigurationError, PairLogps

# Tokens of each chosen answer below: four words and the end.
LENGTH = 5
SAID = re.compile(r"stage (\d) '(\w)': the chosen answers have lost (\S+) nats a token since S \((.*?)\), more than")


class Unlearns(DPOLitModule):
    """Makes the chosen answers less likely, and does nothing else."""

    def preference_loss(self, policy, reference):
        return policy.chosen / policy.chosen_lengths


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> list[PreferenceSource]:
    folder = tmp_path_factory.mktemp("sources")
    found = []
    for seed, name in enumerate("ab"):
        rows = [row | {"chosen": f" w1 w2 w3 w{number}"} for number, row in enumerate(make_rows(12, seed, name))]
        found.append(PreferenceSource(name, str(write_jsonl(folder / f"{name}.jsonl", rows))))
    return found


def run(folder: Path, model_dir, sources, guard: LikelihoodGuard, caplog, reference=None, **data) -> list[tuple]:
    """Stage, drop and place of each warning."""
    caplog.clear()
    data = {"order": "easy_to_hard", "val_fraction": 0.3, "batch_size": 2} | data
    fit(folder, model_dir, sources, None, reference, [guard], module_class=Unlearns, **data)
    return [(int(t), float(drop), where) for t, _, drop, where in SAID.findall(caplog.text)]


def test_the_change_by_hand():
    lengths = torch.tensor([2, 4, 8])
    policy = PairLogps(torch.tensor([-4.0, -9.0, -8.0]), torch.zeros(3), lengths, lengths)
    sft = PairLogps(torch.tensor([-3.0, -3.0, float("nan")]), torch.zeros(3), lengths, lengths)
    # -1 over 2 tokens and -6 over 4; the third isn't counted.
    assert chosen_change(policy, sft, torch.tensor([True, True, False])).tolist() == [-2.0, 2.0]


@pytest.mark.parametrize(
    "reference",
    [
        ResidentReference,
        pytest.param(CachedFixedReference, marks=pytest.mark.slow),
        pytest.param(lambda: UpdatingReference(1), marks=pytest.mark.slow),
    ],
)
def test_one_warning_a_stage_says_how_far_below_s(tmp_path, tiny_model_dir, sources, caplog, reference):
    # The whole pass is one block, so that the number is a mean of what `metrics.csv` has.
    guard = LikelihoodGuard(1e-4, block_steps=100)
    said = run(tmp_path, tiny_model_dir, sources, guard, caplog, reference())
    assert [t for t, _, _ in said] == [1, 2] and "sdpo_lightning.objectives.DPOPLoss" in caplog.text
    for t, drop, where in said:
        rows = [row for row in metrics(tmp_path) if row["stage/index"] == str(t)]
        # Rewards are beta (0.1) times the change since M_0; all chosen answers have one length; pairs of each step.
        changes = [float(row["train/rewards_m0/chosen"]) / 0.1 / LENGTH for row in rows]
        seen = [float(row["train/pairs_seen"]) for row in rows]
        before = 0.0 if t == 1 else float(metrics(tmp_path)[len(rows) - 1]["train/pairs_seen"])
        counts = [after - begin for begin, after in zip([before, *seen], seen, strict=False)]
        mean = sum(c * n for c, n in zip(changes, counts, strict=True)) / sum(counts)
        assert drop == pytest.approx(-mean, rel=0.01) and mean < -1e-3
        assert where == f"{sum(counts):.0f} pairs of {len(rows)} steps"
    assert said[1][1] > said[0][1]


def test_nothing_is_said_where_they_stay_or_it_is_off(tmp_path, tiny_model_dir, sources, caplog):
    assert run(tmp_path / "far", tiny_model_dir, sources, LikelihoodGuard(5.0), caplog) == []
    assert run(tmp_path / "off", tiny_model_dir, sources, LikelihoodGuard(None), caplog) == []
    assert reproducible(tmp_path / "far") == reproducible(tmp_path / "off")


def test_a_block_is_so_many_steps(tmp_path, tiny_model_dir, sources, caplog):
    rows = LikelihoodGuard(1e-4, block_steps=2)
    said = run(tmp_path, tiny_model_dir, sources, rows, caplog, epochs_per_stage=2)
    assert all(where == "4 pairs of 2 steps" for _, _, where in said) and len(said) == 2


def test_without_a_ranking_the_held_out_pairs_stand_in(tmp_path, tiny_model_dir, sources, caplog):
    said = run(tmp_path, tiny_model_dir, sources, LikelihoodGuard(1e-4), caplog, CachedReference(), order="given")
    assert [t for t, _, _ in said] == [1, 2]
    # In stage 1 the reference is S.
    assert "steps" in said[0][2]
    rows = json.loads((tmp_path / "matrix.json").read_text())["rows"]
    a = {row["model"]: row for row in rows if row["source"] == "a"}
    assert said[1][2] == f"{a[2]['pairs']} held-out pairs of 'a'"
    drop = a[0]["chosen_logps_per_token"] - a[2]["chosen_logps_per_token"]
    assert said[1][1] == pytest.approx(drop, rel=0.05)
    none = run(tmp_path / "none", tiny_model_dir, sources, LikelihoodGuard(1e-4), caplog, order="given", val_fraction=0)
    assert [t for t, _, _ in none] == [1]


@pytest.mark.parametrize("loss", [DPOPLoss(penalty=7.0), StageLosses({"*": DPOPLoss(penalty=7.0)})])
def test_with_dpop_its_penalty_is_named(tmp_path, tiny_model_dir, sources, caplog, loss):
    arguments = {"module_class": Unlearns, "module_args": {"loss": loss}, "order": "easy_to_hard"}
    fit(tmp_path, tiny_model_dir, sources, callbacks=[LikelihoodGuard(1e-4), StageEvaluation(0)], **arguments)
    assert len(SAID.findall(caplog.text)) == 2
    assert "raise DPOP's `penalty` in `model.loss`, 7, or a lower" in caplog.text


@pytest.mark.parametrize("make", [lambda: LikelihoodGuard(0.0), lambda: LikelihoodGuard(1.0, 0)])
def test_wrong_numbers_are_refused(make):
    with pytest.raises(ConfigurationError, match="LikelihoodGuard"):
        make()
