"""The load-balancing loss of a mixture of experts: transformers' own value, kept in training and nowhere else."""

from __future__ import annotations

import pytest
import torch
from helpers import make_rows, write_jsonl
from runs import fit, losses
from test_layouts import COMMON, EXPERTS, make_pairs
from transformers import AutoConfig, AutoModelForCausalLM

from sdpo_lightning import PreferenceSource
from sdpo_lightning.attention import register_segment_attention
from sdpo_lightning.backbone import CausalBackbone
from sdpo_lightning.data.collate import PackedCollator, PaddedCollator, SharedPrefixCollator
from sdpo_lightning.execution import Execution
from sdpo_lightning.router import RouterLoss, load_balancing_loss
from sdpo_lightning.types import ConfigurationError

MIXTURES = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 16},
    "qwen3_moe": {"head_dim": 8, **EXPERTS},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
}


def mixture(name: str) -> CausalBackbone:
    torch.manual_seed(3)
    config = AutoConfig.for_model(name, **(COMMON | MIXTURES[name] | {"router_aux_loss_coef": 0.25}))
    model = AutoModelForCausalLM.from_config(config, attn_implementation=register_segment_attention()).float()
    return CausalBackbone(model.eval())


def batch_of(collator, multiple=1):
    return collator(0, multiple)(range(4), make_pairs(), [1.0] * 4, 4)


def router_gradients(backbone, loss):
    backbone.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in backbone.model.named_parameters() if p.grad is not None}


def test_by_hand():
    # Two tokens, both sent to the first of two experts with 3/4: 2 * (1 * 3/4 + 0 * 1/4); a third is padding.
    logits = torch.tensor([[3.0, 1.0], [3.0, 1.0], [1.0, 99.0]]).log()
    real = torch.tensor([True, True, False])
    assert load_balancing_loss([logits], 1, real).item() == pytest.approx(1.5)
    # A second layer that sends both to the second expert with 3/4: shares 1/2 and 1/2, mean probabilities 1/2 and 1/2.
    assert load_balancing_loss([logits, logits.flip(1)], 1, real).item() == pytest.approx(1.0)


@pytest.mark.parametrize("name", MIXTURES)
def test_value_and_gradient_are_transformers(name):
    backbone, batch = mixture(name), batch_of(PaddedCollator, 8)
    assert bool((batch.attention_mask == 0).any())
    backbone.router.set_coefficient(None)
    if name == "granitemoe" and "router_logits" not in type(backbone.model)._can_record_outputs:
        # In transformers 5.5 its body takes the setting and gives none.
        with pytest.raises(ConfigurationError, match="gives no router logits; set `model.router_aux_loss: 0`"):
            backbone(batch)
        return
    backbone(batch)
    ours = backbone.router.take()
    theirs = backbone.model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, output_router_logits=True
    ).aux_loss
    assert ours.item() == pytest.approx(0.25 * theirs.item(), rel=1e-5)
    found, expected = router_gradients(backbone, ours), router_gradients(backbone, 0.25 * theirs)
    assert found.keys() == expected.keys() and found
    for key in found:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-4, atol=1e-6)
    assert any(gradient.abs().max() > 1e-4 for gradient in found.values())


def test_packed_rows_count_each_token_that_runs():
    backbone = mixture("mixtral")
    backbone.router.set_coefficient(1.0)
    found = {}
    kinds = [(PaddedCollator, 1), (PackedCollator, 1), (PackedCollator, 64), (SharedPrefixCollator, 64)]
    for collator, multiple in kinds:
        backbone(batch_of(collator, multiple))
        found[collator, multiple] = backbone.router.take().item()
    # The same tokens, prompts twice; what rounds a row up isn't counted.
    assert found[PackedCollator, 1] == pytest.approx(found[PaddedCollator, 1], rel=1e-5)
    assert found[PackedCollator, 64] == pytest.approx(found[PaddedCollator, 1], rel=1e-5)
    # Prompts once.
    assert found[SharedPrefixCollator, 64] != pytest.approx(found[PaddedCollator, 1], rel=1e-4)


def test_recomputed_layers_give_the_same():
    found = []
    for recompute in (False, True):
        backbone, batch = mixture("mixtral"), batch_of(SharedPrefixCollator, 64)
        backbone = Execution(gradient_checkpointing=recompute).apply(backbone).train()
        backbone.router.set_coefficient(None)
        logps = backbone(batch)
        found.append(router_gradients(backbone, logps.mean() + backbone.router.take()))
    assert found[0].keys() == found[1].keys()
    for key in found[0]:
        torch.testing.assert_close(found[0][key], found[1][key], rtol=1e-5, atol=1e-7)


def test_only_with_gradients_and_only_once():
    backbone, batch = mixture("mixtral"), batch_of(PaddedCollator)
    backbone(batch)
    # No coefficient was chosen.
    assert backbone.router.take() == 0.0
    backbone.router.set_coefficient(None)
    with torch.no_grad():
        backbone(batch)
    assert backbone.router.take() == 0.0
    backbone(batch)
    assert backbone.router.take() > 0.0 and backbone.router.take() == 0.0


def test_a_dense_model_has_none():
    router = RouterLoss({"hidden_size": 8})
    router.set_coefficient(None)
    assert router.coefficient == 0.0 and router.arguments() == {}
    router.set_coefficient(0.0)
    with pytest.raises(ConfigurationError, match="`model.router_aux_loss` is 0.1, and the model is no mixture"):
        router.set_coefficient(0.1)


def test_a_run_keeps_it_unless_told_not_to(tmp_path, tiny_tokenizer):
    torch.manual_seed(3)
    config = AutoConfig.for_model(
        "mixtral", **(COMMON | MIXTURES["mixtral"] | {"vocab_size": len(tiny_tokenizer), "router_aux_loss_coef": 0.25})
    )
    AutoModelForCausalLM.from_config(config).float().save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    source = PreferenceSource("a", str(write_jsonl(tmp_path / "a.jsonl", make_rows(4, 0, "a"))))
    first = {}
    for coefficient in (None, 0.0, 0.5):
        folder = tmp_path / str(coefficient)
        fit(folder, tmp_path / "model", [source], module_args={"router_aux_loss": coefficient})
        first[coefficient] = losses(folder)[0]
    assert first[0.0] == pytest.approx(0.693147, abs=1e-5)
    # Two experts a token: about 2 where they are used alike.
    kept = first[None] - first[0.0]
    assert 0.25 * 1.5 < kept < 0.25 * 4
    assert first[0.5] - first[0.0] == pytest.approx(2 * kept, rel=1e-4)
