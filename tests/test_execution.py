"""Settings that trade time for memory leave logps and gradients as they are."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from helpers import make_rows, write_jsonl
from runs import assert_same_weights, fit

from sdpo_lightning import CachedReference, DPOLitModule, PreferenceSource, offload
from sdpo_lightning.backbone import load_policy
from sdpo_lightning.data.collate import SharedPrefixCollator, TokenizedPair
from sdpo_lightning.execution import Execution
from sdpo_lightning.types import ConfigurationError

PAIRS = [
    TokenizedPair(list(range(10, 15)), list(range(20, 28)), [30, 31, 1]),
    TokenizedPair([9, 8], [40, 41, 42, 1], list(range(44, 50))),
]


def gradients(model_dir, execution):
    backbone = execution.apply(load_policy(str(model_dir))).train()
    batch = SharedPrefixCollator(0)([0, 1], PAIRS, [1.0, 1.0], 2)
    logps = backbone(batch)
    (logps * torch.linspace(-1, 1, len(logps))).sum().backward()
    return logps.detach(), {name: p.grad for name, p in backbone.named_parameters()}


def count_layer_calls(monkeypatch):
    from transformers.models.llama.modeling_llama import LlamaMLP

    calls, forward = [], LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: calls.append(id(self)) or forward(self, x))
    return calls


# Two layers: 2 calls forward, and one again for each recomputed layer (all; layers 0, 2, ...; layers 0, 3, ...).
@pytest.mark.parametrize(("every", "calls"), [(False, 2), (True, 4), (1, 4), (2, 3), (3, 3)])
def test_recomputed_layers_give_the_same_gradients(tiny_model_dir, monkeypatch, every, calls):
    logps, expected = gradients(tiny_model_dir, Execution())
    made = count_layer_calls(monkeypatch)
    again, found = gradients(tiny_model_dir, Execution(gradient_checkpointing=every))
    assert len(made) == calls
    assert torch.equal(logps, again)
    for name in expected:
        assert torch.equal(expected[name], found[name]), name


def test_offloaded_activations_give_the_same_gradients(tiny_model_dir, monkeypatch):
    logps, expected = gradients(tiny_model_dir, Execution())
    moved, move = [], offload._move
    monkeypatch.setattr(offload, "_LEAST_BYTES", 0)
    monkeypatch.setattr(offload, "_move", lambda tensor: moved.append(tuple(tensor.shape)) or move(tensor))
    again, found = gradients(tiny_model_dir, Execution(gradient_checkpointing=True, offload_activations=True))
    # 5 + 8 + 3 and 2 + 4 + 6 tokens in a row, hidden size 32: the input of each of the two layers is moved.
    assert moved.count((1, 28, 32)) >= 2
    weights = {tuple(grad.shape) for grad in expected.values() if grad.dim() == 2}
    assert not weights & set(moved)
    assert torch.equal(logps, again)
    for name in expected:
        assert torch.equal(expected[name], found[name]), name


def test_small_tensors_and_weights_stay_where_they_are():
    small, weight = torch.ones(8) * 2, torch.nn.Parameter(torch.ones(2**19))
    assert offload._pack(small) is small
    assert offload._pack(weight) is weight
    device, host = offload._pack(weight * 2)
    assert torch.equal(offload._unpack((device, host)), weight * 2)


def test_a_run_with_recomputation_is_the_same(tmp_path, tiny_model_dir):
    source = [PreferenceSource("a", str(write_jsonl(tmp_path / "a.jsonl", make_rows(8, 1))))]
    for name, every in (("kept", False), ("recomputed", True)):
        fit(
            tmp_path / name,
            tiny_model_dir,
            source,
            reference=CachedReference(),
            module_args={"gradient_checkpointing": every},
        )
    assert_same_weights(tmp_path / "kept/stages/01-a", tmp_path / "recomputed/stages/01-a")


@pytest.mark.slow
def test_compiled_layers_give_the_same_gradients(tiny_model_dir):
    logps, expected = gradients(tiny_model_dir, Execution())
    again, found = gradients(tiny_model_dir, Execution(compile_layers=True))
    torch.testing.assert_close(logps, again, atol=1e-5, rtol=1e-5)
    for name in expected:
        torch.testing.assert_close(expected[name], found[name], atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_a_copy_of_a_compiled_model_is_compiled(tiny_model_dir):
    backbone = Execution(compile_layers=True).apply(load_policy(str(tiny_model_dir)))
    twin = backbone.frozen_copy()
    batch = SharedPrefixCollator(0)([0, 1], PAIRS, [1.0, 1.0], 2)
    with torch.no_grad():
        assert torch.equal(backbone.eval()(batch), twin.eval()(batch))
    assert all(layer._compiled_call_impl is not None for layer in twin.decoder_layers())


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"gradient_checkpointing": -1}, ["gradient_checkpointing", "-1"]),
        ({"offload_activations": True}, ["offload_activations", "gradient_checkpointing"]),
        ({"offload_activations": True, "gradient_checkpointing": 2}, ["offload_activations"]),
    ],
)
def test_settings_that_make_no_sense_are_refused_at_once(settings, names):
    with pytest.raises(ConfigurationError) as error:
        DPOLitModule("nowhere", **settings)
    assert all(name in str(error.value) for name in names)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_liger_without_a_gpu_is_refused(tiny_model_dir):
    with pytest.raises(ConfigurationError, match="CUDA"):
        Execution(liger=True).apply(load_policy(str(tiny_model_dir)))


def test_liger_that_is_not_installed_is_refused(tiny_model_dir, monkeypatch):
    import transformers.integrations.liger as liger

    def missing(model, kernels):
        assert kernels == {"cross_entropy": False, "fused_linear_cross_entropy": False}
        raise ImportError("liger")

    monkeypatch.setattr(liger, "apply_liger_kernel", missing)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ConfigurationError, match=r"pip install 'sdpo-lightning\[liger\]'"):
        Execution(liger=True).apply(load_policy(str(tiny_model_dir)))


@pytest.mark.slow
@pytest.mark.skipif(find_spec("liger_kernel") is None, reason="needs liger-kernel: pip install 'sdpo-lightning[liger]'")
def test_kernels_of_liger_give_the_same_gradients(tiny_model_dir):
    """Triton's interpreter runs them on a CPU, and only in a process that begins with it."""
    words = [sys.executable, str(Path(__file__).with_name("liger_script.py")), str(tiny_model_dir)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["ran"] == [f"liger_kernel.ops.{name}" for name in ("rms_norm", "rope", "swiglu")]
    assert said["found"].keys() == {"kept", "recomputed"}
    for name, differences in said["found"].items():
        assert differences["logps"] <= 1e-4 and differences["gradients"] <= 1e-4, name
    # Gradients are far larger than what they may differ by.
    assert said["largest"] > 1
    # What Liger binds to a layer is the copy's own, not the policy's.
    assert said["reference"]["logps"] <= 1e-4 and said["reference"]["moved"] == 0
    assert said["reference"]["policy_moved"] > 1e-2


def test_a_model_without_marked_layers_is_refused():
    from transformers import GPT2Config, GPT2LMHeadModel

    from sdpo_lightning.backbone import CausalBackbone

    model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=9))
    model.transformer.h = torch.nn.ModuleList()
    with pytest.raises(ConfigurationError, match="gradient_checkpointing"):
        Execution(gradient_checkpointing=True).apply(CausalBackbone(model))
