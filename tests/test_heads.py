"""Heads that are frozen, carry an adapter or are quantised: logps and gradients against full logits."""

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch.utils._python_dispatch import TorchDispatchMode

from sdpo_lightning.backbone import load_policy
from sdpo_lightning.data.collate import SharedPrefixCollator, TokenizedPair
from sdpo_lightning.logprobs import gather_logps

PAIRS = [TokenizedPair([5, 6, 7], [8, 9, 10, 1], [11, 1]), TokenizedPair([12, 13], [14, 1], [15, 16, 17, 1])]


class CountProducts(TorchDispatchMode):
    """Matrix products of a head and of all that is behind it."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        products = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.mm.out)
        if func in products:
            self.count += 1
        return out


def full_logits(backbone):
    """The pairs' token logps by the model's own forward, each sequence alone, in the order of the batch."""
    parts = []
    for side in ("chosen_ids", "rejected_ids"):
        for pair in PAIRS:
            completion = getattr(pair, side)
            ids = torch.tensor([pair.prompt_ids + completion])
            logits = backbone.model(input_ids=ids, use_cache=False).logits[0, len(pair.prompt_ids) - 1 : -1]
            parts.append(gather_logps(logits, torch.tensor(completion)).sum())
    return torch.stack(parts)


def ours(backbone):
    batch = SharedPrefixCollator(0)([0, 1], PAIRS, [1.0, 1.0], 2)
    return torch.zeros(4).index_add(0, batch.sequence_index, backbone(batch))


def compare(backbone, tolerance=1e-5):
    weights = torch.tensor([1.0, -2.0, 0.5, 3.0])
    trainable = {name: p for name, p in backbone.named_parameters() if p.requires_grad}
    assert trainable
    expected = full_logits(backbone)
    wanted = torch.autograd.grad((expected * weights).sum(), list(trainable.values()), allow_unused=True)
    found = ours(backbone)
    got = torch.autograd.grad((found * weights).sum(), list(trainable.values()), allow_unused=True)
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)
    for _name, w, g in zip(trainable, wanted, got, strict=True):
        torch.testing.assert_close(g, w, atol=10 * tolerance, rtol=10 * tolerance)
    return trainable


@pytest.fixture
def backbone(tiny_model_dir):
    return load_policy(str(tiny_model_dir))


def adapted(backbone, modules):
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=modules, init_lora_weights=False)
    inject_adapter_in_model(config, backbone.model)
    return backbone


@pytest.mark.parametrize("tiles", [1, 4])
def test_an_adapter_on_the_layers_and_a_frozen_head(backbone, tiles):
    vocab = backbone.model.config.vocab_size
    # 12 completion tokens: fp32 logits and softmax of a quarter of the columns, and the whole logits are above it.
    backbone.logits_budget_mb = 256.0 if tiles == 1 else 12 * 8 * -(-vocab // 4) / 2**20
    trainable = compare(adapted(backbone, ["q_proj", "down_proj"]))
    assert all("lora_" in name for name in trainable)
    # Both heads have logits and the hidden states' gradient; the trained one has its own, a product for each tile.
    with CountProducts() as frozen:
        ours(backbone).sum().backward()
    assert backbone.model.lm_head.weight.grad is None
    backbone.model.lm_head.weight.requires_grad_(True)
    with CountProducts() as trained:
        ours(backbone).sum().backward()
    assert backbone.model.lm_head.weight.grad is not None
    assert trained.count - frozen.count == tiles


@pytest.mark.parametrize("budget", [256.0, 1e-4])
def test_an_adapter_on_the_head(backbone, budget):
    backbone.logits_budget_mb = budget
    trainable = compare(adapted(backbone, ["lm_head"]))
    assert set(trainable) == {"model.lm_head.lora_A.default.weight", "model.lm_head.lora_B.default.weight"}


@pytest.mark.parametrize("kind", ["Linear4bit", "Linear8bitLt"])
def test_a_quantised_head(backbone, kind):
    bnb = pytest.importorskip("bitsandbytes")
    plain = backbone.model.lm_head
    if kind == "Linear4bit":
        head = bnb.nn.Linear4bit(32, plain.out_features, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    else:
        head = bnb.nn.Linear8bitLt(32, plain.out_features, bias=False, has_fp16_weights=False)
    head.load_state_dict(plain.state_dict())
    backbone.model.set_output_embeddings(head.to("cpu"))
    with torch.no_grad():
        before = plain(torch.ones(1, 32))
        assert not torch.equal(head(torch.ones(1, 32)).float(), before)
    adapted(backbone, ["q_proj"])
    compare(backbone, 1e-2 if kind == "Linear8bitLt" else 1e-5)
