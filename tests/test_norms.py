"""RMS norms keep less for the backward pass and give the values of the model's own."""

import copy
import pickle
from importlib import import_module

import pytest
import torch
from test_layouts import make
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from sdpo_lightning.data.collate import PaddedCollator
from sdpo_lightning.exactness import layout_problem
from sdpo_lightning.norms import _RMSNorm, keep_less_in_norms, own_norms

CLASSES = {
    "Llama": "llama", "Mistral": "mistral", "Qwen2": "qwen2", "Qwen3": "qwen3", "Gemma2": "gemma2", "Gemma3": "gemma3",
    "Phi3": "phi3", "Olmo2": "olmo2", "Granite": "granite", "Mixtral": "mixtral", "GptOss": "gpt_oss",
}  # fmt: skip
ONE_LAYER = {
    "vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
}  # fmt: skip
DTYPES = [torch.float32, torch.bfloat16]


def norm_of(name: str) -> type[nn.Module]:
    return getattr(import_module(f"transformers.models.{CLASSES[name]}.modeling_{CLASSES[name]}"), f"{name}RMSNorm")


def pair_of(kind, size=24):
    """The same norm twice, the second with our backward pass, and weights that aren't all alike."""
    torch.manual_seed(1)
    plain = kind(size, eps=1e-3)
    plain.load_state_dict({"weight": torch.randn(size)})
    ours = copy.deepcopy(plain)
    assert keep_less_in_norms(nn.ModuleList([ours])) == 1
    return plain, ours


def run(norm, hidden, gradient):
    hidden = hidden.clone().requires_grad_()
    norm.zero_grad()
    out = norm(hidden)
    out.backward(gradient.to(out.dtype))
    return out.detach(), hidden.grad, norm.weight.grad


@pytest.mark.parametrize("weights", DTYPES)
@pytest.mark.parametrize("inputs", DTYPES)
@pytest.mark.parametrize("name", CLASSES)
def test_values_are_equal_and_gradients_those_of_autograd(name, inputs, weights):
    plain, ours = (norm.to(weights) for norm in pair_of(norm_of(name)))
    hidden, gradient = torch.randn(2, 5, 24).to(inputs), torch.randn(2, 5, 24).to(inputs)
    hidden[0, 0] *= 1e-2
    expected, found = run(plain, hidden, gradient), run(ours, hidden, gradient)
    assert torch.equal(expected[0], found[0]) and expected[0].dtype == found[0].dtype
    # bf16 has 8 bits, and autograd rounds on the way.
    tolerance = 1e-6 if inputs == weights == torch.float32 else 2**-7
    for theirs, mine in zip(expected[1:], found[1:], strict=True):
        assert theirs.dtype == mine.dtype
        assert (theirs - mine).norm() <= tolerance * theirs.norm() and theirs.norm() > 0


def test_gradients_by_hand():
    """x = (3, 4), weights (1, 2), epsilon 0: mean of squares 12.5, r = 12.5^-1/2; y = r (3, 8).

    With gradient (1, 0): dy_1/dx = r (1, 0) - r^3 * 3 * x / 2 = r (1, 0) - r / 25 * 3 * (3, 4) = r (16, -12) / 25;
    dy_1/dw = (3 r, 0).
    """
    norm = norm_of("Llama")(2, eps=0.0)
    norm.load_state_dict({"weight": torch.tensor([1.0, 2.0])})
    keep_less_in_norms(nn.ModuleList([norm]))
    out, d_hidden, d_weight = run(norm, torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 0.0]]))
    r = 12.5**-0.5
    assert torch.allclose(out, torch.tensor([[3 * r, 8 * r]]))
    assert torch.allclose(d_hidden, torch.tensor([[16 * r / 25, -12 * r / 25]]))
    assert torch.allclose(d_weight, torch.tensor([3 * r, 0.0]))


@pytest.mark.parametrize(("dtype", "numbers"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_what_is_kept_is_the_input_and_a_number_a_token(dtype, numbers):
    """10 tokens of 24 numbers, their scales and 24 weights. Autograd keeps 24 fp32 numbers a token and more."""
    plain, ours = (norm.to(dtype) for norm in pair_of(norm_of("Llama")))
    hidden, found = torch.randn(1, 10, 24).to(dtype).requires_grad_(), []
    for norm in (plain, ours):
        kept = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor, kept=kept: kept.setdefault(tensor.untyped_storage()._cdata, tensor), lambda tensor: tensor
        ):
            norm(hidden)
        found.append(sum(tensor.untyped_storage().nbytes() for tensor in kept.values()))
    before, after = found
    assert after == numbers * (10 * 24 + 24) + 4 * 10
    assert before > after + 4 * 10 * 24 - numbers * 24


def test_frozen_weights_get_no_gradient():
    _, norm = pair_of(norm_of("Llama"))
    norm.requires_grad_(False)
    hidden = torch.randn(1, 3, 24, requires_grad=True)
    norm(hidden).sum().backward()
    assert norm.weight.grad is None and hidden.grad is not None
    norm.requires_grad_(True)
    norm(hidden.detach()).sum().backward()
    assert norm.weight.grad is not None


class GatedRMSNorm(nn.Module):
    __module__ = "transformers.models.made_up"

    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, hidden, gate=None):
        hidden = hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight
        return hidden if gate is None else hidden * gate


class OtherRMSNorm(nn.Module):
    __module__ = "transformers.models.made_up"

    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, hidden):
        return self.weight * hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True)).clamp(max=1 / self.eps)


class OwnRMSNorm(nn.Module):
    __module__ = "transformers.models.made_up"

    def __init__(self):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(4)), 1e-3

    def forward(self, hidden):
        return hidden


class OptionRMSNorm(nn.Module):
    """With `groups` it norms parts of its input, with `scales` False it has no weights."""

    __module__ = "transformers.models.made_up"

    def __init__(self, size, eps=1e-6, groups=1, scales=True):
        super().__init__()
        self.eps, self.groups = eps, groups
        if scales:
            self.weight = nn.Parameter(torch.ones(size))

    def forward(self, hidden):
        parts = hidden.float().unflatten(-1, (self.groups, -1))
        parts = parts * torch.rsqrt(parts.pow(2).mean(-1, keepdim=True) + self.eps)
        return (parts.flatten(-2) * getattr(self, "weight", 1)).type_as(hidden)


class KernelRMSNorm(norm_of("Llama")):
    """As Liger's, which stands in the place of transformers' class and runs on a GPU."""

    __module__ = "liger_kernel.transformers"


OTHERS = {
    "gated": GatedRMSNorm(4, 1e-3), "other": OtherRMSNorm(4, 1e-3), "own": OwnRMSNorm(), "torch": nn.RMSNorm(4),
    "groups": OptionRMSNorm(4, groups=2), "no weights": OptionRMSNorm(4, scales=False), "kernel": KernelRMSNorm(4),
}  # fmt: skip


def test_a_norm_that_holds_a_tensor_stays():
    """Whatever it is for, two of them can't be compared by `==`."""
    norm = norm_of("Llama")(4)
    norm.extra = torch.ones(2)
    assert keep_less_in_norms(nn.ModuleList([norm])) == 0


def test_an_option_that_is_left_alone_changes_nothing():
    """So that the two norms with an option are refused for it."""
    assert keep_less_in_norms(nn.ModuleList([OptionRMSNorm(4, eps=1e-3)])) == 1


@pytest.mark.parametrize("norm", OTHERS.values(), ids=OTHERS)
def test_norms_of_another_form_stay(norm):
    kind = type(norm)
    assert keep_less_in_norms(nn.ModuleList([norm])) == 0
    assert type(norm) is kind


def test_a_models_norms_and_names():
    """Two a layer and the last; Qwen3 has two more a layer for queries and keys."""
    for name, count in (("llama", 2 * 2 + 1), ("qwen3", 2 * 4 + 1), ("cohere", 0)):
        model = make(name).model
        assert keep_less_in_norms(model) == count, name
    model = LlamaForCausalLM(LlamaConfig(**ONE_LAYER))
    names = list(model.state_dict())
    keep_less_in_norms(model)
    kind = type(model.model.norm)
    assert keep_less_in_norms(model) == 3 and type(model.model.norm) is kind
    assert list(model.state_dict()) == names and kind.__name__ == "LlamaRMSNorm"
    assert type(copy.deepcopy(model).model.norm) is kind


def test_a_model_without_values_has_them_too():
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**ONE_LAYER))
    assert keep_less_in_norms(model) == 3
    assert model(torch.zeros(1, 3, dtype=torch.long, device="meta")).logits.shape == (1, 3, 8)


def test_under_autocast_the_backward_pass_is_fp32():
    plain, ours = pair_of(norm_of("Llama"))
    hidden, gradient = torch.randn(2, 5, 24), torch.randn(2, 5, 24)
    expected = run(plain, hidden, gradient)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = run(ours, hidden, gradient)
    for theirs, mine in zip(expected, found, strict=True):
        assert torch.allclose(theirs, mine, rtol=1e-5, atol=1e-6)


def test_a_norm_is_pickled_and_read_again():
    """Equal in weights, class and values; also within a whole module."""
    plain, ours = pair_of(norm_of("Llama"))
    again = pickle.loads(pickle.dumps(nn.Sequential(ours)))[0]
    hidden = torch.randn(2, 5, 24)
    assert type(again) is type(ours) and torch.equal(again(hidden), plain(hidden))
    assert again.weight.data_ptr() != ours.weight.data_ptr()


def test_one_row_of_numbers():
    plain, ours = pair_of(norm_of("Llama"))
    hidden, gradient = torch.randn(24), torch.randn(24)
    for theirs, mine in zip(run(plain, hidden, gradient), run(ours, hidden, gradient), strict=True):
        assert torch.allclose(theirs, mine, atol=1e-6)


def test_the_start_up_check_is_against_the_models_own(monkeypatch):
    """Ours made wrong, in padded rows too: nothing is left, and a backbone without ours is exact."""
    backbone = make("llama")
    right = _RMSNorm.forward
    monkeypatch.setattr(_RMSNorm, "forward", lambda ctx, hidden, *rest: right(ctx, hidden, *rest) * 1.1)
    assert "differ" in layout_problem(backbone, PaddedCollator(0))
    with own_norms():
        assert layout_problem(backbone, PaddedCollator(0)) == ""


def test_a_compiled_norm_is_the_models_own():
    plain, ours = pair_of(norm_of("Llama"))
    hidden = torch.randn(2, 5, 24)
    assert torch.equal(torch.compile(ours, backend="eager", fullgraph=True)(hidden), plain(hidden))
