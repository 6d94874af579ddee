"""The tiled attention: values and gradients against PyTorch's SDPA on whole sequences."""

import pytest
import torch
from helpers import dense_attention

from sdpo_lightning import attention, tiles
from sdpo_lightning.tiles import tiled_attention

# Prompt 5 + chosen 70 (two tiles), rejected 9 behind the prompt, and a sequence of its own (3).
SEGMENTS = ((0, 75, 0, 0), (75, 84, 0, 5), (84, 87, 84, 84))


def inputs(dtype, heads=4, kv_heads=2, length=87, size=8):
    torch.manual_seed(0)
    shapes = [(heads, length, size), (kv_heads, length, size), (kv_heads, length, size)]
    return [torch.randn(*shape).to(dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("window", [None, 1, 4, 60, 500])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 3e-2)])
def test_values_and_gradients_equal_a_dense_mask(dtype, tolerance, window):
    mine, theirs = inputs(dtype), inputs(torch.float32)
    for t, m in zip(theirs, mine, strict=True):
        t.data.copy_(m.data)
    out = tiled_attention(*mine, SEGMENTS, 0.3, window)
    expected = dense_attention(*theirs, SEGMENTS, 0.3, window)
    assert out.dtype == dtype and out.shape == expected.shape
    torch.testing.assert_close(out.float(), expected, atol=tolerance, rtol=tolerance)
    weights = torch.randn(expected.shape)
    (out.float() * weights).sum().backward()
    (expected * weights).sum().backward()
    for m, t in zip(mine, theirs, strict=True):
        torch.testing.assert_close(m.grad.float(), t.grad, atol=10 * tolerance, rtol=tolerance)


# A prompt of 70 and an answer of 230 tokens; a second answer of 450 sees 520 keys, above 512 and no multiple of 64.
LONG = ((0, 300, 0, 0), (300, 750, 0, 70))


@pytest.mark.parametrize("window", [None, 4, 100])
@pytest.mark.parametrize("kept_keys", [512, 10_000], ids=["made again above 512", "kept"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 3e-2)])
def test_long_segments_equal_a_dense_mask(dtype, tolerance, kept_keys, window, monkeypatch):
    """In bf16, from 256 keys on, the products but the scores' are of bf16 numbers, in sizes rounded up to 64."""
    monkeypatch.setattr(tiles, "KEPT_KEYS", kept_keys)
    plans = [tiles._plan(segment, dtype) for segment in LONG]
    assert [plan.keeps for plan in plans] == [True, kept_keys > 512]
    # 300 tokens are 5 tiles, the last of 44; 450 are 8, the last of 2: 70 + 448 + 64 keys are rounded up to 640.
    assert [tile.number for tile in plans[0].tiles] == [64, 64, 64, 64, 44]
    assert plans[1].tiles[-1].seen == (640 if dtype == torch.bfloat16 else 520)
    mine, theirs = inputs(dtype, length=750), inputs(torch.float32, length=750)
    for t, m in zip(theirs, mine, strict=True):
        t.data.copy_(m.data)
    out, expected = tiled_attention(*mine, LONG, 0.3, window), dense_attention(*theirs, LONG, 0.3, window)
    torch.testing.assert_close(out.float(), expected, atol=tolerance, rtol=tolerance)
    weights = torch.randn(expected.shape)
    (out.float() * weights).sum().backward()
    (expected * weights).sum().backward()
    for m, t in zip(mine, theirs, strict=True):
        # Relative to all: sums over hundreds of terms, each of which is rounded.
        assert (m.grad.float() - t.grad).norm() < tolerance * t.grad.norm()
        assert t.grad.norm() > 1


def test_gradcheck():
    # The products run in fp32, so finite differences need a coarse step: (f(x+h) - f(x-h)) / 2h, h = 1e-2.
    mine = inputs(torch.float32, length=6, size=3)
    segments = ((0, 4, 0, 0), (4, 6, 0, 2))
    weights = torch.randn(4, 6, 3)

    def f(*args):
        return (tiled_attention(*args, segments, 0.5, None) * weights).sum().double()

    f(*mine).backward()
    with torch.no_grad():
        for tensor in mine:
            for index in ((0, 0, 0), (1, 3, 2), (1, 5, 1)):
                before = tensor[index].item()
                tensor[index] = before + 1e-2
                up = f(*mine).item()
                tensor[index] = before - 1e-2
                down = f(*mine).item()
                tensor[index] = before
                assert (up - down) / 2e-2 == pytest.approx(tensor.grad[index].item(), abs=2e-3)


def test_the_same_values_with_and_without_gradients():
    mine = inputs(torch.bfloat16)
    with torch.no_grad():
        quiet = tiled_attention(*mine, SEGMENTS, 0.3, None)
    assert torch.equal(quiet, tiled_attention(*mine, SEGMENTS, 0.3, None))


@pytest.mark.parametrize("window", [None, 6])
def test_long_segments_take_sdpa_with_the_same_values(monkeypatch, window):
    query, key, value = (t.detach()[None] for t in inputs(torch.float32))
    module, plan = torch.nn.Module(), attention.SegmentPlan(SEGMENTS, "cpu")
    short, _ = attention._segment_attention(
        module, query, key, value, None, segments=plan, scaling=0.3, sliding_window=window
    )
    # 75 keys is the most a segment sees: at 74 the row is too long for tiles.
    monkeypatch.setattr(attention, "MAX_KEYS", 74)
    monkeypatch.setattr(attention, "tiled_attention", None)
    long, _ = attention._segment_attention(
        module, query, key, value, None, segments=plan, scaling=0.3, sliding_window=window
    )
    torch.testing.assert_close(short, long, atol=2e-6, rtol=2e-6)


def test_a_backward_pass_under_autocast_gives_the_same_gradients():
    """As of a `training_step` that calls `manual_backward`, or of a loop of one's own."""
    query, key, value = mine = inputs(torch.float32)
    out = tiled_attention(query, key, value, SEGMENTS, 0.3, None).square().sum()
    expected = torch.autograd.grad(out, mine, retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = torch.autograd.grad(out, mine)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_products_stay_in_fp32_under_autocast():
    query, key, value = (t.detach() for t in inputs(torch.float32))
    expected = tiled_attention(query, key, value, SEGMENTS, 0.3, None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = tiled_attention(query, key, value, SEGMENTS, 0.3, None)
    assert torch.equal(found, expected)
