"""Low-precision copies of the weights: made once a step, never stale, never without their graph."""

import pytest
import torch
from helpers import make_rows, write_jsonl
from runs import adamw, assert_same_weights, fit
from torch.utils._python_dispatch import TorchDispatchMode

from sdpo_lightning import CachedReference, PreferenceSource
from sdpo_lightning.casts import CASTS, WeightCasts


class CountCasts(TorchDispatchMode):
    """How often a float32 tensor of a shape is copied into bf16."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        copies = func is torch.ops.aten._to_copy.default and kwargs.get("dtype") == torch.bfloat16
        self.count += copies and args[0].shape == self.shape
        return func(*args, **kwargs)


@pytest.fixture(autouse=True)
def nothing_held():
    yield
    assert not CASTS.is_held
    assert not torch.is_autocast_enabled("cpu")


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return torch.nn.Linear(3, 5)


def forward(casts, layer, rows):
    # Lightning's context: its cache is off.
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False), casts.in_use():
        weight = casts.cast(layer.weight, torch.bfloat16)
        return layer(rows).float() + torch.nn.functional.linear(rows.bfloat16(), weight)


def test_one_copy_for_two_forwards_and_the_same_gradients(layer):
    casts, rows = WeightCasts(), torch.randn(4, 3)
    with CountCasts((5, 3)) as counter:
        for part in rows.split(2):
            forward(casts, layer, part).sum().backward()
    # Two forwards, in each one by autocast and one by `cast`.
    assert counter.count == 4
    expected = layer.weight.grad.clone()
    layer.zero_grad()
    with CountCasts((5, 3)) as counter:
        casts.hold()
        for part in rows.split(2):
            forward(casts, layer, part).sum().backward()
        casts.release()
    assert counter.count == 2
    assert torch.equal(layer.weight.grad, expected)


@pytest.mark.parametrize("fused", [True, False])
def test_any_optimizer_step_ends_it(layer, fused):
    casts, rows = WeightCasts(), torch.ones(1, 3)
    casts.hold()
    before = forward(casts, layer, rows)
    before.sum().backward()
    torch.optim.AdamW(layer.parameters(), lr=0.5, fused=fused).step()
    assert not casts.is_held
    # AdamW's first step moves each weight by lr = 0.5 down: 3 inputs x 0.5, twice, and the bias once.
    moved = before - forward(casts, layer, rows)
    torch.testing.assert_close(moved, torch.full((1, 5), 3.5), atol=0.1, rtol=0)


def test_a_forward_without_gradients_in_between_leaves_the_graph_alone(layer):
    casts, rows = WeightCasts(), torch.randn(2, 3)
    forward(casts, layer, rows).sum().backward()
    expected = layer.weight.grad.clone()
    layer.zero_grad()
    casts.hold()
    with torch.no_grad():
        quiet = forward(casts, layer, rows)
    loud = forward(casts, layer, rows)
    assert torch.equal(quiet, loud.detach())
    loud.sum().backward()
    casts.release()
    assert torch.equal(layer.weight.grad, expected)


def test_a_pass_without_gradients_casts_once_and_leaves_nothing(layer):
    casts, rows = WeightCasts(), torch.randn(2, 3)
    with CountCasts((5, 3)) as counter, torch.no_grad(), casts.held():
        for _ in range(3):
            forward(casts, layer, rows)
    assert counter.count == 2
    forward(casts, layer, rows).sum().backward()
    assert layer.weight.grad.abs().sum() > 0


def test_the_cache_of_a_plain_autocast_is_left_as_it_was(layer):
    casts = WeightCasts()
    for enabled in (True, False):
        with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=enabled):
            with casts.in_use():
                assert torch.is_autocast_cache_enabled() == enabled


def run(tmp_path, name, model, **trainer_args):
    sources = [PreferenceSource("a", str(write_jsonl(tmp_path / "a.jsonl", make_rows(12, 1))))]
    fit(
        tmp_path / name,
        model,
        sources,
        reference=CachedReference(),
        module_args={"optimizer": adamw()},
        trainer_args={"precision": "bf16-mixed", "accumulate_grad_batches": 3, **trainer_args},
    )
    return next((tmp_path / name / "stages").glob("01-*"))


def test_a_run_is_the_same_to_the_bit_and_casts_less(tmp_path, tiny_model_dir, monkeypatch):
    with CountCasts((64, 32)) as once:
        ours = run(tmp_path, "once", tiny_model_dir)
    monkeypatch.setattr(WeightCasts, "hold", lambda self: None)
    with CountCasts((64, 32)) as often:
        plain = run(tmp_path, "often", tiny_model_dir)
    assert_same_weights(ours, plain)
    assert 0 < once.count < often.count


def test_an_interrupted_run_leaves_nothing_held(tmp_path, tiny_model_dir):
    from lightning.pytorch import Callback

    class Stop(Callback):
        def on_after_backward(self, trainer, pl_module):
            assert CASTS.is_held
            raise RuntimeError("power cut")

    sources = [PreferenceSource("a", str(write_jsonl(tmp_path / "a.jsonl", make_rows(12, 1))))]
    with pytest.raises(RuntimeError, match="power cut"):
        fit(tmp_path / "run", tiny_model_dir, sources, callbacks=[Stop()], trainer_args={"precision": "bf16-mixed"})
    assert not CASTS.is_held


def test_recomputed_layers_are_cast_for_a_moment(tmp_path, tiny_model_dir, monkeypatch):
    holds, hold = [], WeightCasts.hold

    def noted(self):
        holds.append(torch.is_grad_enabled())
        hold(self)

    monkeypatch.setattr(WeightCasts, "hold", noted)
    sources = [PreferenceSource("a", str(write_jsonl(tmp_path / "a.jsonl", make_rows(12, 1))))]
    folders = []
    for recomputed in (False, True):
        holds.clear()
        fit(
            tmp_path / str(recomputed),
            tiny_model_dir,
            sources,
            reference=CachedReference(),
            module_args={"optimizer": adamw(), "gradient_checkpointing": recomputed},
            trainer_args={"precision": "bf16-mixed", "accumulate_grad_batches": 3},
        )
        # Passes without gradients (ranking, reference, samples) hold copies either way, training only without.
        assert set(holds) == ({False} if recomputed else {False, True})
        folders.append(next((tmp_path / str(recomputed) / "stages").glob("01-*")))
    assert_same_weights(*folders)


def test_generate_casts_once(tmp_path, tiny_model_dir):
    from transformers import AutoModelForCausalLM

    from sdpo_lightning.sampling import draw_answers, uniforms

    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32).eval()
    shape = tuple(model.get_output_embeddings().weight.shape)
    numbers = uniforms(0, 0, 0, 4).expand(1, 4)
    with CountCasts(shape) as counter, torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
        draw_answers(model, [[5, 6, 7]], numbers, [10**6], 0)
    # Four tokens, one copy of the head.
    assert counter.count == 1
    assert not CASTS.is_held
