"""Features that meet in one run: what ends or chooses a stage beside what makes or orders the next one's pairs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from helpers import WORDS, make_rows, write_jsonl
from runs import adamw, assert_same_weights, fit, reproducible

from sdpo_lightning import (
    BestOfStage,
    CachedReference,
    DPOLitModule,
    PairSource,
    PreferenceSource,
    ResidentReference,
    StageCheckpoint,
    StageTransition,
    StopRule,
)
from sdpo_lightning.external_reference import CachedExternalReference
from sdpo_lightning.fork import Fork
from sdpo_lightning.generation import Generator
from sdpo_lightning.ledger import Ledger
from sdpo_lightning.sample_statistics import SampleStatistics
from sdpo_lightning.types import ConfigurationError

# Steps so long that the weights of no two are alike.
FAST = {"optimizer": adamw(3e-2), "lr_scheduler": "constant", "warmup_ratio": 0.0, "disable_dropout": False}


@dataclass(frozen=True)
class Seeded(PairSource):
    """A pure function of the weights that seeds the random states of the process, as a scorer with a model may."""

    name: str
    num_pairs: int

    def pairs(self, generator: Generator, stage_index: int) -> Iterator[dict | str]:
        torch.manual_seed(7)
        first = next(generator._model.parameters()).detach().double().sum().item()
        start = int(abs(first) * 1e6) % 40
        for number in range(self.num_pairs):
            words = [WORDS[(start + number + k) % 60] for k in range(5)]
            yield {"prompt": " ".join(words[:2]), "chosen": " " + " ".join(words[2:]), "rejected": " " + words[0]}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    found = []
    for seed, name in enumerate("abc"):
        path = write_jsonl(folder / f"{name}.jsonl", make_rows(8, seed, name))
        held_out = write_jsonl(folder / f"{name}-val.jsonl", make_rows(4, 9 + seed, f"{name}-val"))
        found.append(PreferenceSource(name, str(path), val_path=str(held_out)))
    return found


@pytest.fixture(scope="module")
def dropout_dir(tiny_model_dir, tmp_path_factory) -> Path:
    folder = shutil.copytree(tiny_model_dir, tmp_path_factory.mktemp("dropout") / "model")
    config = (folder / "config.json").read_text()
    assert '"attention_dropout": 0.0' in config
    (folder / "config.json").write_text(config.replace('"attention_dropout": 0.0', '"attention_dropout": 0.2'))
    return folder


def run(folder, model_dir, sources, checkpoint=None, reference=None, monitor="val/a/loss", **more):
    """8 pairs by 2 are 4 steps a stage, each with a validation.

    No loss falls by 100: a stage ends with its third validation, after 3 steps. The number of held-out pairs is the
    same at each, and the first of equals counts: M_t is the weights of a stage's step 1.
    """
    rule = StopRule(monitor=monitor, patience=2, min_delta=100.0)
    transition = StageTransition(stop=rule, stage_weights=BestOfStage(monitor="val/a/pairs", mode="max"))
    every = StageCheckpoint(every_n_train_steps=1, save_top_k=-1, filename="{step:02d}")
    measures = SampleStatistics(every_n_steps=2, num_prompts=2, max_new_tokens=3)
    return fit(
        folder, model_dir, sources, checkpoint, reference or ResidentReference(), [transition, every, measures],
        module_args=FAST, trainer_args={"val_check_interval": 1}, on_val_overlap="warn", **more,
    )


def goes_on_alike(whole, start, steps):
    """From the checkpoints of these steps, with all else that the run has left."""
    for step in steps:
        resumed = whole.with_name("resumed")
        shutil.copytree(whole, resumed, ignore=shutil.ignore_patterns("checkpoints", "best*"))
        start(resumed, whole / "checkpoints" / f"step={step:02d}.ckpt")
        for folder in sorted(path.name for path in (whole / "stages").iterdir()):
            assert_same_weights(whole / "stages" / folder, resumed / "stages" / folder)
        assert reproducible(resumed) == reproducible(whole), step
        assert Ledger.read(resumed).stages == Ledger.read(whole).stages, step
        for name in ("curriculum.json", "sample_statistics.csv"):
            assert (resumed / name).read_text() == (whole / name).read_text(), (name, step)
        shutil.rmtree(resumed)


def test_pairs_are_made_by_the_chosen_weights_and_every_part_goes_on(tmp_path, dropout_dir, sources):
    made, whole = [Seeded("new", 8), Seeded("last", 4)], tmp_path / "whole"

    def start(folder, checkpoint=None):
        run(folder, dropout_dir, sources[:1], checkpoint, CachedReference(), pair_sources=made)

    start(whole)
    stages = Ledger.read(whole).stages
    assert [stage.name for stage in stages] == ["a", "new", "last"]
    for before, name in zip(stages, ("02-new", "03-last"), strict=False):
        note = json.loads((whole / "new_pairs" / f"{name}.json").read_text())
        assert note["made_with"]["weights_sha256"] == before.output.sha256
    # 4 pairs are 2 steps.
    assert [stage.steps for stage in stages] == [3, 6, 8]
    # The end of stage 1, where the rows are found and nothing is drawn; within stage 2.
    goes_on_alike(whole, start, (3, 4))


def test_pairs_are_ranked_by_the_chosen_weights_and_every_part_goes_on(tmp_path, dropout_dir, sources):
    whole = tmp_path / "whole"

    def start(folder, checkpoint=None):
        run(folder, dropout_dir, sources, checkpoint, order="easy_to_hard", ranked_by="previous")

    start(whole)
    stages = Ledger.read(whole).stages
    assert [stage.steps for stage in stages] == [3, 6, 9]
    goes_on_alike(whole, start, (3, 4))
    # What M_1 from the disk, the weights of step 1, makes of the pairs that were left.
    decision = json.loads((whole / "curriculum.json").read_text())["ranked_again"][0]
    one = {"trainer_args": {"max_steps": 1}, "order": "easy_to_hard", "on_val_overlap": "warn"}
    trainer, _ = fit(tmp_path / "m1", whole / "stages" / f"01-{stages[0].name}", sources, **one)
    rows = {row["name"]: row for row in trainer.datamodule.curriculum()["sources"]}
    assert len(decision["accuracy"]) == 2
    for name, accuracy in decision["accuracy"].items():
        assert accuracy == pytest.approx(rows[name]["reward_accuracy"], abs=1e-6)


def test_a_monitor_of_the_stages_sources_is_refused_where_pairs_are_made(tmp_path, tiny_model_dir, sources):
    """Of made pairs none are held out: before, the run ended at the first validation of that stage."""
    with pytest.raises(ConfigurationError, match=r"stage 'new', which has none.*without \{source\}"):
        run(tmp_path, tiny_model_dir, sources[:1], monitor="val/{source}/loss", pair_sources=[Seeded("new", 8)])
    assert not (tmp_path / "ledger.json").exists()


def test_a_table_of_all_pairs_is_refused_where_pairs_are_made(tmp_path, tiny_model_dir, sources):
    reference = CachedExternalReference(str(tiny_model_dir))
    data = {"pair_sources": [Seeded("new", 4)], "on_val_overlap": "warn"}
    with pytest.raises(ConfigurationError, match=r"\['new'\] don't exist yet; use ExternalReference"):
        fit(tmp_path, tiny_model_dir, sources[:1], reference=reference, **data)
    assert not (tmp_path / "ledger.json").exists()


def test_a_fork_behind_a_choice_makes_the_same_pairs(tmp_path, dropout_dir, sources):
    made = [Seeded("new", 4), Seeded("last", 4)]
    run(tmp_path / "parent", dropout_dir, sources[:1], pair_sources=made)

    class Forked(DPOLitModule):
        at = 2

        def configure_callbacks(self):
            self.fork = Fork(str(tmp_path / "parent"), self.at)
            return super().configure_callbacks()

    run(tmp_path / "fork", dropout_dir, sources[:1], pair_sources=made, module_class=Forked)
    for name in ("02-new", "03-last"):
        assert_same_weights(tmp_path / "parent" / "stages" / name, tmp_path / "fork" / "stages" / name)
    Forked.at = 3
    with pytest.raises(ConfigurationError, match="a fork behind such a stage"):
        run(tmp_path / "later", dropout_dir, sources[:1], pair_sources=made, module_class=Forked)
