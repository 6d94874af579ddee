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
    KLBoundReference,
    LoraSettings,
    PairLogps,
    PreferenceSource,
    ResidentReference,
    StageCheckpoint,
    StageTransition,
    UpdatingReference,
    callbacks,
)
from sdpo_lightning.cli import main
from sdpo_lightning.divergences import k2_sums
from sdpo_lightning.types import ConfigurationError, ResumeError, SelfCheckError

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


def sequence_logps(model, tokenizer, rows: list[dict]) -> torch.Tensor:
    """`[P, 2]` summed logps of chosen and rejected by a plain loop over plain sequences."""
    found = []
    for row in rows:
        start = len(tokenizer(row["prompt"])["input_ids"])
        for side in ("chosen", "rejected"):
            ids = torch.tensor([tokenizer(row["prompt"] + row[side])["input_ids"] + [tokenizer.eos_token_id]])
            logps = model(ids).logits.float().log_softmax(-1)
            found.append(logps[0, start - 1 : -1].gather(1, ids[0, start:, None]).sum())
    return torch.stack(found).view(-1, 2)


@torch.no_grad()
def logps_of(folder: Path, rows: list[dict]) -> torch.Tensor:
    """As above, of a folder."""
    return sequence_logps(
        AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder), rows
    )


def dpo(policy: torch.Tensor, reference: torch.Tensor, beta: float = 0.1) -> float:
    """Mean loss of `[P, 2]` logps."""
    gamma = (policy - reference).diff(dim=1).neg()
    return -F.logsigmoid(beta * gamma).mean().item()


def check_every_checkpoint(tmp_path, model_dir, sources, make_reference, **args):
    """Resume from each checkpoint of a run, with only what lay on the disk then: bit for bit the same."""
    args = {"order": "easy_to_hard", "val_fraction": 0.2} | args
    whole, table = tmp_path / "whole", "model.safetensors"
    every = StageCheckpoint(every_n_train_steps=1, save_top_k=-1)
    trainer, _ = fit(whole, model_dir, sources, None, make_reference(), [every], **args)
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


# ---- the policy begins at S again

SFT = {"policy_starts_at": "sft"}


def test_each_stage_trains_s_against_the_moved_reference(tmp_path, tiny_model_dir, sources):
    fit(tmp_path / "run", tiny_model_dir, sources, module_args=SFT, shuffle=False)
    fit(tmp_path / "plain", tiny_model_dir, sources, shuffle=False)
    found = first_losses(tmp_path / "run")
    assert found[0] == pytest.approx(LN2, abs=1e-6)
    for index, name in ((2, "b"), (3, "c")):
        rows = make_rows(COUNTS[name], index - 1, name)[:2]
        reference = logps_of(tmp_path / "run" / "stages" / FOLDERS[index - 2], rows)
        # The sign is the other way round than with a fixed reference: policy and reference have changed places.
        assert found[index - 1] == pytest.approx(dpo(logps_of(tiny_model_dir, rows), reference), abs=1e-5)
        assert abs(found[index - 1] - LN2) > 1e-3
    # Stage 1 knows no difference.
    assert_same_weights(tmp_path / "run" / "stages" / "01-a", tmp_path / "plain" / "stages" / "01-a")


def test_s_against_s_is_plain_training_of_each_chunk(tmp_path, tiny_model_dir, sources):
    """Reference and policy at S in every stage: stage t is stage 1 of a run on its chunk alone."""
    fit(tmp_path / "run", tiny_model_dir, sources, reference=FixedReference(), module_args=SFT)
    for index, source in enumerate(sources):
        fit(tmp_path / source.name, tiny_model_dir, [source])
        assert_same_weights(
            tmp_path / "run" / "stages" / FOLDERS[index], tmp_path / source.name / "stages" / f"01-{source.name}"
        )
    assert first_losses(tmp_path / "run") == pytest.approx([LN2] * 3, abs=1e-6)


def test_with_adapters_s_is_the_base(tmp_path, tiny_model_dir, sources):
    args = {"reference": FixedAdapterReference(), "module_args": LORA | SFT}
    fit(tmp_path / "run", tiny_model_dir, sources, **args)
    assert first_losses(tmp_path / "run") == pytest.approx([LN2] * 3, abs=1e-6)


@pytest.mark.parametrize("module_args", [{}, LORA], ids=["full", "adapter"])
def test_starts_at_s_resumes_from_every_checkpoint(tmp_path, tiny_model_dir, sources, module_args):
    def reference():
        return type(DPOLitModule("x", **module_args).reference)()

    module_args = {"optimizer": adamw(1e-2)} | SFT | module_args
    run = check_every_checkpoint(tmp_path, tiny_model_dir, sources, reference, module_args=module_args)
    # The stages have moved the policy.
    assert max(abs(loss - LN2) for loss in first_losses(run)) > 1e-4


def test_a_policy_that_is_not_s_again_is_noticed(tmp_path, tiny_model_dir, sources, monkeypatch):
    check = callbacks.check_weights

    def too_late(trainer, pl_module, stage, start):
        """After the policy is S again, M_{t-1} lands in it."""
        if stage.index == 2:
            pl_module.policy.load_state_dict(pl_module.reference._model.state_dict())
        check(trainer, pl_module, stage, start)

    monkeypatch.setattr(callbacks, "check_weights", too_late)
    with pytest.raises(SelfCheckError, match="stage 2.*the policy is not M_0"):
        fit(tmp_path, tiny_model_dir, sources, module_args=SFT)


def test_another_start_is_refused(tmp_path, tiny_model_dir, sources):
    with pytest.raises(ConfigurationError, match="`model.policy_starts_at` is 's'"):
        DPOLitModule("x", policy_starts_at="s")
    fit(tmp_path, tiny_model_dir, sources, module_args=SFT, trainer_args={"max_steps": 5})
    with pytest.raises(ResumeError, match="model.policy_starts_at: sft -> previous"):
        fit(tmp_path, tiny_model_dir, sources, tmp_path / "checkpoints" / "stopped-step=5.ckpt")


# ---- references that follow within a stage

CONSTANT = {"lr_scheduler": "constant", "warmup_ratio": 0.0}


def hard():
    return UpdatingReference(every_n_steps=2)


def soft():
    return UpdatingReference(every_n_steps=1, mix=0.3)


def bound():
    return KLBoundReference(max_kl=1e-4)


def at_ln2(run_dir: Path) -> list[bool]:
    return [abs(loss - LN2) < 1e-6 for loss in losses(run_dir)]


def test_a_hard_update_after_each_step_never_leaves_the_policy(tmp_path, tiny_model_dir, sources):
    fit(tmp_path, tiny_model_dir, sources, reference=UpdatingReference(1), module_args=CONSTANT)
    assert at_ln2(tmp_path) == [True] * sum(STEPS.values())


def test_a_hard_update_every_two_steps_of_a_stage(tmp_path, tiny_model_dir, sources):
    fit(tmp_path, tiny_model_dir, sources, reference=hard(), module_args=CONSTANT)
    # A stage begins at M_{t-1}; after its steps 2, 4, ... the reference is the policy.
    assert at_ln2(tmp_path) == [step % 2 == 0 for count in STEPS.values() for step in range(count)]


def test_the_kl_bound_is_asked_of_the_logps_of_each_step(tmp_path, tiny_model_dir, sources):
    fit(tmp_path / "tight", tiny_model_dir, sources, reference=bound(), module_args=CONSTANT)
    # Step 1 of a stage measures 0, step 2 more than the bound: the reference moves behind it, and so on.
    assert at_ln2(tmp_path / "tight") == [step % 2 == 0 for count in STEPS.values() for step in range(count)]
    fit(tmp_path / "wide", tiny_model_dir, sources, reference=KLBoundReference(1e9), module_args=CONSTANT)
    fit(tmp_path / "swap", tiny_model_dir, sources, module_args=CONSTANT)
    assert reproducible(tmp_path / "wide") == reproducible(tmp_path / "swap")


def test_the_estimate_by_hand():
    lengths = torch.ones(3, dtype=torch.long)
    policy = PairLogps(torch.tensor([-1.0, -2.0, -9.0]), torch.tensor([-3.0, -4.0, -9.0]), lengths, lengths)
    reference = PairLogps(torch.tensor([-2.0, -2.0, 0.0]), torch.tensor([-1.0, -4.0, 0.0]), lengths, lengths)
    # Ratios 1 and 0 of the chosen, -2 and 0 of the rejected; the third pair is a filler: (1 + 4) / 2 over 4.
    assert k2_sums(torch.tensor([1.0, 1.0, 0.0]), policy, reference).tolist() == [2.5, 4.0]


def test_a_soft_update_equals_a_loop_written_by_hand(tmp_path, tiny_model_dir, sources):
    lr, mix, rows = 1e-3, 0.3, make_rows(COUNTS["b"], 1, "b")
    args = {"module_args": CONSTANT | {"optimizer": adamw(lr, 0.0)}, "shuffle": False}
    fit(tmp_path / "run", tiny_model_dir, sources[1:2], reference=soft(), **args)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    policy, reference = (AutoModelForCausalLM.from_pretrained(tiny_model_dir) for _ in range(2))
    optimizer, found = torch.optim.AdamW(policy.parameters(), lr=lr, weight_decay=0.0), []
    for start in range(0, len(rows), 2):
        part = rows[start : start + 2]
        ours = sequence_logps(policy, tokenizer, part)
        with torch.no_grad():
            theirs = sequence_logps(reference, tokenizer, part)
        loss = -F.logsigmoid(0.1 * ((ours - theirs)[:, 0] - (ours - theirs)[:, 1])).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
        with torch.no_grad():
            for mine, other in zip(reference.parameters(), policy.parameters(), strict=True):
                mine.copy_(mix * other + (1 - mix) * mine)
    assert losses(tmp_path / "run") == pytest.approx(found, abs=1e-5)
    # Not what the swap alone gives.
    fit(tmp_path / "swap", tiny_model_dir, sources[1:2], **args)
    assert max(abs(a - b) for a, b in zip(losses(tmp_path / "swap"), found, strict=True)) > 1e-3


@pytest.mark.parametrize(
    "make, accumulate, offload",
    [(hard, 1, False), (soft, 1, False), (bound, 2, False), (soft, 1, True)],
    ids=["hard", "soft", "bound", "offloaded"],
)
def test_following_references_resume_from_every_checkpoint(
    tmp_path, tiny_model_dir, sources, make, accumulate, offload
):
    def reference():
        made = make()
        made.offload = offload
        return made

    args = {"trainer_args": {"accumulate_grad_batches": accumulate}, "epochs_per_stage": accumulate}
    run = check_every_checkpoint(tmp_path, tiny_model_dir, sources, reference, **args)
    held = [torch.load(path, weights_only=True)["reference"] for path in (run / "checkpoints").glob("*.ckpt")]
    # Some checkpoints hold the reference's weights; those before its first move in a stage need none.
    assert {len(state) > 1 for state in held} == ({True} if make is soft else {True, False})


class LosesItsWeights(UpdatingReference):
    """What a checkpoint without the reference would do."""

    def state_dict(self):
        return {}


def test_without_its_weights_a_resume_is_another_run(tmp_path, tiny_model_dir, sources):
    for name, stop in (("whole", {}), ("cut", {"trainer_args": {"max_steps": 5}})):
        fit(tmp_path / name, tiny_model_dir, sources, reference=LosesItsWeights(1, 0.3), **stop)
    checkpoint = tmp_path / "cut" / "checkpoints" / "stopped-step=5.ckpt"
    fit(tmp_path / "cut", tiny_model_dir, sources, checkpoint, LosesItsWeights(1, 0.3))
    assert reproducible(tmp_path / "cut") != reproducible(tmp_path / "whole")


class StaysAtFirst(UpdatingReference):
    """Forgets the swap at a boundary."""

    def advance(self, policy, stage, inputs):
        if stage.index == 1:
            super().advance(policy, stage, inputs)


def test_a_following_reference_that_misses_the_swap_is_noticed(tmp_path, tiny_model_dir, sources):
    with pytest.raises(SelfCheckError, match="stage 2.*the reference has sha .*, M_1 has"):
        fit(tmp_path, tiny_model_dir, sources, reference=StaysAtFirst(10))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: UpdatingReference(0), "`every_n_steps` of UpdatingReference is 0"),
        (lambda: UpdatingReference(1, 0.0), "`mix` of UpdatingReference is 0.0"),
        (lambda: UpdatingReference(1, 1.5), "`mix` of UpdatingReference is 1.5"),
        (lambda: KLBoundReference(0.0), "`max_kl` of KLBoundReference is 0.0"),
    ],
)
def test_numbers_outside_their_range_are_refused(make, message):
    with pytest.raises(ConfigurationError, match=message):
        make()


def test_what_a_following_reference_cannot_do_is_refused(tmp_path, tiny_model_dir, sources):
    with pytest.raises(ConfigurationError, match="UpdatingReference can't stay behind at stage 2"):
        fit(tmp_path / "b", tiny_model_dir, sources, reference=soft(), callbacks=[HoldsBack()])
    fit(tmp_path / "c", tiny_model_dir, sources, reference=soft(), trainer_args={"max_steps": 5})
    with pytest.raises(ResumeError, match="model.reference: .*0.3 . policy.* every 1 steps -> .* every 2 steps"):
        fit(tmp_path / "c", tiny_model_dir, sources, tmp_path / "c" / "checkpoints" / "stopped-step=5.ckpt", hard())


def test_a_fork_goes_on_with_a_following_reference(tmp_path, tiny_model_dir, sources):
    fit(tmp_path / "whole", tiny_model_dir, sources, reference=soft())
    made = forked(tmp_path / "whole", 2)
    fit(tmp_path / "fork", tiny_model_dir, sources, None, soft(), module_class=made)
    later = [row for row in reproducible(tmp_path / "whole") if row["stage/index"] != "1"]
    assert reproducible(tmp_path / "fork") == later


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


@pytest.mark.parametrize(
    "name, given",
    [
        ("FixedReference", {}),
        ("CachedFixedReference", {}),
        ("UpdatingReference", {"every_n_steps": 3}),
        ("KLBoundReference", {"max_kl": 0.5}),
    ],
)
def test_by_command_line(command, name, given, capsys):
    reference = {"class_path": f"sdpo_lightning.{name}", "init_args": given}
    run_dir = command("--trainer.max_steps", 5, reference=reference)
    command(reference=reference)
    assert "going on from" in capsys.readouterr().out
    assert len(losses(run_dir)) == sum(STEPS.values())
    assert (abs(first_losses(run_dir)[1] - LN2) > 1e-4) == ("Fixed" in name)


def test_the_start_at_s_by_command_line(command):
    run_dir = command(policy_starts_at="sft")
    found = first_losses(run_dir)
    assert found[0] == pytest.approx(LN2, abs=1e-6) and abs(found[1] - LN2) > 1e-4
