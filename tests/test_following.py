"""References that follow the policy within a stage, cut over ranks and as adapters."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import following_script
import lightning.pytorch as pl
import peft
import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from following_script import MIDDLE, Bound, scenarios, start
from helpers import make_rows, write_jsonl
from runs import adamw, fit, losses
from safetensors.torch import load_file
from test_lora import KINDS, KeepsBatches, _pair_logps_by_hand
from test_references import LN2, check_every_checkpoint
from transformers import AutoModelForCausalLM

from sdpo_lightning import (
    CurriculumDataModule,
    DPOLitModule,
    KLBoundReference,
    LoraSettings,
    PreferenceSource,
    UpdatingReference,
)
from sdpo_lightning.adapters import REFERENCE, adapter_state
from sdpo_lightning.ranks import leave_group
from sdpo_lightning.trainer_memory import memory_released
from sdpo_lightning.types import ConfigurationError, SelfCheckError

TESTS = Path(__file__).resolve().parent
STEADY = following_script.STEADY


# ---- shards


QUICK = ("soft", "adapter-bound")
NAMES = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in scenarios()]


@pytest.fixture(scope="module")
def quick(tmp_path_factory, tiny_model_dir) -> Path:
    """Data, and some of the runs on two ranks."""
    folder = tmp_path_factory.mktemp("following")
    for seed, name in enumerate("ab"):
        write_jsonl(folder / f"{name}.jsonl", make_rows(10, seed, name))
    (folder / "model").symlink_to(tiny_model_dir)
    _torchrun(folder, 2, _whole_and_resumed(QUICK))
    return folder


@pytest.fixture(scope="module")
def out(quick) -> Path:
    """The other runs as well, on 2, then 1, then 2 ranks."""
    _torchrun(quick, 2, _whole_and_resumed([name for name in scenarios() if name not in QUICK]))
    _torchrun(quick, 1, ["soft-1", "soft-1-from-2", "adapter-1", "adapter-1-from-2"])
    _torchrun(quick, 2, ["soft-2-from-1", "adapter-2-from-1"])
    return quick


@pytest.fixture
def runs(request, name) -> Path:
    """The folder with all runs of the scenario `name`."""
    return request.getfixturevalue("quick" if name in QUICK else "out")


def _whole_and_resumed(names: Sequence[str]) -> list[str]:
    return [f"{name}-2" for name in names] + [f"{name}-2-from-2" for name in names]


def _torchrun(folder: Path, ranks: int, names: list[str]) -> None:
    script = [str(TESTS / "following_script.py"), str(folder), str(folder / "model"), *names]
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *script]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, capture_output=True, text=True, cwd=folder, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]


def _facts(out: Path, name: str) -> dict:
    return json.loads((out / name / "facts.json").read_text())


def _stage(run: Path, folder: str) -> dict[str, torch.Tensor]:
    [path] = (run / "stages" / folder).glob("*.safetensors")
    return load_file(path)


def _assert_close(ours: Path, theirs: Path, folders: list[str]) -> None:
    for folder in folders:
        mine, other = _stage(ours, folder), _stage(theirs, folder)
        assert mine.keys() == other.keys()
        for name, tensor in mine.items():
            torch.testing.assert_close(tensor, other[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_shards_equal_one_process(runs, tmp_path, name):
    for folder in ("a.jsonl", "b.jsonl"):
        (tmp_path / folder).symlink_to(runs / folder)
    module = start(tmp_path, str(runs / "model"), f"{name}-1", 1)
    ours, theirs = runs / f"{name}-2", tmp_path / f"{name}-1"
    _assert_close(ours, theirs, ["01-a", "02-b"])
    assert losses(ours) == pytest.approx(losses(theirs), abs=1e-4) and len(losses(ours)) == 10
    found = _facts(runs, f"{name}-2")
    assert found["sharded"]
    if isinstance(module.reference, Bound):
        # Both ranks decide as one process that sees all pairs; some steps pass the bound and some don't.
        assert found["moves"] == [module.reference.moves] * 2 and set(module.reference.moves) == {True, False}


@pytest.mark.parametrize("name", NAMES)
def test_a_resume_after_a_move_is_bit_for_bit(runs, name):
    whole, resumed = runs / f"{name}-2", runs / f"{name}-2-from-2"
    assert losses(resumed) == losses(whole)[-2:]
    ours, theirs = _stage(resumed, "02-b"), _stage(whole, "02-b")
    assert ours.keys() == theirs.keys() and all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["soft", "adapter"])
@pytest.mark.parametrize("ranks, before", [(1, 2), (2, 1)])
def test_a_resume_on_other_ranks(out, name, ranks, before):
    resumed, whole = out / f"{name}-{ranks}-from-{before}", out / f"{name}-{before}"
    _assert_close(resumed, whole, ["02-b"])
    assert losses(resumed) == pytest.approx(losses(whole)[-2:], abs=1e-4)


@pytest.mark.parametrize("name", QUICK)
def test_the_step_after_the_checkpoint_needs_the_saved_weights(runs, name):
    """Else a resume without them would pass: there the reference is neither the policy nor M_1."""
    found = losses(runs / f"{name}-2")
    # Stage 2 begins at step 6 with the reference at the policy; by step 9 they differ.
    assert abs(found[5] - LN2) < 1e-6 and abs(found[8] - LN2) > 1e-3
    # Where the checkpoint holds shards, they are of all weights: 21 of the model, or A and B of 14 layers.
    held = dcp.FileSystemReader(runs / f"{name}-2" / "checkpoints" / MIDDLE).read_metadata().state_dict_metadata
    assert sum(key.startswith("reference.weights.") for key in held) == (21 if name == "soft" else 28)


# ---- adapters

NUMBERS = 4352  # r = 4: see `test_checkpoints_hold_the_adapter_alone`.


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> list[PreferenceSource]:
    """Two files: 4 + 3 steps by two pairs, the last of a stage with one."""
    folder = tmp_path_factory.mktemp("pairs")
    counts = (("a", 7), ("b", 5))
    paths = {n: write_jsonl(folder / f"{n}.jsonl", make_rows(c, i, n)) for i, (n, c) in enumerate(counts)}
    return [PreferenceSource(name, str(path)) for name, path in paths.items()]


class KeepsBeginnings(pl.Callback):
    """The frozen adapter at each stage's first backward pass."""

    def __init__(self):
        self.found = {}

    def on_before_backward(self, trainer, pl_module, loss):
        held = adapter_state(pl_module.policy.model, REFERENCE)
        self.found.setdefault(pl_module.stage.index, {name: tensor.clone() for name, tensor in held.items()})


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("name", ["hard", "bound"])
def test_adapters_that_follow_equal_a_loop_by_hand_with_peft_alone(tmp_path, tiny_model_dir, pairs, kind, name):
    keeps, begins, bound = KeepsBatches(), KeepsBeginnings(), 0.01
    reference = UpdatingReference(2) if name == "hard" else KLBoundReference(bound)
    fit(
        tmp_path, tiny_model_dir, pairs, None, reference, [keeps, begins], layout="padded",
        module_args=KINDS[kind] | STEADY | {"optimizer": adamw(1e-2, 0.0)},
    )  # fmt: skip
    found, moves = _by_hand(keeps.batches, tiny_model_dir, KINDS[kind]["lora"], name, bound)
    assert losses(tmp_path) == pytest.approx(found, abs=1e-5) and len(found) == 7
    # Some steps move it and some don't.
    assert set(moves) == {True, False}
    assert name == "bound" or moves == [False, True, False, True, False, True, False]
    # A stage begins at M_{t-1}: stage 2 at what stage 1 has exported.
    exported = load_file(tmp_path / "stages" / "01-a" / "adapter_model.safetensors")
    assert begins.found.keys() == {1, 2} and exported.keys() == begins.found[2].keys()
    assert all(torch.equal(tensor, exported[key]) for key, tensor in begins.found[2].items())


def _by_hand(stages, model_dir, settings, name, bound):
    """Losses of all steps, and behind which of them the reference becomes the policy."""
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=8, lora_dropout=0.0, target_modules="all-linear", use_dora=settings.dora
    )

    def make():
        torch.manual_seed(settings.seed)
        return peft.get_peft_model(AutoModelForCausalLM.from_pretrained(model_dir), config)

    policy, reference, found, moves = make(), make(), [], []
    for batches in stages.values():
        reference.load_state_dict(policy.state_dict())
        optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
        for step, batch in enumerate(batches, 1):
            with torch.no_grad():
                theirs = _pair_logps_by_hand(reference, batch)
            ours = _pair_logps_by_hand(policy, batch)
            ratios = torch.stack([ours[0] - theirs[0], ours[1] - theirs[1]])
            loss = -(F.logsigmoid(0.1 * (ratios[0] - ratios[1])) * batch.weights).sum() / batch.weights.sum()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
            far = (ratios.detach()[:, batch.weights > 0].double() ** 2 / 2).mean().item()
            moves.append(step % 2 == 0 if name == "hard" else far > bound)
            if moves[-1]:
                reference.load_state_dict(policy.state_dict())
    return found, moves


def test_what_an_interrupted_step_has_left_doesnt_count(tmp_path, tiny_model_dir, pairs):
    found = []
    # Beyond any bound: the first step would move the reference.
    for name, left in (("fresh", []), ("interrupted", [torch.tensor([1e6, 1.0], dtype=torch.float64)])):
        reference = KLBoundReference(0.01)
        reference._observed += left
        args = STEADY | {"optimizer": adamw(1e-2, 0.0)}
        fit(tmp_path / name, tiny_model_dir, pairs, reference=reference, module_args=args)
        found.append(losses(tmp_path / name))
    assert found[0] == found[1] and len(found[0]) == 7


@pytest.mark.parametrize("kind", ["lora", pytest.param("dora", marks=pytest.mark.slow), "nf4", "int8"])
def test_an_adapter_that_follows_each_step_never_leaves_the_policy(tmp_path, tiny_model_dir, pairs, kind):
    if "quantization" in KINDS[kind]:
        pytest.importorskip("bitsandbytes")
    args = KINDS[kind] | STEADY | {"optimizer": adamw(1e-2)}
    fit(tmp_path, tiny_model_dir, pairs, reference=UpdatingReference(1), module_args=args)
    # Policy and reference are one at each step, so their logps are.
    assert losses(tmp_path) == pytest.approx([LN2] * 7, abs=1e-6)


@pytest.mark.parametrize(
    "make, module_args",
    [
        pytest.param(lambda: UpdatingReference(2), {"lora": LoraSettings(r=4, dropout=0.2)}, id="hard"),
        pytest.param(lambda: KLBoundReference(0.01), KINDS["dora"], id="bound-dora", marks=pytest.mark.slow),
        pytest.param(lambda: UpdatingReference(2), KINDS["nf4"], id="hard-nf4", marks=pytest.mark.slow),
    ],
)
def test_adapters_that_follow_resume_from_every_checkpoint(tmp_path, tiny_model_dir, pairs, make, module_args):
    args = module_args | STEADY | {"optimizer": adamw(1e-2)}
    run = check_every_checkpoint(tmp_path, tiny_model_dir, pairs, make, module_args=args)
    held = [torch.load(path, weights_only=True) for path in (run / "checkpoints").glob("*.ckpt")]
    moved = [content["reference"] for content in held if len(content["reference"]) > 1]
    # Those before the first move of a stage need none.
    assert 0 < len(moved) < len(held)
    if module_args.get("lora") == LoraSettings(r=4, dropout=0.2):
        # The frozen adapter, the trained one and AdamW's two numbers for each of its weights; nothing of the base.
        assert {sum(t.numel() for t in state.values()) for state in moved} == {NUMBERS + 1}
        sizes = {_numbers([c["state_dict"], c["optimizer_states"]], "step") for c in held if c["optimizer_states"]}
        assert sizes == {3 * NUMBERS}


def _numbers(content, but: str) -> int:
    """How many numbers stand in the tensors of nested containers."""
    if isinstance(content, torch.Tensor):
        return content.numel()
    if isinstance(content, dict):
        content = [value for key, value in content.items() if key != but]
    return sum(_numbers(value, but) for value in content) if isinstance(content, list) else 0


class MissesTheSwap(KLBoundReference):
    """Keeps what it was at the end of the stage before."""

    def advance(self, policy, stage, inputs):
        if stage.index == 1:
            super().advance(policy, stage, inputs)


def test_an_adapter_that_misses_the_swap_is_noticed(tmp_path, tiny_model_dir, pairs):
    args = KINDS["lora"] | STEADY | {"optimizer": adamw(1e-2)}
    with pytest.raises(SelfCheckError, match="stage 2.*the reference has sha .*, M_1 has"):
        fit(tmp_path, tiny_model_dir, pairs, reference=MissesTheSwap(1e9), module_args=args)


class ReadsNoWeights(DPOLitModule):
    """The refusals come before."""

    def load_weights(self, model_name_or_path):
        raise AssertionError("weights were loaded")


@pytest.mark.parametrize(
    "make, message",
    [
        pytest.param(
            lambda: UpdatingReference(1, 0.3),
            "UpdatingReference with `mix: 0.3` and `model.lora`.*use `mix: 1`, or train all weights",
            id="soft",
        ),
        pytest.param(
            lambda: UpdatingReference(1, offload=True),
            "UpdatingReference with `offload: true` and `model.lora`.*leave `offload` out",
            id="hard-offloaded",
        ),
        pytest.param(lambda: KLBoundReference(1.0, True), "KLBoundReference with `offload: true`", id="bound"),
    ],
)
def test_what_adapters_cannot_do_is_refused_before_weights_load(tmp_path, tiny_model_dir, pairs, make, message):
    with pytest.raises(ConfigurationError, match=message):
        fit(tmp_path, tiny_model_dir, pairs, None, make(), module_class=ReadsNoWeights, module_args=KINDS["lora"])


@pytest.mark.parametrize("module_args", [{}, KINDS["lora"]], ids=["resident", "adapter"])
def test_a_module_that_has_trained_is_validated_as_its_checkpoint_is(tmp_path, tiny_model_dir, pairs, module_args):
    arguments, found = module_args | STEADY, {}
    module = fit(
        tmp_path, tiny_model_dir, pairs, None, UpdatingReference(1), module_args=arguments, val_fraction=0.3,
        trainer_args={"max_steps": 3},
    )[1]  # fmt: skip
    steps = [("live", module, None), ("again", module, None)]
    fresh = DPOLitModule(str(tiny_model_dir), reference=UpdatingReference(1), **arguments)
    steps.append(("checkpoint", fresh, str(tmp_path / "checkpoints" / "stopped-step=3.ckpt")))
    for name, which, checkpoint in steps:
        data = CurriculumDataModule(pairs, order="given", batch_size=2, max_length=64, val_fraction=0.3)
        trainer = pl.Trainer(default_root_dir=tmp_path, accelerator="cpu", logger=False, enable_progress_bar=False)
        trainer.validate(which, data, ckpt_path=checkpoint, verbose=False)
        found[name] = trainer.callback_metrics["val/a/loss"].item()
    # The reference has become the policy with the last step.
    assert found == dict.fromkeys(found, pytest.approx(LN2, abs=1e-6))


def test_what_follows_waits_with_the_trainers_memory(tmp_path, tiny_model_dir, pairs):
    """A process that makes pairs finds its memory free, as with a ResidentReference."""
    module = fit(tmp_path, tiny_model_dir, pairs, None, UpdatingReference(2), trainer_args={"max_steps": 1})[1]
    held = list(module.reference.held.model.parameters())
    before = [tensor.clone() for tensor in held]
    with memory_released([module.policy, *module.reference.models()], [], torch.device("cpu")):
        assert {tensor.untyped_storage().nbytes() for tensor in held} == {0}
    assert all(map(torch.equal, held, before))
    assert not UpdatingReference(2).models()


@pytest.mark.parametrize(
    "make, module_args", [(lambda: UpdatingReference(1, 0.3), {}), (lambda: UpdatingReference(1), KINDS["lora"])],
    ids=["soft", "adapter"],
)  # fmt: skip
def test_validate_looks_at_a_checkpoint_with_its_moved_reference(tmp_path, tiny_model_dir, pairs, make, module_args):
    """The same held-out losses by shards and without, and others than with M_1 in the place of the reference."""
    found, arguments = {}, module_args | STEADY
    for name, strategy in (("plain", "auto"), ("shards", "fsdp2")):
        trainer_args = {"devices": 1, "strategy": strategy}
        fit(
            tmp_path / name, tiny_model_dir, pairs, None, make(), module_args=arguments, val_fraction=0.3,
            trainer_args=trainer_args | {"max_steps": 3},
        )  # fmt: skip
        leave_group()
        for reference in (make(), None):
            module = DPOLitModule(str(tiny_model_dir), reference=reference, **arguments)
            data = CurriculumDataModule(pairs, order="given", batch_size=2, max_length=64, val_fraction=0.3)
            trainer = pl.Trainer(
                default_root_dir=tmp_path / name, accelerator="cpu", logger=False, enable_progress_bar=False,
                **trainer_args,
            )  # fmt: skip
            checkpoint = str(tmp_path / name / "checkpoints" / "stopped-step=3.ckpt")
            trainer.validate(module, data, ckpt_path=checkpoint, verbose=False)
            found[name, reference is None] = trainer.callback_metrics["val/a/loss"].item()
            leave_group()
    assert found["shards", False] == pytest.approx(found["plain", False], abs=1e-5)
    for name in ("plain", "shards"):
        # Step 3 is the first of stage 2: by the default reference the policy is compared with M_1.
        assert abs(found[name, True] - found[name, False]) > 1e-4
