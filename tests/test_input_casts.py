"""Inputs of several linear layers under autocast: cast once, with the values of plain autocast."""

import copy
import gc
import threading
import weakref

import pytest
import torch
from test_casts import CountCasts
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from sdpo_lightning import adapters
from sdpo_lightning.adapters import LoraSettings, add_adapters
from sdpo_lightning.input_casts import _LAST, LastCast, share_input_casts

SIZES = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def autocast():
    return torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False)


@pytest.fixture
def pair():
    """The same model twice, the second with shared casts."""
    torch.manual_seed(0)
    plain = LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2))
    shared = copy.deepcopy(plain)
    share_input_casts(shared)
    return plain, shared


IDS = torch.arange(24)[None]


def test_the_values_of_plain_autocast_with_fewer_casts(pair):
    """A layer casts for q, k, v, gate and up: 5 for 2 layers and the head are 11, two a layer and the head are 5."""
    found = []
    for model in pair:
        with CountCasts((1, 24, 32)) as counter, autocast():
            found.append((model(IDS).logits, counter.count))
    (expected, before), (got, after) = found
    assert torch.equal(expected, got)
    assert (before, after) == (11, 5)


def test_gradients_are_those_of_plain_autocast_up_to_the_rounding_of_a_sum(pair):
    for model in pair:
        with autocast():
            logits = model(IDS).logits
        logits.float().square().mean().backward()
    for (name, one), two in zip(pair[0].named_parameters(), pair[1].parameters(), strict=True):
        # bf16 has 8 bits: a sum of three is rounded twice by 2^-9 of itself.
        assert (one.grad - two.grad).norm() <= 0.01 * one.grad.norm(), name
        assert one.grad.norm() > 0


def test_adapters_share_the_input_of_their_base(pair, monkeypatch):
    """With adapters on q, k and v plain autocast casts three times more in each of two layers, shared casts never."""
    found = []
    for model in pair:
        settings = LoraSettings(r=2, target_modules=["q_proj", "k_proj", "v_proj"])
        if model is pair[0]:
            monkeypatch.setattr(adapters, "share_input_casts", lambda model: None)
        add_adapters(model, settings, "base")
        monkeypatch.undo()
        with CountCasts((1, 24, 32)) as counter, autocast():
            found.append((model(IDS).logits, counter.count))
    (expected, before), (got, after) = found
    assert torch.equal(expected, got)
    assert (before, after) == (11 + 2 * 3, 5)


def test_without_autocast_nothing_changes(pair):
    assert torch.equal(pair[0](IDS).logits, pair[1](IDS).logits)
    half = copy.deepcopy(pair[1]).bfloat16()
    assert half(IDS).logits.dtype == torch.bfloat16


def test_recomputed_layers_give_the_same_gradients(pair):
    _, model = pair
    gradients = []
    for recomputed in (False, True):
        model.zero_grad()
        if recomputed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
        with autocast():
            logits = model(IDS).logits
        logits.float().square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_changed_input_is_cast_again():
    casts, rows = LastCast(), torch.ones(2, 3)
    first = casts.cast(rows, torch.bfloat16)
    assert casts.cast(rows, torch.bfloat16) is first
    rows.mul_(2)
    assert casts.cast(rows, torch.bfloat16).tolist() == [[2.0] * 3] * 2
    assert casts.cast(rows, torch.float16).dtype == torch.float16


def test_a_copy_without_a_graph_is_not_used_where_one_is_wanted():
    casts, rows = LastCast(), torch.ones(2, 3, requires_grad=True)
    with torch.no_grad():
        assert not casts.cast(rows, torch.bfloat16).requires_grad
    assert casts.cast(rows, torch.bfloat16).requires_grad


def test_what_can_change_unseen_is_cast_each_time():
    """Tensors of inference mode have no version; copies made there can't be kept for a backward pass."""
    casts = LastCast()
    with torch.inference_mode():
        rows = torch.ones(2)
        casts.cast(rows, torch.bfloat16)
        rows.mul_(2)
        assert casts.cast(rows, torch.bfloat16).tolist() == [2.0, 2.0]
    ordinary = torch.ones(2)
    with torch.inference_mode():
        assert casts.cast(ordinary, torch.bfloat16).is_inference()
    assert not casts.cast(ordinary, torch.bfloat16).is_inference()


def test_a_graph_that_comes_or_goes_is_seen():
    casts, rows = LastCast(), torch.ones(2, 3)
    assert not casts.cast(rows, torch.bfloat16).requires_grad
    rows.requires_grad_()
    assert casts.cast(rows, torch.bfloat16).requires_grad
    inner = rows * 2
    assert casts.cast(inner, torch.bfloat16).requires_grad
    inner.detach_()
    assert not casts.cast(inner, torch.bfloat16).requires_grad


def test_leaves_one_after_the_other():
    """The copy of a leaf has the leaf in its graph: it would keep it, and let it die amid the next call."""
    layer = nn.Linear(4, 4)
    share_input_casts(layer)
    leaves = []
    for _ in range(5):
        rows = torch.randn(2, 4, requires_grad=True)
        with autocast():
            layer(rows).float().sum().backward()
        assert rows.grad is not None
        leaves.append(weakref.ref(rows))
        del rows
    gc.collect()
    assert [leaf() for leaf in leaves] == [None] * 5


def test_an_input_that_dies_with_its_copy():
    """The old copy is all that holds the old input: the end of both must not take the new copy with it."""
    casts, rows = LastCast(), torch.ones(2)
    casts.cast(rows, torch.bfloat16).held = rows
    del rows
    for number in (2.0, 3.0):
        assert casts.cast(torch.full((2,), number), torch.bfloat16).tolist() == [number] * 2


def test_threads_have_copies_of_their_own():
    casts, rows = LastCast(), torch.ones(2)
    mine = casts.cast(rows, torch.bfloat16)
    theirs = []
    thread = threading.Thread(target=lambda: theirs.append(casts.cast(rows, torch.bfloat16)))
    thread.start()
    thread.join()
    assert theirs[0] is not mine and casts.cast(rows, torch.bfloat16) is mine


def test_a_model_without_values():
    model = nn.Linear(3, 3, device="meta")
    share_input_casts(model)
    assert model(torch.empty(2, 3, device="meta")).shape == (2, 3)


def test_the_copy_goes_with_the_input():
    casts, rows = LastCast(), torch.ones(2, 3)
    copied = weakref.ref(casts.cast(rows, torch.bfloat16))
    assert copied() is not None
    del rows
    gc.collect()
    assert copied() is None


def test_nothing_is_held_after_a_pass(pair):
    with autocast():
        loss = pair[1](IDS).logits.float().mean()
    loss.backward()
    gc.collect()
    assert _LAST._copy is None


def test_quantised_and_other_subclasses_are_left_alone():
    class Own(nn.Linear):
        pass

    model = nn.Sequential(Own(3, 3), nn.Linear(3, 3))
    for _ in range(2):
        share_input_casts(model)
    assert [len(module._forward_pre_hooks) for module in model] == [0, 1]
