"""Every layout gives the same logps and gradients as one padded sequence at a time, for each architecture."""

import random
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from sdpo_lightning.attention import register_segment_attention
from sdpo_lightning.backbone import CausalBackbone
from sdpo_lightning.data.collate import PackedCollator, PaddedCollator, SharedPrefixCollator, TokenizedPair
from sdpo_lightning.exactness import choose_layout, layout_problem
from sdpo_lightning.logprobs import gather_logps, pair_logps
from sdpo_lightning.self_check import compare_logps

COMMON = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1}
ARCHITECTURES = {
    "llama": {},
    "llama_tied": {"model_type": "llama", "tie_word_embeddings": True},
    "mistral": {"sliding_window": 7},
    "qwen2": {},
    "qwen2_window": {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "qwen3": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "sliding_window": 6},
    "gemma3_text": {"head_dim": 8, "sliding_window": 6},
    "phi3": {},
    "olmo2": {},
    "gpt_neox": {},
    "granite": {"logits_scaling": 4.0, "embedding_multiplier": 2.0},
    "cohere": {"logit_scale": 0.25},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"head_dim": 8, **EXPERTS},
}
# Its scores are capped, which no kernel but the eager one does; transformers masks packed rows for that by position.
UNSHARED = {"gemma2"}


def make(name: str) -> CausalBackbone:
    settings = dict(ARCHITECTURES[name])
    kind = settings.pop("model_type", name)
    torch.manual_seed(3)
    config = AutoConfig.for_model(kind, **(COMMON | settings))
    attention = "eager" if name in UNSHARED else register_segment_attention()
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).float()
    return CausalBackbone(model.eval())


def make_pairs(seed: int = 0) -> list[TokenizedPair]:
    generator = random.Random(seed)

    def ids(low, high):
        return [generator.randrange(3, 96) for _ in range(generator.randint(low, high))]

    return [TokenizedPair(ids(1, 12), ids(1, 14), ids(1, 14)) for _ in range(4)]


def plain(backbone: CausalBackbone, pairs) -> torch.Tensor:
    """Summed logps [2B] from the full logits of single sequences, with a mask of the model's own."""
    found = []
    for side in ("chosen_ids", "rejected_ids"):
        for pair in pairs:
            ids = torch.tensor([pair.prompt_ids + getattr(pair, side)])
            logits = backbone.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, :-1]
            found.append(gather_logps(logits, ids[0, 1:])[len(pair.prompt_ids) - 1 :].sum())
    return torch.stack(found)


def gradients(backbone: CausalBackbone, logps: torch.Tensor) -> dict[str, torch.Tensor]:
    backbone.zero_grad()
    weights = torch.linspace(-1, 1, len(logps))
    (logps * weights).sum().backward()
    return {name: p.grad.clone() for name, p in backbone.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("collator", [SharedPrefixCollator, PackedCollator, PaddedCollator])
def test_values_and_gradients(name, collator):
    if name in UNSHARED and collator is SharedPrefixCollator:
        assert layout_problem(make(name), collator(0))
        return
    backbone, pairs = make(name), make_pairs()
    expected = plain(backbone, pairs)
    expected_gradients = gradients(backbone, expected)
    batch = collator(0)(range(4), pairs, [1.0] * 4, 4)
    for budget in (256.0, 96 * 4 * 5 / 2**20):  # at once, and five positions at a time
        backbone.logits_budget_mb = budget
        logps = pair_logps(backbone(batch), batch)
        found = torch.cat([logps.chosen, logps.rejected])
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
        found_gradients = gradients(backbone, found)
        assert found_gradients.keys() == expected_gradients.keys()
        for key, gradient in expected_gradients.items():
            scale = gradient.abs().max().clamp(min=1e-3)
            assert (found_gradients[key] - gradient).abs().max() <= 2e-4 * scale, key


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_layout_is_decided(name):
    chosen = choose_layout(make(name), "shared_prefix", 0)
    assert type(chosen) is (PackedCollator if name in UNSHARED else SharedPrefixCollator)


def test_a_model_with_recurrent_state_takes_rows_apart(caplog):
    config = AutoConfig.for_model(
        "mamba", vocab_size=96, hidden_size=32, num_hidden_layers=2, state_size=4, initializer_range=0.2
    )
    torch.manual_seed(3)
    backbone = CausalBackbone(AutoModelForCausalLM.from_config(config).float())
    assert type(choose_layout(backbone, "shared_prefix", 0)) is PaddedCollator
    assert "mamba has recurrent state" in caplog.text


def test_the_check_notices_an_attention_that_ignores_segments():
    backbone = make("llama")
    backbone.model.set_attn_implementation("sdpa")
    assert "logps differ" in layout_problem(backbone, SharedPrefixCollator(0))
    assert layout_problem(backbone, PaddedCollator(0)) == ""


def test_numbers_that_are_none_are_not_exact():
    """NaN in one of a packed row's hidden states, and in none of the plain forward's two rows."""
    backbone = make("llama")

    def spoil(module, inputs, output):
        second = torch.arange(output.shape[1])[:, None] == 1
        return output if len(output) == 2 else torch.where(second, torch.nan, output)

    backbone.model.model.norm.register_forward_hook(spoil)
    assert "differ by nan" in layout_problem(backbone, SharedPrefixCollator(0))


@pytest.mark.parametrize(
    ("error", "said"), [(IndexError("no such row\nat all"), "no such row"), (AttributeError(), "AttributeError")]
)
def test_a_layout_that_a_model_cannot_run_is_a_reason(error, said):
    """Also an error without a word of its own; padded rows, which don't meet it, are exact."""
    backbone = make("llama")

    def fail(module, inputs, output):
        if len(output) == 1:
            raise error

    backbone.model.model.norm.register_forward_hook(fail)
    assert layout_problem(backbone, SharedPrefixCollator(0)) == said
    assert layout_problem(backbone, PaddedCollator(0)) == ""


def test_a_self_check_of_numbers_that_are_none_fails():
    """The second of two pairs has no chosen logp; as a filler pair it isn't looked at."""
    module = SimpleNamespace(trainer=SimpleNamespace(precision="32-true"), reference=SimpleNamespace(tolerance=1e-5))
    logps = [torch.tensor([-3.0, -4.0]), torch.tensor([-5.0, -6.0])]
    same = SimpleNamespace(chosen=logps[0], rejected=logps[1])
    none = SimpleNamespace(chosen=torch.tensor([-3.0, float("nan")]), rejected=logps[1])
    real, filler = (SimpleNamespace(weights=torch.tensor([1.0, weight])) for weight in (1.0, 0.0))
    assert compare_logps(module, real, same, same) == ""
    assert "differ by nan" in compare_logps(module, real, none, same)
    assert "differ by nan" in compare_logps(module, real, same, none)
    assert compare_logps(module, filler, none, same) == ""


def test_a_shared_prompt_stands_once():
    pairs = [TokenizedPair([5, 6, 7], [8, 9], [10]), TokenizedPair([11], [12], [13, 14])]
    batch = SharedPrefixCollator(0)([0, 1], pairs, [1.0, 1.0], 2)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 3, 0, 1, 1, 2]]
    assert batch.segments == ((0, 5, 0, 0), (5, 6, 0, 3), (6, 8, 6, 6), (8, 10, 6, 7))
    # The first token of both answers is predicted from the last of the prompt.
    assert batch.source_index.tolist() == [2, 3, 2, 6, 6, 8]
    assert batch.target_ids.tolist() == [8, 9, 10, 12, 13, 14]
    assert batch.sequence_index.tolist() == [0, 0, 2, 1, 3, 3]
    assert batch.completion_lengths.tolist() == [2, 1, 1, 2]
    assert batch.num_tokens == 10
    packed = PackedCollator(0)([0, 1], pairs, [1.0, 1.0], 2)
    assert packed.num_tokens == 10 + 3 + 1
