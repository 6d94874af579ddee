"""References other than sDPO's swap: what they are at each stage, by value; exact resumes; wrong ones are noticed."""

import math
import shutil
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
import yaml
from helpers import make_rows, write_jsonl
from runs import adamw, assert_same_weights, fit, losses, metrics, reproducible
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from sdpo_lightning import (
    CachedFixedReference,
    CurriculumDataModule,
    DPOLitModule,
    FixedAdapterReference,
    FixedReference,
    Fork,
    LoraSettings,
    PreferenceSource,
    ResidentReference,
    StageCheckpoint,
    StageTransition,
)
from sdpo_lightning.cli import main
from sdpo_lightning.types import ResumeError, SelfCheckError

LN2 = math.log(2)
COUNTS = {"a": 5, "b": 7, "c": 3}
# By 2 pairs: 3 + 4 + 2 steps.
STEPS = {"a": 3, "b": 4, "c": 2}
FOLDERS = ["01-a", "02-b", "03-c"]
LORA = {"lora": LoraSettings(r=4)}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    paths = {n: write_jsonl(folder / f"{n}.jsonl", make_rows(c, i, n)) for i, (n, c) in enumerate(COUNTS.items())}
    return [PreferenceSource(name, str(path)) for name, path in paths.items()]


def first_losses(run_dir: Path) -> list[float]:
    """Loss of the first step of each stage."""
    first = {}
    for row in metrics(run_dir):
        first.setdefault(row["stage/index"], float(row["train/loss"]))
    return list(first.values())


def logps_of(folder: Path, rows: list[dict]) -> torch.Tensor:
    """`[P, 2]` summed logps of chosen and rejected by a plain loop over plain sequences."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    found = []
    for row in rows:
        start = len(tokenizer(row["prompt"])["input_ids"])
        for side in ("chosen", "rejected"):
            ids = torch.tensor([tokenizer(row["prompt"] + row[side])["input_ids"] + [tokenizer.eos_token_id]])
            with torch.no_grad():
                logps = model(ids).logits.float().log_softmax(-1)
            found.append(logps[0, start - 1 : -1].gather(1, ids[0, start:, None]).sum())
    return torch.stack(found).view(-1, 2)


def dpo(policy: torch.Tensor, reference: torch.Tensor, beta: float = 0.1) -> float:
    """Mean loss of `[P, 2]` logps."""
    gamma = (policy - reference).diff(dim=1).neg()
    return -F.logsigmoid(beta * gamma).mean().item()


def check_every_checkpoint(tmp_path, model_dir, sources, make_reference, **args):
    """Resume from each checkpoint of a run, with only what lay on the disk then: bit for bit the same."""
    args = {"order": "easy_to_hard", "val_fraction": 0.2} | args
    whole, table = tmp_path / "whole", "model.safetensors"
    every = StageCheckpoint(every_n_train_steps=1, save_top_k=-1)
    ends = StageCheckpoint(every_n_epochs=1, save_top_k=-1, filename="end-{epoch}-{step}")
    trainer, _ = fit(whole, model_dir, sources, None, make_reference(), [every, ends], **args)
    checkpoints = sorted((whole / "checkpoints").glob("*.ckpt"))
    assert len(checkpoints) >= trainer.global_step
    folders = sorted(path.name for path in (whole / "stages").glob("0*"))
    for checkpoint in checkpoints:
        resumed = tmp_path / "resumed"
        shutil.copytree(whole, resumed, ignore=shutil.ignore_patterns("checkpoints"))
        entered = torch.load(checkpoint, weights_only=True)["stage_record"]["entered"]
        for folder in folders[max(entered - 1, 0) :]:
            shutil.rmtree(resumed / "stages" / folder)
        again = [StageCheckpoint(every_n_train_steps=1, save_top_k=-1)]
        fit(resumed, model_dir, sources, checkpoint, make_reference(), again, **args)
        for folder in folders:
            [path] = (whole / "stages" / folder).glob(f"*{table}")
            ours, theirs = load_file(path), load_file(resumed / "stages" / folder / path.name)
            assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
        assert reproducible(resumed) == reproducible(whole), checkpoint.name
        shutil.rmtree(resumed)
    return whole


def forked(run, from_stage):
    """Makes modules of a fork."""

    def make(*args, **kwargs):
        module = DPOLitModule(*args, **kwargs)
        module.fork = Fork(str(run), from_stage)
        return module

    return make


# ---- M_0 throughout


class HoldsBack(StageTransition):
    """Another way to the same reference."""

    def should_advance(self, trainer, stage):
        return False


@pytest.fixture(scope="module")
def fixed(tmp_path_factory, tiny_model_dir, sources):
    run_dir = tmp_path_factory.mktemp("fixed") / "run"
    fit(run_dir, tiny_model_dir, sources, reference=FixedReference(), shuffle=False)
    return run_dir


def test_fixed_is_m0_in_every_stage_by_value(fixed, tiny_model_dir, sources):
    assert len(losses(fixed)) == sum(STEPS.values())
    found = first_losses(fixed)
    assert found[0] == pytest.approx(LN2, abs=1e-6)
    # The first step of stage t sees the first two rows: the policy is M_{t-1}, the reference S.
    for index, name in ((2, "b"), (3, "c")):
        rows = make_rows(COUNTS[name], index - 1, name)[:2]
        policy = logps_of(fixed / "stages" / FOLDERS[index - 2], rows)
        assert found[index - 1] == pytest.approx(dpo(policy, logps_of(tiny_model_dir, rows)), abs=1e-5)
        assert abs(found[index - 1] - LN2) > 1e-3


def test_fixed_equals_a_reference_that_is_held_back(tmp_path, fixed, tiny_model_dir, sources):
    fit(tmp_path, tiny_model_dir, sources, callbacks=[HoldsBack()], shuffle=False)
    for folder in FOLDERS:
        assert_same_weights(tmp_path / "stages" / folder, fixed / "stages" / folder)
    assert reproducible(tmp_path) == reproducible(fixed)


@pytest.mark.parametrize("order", ["given", "easy_to_hard"])
def test_the_cached_one_agrees(tmp_path, tiny_model_dir, sources, order):
    for name, reference in (("cached", CachedFixedReference()), ("resident", FixedReference())):
        fit(tmp_path / name, tiny_model_dir, sources, reference=reference, order=order)
    assert losses(tmp_path / "cached") == pytest.approx(losses(tmp_path / "resident"), abs=1e-5)
    tables = {path.name for path in (tmp_path / "cached" / "references").glob("*.safetensors")}
    assert tables - {"m0.safetensors"} == {"fixed.safetensors"}


def test_with_adapters(tmp_path, tiny_model_dir, sources):
    run = tmp_path / "adapter"
    fit(run, tiny_model_dir, sources, reference=FixedAdapterReference(), module_args=LORA)
    fit(tmp_path / "cached", tiny_model_dir, sources, reference=CachedFixedReference(), module_args=LORA)
    found = first_losses(run)
    assert found[0] == pytest.approx(LN2, abs=1e-6)
    assert all(abs(loss - LN2) > 1e-4 for loss in found[1:])
    assert losses(run) == pytest.approx(losses(tmp_path / "cached"), abs=1e-5)


@pytest.mark.parametrize(
    "reference, module_args",
    [(FixedReference, {}), (CachedFixedReference, {}), (FixedAdapterReference, LORA)],
    ids=["resident", "cached", "adapter"],
)
def test_fixed_resumes_from_every_checkpoint(tmp_path, tiny_model_dir, sources, reference, module_args):
    module_args = {"optimizer": adamw(1e-2)} | module_args
    check_every_checkpoint(tmp_path, tiny_model_dir, sources, reference, module_args=module_args)


def test_a_lost_table_is_scored_again_by_m0(tmp_path, tiny_model_dir, sources):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    fit(whole, tiny_model_dir, sources, reference=CachedFixedReference())
    fit(cut, tiny_model_dir, sources, reference=CachedFixedReference(), trainer_args={"max_steps": 5})
    checkpoint = cut / "checkpoints" / "stopped-step=5.ckpt"
    (cut / "references" / "fixed.safetensors").unlink()
    fit(cut, tiny_model_dir, sources, checkpoint, CachedFixedReference())
    assert reproducible(cut) == reproducible(whole)


@pytest.mark.parametrize(
    "parent_reference, reference, module_args",
    [
        (ResidentReference, FixedReference, {}),
        (ResidentReference, CachedFixedReference, {}),
        (None, FixedAdapterReference, LORA),
    ],
    ids=["resident", "cached", "adapter"],
)
def test_a_fork_of_a_swapping_run(tmp_path, tiny_model_dir, sources, parent_reference, reference, module_args):
    """In stage 1 both references are S: the fork from stage 2 is the run that was fixed from the start."""
    parent = (parent_reference or type(DPOLitModule("x", **module_args).reference))()
    fit(tmp_path / "parent", tiny_model_dir, sources, reference=parent, module_args=module_args)
    fit(tmp_path / "whole", tiny_model_dir, sources, reference=reference(), module_args=module_args)
    made = forked(tmp_path / "parent", 2)
    fit(tmp_path / "fork", tiny_model_dir, sources, None, reference(), module_class=made, module_args=module_args)
    later = [row for row in reproducible(tmp_path / "whole") if row["stage/index"] != "1"]
    assert reproducible(tmp_path / "fork") == later
    assert first_losses(tmp_path / "fork")[0] != pytest.approx(LN2, abs=1e-4)


class AdvancesAfterAll(FixedReference):
    """Says M_0 and swaps."""

    def advance(self, policy, stage, inputs):
        ResidentReference.advance(self, policy, stage, inputs)


def test_a_fixed_reference_that_moves_is_noticed(tmp_path, tiny_model_dir, sources):
    with pytest.raises(SelfCheckError, match="stage 2.*the reference has sha .*, M_0 has"):
        fit(tmp_path, tiny_model_dir, sources, reference=AdvancesAfterAll())


def test_another_reference_is_refused_on_resume(tmp_path, tiny_model_dir, sources):
    cut = {"trainer_args": {"max_steps": 5}}
    fit(tmp_path, tiny_model_dir, sources, reference=FixedReference(), **cut)
    checkpoint = tmp_path / "checkpoints" / "stopped-step=5.ckpt"
    with pytest.raises(ResumeError, match=r"model.reference: M_0 -> M_\{t-1\}"):
        fit(tmp_path, tiny_model_dir, sources, checkpoint, ResidentReference())


def test_validation_finds_m0_again(tmp_path, tiny_model_dir, sources):
    data = {"order": "given", "batch_size": 2, "max_length": 64, "val_fraction": 0.4}
    trainer, _ = fit(tmp_path, tiny_model_dir, sources, reference=FixedReference(), **data)
    [row] = [row for row in metrics(tmp_path)[-1:]]
    again = pl.Trainer(default_root_dir=tmp_path, accelerator="cpu", logger=False, enable_progress_bar=False)
    module, checkpoint = DPOLitModule(str(tiny_model_dir), reference=FixedReference()), trainer.checkpoint_callback
    again.validate(module, CurriculumDataModule(sources, **data), checkpoint.best_model_path, verbose=False)
    for key in ("val/a/loss", "val/b/rewards/margins"):
        assert again.callback_metrics[key].item() == pytest.approx(float(row[key]), abs=1e-6)


# ---- the command line


@pytest.fixture
def command(tmp_path, tiny_model_dir, sources):
    """Runs `fit` with the given model settings."""

    def run(*words, **model):
        path = tmp_path / "config.yaml"
        optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3}}
        content = {
            "trainer": {"accelerator": "cpu", "enable_progress_bar": False, "default_root_dir": str(tmp_path / "run")},
            "model": {"model_name_or_path": str(tiny_model_dir), "optimizer": optimizer} | model,
            "data": {
                "sources": [{"name": source.name, "path": source.path} for source in sources],
                "order": "given",
                "batch_size": 2,
            },
        }
        path.write_text(yaml.safe_dump(content))
        main(["fit", "--config", str(path), *map(str, words)])
        return tmp_path / "run"

    return run


@pytest.mark.parametrize("name", ["FixedReference", "CachedFixedReference"])
def test_by_command_line(command, name, capsys):
    run_dir = command("--trainer.max_steps", 5, reference={"class_path": f"sdpo_lightning.{name}"})
    command(reference={"class_path": f"sdpo_lightning.{name}"})
    assert "going on from" in capsys.readouterr().out
    assert len(losses(run_dir)) == sum(STEPS.values())
    assert first_losses(run_dir)[1] != pytest.approx(LN2, abs=1e-4)
