"""Rounded lengths change no value: rows of tokens, and rows of the head."""

import random

import pytest
import torch
from helpers import make_rows, write_jsonl
from runs import fit
from test_layouts import ARCHITECTURES, UNSHARED, gradients, make
from torch import nn

from sdpo_lightning import PreferenceSource
from sdpo_lightning.data.collate import PackedCollator, PaddedCollator, SharedPrefixCollator, TokenizedPair
from sdpo_lightning.exactness import choose_layout
from sdpo_lightning.logprobs import linear_token_logps, pair_logps, token_logps

LAYOUTS = [SharedPrefixCollator, PackedCollator, PaddedCollator]
PAIRS = [TokenizedPair([5, 6, 7], [8, 9], [10]), TokenizedPair([11], [12], [13, 14])]


def pairs_of_many_tokens() -> list[TokenizedPair]:
    """Completions of 18 tokens and more, so that the 8 of them have over 64 rows in the head."""
    generator = random.Random(1)

    def ids(low, high):
        return [generator.randrange(3, 96) for _ in range(generator.randint(low, high))]

    return [TokenizedPair(ids(2, 12), ids(18, 25), ids(18, 25)) for _ in range(4)]


def test_a_packed_row_by_hand():
    batch = SharedPrefixCollator(1, 8)([0, 1], PAIRS, [1.0, 1.0], 2)
    # 10 tokens; 6 more make 16, as a segment that nothing else sees.
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14, *[1] * 6]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 3, 0, 1, 1, 2, 0, 1, 2, 3, 4, 5]]
    assert batch.segments == ((0, 5, 0, 0), (5, 6, 0, 3), (6, 8, 6, 6), (8, 10, 6, 7), (10, 16, 10, 10))
    assert batch.num_tokens == 10
    exact = SharedPrefixCollator(1)([0, 1], PAIRS, [1.0, 1.0], 2)
    assert torch.equal(batch.source_index, exact.source_index) and torch.equal(batch.target_ids, exact.target_ids)
    # A row that has such a length already stays as it is.
    assert SharedPrefixCollator(1, 5)([0, 1], PAIRS, [1.0, 1.0], 2).segments == exact.segments
    assert PackedCollator(1, 8)([0, 1], PAIRS, [1.0, 1.0], 2).segments[-1] == (14, 16, 14, 14)


def test_padded_rows_by_hand():
    batch = PaddedCollator(1, 8)([0, 1], PAIRS, [1.0, 1.0], 2)
    # 5, 2, 4 and 3 tokens.
    assert batch.attention_mask.tolist() == [[1] * n + [0] * (8 - n) for n in (5, 2, 4, 3)]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 4, 4, 4]] * 4
    assert batch.num_tokens == 14
    assert torch.equal(batch.input_ids.flatten()[batch.source_index[1:2] + 1], torch.tensor([9]))


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rounded_rows_give_the_same_values_and_gradients(name, layout):
    if name in UNSHARED and layout is SharedPrefixCollator:
        return
    backbone, pairs, found = make(name), pairs_of_many_tokens(), []
    for multiple in (1, 64):
        batch = layout(0, multiple)(range(4), pairs, [1.0] * 4, 4)
        logps = pair_logps(backbone(batch), batch)
        summed = torch.cat([logps.chosen, logps.rejected])
        found.append((batch, summed, gradients(backbone, summed)))
    (exact, expected, expected_gradients), (rounded, values, value_gradients) = found
    assert exact.input_ids.shape[1] % 64 and not rounded.input_ids.shape[1] % 64
    assert rounded.num_tokens == exact.num_tokens
    torch.testing.assert_close(values, expected, rtol=1e-6, atol=1e-4)
    assert value_gradients.keys() == expected_gradients.keys()
    for key, gradient in expected_gradients.items():
        scale = gradient.abs().max().clamp(min=1e-3)
        assert (value_gradients[key] - gradient).abs().max() <= 1e-5 * scale, key


def test_the_check_of_a_layout_runs_on_rounded_rows():
    chosen = choose_layout(make("llama"), "shared_prefix", 0, 64)
    assert (type(chosen), chosen.pad_to_multiple_of) == (SharedPrefixCollator, 64)


@pytest.mark.parametrize("budget", [256.0, 192 * 8 * 3 / 2**20], ids=["kept", "made again, 3 columns at a time"])
@pytest.mark.parametrize("bias", [False, True])
def test_rounded_rows_of_the_head(budget, bias):
    torch.manual_seed(0)
    batch = PaddedCollator(0)(range(4), pairs_of_many_tokens(), [1.0] * 4, 4)
    # Rounded up to 192, of which 3 columns of fp32 logits and their softmax are 192 * 8 * 3 bytes.
    assert len(batch.target_ids) == 167
    head = nn.Linear(8, 96, bias=bias)
    hidden = torch.randn(*batch.input_ids.shape, 8)
    weights = torch.randn(len(batch.target_ids))
    found = []
    for plain in (False, True):
        inputs = hidden.clone().requires_grad_()
        head.zero_grad()
        logps = token_logps(inputs, batch, head, 96) if plain else linear_token_logps(inputs, batch, head, 1.0, budget)
        (logps * weights).sum().backward()
        found.append([logps.detach(), inputs.grad, *(p.grad.clone() for p in head.parameters())])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    # What rounds up is read off position 0, which predicts nothing: not a trace of it comes back.
    assert 0 not in batch.source_index
    assert torch.equal(found[0][1][0, 0], torch.zeros(8))


def test_a_run_rounds_up_by_default(tmp_path, tiny_model_dir):
    path = write_jsonl(tmp_path / "rows.jsonl", make_rows(4, 0))
    for multiple, given in ((64, {}), (1, {"pad_to_multiple_of": 1})):
        sources = [PreferenceSource("rows", str(path))]
        trainer, _ = fit(tmp_path / str(multiple), tiny_model_dir, sources, **given)
        assert trainer.datamodule.collator.pad_to_multiple_of == multiple
        lengths = {batch.input_ids.shape[1] % 64 for batch in trainer.train_dataloader}
        assert (lengths == {0}) == (multiple == 64)
