"""`BestOfStage`: the weights that are best by a held-out metric become M_t, policy and reference."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from helpers import make_rows, write_jsonl
from runs import adamw, assert_same_weights, fit, losses, metrics, reproducible
from safetensors.torch import load_file

from sdpo_lightning import (
    AdapterReference,
    BestOfStage,
    LoraSettings,
    PreferenceSource,
    ResidentReference,
    StageCheckpoint,
    StageTransition,
    StageWeights,
    StopRule,
)
from sdpo_lightning.ledger import Ledger
from sdpo_lightning.types import ConfigurationError, ResumeError

LORA = LoraSettings(r=4, alpha=8)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    found = []
    for seed, (name, count) in enumerate((("a", 10), ("b", 10))):
        path = write_jsonl(folder / f"{name}.jsonl", make_rows(count, seed, name))
        held_out = write_jsonl(folder / f"{name}-val.jsonl", make_rows(4, 9 + seed, f"{name}-val"))
        found.append(PreferenceSource(name, str(path), val_path=str(held_out)))
    return found


# Steps that are far too long: held-out losses rise and fall.
FAST = {"optimizer": adamw(3e-2), "lr_scheduler": "constant", "warmup_ratio": 0.0}


def run(run_dir, model_dir, sources, weights, callbacks=(), ckpt_path=None, stop=None, lora=None, **more):
    """10 pairs by 2: 5 steps a stage, each with a validation after it."""
    transition = StageTransition(stop=stop, stage_weights=weights)
    return fit(
        run_dir, model_dir, sources, ckpt_path, AdapterReference() if lora else ResidentReference(),
        callbacks=[transition, *callbacks], module_args=FAST | {"lora": lora},
        trainer_args={"val_check_interval": 1} | more.pop("trainer_args", {}), on_val_overlap="warn", **more,
    )


def best_steps(run_dir, tail="loss", best=min) -> list[int]:
    """Of each stage, counted within it from 1: the first step with the best held-out value of its source."""
    found = []
    for index, name in enumerate(("a", "b"), 1):
        values = [float(r[f"val/{name}/{tail}"]) for r in metrics(run_dir) if r["stage/index"] == str(index)]
        assert len(values) == 5
        found.append(values.index(best(values)) + 1)
    return found


@pytest.mark.parametrize("lora", [None, pytest.param(LORA, marks=pytest.mark.slow)], ids=["full", "lora"])
def test_m_t_is_what_a_run_of_that_many_steps_ends_with(tmp_path, tiny_model_dir, sources, lora, caplog):
    caplog.set_level("INFO")
    run(tmp_path / "best", tiny_model_dir, sources, BestOfStage(), lora=lora)
    steps = best_steps(tmp_path / "best")
    # Else the last weights would do.
    assert any(step < 5 for step in steps)
    start, chained = tiny_model_dir, []
    for index, (source, step) in enumerate(zip(sources, steps, strict=True), 1):
        if lora is not None and index > 1:
            break
        run_dir = tmp_path / f"chain-{index}"
        fit(run_dir, start, [source], None, AdapterReference() if lora else ResidentReference(),
            module_args=FAST | {"lora": lora}, trainer_args={"limit_train_batches": step}, on_val_overlap="warn")
        chained += losses(run_dir)
        start, ours = run_dir / "stages" / f"01-{source.name}", tmp_path / "best" / "stages" / f"0{index}-{source.name}"
        if lora is None:
            assert_same_weights(ours, start)
        else:
            left, right = (load_file(folder / "adapter_model.safetensors") for folder in (ours, start))
            assert all(torch.equal(left[key], right[key]) for key in left) and left.keys() == right.keys()
    # Stage 2 begins where that run ended: its losses are those of the chain, bit for bit.
    in_stages = [[float(r["train/loss"]) for r in metrics(tmp_path / "best") if r["stage/index"] == i] for i in "12"]
    assert chained == in_stages[0][: steps[0]] + (in_stages[1][: steps[1]] if lora is None else [])
    # All steps are recorded, and no file is left.
    assert [stage.steps for stage in Ledger.read(tmp_path / "best").stages] == [5, 10]
    assert not (tmp_path / "best" / "references" / "best.safetensors").exists()
    for index, step in enumerate(steps):
        if step < 5:
            assert f"back to the weights of step {5 * index + step} of {5 * index + 5}" in caplog.text


@pytest.mark.parametrize(
    "lora, every",
    [(None, 4), pytest.param(None, 1, marks=pytest.mark.slow), pytest.param(LORA, 4, marks=pytest.mark.slow)],
)
def test_every_checkpoint_goes_on_to_the_same_models(tmp_path, tiny_model_dir, sources, lora, every):
    whole = tmp_path / "whole"

    def start(folder, checkpoint=None):
        saves = StageCheckpoint(every_n_train_steps=1, save_top_k=-1)
        run(folder, tiny_model_dir, sources, BestOfStage(), [saves], checkpoint, lora=lora)

    start(whole)
    checkpoints = sorted((whole / "checkpoints").glob("*.ckpt"))
    assert len(checkpoints) >= 10
    file = "model.safetensors" if lora is None else "adapter_model.safetensors"
    kept = set()
    # All of them in the slow test.
    for checkpoint in checkpoints[1::every] if every > 1 else checkpoints:
        states = torch.load(checkpoint, weights_only=True)["callbacks"]
        kept.add(bool(states["StageTransition"]["weights"]))
        resumed = tmp_path / "resumed"
        # Nothing of the whole run but its models, tables and records.
        shutil.copytree(whole, resumed, ignore=shutil.ignore_patterns("checkpoints", "best*"))
        start(resumed, checkpoint)
        for folder in ("01-a", "02-b"):
            left, right = (load_file(root / "stages" / folder / file) for root in (whole, resumed))
            assert all(torch.equal(left[key], right[key]) for key in left), checkpoint.name
        assert reproducible(resumed) == reproducible(whole), checkpoint.name
        shutil.rmtree(resumed)
    # Those from within a stage hold its best weights, those of a stage's end hold none.
    assert every > 1 or kept == {True, False}


def test_with_a_stop_rule_and_by_accuracy(tmp_path, tiny_model_dir, sources):
    """The stage ends at its third validation without improvement; M_1 is its first one's."""
    rule = StopRule(patience=2, min_delta=100.0)
    first = BestOfStage(monitor="val/a/pairs", mode="max")
    # The number of held-out pairs is the same at each validation, and the first of equals counts: step 1.
    run(tmp_path / "one", tiny_model_dir, sources[:1], first, stop=rule)
    ledger = Ledger.read(tmp_path / "one")
    assert ledger.stages[0].end.epoch_steps == (3,) and ledger.stages[0].steps == 3
    fit(tmp_path / "step", tiny_model_dir, sources[:1], module_args=FAST, trainer_args={"limit_train_batches": 1},
        on_val_overlap="warn")
    assert_same_weights(tmp_path / "one" / "stages" / "01-a", tmp_path / "step" / "stages" / "01-a")


def test_another_choice_is_refused_on_resume(tmp_path, tiny_model_dir, sources):
    run(tmp_path, tiny_model_dir, sources, BestOfStage(), trainer_args={"max_steps": 3})
    [checkpoint] = (tmp_path / "checkpoints").glob("*.ckpt")
    for other in (None, BestOfStage(mode="max")):
        with pytest.raises(ResumeError, match="StageTransition.stage_weights"):
            run(tmp_path, tiny_model_dir, sources, other, ckpt_path=checkpoint)


def test_what_can_not_be_chosen_among_is_refused(tmp_path, tiny_model_dir, sources):
    with pytest.raises(ConfigurationError, match="`mode` is 'best'"):
        BestOfStage(mode="best")
    with pytest.raises(ConfigurationError, match="stage_weights.*the only one is at its end"):
        run(tmp_path, tiny_model_dir, sources, BestOfStage(), trainer_args={"val_check_interval": 1.0})


def test_fsdp2_is_refused(tmp_path, tiny_model_dir, sources):
    trainer_args = {"strategy": "fsdp2", "devices": 1}
    with pytest.raises(ConfigurationError, match="BestOfStage with FSDP2Strategy"):
        run(tmp_path, tiny_model_dir, sources, BestOfStage(), trainer_args=trainer_args)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def test_the_file_of_the_best_weights(tmp_path, tiny_model_dir, sources):
    """One file, written anew at each improvement: the policy of the step that is recorded."""
    run(tmp_path, tiny_model_dir, sources, BestOfStage(), trainer_args={"max_steps": 4})
    [checkpoint] = (tmp_path / "checkpoints").glob("*.ckpt")
    state = torch.load(checkpoint, weights_only=True)["callbacks"]["StageTransition"]["weights"]
    values = [float(row["val/a/loss"]) for row in metrics(tmp_path)]
    assert len(values) == 4 and state["step"] == values.index(min(values)) + 1
    assert state["value"] == pytest.approx(min(values))
    file = load_file(tmp_path / "references" / "best.safetensors")
    assert file.keys() == state["weights"].keys()
    assert all(torch.equal(file[name], state["weights"][name]) for name in file)
    assert json.loads((tmp_path / "ledger.json").read_text())["stages"][0]["status"] == "open"


class MeanOfStage(StageWeights):
    """M_t is the mean of the policies at the validations of a stage; without a monitor."""

    def __init__(self):
        self.seen = []

    def settings(self):
        return {"class": "MeanOfStage"}

    def begin_stage(self):
        self.seen = []

    def after_validation(self, trainer, pl_module, value):
        assert value is None
        self.seen.append([p.detach().clone() for p in pl_module.trainable()])

    def choose_(self, trainer, pl_module, stage):
        for parameter, *values in zip(pl_module.trainable(), *self.seen, strict=True):
            parameter.data.copy_(torch.stack(values).mean(0))


def test_a_choice_of_ones_own(tmp_path, tiny_model_dir, sources):
    own = MeanOfStage()
    _, module = run(tmp_path, tiny_model_dir, sources[:1], own)
    assert len(own.seen) == 5 and module.settings()["StageTransition.stage_weights"] == {"class": "MeanOfStage"}
    file = load_file(tmp_path / "stages" / "01-a" / "model.safetensors")
    names = [name for name, _ in module.policy.model.named_parameters()]
    for name, *values in zip(names, *own.seen, strict=True):
        assert torch.equal(file[name], torch.stack(values).mean(0)) and not torch.equal(file[name], values[-1]), name
