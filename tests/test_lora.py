"""LoRA, DoRA and quantised bases: the reference is a frozen second adapter in the policy itself."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import peft
import pytest
import torch
import torch.nn.functional as F
import yaml
from helpers import free_port, make_rows, write_jsonl
from runs import adamw, command_line, fit, losses, made_sources, metrics, reproducible
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from sdpo_lightning import (
    AdapterReference,
    CachedReference,
    DPOLitModule,
    LoraSettings,
    PreferenceSource,
    ResidentReference,
    StageCheckpoint,
)
from sdpo_lightning import adapters as adapters_module
from sdpo_lightning.adapters import (
    REFERENCE,
    TRAINED,
    adapter_state,
    read_reference_adapter_,
    reference_adapter_active,
    snapshot_adapter_,
)
from sdpo_lightning.backbone import attach_adapters, load_policy, weights_digest
from sdpo_lightning.cli import main
from sdpo_lightning.types import ConfigurationError, ResumeError, SelfCheckError

pytestmark = pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")

TESTS = Path(__file__).resolve().parent
LORA = LoraSettings(r=4, alpha=8)
DORA = LoraSettings(r=4, alpha=8, dora=True)
KINDS = {
    "lora": {"lora": LORA},
    "dora": {"lora": DORA},
    "nf4": {"lora": LORA, "quantization": "nf4"},
    "int8": {"lora": LORA, "quantization": "int8"},
}
FOLDERS = ["01-a", "02-b", "03-c"]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return made_sources(tmp_path_factory.mktemp("sources"), {"a": 7, "b": 12, "c": 5})


def run(run_dir, model_dir, sources, kind="lora", reference=None, module_args=None, **rest):
    if "quantization" in KINDS[kind]:
        pytest.importorskip("bitsandbytes")
    arguments = {"optimizer": adamw(1e-2), "warmup_ratio": 0.0, **KINDS[kind], **(module_args or {})}
    reference = reference or AdapterReference()
    return fit(run_dir, model_dir, sources, reference=reference, module_args=arguments, **rest)


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def assert_same_adapter(left: dict, right: dict) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


def backbone(model_dir, kind="lora"):
    if "quantization" in KINDS[kind]:
        pytest.importorskip("bitsandbytes")
    model = load_policy(str(model_dir), quantization=KINDS[kind].get("quantization"))
    return attach_adapters(model, KINDS[kind]["lora"], str(model_dir))


# ---- the stages


@pytest.mark.parametrize("reference, tolerance", [(AdapterReference, 1e-6), (CachedReference, 1e-5)])
@pytest.mark.parametrize("kind", list(KINDS))
def test_first_loss_of_each_stage_is_ln2(tmp_path, tiny_model_dir, sources, kind, reference, tolerance):
    if (kind, reference) == ("int8", CachedReference):
        pytest.skip("refused, see test_refused_before_weights_load")
    run(tmp_path, tiny_model_dir, sources, kind, reference())
    first = {}
    for row in metrics(tmp_path):
        first.setdefault(row["stage/index"], float(row["train/loss"]))
    assert list(first) == ["1", "2", "3"]
    assert list(first.values()) == pytest.approx([math.log(2)] * 3, abs=tolerance)
    # Not all ln 2: it does train.
    assert max(abs(loss - math.log(2)) for loss in losses(tmp_path)) > 1e-2


@pytest.mark.parametrize("kind", ["lora", "nf4"])
def test_bf16_mixed_starts_at_ln2_with_fp32_adapters(tmp_path, tiny_model_dir, sources, kind):
    _, module = run(tmp_path, tiny_model_dir, sources, kind, trainer_args={"precision": "bf16-mixed"})
    first = {}
    for row in metrics(tmp_path):
        first.setdefault(row["stage/index"], float(row["train/loss"]))
    assert list(first.values()) == pytest.approx([math.log(2)] * 3, abs=1e-6)
    assert {p.dtype for p in module.policy.parameters() if p.requires_grad} == {torch.float32}


class StartsFrom(DPOLitModule):
    """Stage t as a run of its own: S with the exported adapter of the run before."""

    folder = None

    def configure_model(self):
        super().configure_model()
        if self.folder is not None:
            model = self.policy.model
            read_reference_adapter_(model, self.folder)
            for name, tensor in adapter_state(model, TRAINED).items():
                tensor.copy_(adapter_state(model, REFERENCE)[name])
            self.record.digests[0] = weights_digest(self.policy)


@pytest.mark.parametrize("kind", ["lora", "dora", "nf4"])
def test_one_run_equals_chained_runs_bit_for_bit(tmp_path, tiny_model_dir, sources, kind):
    run(tmp_path / "one", tiny_model_dir, sources, kind)
    chained, start = [], None
    for index, source in enumerate(sources, 1):
        module_class = type("Stage", (StartsFrom,), {"folder": start})
        run(tmp_path / f"{index}", tiny_model_dir, [source], kind, module_class=module_class)
        start = tmp_path / f"{index}" / "stages" / f"01-{source.name}"
        chained += losses(tmp_path / f"{index}")
        assert_same_adapter(adapter(tmp_path / "one" / "stages" / FOLDERS[index - 1]), adapter(start))
    # 7, 12 and 5 pairs by 2: 4 + 6 + 3 steps.
    assert len(chained) == 13
    assert losses(tmp_path / "one") == chained


class KeepsBatches(pl.Callback):
    """Micro-batches of each stage, and both adapters after each step."""

    def __init__(self):
        self.batches, self.references, self.policies = {}, {}, {}

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        stage = module.stage.index
        self.batches.setdefault(stage, []).append(batch)
        for adapter_name, kept in ((REFERENCE, self.references), (TRAINED, self.policies)):
            kept[stage] = {k: v.clone() for k, v in adapter_state(module.policy.model, adapter_name).items()}


def test_losses_are_those_of_a_loop_by_hand_with_peft_alone(tmp_path, tiny_model_dir, sources):
    keeps = KeepsBatches()
    module_args = {"lr_scheduler": "constant", "optimizer": adamw(1e-2, 0.0)}
    run(tmp_path, tiny_model_dir, sources, callbacks=[keeps], layout="padded", module_args=module_args)
    torch.manual_seed(LORA.seed)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=8, lora_dropout=0.0, target_modules="all-linear"
    )
    policy = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model_dir), config)
    found = []
    for batches in keeps.batches.values():
        reference = {k: v.clone() for k, v in policy.state_dict().items()}
        frozen = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model_dir), config)
        frozen.load_state_dict(reference)
        optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
        for batch in batches:
            with torch.no_grad():
                theirs = _pair_logps_by_hand(frozen, batch)
            ours = _pair_logps_by_hand(policy, batch)
            margin = (ours[0] - ours[1]) - (theirs[0] - theirs[1])
            loss = -(F.logsigmoid(0.1 * margin) * batch.weights).sum() / batch.weights.sum()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
    assert len(found) == 13
    assert losses(tmp_path) == pytest.approx(found, abs=1e-5)


def _pair_logps_by_hand(model, batch):
    logits = model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, position_ids=batch.position_ids
    ).logits
    logps = logits.flatten(0, 1)[batch.source_index].log_softmax(-1).gather(1, batch.target_ids[:, None])[:, 0]
    return torch.zeros(2 * batch.num_pairs).index_add(0, batch.sequence_index, logps).chunk(2)


def test_the_swap_is_real(tmp_path, tiny_model_dir, sources):
    keeps = KeepsBatches()
    run(tmp_path, tiny_model_dir, sources, callbacks=[keeps])
    start = {k: v.clone() for k, v in adapter_state(backbone(tiny_model_dir).model, TRAINED).items()}
    assert_same_adapter(keeps.references[1], start)
    for index in (2, 3):
        # In the last step of stage t the reference still is M_{t-1}, and that isn't S.
        assert_same_adapter(keeps.references[index], adapter(tmp_path / "stages" / FOLDERS[index - 2]))
        product = [name for name in start if "lora_B" in name]
        assert product and all(keeps.references[index][name].abs().max() > 0 for name in product)
        assert any(not torch.equal(keeps.policies[index][n], keeps.references[index][n]) for n in start)


class StaysBehind(AdapterReference):
    """Forgets to advance after stage 1."""

    def advance(self, policy, stage, inputs):
        if stage.index == 1:
            super().advance(policy, stage, inputs)


class StaysBehindWithoutDigest(StaysBehind):
    """As above, and no digest gives it away: the logps must."""

    def digest(self):
        return None


@pytest.mark.parametrize("reference", [StaysBehind, StaysBehindWithoutDigest])
def test_self_check_stops_a_stale_reference(tmp_path, tiny_model_dir, sources, reference):
    with pytest.raises(SelfCheckError, match="stage 2"):
        run(tmp_path, tiny_model_dir, sources, reference=reference())
    assert not (tmp_path / "stages" / "02-b").exists()


def test_dropout_of_the_adapters_is_the_policys_alone(tmp_path, tiny_model_dir, sources):
    # The self-check passes: reference and policy agree in eval mode.
    dropping = {"lora": LoraSettings(r=4, alpha=8, dropout=0.3)}
    trainer, _ = run(tmp_path / "on", tiny_model_dir, sources, module_args=dropping)
    assert trainer.global_step == 13
    run(tmp_path / "off", tiny_model_dir, sources)
    assert losses(tmp_path / "on") != losses(tmp_path / "off")


def test_a_snapshot_is_in_eval_mode_and_leaves_training_as_it_was(tiny_model_dir):
    policy = attach_adapters(load_policy(str(tiny_model_dir)), LoraSettings(r=4, dropout=0.5), "base").train()
    trainable = [name for name, p in policy.named_parameters() if p.requires_grad]
    product = [p for name, p in policy.named_parameters() if "lora_B.default" in name]
    with torch.no_grad():
        for parameter in product:
            parameter.normal_(std=0.1)
    snapshot_adapter_(policy.model)
    ids = torch.arange(8)[None]
    with torch.no_grad():
        with reference_adapter_active(policy):
            first, second = policy.model(input_ids=ids).logits, policy.model(input_ids=ids).logits
            assert [name for name, p in policy.named_parameters() if p.requires_grad] == trainable
        assert torch.equal(first, second)
        assert policy.training and policy.model.training
        # The policy itself drops out, and in eval mode equals its snapshot.
        assert not torch.equal(policy.model(input_ids=ids).logits, policy.model(input_ids=ids).logits)
        assert torch.equal(policy.eval().model(input_ids=ids).logits, first)
        for parameter in product:
            parameter.zero_()
        with reference_adapter_active(policy):
            assert torch.equal(policy.model(input_ids=ids).logits, first)
        assert not torch.equal(policy.model(input_ids=ids).logits, first)


def test_recomputed_layers_give_the_same_losses(tmp_path, tiny_model_dir, sources):
    for name, flag in (("plain", False), ("recomputed", True)):
        run(tmp_path / name, tiny_model_dir, sources, "nf4", module_args={"gradient_checkpointing": flag})
    assert losses(tmp_path / "recomputed") == pytest.approx(losses(tmp_path / "plain"), abs=1e-6)


# ---- what is trained, and what isn't


@pytest.mark.parametrize("kind", list(KINDS))
def test_the_base_stays_bit_for_bit(tmp_path, tiny_model_dir, sources, kind):
    _, module = run(tmp_path, tiny_model_dir, sources, kind)
    fresh = backbone(tiny_model_dir, kind)
    trained, untouched = module.policy.model.state_dict(), fresh.model.state_dict()
    base = [name for name in untouched if ".lora_" not in name]
    # Embedding, head, 2 layers of 7 linear layers and 2 norms, the last norm: 21 and the scales of quantised ones.
    assert len(base) == 21 if kind in ("lora", "dora") else len(base) > 21
    for name in base:
        assert torch.equal(torch.as_tensor(trained[name]), torch.as_tensor(untouched[name])), name
    assert module.policy.base_digest == fresh.base_digest


def test_only_the_default_adapter_is_trained(tmp_path, tiny_model_dir, sources):
    trainer, module = run(tmp_path, tiny_model_dir, sources, "dora")
    held = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    names = {name for name, p in module.policy.model.named_parameters() if id(p) in held}
    # 14 linear layers, each with A, B and a magnitude.
    assert len(names) == len(held) == 14 * 3
    assert all(".default." in name for name in names)
    assert {name for name, p in module.policy.model.named_parameters() if p.requires_grad} == names


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_eval_mode_computes_as_training_does(tiny_model_dir, kind):
    policy = backbone(tiny_model_dir, kind)
    ids = torch.arange(8)[None]

    def gradients():
        policy.train().zero_grad()
        logits = policy.model(input_ids=ids).logits
        logits.square().sum().backward()
        return logits.detach(), [p.grad.clone() for p in policy.parameters() if p.requires_grad]

    logits, before = gradients()
    digest = weights_digest(policy)
    with torch.no_grad():
        assert torch.equal(policy.eval().model(input_ids=ids).logits, logits)
    _, after = gradients()
    assert all(torch.equal(left, right) for left, right in zip(before, after, strict=True))
    # B is 0, so that A has no gradient; that of B is there in the first layer.
    assert sum(bool(gradient.any()) for gradient in after) == 14
    assert weights_digest(policy) == digest


def test_first_values_follow_the_seed_of_the_adapters_alone(tiny_model_dir):
    digests = []
    for seed, settings in ((1, LORA), (2, LORA), (1, LoraSettings(r=4, alpha=8, seed=1))):
        torch.manual_seed(seed)
        model = load_policy(str(tiny_model_dir))
        before = torch.get_rng_state()
        digests.append(weights_digest(attach_adapters(model, settings, "base")))
        assert torch.equal(torch.get_rng_state(), before)
    assert digests[0] == digests[1] != digests[2]


def test_the_fresh_adapter_changes_nothing(tiny_model_dir):
    ids = torch.arange(8)[None]
    plain = AutoModelForCausalLM.from_pretrained(tiny_model_dir)(input_ids=ids).logits
    torch.testing.assert_close(backbone(tiny_model_dir).eval().model(input_ids=ids).logits, plain, rtol=0, atol=0)


# ---- exports


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_exports_load_in_peft_and_merged(tmp_path, tiny_model_dir, sources, kind):
    settings = LoraSettings(r=4, alpha=8, dora=kind == "dora", export_merged=True)
    _, module = run(tmp_path, tiny_model_dir, sources, kind, module_args={"lora": settings})
    names = sorted(path.name for path in (tmp_path / "stages").iterdir())
    assert names == sorted([*FOLDERS, *(f"{name}-merged" for name in FOLDERS)])
    ids = torch.arange(40)[None]
    with torch.no_grad():
        ours = module.policy.eval().model(input_ids=ids).logits
        for name in FOLDERS:
            folder = tmp_path / "stages" / name
            files = {path.name for path in folder.iterdir()}
            assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json"} <= files
            assert "model.safetensors" not in files
            config = json.loads((folder / "adapter_config.json").read_text())
            assert config["base_model_name_or_path"] == str(tiny_model_dir)
            base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
            loaded = peft.PeftModel.from_pretrained(base, folder).eval()(input_ids=ids).logits
            merged = AutoModelForCausalLM.from_pretrained(f"{folder}-merged")(input_ids=ids).logits
            torch.testing.assert_close(
                merged.log_softmax(-1), loaded.log_softmax(-1), rtol=0, atol=1e-5
            )
            assert AutoTokenizer.from_pretrained(f"{folder}-merged").chat_template is not None
    # M_3 is the policy, and by its folder alone.
    torch.testing.assert_close(loaded, ours, rtol=0, atol=1e-6)
    # Merging left the policy's base as it was.
    fresh = backbone(tiny_model_dir, kind).model.state_dict()
    for name, tensor in module.policy.model.state_dict().items():
        assert ".lora_" in name or torch.equal(tensor, fresh[name]), name


# ---- checkpoints


def test_checkpoints_hold_the_adapter_alone(tmp_path, tiny_model_dir, sources):
    run(tmp_path, tiny_model_dir, sources)
    [path] = (tmp_path / "checkpoints").glob("*.ckpt")
    state = torch.load(path, weights_only=True)["state_dict"]
    policy = [name for name in state if name.startswith("policy.")]
    # 14 layers with A and B. r = 4, 4 D x D and 3 D x 64 layers a block, D = 32:
    # 2 * (4 * 4 * (32 + 32) + 3 * 4 * (32 + 64)) = 4352 numbers.
    assert len(policy) == 28 and all(".default." in name for name in policy)
    assert sum(state[name].numel() for name in policy) == 4352


@pytest.mark.parametrize(
    "kind, reference, dropout",
    [("lora", AdapterReference, 0.3), ("lora", CachedReference, 0.0), ("dora", AdapterReference, 0.0),
     ("nf4", AdapterReference, 0.0), ("int8", AdapterReference, 0.0)],
)  # fmt: skip
def test_resume_within_stage_2_is_bit_for_bit(tmp_path, tiny_model_dir, sources, kind, reference, dropout):
    settings = {"lora": LoraSettings(r=4, alpha=8, dora=kind == "dora", dropout=dropout)}
    data = {"val_fraction": 0.2, "order": "easy_to_hard"}
    whole = tmp_path / "whole"
    every = StageCheckpoint(every_n_train_steps=1, save_top_k=-1)
    trainer, _ = run(whole, tiny_model_dir, sources, kind, reference(), settings, callbacks=[every], **data)
    folders = sorted(path.name for path in (whole / "stages").iterdir())
    middle = [
        path for path in sorted((whole / "checkpoints").glob("*.ckpt"))
        if torch.load(path, weights_only=True)["stage_record"]["entered"] == 2
    ][1]  # fmt: skip
    resumed = tmp_path / "resumed"
    shutil.copytree(whole, resumed, ignore=shutil.ignore_patterns("checkpoints"))
    for folder in folders[1:]:
        shutil.rmtree(resumed / "stages" / folder)
    if reference is CachedReference:
        # Then the logps are computed again, by M_1 from its folder.
        (resumed / "references" / "02.safetensors").unlink()
    run(resumed, tiny_model_dir, sources, kind, reference(), settings, ckpt_path=middle, **data)
    for folder in folders:
        assert_same_adapter(adapter(whole / "stages" / folder), adapter(resumed / "stages" / folder))
    assert reproducible(resumed) == reproducible(whole)
    assert len(reproducible(whole)) == trainer.global_step


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, tiny_model_dir, sources):
    """A run that stopped in stage 2, after 5 steps."""
    folder = tmp_path_factory.mktemp("stopped")
    run(folder, tiny_model_dir, sources, trainer_args={"max_steps": 5})
    return folder


def _altered(path):
    tensors = load_file(path)
    save_file({name: tensor + 1e-6 for name, tensor in tensors.items()}, path)


def _without_one(path):
    tensors = load_file(path)
    tensors.popitem()
    save_file(tensors, path)


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-40]), "adapter_model.safetensors"),
        (lambda path: path.unlink(), "adapter_model.safetensors"),
        (_without_one, "names or shapes"),
        (_altered, "reference M_1 sha mismatch"),
    ],
)
def test_a_damaged_reference_is_refused(tmp_path, tiny_model_dir, sources, stopped, damage, message):
    shutil.copytree(stopped, tmp_path / "run")
    damage(tmp_path / "run" / "stages" / "01-a" / "adapter_model.safetensors")
    checkpoint = tmp_path / "run" / "checkpoints" / "stopped-step=5.ckpt"
    with pytest.raises(ResumeError, match=message):
        run(tmp_path / "run", tiny_model_dir, sources, ckpt_path=checkpoint)


@pytest.mark.parametrize(
    "settings",
    [{"lora": LoraSettings(r=8)}, {"lora": LoraSettings(r=4, alpha=9)}, {"quantization": "nf4"}, {"lora": None}],
)
def test_a_resume_with_other_settings_is_refused(tmp_path, tiny_model_dir, sources, stopped, settings):
    shutil.copytree(stopped, tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoints" / "stopped-step=5.ckpt"
    # A cached reference goes with any settings.
    arguments = {"ckpt_path": checkpoint, "module_args": settings, "reference": CachedReference()}
    with pytest.raises(ResumeError, match="`model.lora` and `model.quantization` are"):
        run(tmp_path / "run", tiny_model_dir, sources, **arguments)


def test_a_checkpoint_that_lacks_an_adapter_weight_is_refused(tmp_path, tiny_model_dir, sources, stopped):
    shutil.copytree(stopped, tmp_path / "run")
    path = tmp_path / "run" / "checkpoints" / "stopped-step=5.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["state_dict"][next(name for name in checkpoint["state_dict"] if "lora_A" in name)]
    torch.save(checkpoint, path)
    with pytest.raises(ResumeError, match="holds 27 weights of adapters, the model has 28"):
        run(tmp_path / "run", tiny_model_dir, sources, ckpt_path=path)


# ---- ranks

SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
from runs import adamw, fit
from sdpo_lightning import AdapterReference, LoraSettings, PreferenceSource

if __name__ == "__main__":
    _, tests, run_dir, model_dir, quantization, *paths = sys.argv
    sources = [PreferenceSource(Path(path).stem, path) for path in paths]
    module = {"lora": LoraSettings(r=4, alpha=8), "quantization": quantization or None, "optimizer": adamw(1e-2)}
    trainer = {"devices": 2, "strategy": "ddp"}
    data = {"batch_size": 1, "order": "easy_to_hard", "val_fraction": 0.2, "trainer_args": trainer}
    fit(Path(run_dir), model_dir, sources, reference=AdapterReference(), module_args=module, **data)
"""


@pytest.mark.parametrize("kind", ["lora", pytest.param("nf4", marks=pytest.mark.slow)])
def test_two_ranks_equal_one(tmp_path, tiny_model_dir, kind):
    paths = [write_jsonl(tmp_path / f"{name}.jsonl", make_rows(9, seed, name)) for seed, name in enumerate("ab")]
    (tmp_path / "script.py").write_text(SCRIPT)
    quantization = KINDS[kind].get("quantization", "")
    words = [sys.executable, "script.py", str(TESTS), str(tmp_path / "two"), str(tiny_model_dir), quantization]
    environment = os.environ | {"MASTER_PORT": free_port(), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [*words, *map(str, paths)], capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=240
    )
    assert done.returncode == 0, done.stderr[-2000:]
    sources = [PreferenceSource(path.stem, str(path)) for path in paths]
    data = {"batch_size": 2, "order": "easy_to_hard", "val_fraction": 0.2}
    run(tmp_path / "one", tiny_model_dir, sources, kind, module_args={"warmup_ratio": 0.2}, **data)
    folders = sorted(path.name for path in (tmp_path / "one" / "stages").iterdir())
    assert len(folders) == 2
    for folder in folders:
        ours, theirs = (adapter(tmp_path / name / "stages" / folder) for name in ("two", "one"))
        for name, tensor in ours.items():
            torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=1e-4)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-4)


# ---- refusals and the command line


def test_the_default_reference_with_adapters():
    assert type(DPOLitModule("x", lora=LORA).reference) is AdapterReference
    assert type(DPOLitModule("x").reference) is ResidentReference


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"quantization": "nf4"}, "`model.quantization` is 'nf4', .* `model.lora.r`"),
        ({"reference": AdapterReference()}, "`model.reference` is AdapterReference, .* `model.lora.r`"),
        ({"lora": LORA, "reference": ResidentReference()}, "`model.reference` is ResidentReference, .* leave it out"),
        ({"lora": LORA, "quantization": "nf4", "reference": ResidentReference()}, "frozen and quantised"),
        ({"lora": LORA, "quantization": "int8", "reference": CachedReference()}, "CachedReference with .* int8"),
        ({"lora": LoraSettings(export_merged=True), "quantization": "nf4"}, "`model.lora.export_merged` with .* nf4"),
    ],
)
def test_refused_before_weights_load(arguments, message):
    # Without a Trainer there are no weights: `__init__` refuses.
    with pytest.raises(ConfigurationError, match=message):
        DPOLitModule("there is no such model", **arguments)


@pytest.mark.parametrize(
    "number", [{"r": 0}, {"alpha": 0}, {"dropout": 1.0}, {"dropout": -0.1}], ids=lambda n: str(n)
)
def test_numbers_outside_their_range(number):
    [key] = number
    with pytest.raises(ConfigurationError, match=f"`model.lora.{key}`"):
        DPOLitModule("there is no such model", lora=LoraSettings(**number))


@pytest.mark.parametrize(
    "package, message", [("peft", r"pip install 'sdpo-lightning\[peft\]'"), ("bitsandbytes", "install bitsandbytes")]
)
def test_an_absent_package_is_named(monkeypatch, package, message):
    monkeypatch.setattr(adapters_module, f"is_{package}_available", lambda: False)
    with pytest.raises(ConfigurationError, match=message):
        DPOLitModule("there is no such model", lora=LORA, quantization="nf4")


@pytest.mark.parametrize("targets, adapted", [(["embed_tokens", "lm_head"], 4), (r".*\.0\.mlp\..*_proj", 6)])
def test_other_target_modules(tmp_path, tiny_model_dir, sources, targets, adapted):
    settings = LoraSettings(r=4, target_modules=targets, export_merged=True)
    _, module = run(tmp_path, tiny_model_dir, sources, module_args={"lora": settings})
    folder = tmp_path / "stages" / "03-c"
    # Two tensors a module.
    assert len(adapter(folder)) == adapted
    ids = torch.arange(40)[None]
    merged = AutoModelForCausalLM.from_pretrained(f"{folder}-merged")(input_ids=ids).logits
    with torch.no_grad():
        torch.testing.assert_close(module.policy.eval().model(input_ids=ids).logits, merged, rtol=0, atol=1e-5)


def test_a_merged_export_keeps_tied_weights_tied(tmp_path, tiny_model_dir, sources):
    config = AutoConfig.from_pretrained(tiny_model_dir)
    config.tie_word_embeddings = True
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "tied")
    for path in tiny_model_dir.glob("tokenizer*"):
        shutil.copy(path, tmp_path / "tied")
    with pytest.raises(ConfigurationError, match="share their weight"):
        settings = LoraSettings(target_modules=["lm_head"], export_merged=True)
        run(tmp_path / "no", tmp_path / "tied", sources, module_args={"lora": settings})
    settings = LoraSettings(r=4, export_merged=True)
    _, module = run(tmp_path / "yes", tmp_path / "tied", sources, module_args={"lora": settings})
    ids = torch.arange(40)[None]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "yes" / "stages" / "03-c-merged")
    with torch.no_grad():
        ours = module.policy.eval().model(input_ids=ids).logits
        torch.testing.assert_close(ours, merged(input_ids=ids).logits, rtol=0, atol=1e-5)
    assert merged.lm_head.weight is merged.model.embed_tokens.weight


def test_unknown_target_modules(tmp_path, tiny_model_dir, sources):
    with pytest.raises(ConfigurationError, match=r"`model.lora.target_modules` is \['nothing'\]"):
        run(tmp_path, tiny_model_dir, sources, module_args={"lora": LoraSettings(target_modules=["nothing"])})


@pytest.fixture
def words(tmp_path, tiny_model_dir):
    base = command_line(tmp_path, tiny_model_dir, {"a": 10, "b": 10})
    return [*base, "--model.optimizer.init_args.lr=1e-2", "--data.val_fraction=0.2"]


def test_the_command_line(tmp_path, words):
    run_dir = tmp_path / "run"
    flags = [*words, "--model.lora.r=8", '--model.lora.target_modules=["q_proj","v_proj"]', "--model.quantization=nf4"]
    main(["fit", *flags])
    config = yaml.safe_load((run_dir / "config.yaml").read_text())["model"]
    assert config["lora"]["r"] == 8 and config["lora"]["alpha"] == 32 and config["quantization"] == "nf4"
    tensors = [adapter(folder) for folder in sorted((run_dir / "stages").iterdir())]
    # 2 layers, q and v, A and B.
    assert [len(found) for found in tensors] == [8, 8]
    assert {min(t.shape) for found in tensors for t in found.values()} == {8}
    [checkpoint] = (run_dir / "checkpoints").glob("*.ckpt")
    (run_dir / "config.yaml").rename(tmp_path / "again.yaml")
    main(["validate", f"--config={tmp_path / 'again.yaml'}", f"--ckpt_path={checkpoint}"])
    main(["predict", f"--config={tmp_path / 'again.yaml'}", f"--ckpt_path={checkpoint}"])
    # The checkpoint's policy is M_2 and its reference M_1: they differ.
    lines = (run_dir / "predictions.csv").read_text().splitlines()
    rows = [dict(zip(lines[0].split(","), line.split(","), strict=True)) for line in lines[1:]]
    assert len(rows) == 20
    assert any(abs(float(row["policy_chosen"]) - float(row["reference_chosen"])) > 1e-4 for row in rows)


def test_print_config(words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["fit", *words, "--model.lora.r", "8", "--print_config"])
    assert stop.value.code == 0
    model = yaml.safe_load(capsys.readouterr().out)["model"]
    assert model["lora"] == {
        "r": 8, "alpha": 32, "dropout": 0.0, "target_modules": "all-linear", "dora": False, "seed": 0,
        "export_merged": False,
    }  # fmt: skip


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--model.quantization=nf4"], "add adapters with `model.lora.r`"),
        (["--model.lora.r=0"], "`model.lora.r` is 0"),
        (["--model.lora.r=8", "--model.quantization=int4"], "int4"),
        (["--model.lora.r=8", "--model.reference=ResidentReference"], "`model.reference` is ResidentReference"),
    ],
)
def test_refused_in_one_line_with_exit_code_2(words, capsys, flags, message):
    with pytest.raises(SystemExit) as stop:
        main(["fit", *words, *flags])
    assert stop.value.code == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert message in line
