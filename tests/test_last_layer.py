"""The last layer computes what is read of it, with the logps and gradients of one that computes all."""

import pytest
import torch
from test_layouts import ARCHITECTURES, UNSHARED, make, make_pairs
from torch import nn

from sdpo_lightning import attention
from sdpo_lightning.adapters import TRAINED, LoraSettings, add_adapters
from sdpo_lightning.backbone import CausalBackbone
from sdpo_lightning.data.collate import PackedCollator, PaddedCollator, SharedPrefixCollator, TokenizedPair
from sdpo_lightning.exactness import layout_problem
from sdpo_lightning.last_layer import narrow_last_layer, read_positions

EXPERTS = {"mixtral", "qwen3_moe"}


def batch_of(collator, pairs):
    return collator(list(range(len(pairs))), pairs, [1.0] * len(pairs), len(pairs))


def run(backbone, batch):
    """Logps `[N]` and the gradients of a sum in which each has a factor of its own."""
    backbone.zero_grad()
    logps = backbone(batch)
    (logps * torch.linspace(-1, 1, len(logps))).sum().backward()
    return logps.detach(), {name: p.grad for name, p in backbone.named_parameters() if p.requires_grad}


def rows_of(module, call):
    """Positions that a module is given, in each of its calls within `call`."""
    seen = []
    with module.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[1])):
        call()
    return seen


def mlps(backbone):
    """The last linear layer of each decoder layer: the MLP's second one."""
    return [[m for m in layer.modules() if isinstance(m, nn.Linear)][-1] for layer in backbone.decoder_layers()]


def test_positions_that_are_read():
    """3, 5 and 9 are read of 12, 5 twice: four sources, so four positions, the first that isn't read among them."""
    read = read_positions(torch.tensor([3, 5, 5, 9]), 12)
    assert read.positions.tolist() == [0, 3, 5, 9]
    assert read.places.tolist() == [0, 4, 4, 1, 4, 2, 4, 4, 4, 3, 4, 4]


@pytest.mark.parametrize(
    ("sources", "length", "expected"), [(64, 200, 64), (65, 200, 128), (70, 128, None), (64, 64, None), (130, 193, 192)]
)
def test_many_positions_come_in_round_numbers(sources, length, expected):
    read = read_positions(torch.arange(sources) + length - sources, length)
    assert (None if read is None else len(read.positions)) == expected
    if read is not None:
        assert set(range(length - sources, length)) <= set(read.positions.tolist())


@pytest.mark.parametrize("layout", [SharedPrefixCollator, PackedCollator])
@pytest.mark.parametrize("name", sorted(set(ARCHITECTURES) - UNSHARED))
def test_logps_and_gradients_are_those_of_a_layer_that_computes_all(monkeypatch, name, layout):
    backbone, batch = make(name), batch_of(layout(0), make_pairs())
    logps, gradients = run(backbone, batch)
    monkeypatch.setattr(attention, "read_positions", lambda source_index, length: None)
    expected, expected_gradients = run(backbone, batch)
    assert torch.allclose(logps, expected, atol=1e-5)
    for key, gradient in gradients.items():
        assert torch.allclose(gradient, expected_gradients[key], atol=1e-5), key


@pytest.mark.parametrize("name", sorted(set(ARCHITECTURES) - UNSHARED - EXPERTS))
def test_the_last_layer_leaves_prompts_out(name):
    """[prompt 9][answer 3][answer 2]: 5 tokens are predicted, from 4 positions; 5 of 14 go through the last MLP."""
    backbone = make(name)
    batch = batch_of(SharedPrefixCollator(0), [TokenizedPair(list(range(10, 19)), [20, 21, 22], [23, 24])])
    seen = [rows_of(module, lambda: backbone(batch)) for module in mlps(backbone)]
    assert seen == [[14], [5]]


def test_the_last_layer_leaves_prompts_queries_out():
    backbone = make("llama")
    batch = batch_of(SharedPrefixCollator(0), [TokenizedPair(list(range(10, 19)), [20, 21, 22], [23, 24])])
    for name, last in (("q_proj", 5), ("o_proj", 5), ("k_proj", 14), ("v_proj", 14)):
        parts = [layer.self_attn.get_submodule(name) for layer in backbone.decoder_layers()]
        assert [rows_of(part, lambda: backbone(batch)) for part in parts] == [[14], [last]], name


def test_a_model_that_is_wrapped_twice_is_narrowed_once():
    backbone, batch = make("llama"), batch_of(SharedPrefixCollator(0), make_pairs())
    expected = backbone(batch)
    assert torch.equal(CausalBackbone(backbone.model)(batch), expected)


def test_padded_rows_and_the_models_own_forward_pass_are_whole():
    """Also right behind a packed row, whose positions aren't those of the next."""
    backbone, pairs = make("llama"), make_pairs()
    last, ids = mlps(backbone)[-1], torch.arange(3, 30)[None]
    alone = backbone.model(input_ids=ids).logits
    backbone(batch_of(SharedPrefixCollator(0), pairs))
    assert torch.equal(backbone.model(input_ids=ids).logits, alone)
    assert rows_of(last, lambda: backbone.model(input_ids=ids)) == [27]
    padded = batch_of(PaddedCollator(0), pairs)
    assert rows_of(last, lambda: backbone(padded)) == [padded.input_ids.shape[1]]


@pytest.mark.parametrize("name", sorted(EXPERTS))
def test_a_router_sees_all_tokens(name):
    backbone = make(name)
    assert not narrow_last_layer(backbone.model)
    batch = batch_of(SharedPrefixCollator(0), make_pairs())
    queries = backbone.decoder_layers()[-1].self_attn.q_proj
    assert rows_of(queries, lambda: backbone(batch)) == [batch.input_ids.shape[1]]


def test_layers_that_share_their_weights_as_modules_are_whole():
    """Hooks of the last would act in the first too."""
    backbone = make("llama")
    layers = backbone.model.model.layers
    layers[1] = layers[0]
    for module in layers[0].modules():
        module._forward_pre_hooks.clear()
        module._forward_hooks.clear()
    assert not narrow_last_layer(backbone.model)
    assert layout_problem(CausalBackbone(backbone.model), SharedPrefixCollator(0)) == ""


def test_the_start_up_check_meets_it_and_notices_what_it_breaks(monkeypatch):
    """What reads a prompt's hidden state behind the last layer is refused with packed rows."""
    backbone = make("llama")
    last, seen = mlps(backbone)[-1], []
    with last.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[1])):
        assert layout_problem(backbone, SharedPrefixCollator(0)) == ""
    # A row of 2 + 6 + 16 and 6 + 2 + 12 tokens, 36 of them predicted; then two sequences of 8 and two of 18.
    assert seen == [36, 8, 18]
    norm = backbone.model.model.norm
    norm.register_forward_hook(lambda module, inputs, output: output + output[:, :1])
    assert "differ" in layout_problem(backbone, PackedCollator(0))
    assert layout_problem(backbone, PaddedCollator(0)) == ""


def test_adapters_are_narrow_too():
    """Those of the MLP: 5 of 14 positions, as above."""
    backbone = make("llama")
    settings = LoraSettings(r=2, target_modules=["down_proj", "o_proj"])
    add_adapters(backbone.model, settings, "base")
    batch = batch_of(SharedPrefixCollator(0), [TokenizedPair(list(range(10, 19)), [20, 21, 22], [23, 24])])
    layer = backbone.decoder_layers()[-1]
    half = layer.mlp.down_proj.lora_A[TRAINED]
    assert rows_of(half, lambda: backbone(batch)) == [5]
    assert layout_problem(backbone, SharedPrefixCollator(0)) == ""


def test_recomputed_layers_leave_the_same_out():
    backbone, batch = make("llama"), batch_of(SharedPrefixCollator(0), make_pairs())
    expected = run(backbone.train(), batch)
    backbone.model.gradient_checkpointing_enable({"use_reentrant": False})
    found = run(backbone, batch)
    seen = rows_of(mlps(backbone)[-1], lambda: run(backbone, batch))
    assert len(seen) == 2 and seen[0] == seen[1] < batch.input_ids.shape[1]
    assert torch.equal(expected[0], found[0])
    assert all(torch.equal(gradient, found[1][key]) for key, gradient in expected[1].items())


def test_compiled_layers_compute_all():
    """Layers that Dynamo gives up on, and so runs as they are, too: here each is, at its second length of row."""
    backbone, plain = make("llama"), make("llama")
    for layer in backbone.decoder_layers():
        layer.compile(dynamic=False, backend="eager")
    backbone._compiles_layers = True
    with torch._dynamo.config.patch(recompile_limit=1):
        for seed in range(4):
            batch = batch_of(SharedPrefixCollator(0), make_pairs(seed))
            # Another model in between leaves nothing behind.
            expected = plain(batch).detach()
            seen = rows_of(mlps(backbone)[-1], lambda batch=batch: backbone(batch)) if seed else None
            assert torch.allclose(backbone(batch).detach(), expected, atol=1e-5)
            assert seen in (None, [], [batch.input_ids.shape[1]])


def test_nothing_is_left_behind_a_row():
    """The last layer's MLP by itself, on a row as long as the one before it, takes all of it."""
    backbone, batch = make("llama"), batch_of(SharedPrefixCollator(0), make_pairs())
    backbone(batch)
    mlp, length = backbone.decoder_layers()[-1].mlp, batch.input_ids.shape[1]
    assert rows_of(mlps(backbone)[-1], lambda: mlp(torch.randn(1, length, 32))) == [length]
