"""The GPU's ways of segment attention: on a CPU the same code with a plain kernel, on a GPU the real ones."""

import inspect
import random

import pytest
import torch
import torch.nn.functional as F
from helpers import dense_attention
from runs import assert_same_weights, fit, losses, made_sources
from torch._dynamo.utils import counters
from torch.nn.attention import flex_attention as torch_flex
from transformers import AutoConfig, AutoModelForCausalLM

from sdpo_lightning import attention, kernels_cuda
from sdpo_lightning.attention import SegmentPlan, choose_path, register_segment_attention
from sdpo_lightning.backbone import CausalBackbone
from sdpo_lightning.data.collate import PackedCollator, PaddedCollator, SharedPrefixCollator, TokenizedPair
from sdpo_lightning.logprobs import pair_logps

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

# Prompt 90 + chosen 60 (more than one block), rejected 40 behind the prompt, one token behind two, and one alone.
SEGMENTS = ((0, 150, 0, 0), (150, 190, 0, 90), (190, 191, 150, 152), (191, 199, 191, 191))
LENGTH = 199
WINDOWS = [None, 1, 7, 50, 500]


def kernel_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
    """What the real kernel does: a loop over sequences, the mask from the lower right."""
    parts = []
    for s in range(len(cu_seq_q) - 1):
        q = query[cu_seq_q[s] : cu_seq_q[s + 1]].transpose(0, 1)
        k, v = (t[cu_seq_k[s] : cu_seq_k[s + 1]].transpose(0, 1) for t in (key, value))
        assert q.shape[1] <= max_q and k.shape[1] <= max_k
        # The last query stands at the last key.
        place = torch.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1]
        distance = place - torch.arange(k.shape[1])
        left, right = window_size
        mask = torch.ones_like(distance, dtype=torch.bool) if left < 0 else distance <= left
        mask &= distance >= -right
        k, v = (t.repeat_interleave(len(q) // len(t), 0) for t in (k, v))
        parts.append(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(0, 1))
    return torch.cat(parts)


def kernel_2_12(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False
):
    assert enable_gqa or query.shape[1] == key.shape[1], "the real one raises"
    return kernel_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size)


def kernel_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
    raise AssertionError("has neither scale nor window")


def inputs(device="cpu", dtype=torch.float32, heads=4, kv_heads=2, size=16):
    """`[heads, LENGTH, size]` leaves, laid out token by token as a model's projections are."""
    torch.manual_seed(0)
    rows = [torch.randn(LENGTH, n, size, dtype=torch.float32) for n in (heads, kv_heads, kv_heads)]
    return [row.to(device, dtype).transpose(0, 1).requires_grad_() for row in rows]


def run(path, query, key, value, window, kernel=None):
    plan = SegmentPlan(SEGMENTS, query.device)
    if path == "varlen":
        return kernels_cuda.varlen_attention(query, key, value, plan.key_index, 0.3, window, kernel)
    return kernels_cuda.flex_segment_attention(query[None], key[None], value[None], plan.block_mask(window), 0.3)[0]


def compare(path, window, kv_heads, device="cpu", dtype=torch.float32, tolerance=3e-6, kernel=None):
    """Values and gradients against a dense mask in fp32."""
    mine = inputs(device, dtype, kv_heads=kv_heads)
    theirs = [t.detach().float().requires_grad_() for t in mine]
    out = run(path, *mine, window, kernel)
    expected = dense_attention(*theirs, SEGMENTS, 0.3, window)
    assert out.dtype == dtype and out.shape == (4, LENGTH, 16)
    torch.testing.assert_close(out.float(), expected, atol=tolerance, rtol=tolerance)
    weights = torch.randn(expected.shape).to(device)
    (out.float() * weights).sum().backward()
    (expected * weights).sum().backward()
    for m, t in zip(mine, theirs, strict=True):
        # Under a window of 1 nothing depends on queries and keys.
        scale = weights.norm() if window == 1 else t.grad.norm()
        assert (m.grad.float() - t.grad).norm() <= tolerance * scale


def check_alignment(path, device="cpu", dtype=torch.float32, kernel=None):
    """Scores of 0 make the output the mean of the values seen, and token t has the value t."""
    query, key, _ = (torch.zeros_like(t) for t in inputs(device, dtype))
    value = torch.arange(LENGTH, dtype=dtype, device=device)[:, None].expand(2, LENGTH, 16).contiguous()
    tolerance = {"rel": 1e-5 if dtype == torch.float32 else 1e-2}
    out = run(path, query, key, value, None, kernel)[3, :, 5].tolist()
    assert out[2] == pytest.approx((0 + 1 + 2) / 3, **tolerance)
    # The rejected answer's first token sees the prompt's 90 and itself; from the upper left it would see 0 alone.
    assert out[150] == pytest.approx((90 * 89 / 2 + 150) / 91, **tolerance)
    assert out[152] == pytest.approx((90 * 89 / 2 + 150 + 151 + 152) / 93, **tolerance)
    assert out[190] == pytest.approx((150 + 151 + 190) / 3, **tolerance)
    out = run(path, query, key, value, 3, kernel)[0, :, 0].tolist()
    assert out[100] == pytest.approx((98 + 99 + 100) / 3, **tolerance)
    assert out[150] == pytest.approx((88 + 89 + 150) / 3, **tolerance)
    assert out[151] == pytest.approx((89 + 150 + 151) / 3, **tolerance)


def test_indices_by_hand():
    index = kernels_cuda.build_key_index(((0, 3, 0, 0), (3, 5, 0, 2), (5, 6, 5, 5)), torch.device("cpu"))
    assert index.cu_seq_q.tolist() == [0, 3, 5, 6]
    assert index.cu_seq_k.tolist() == [0, 3, 3 + 2 + 2, 8]
    assert (index.max_q, index.max_k) == (3, 4)
    assert index.gather.tolist() == [0, 1, 2, 0, 1, 3, 4, 5]
    assert [t.dtype for t in (index.cu_seq_q, index.cu_seq_k, index.gather)] == [torch.int32, torch.int32, torch.int64]
    # Without a prefix nothing is gathered.
    apart = kernels_cuda.build_key_index(((0, 3, 0, 0), (3, 5, 3, 3)), torch.device("cpu"))
    assert apart.gather is None and apart.cu_seq_k.tolist() == apart.cu_seq_q.tolist() == [0, 3, 5]


def test_segments_cover_the_row():
    with pytest.raises(AssertionError, match="gap"):
        SegmentPlan(((0, 3, 0, 0), (4, 5, 0, 2)), "cpu")


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("kernel", [kernel_2_11, kernel_2_12])
def test_varlen_equals_a_dense_mask(window, kv_heads, kernel):
    compare("varlen", window, kv_heads, kernel=kernel)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_flex_equals_a_dense_mask(monkeypatch, window, kv_heads):
    # On a CPU FlexAttention refuses inputs that want gradients, although its eager form has them.
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *tensors: None)
    compare("flex", window, kv_heads)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize(("path", "kernel"), [("varlen", kernel_2_12), ("flex", None)])
def test_the_last_query_stands_at_the_last_key(path, kernel):
    check_alignment(path, kernel=kernel)


def recorded_call(window, kv_heads=2):
    calls = []

    def kernel(*args, scale, window_size, enable_gqa=False):
        calls.append((args, {"scale": scale, "window_size": window_size, "enable_gqa": enable_gqa}))
        return args[0]

    run("varlen", *inputs(dtype=torch.bfloat16, kv_heads=kv_heads), window, kernel)
    (call,) = calls
    return call


def test_the_kernel_gets_what_flash_attention_wants():
    args, settings = recorded_call(None)
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k = args
    keys = 150 + (40 + 90) + (1 + 2) + 8
    assert query.shape == (LENGTH, 4, 16) and key.shape == value.shape == (keys, 2, 16)
    assert {t.dtype for t in (query, key, value)} == {torch.bfloat16}
    # Queries aren't copied; the last dimension must be dense.
    assert query.is_contiguous() and key.stride(-1) == value.stride(-1) == 1
    for cumulated, total in ((cu_seq_q, LENGTH), (cu_seq_k, keys)):
        assert cumulated.dtype == torch.int32 and cumulated.is_contiguous() and cumulated.shape == (5,)
        assert cumulated[-1] == total
    assert (type(max_q), max_q, type(max_k), max_k) == (int, 150, int, 150)
    assert settings == {"scale": 0.3, "window_size": (-1, 0), "enable_gqa": True}
    # A window of 7 is the token and six to its left.
    assert recorded_call(7, kv_heads=4)[1] == {"scale": 0.3, "window_size": (6, 0), "enable_gqa": False}


@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("window", [None, 7])
def test_the_installed_kernel_takes_the_call(window, kv_heads):
    """PyTorch's own operator and its derivative, on tensors without numbers."""
    if kernels_cuda.varlen_attn is None or "window_size" not in inspect.signature(kernels_cuda.varlen_attn).parameters:
        pytest.skip("torch before 2.11")
    tensors = [t.detach().to("meta").requires_grad_() for t in inputs(dtype=torch.bfloat16, kv_heads=kv_heads)]
    out = run("varlen", *tensors, window)
    assert out.shape == (4, LENGTH, 16) and out.dtype == torch.bfloat16
    out.sum().backward()
    assert [t.grad.shape for t in tensors] == [t.shape for t in tensors]


def test_blocks_that_no_query_sees_are_skipped():
    # Three segments of one block each: the diagonal's 3 of 9 blocks. A prefix of 10 tokens adds one.
    apart = ((0, 128, 0, 0), (128, 256, 128, 128), (256, 384, 256, 256))
    sharing = (*apart[:2], (256, 384, 0, 10))
    for segments, blocks in ((apart, 3), (sharing, 4)):
        mask = SegmentPlan(segments, "cpu").block_mask(None)
        assert (mask.kv_num_blocks.sum() + mask.full_kv_num_blocks.sum()).item() == blocks


def test_one_compiled_kernel_for_all_lengths_and_windows():
    torch._dynamo.reset()
    counters.clear()
    attend = torch.compile(torch_flex.flex_attention, backend="aot_eager", fullgraph=True)
    generator = random.Random(0)
    for step in range(4):
        first = generator.randint(150, 400)
        plan = SegmentPlan(((0, first, 0, 0), (first, first + 50 + step, 0, first // 2)), "cpu")
        tensors = [torch.randn(1, heads, plan.length, 16) for heads in (4, 2, 2)]
        for window in (None, 20 + step):
            attend(*tensors, block_mask=plan.block_mask(window), enable_gqa=True)
    # One for the first length, and one for any length.
    assert counters["stats"]["unique_graphs"] == 2


CUDA = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("device", "dtype", "sizes", "dropout", "flash", "path"),
    [
        (CUDA, torch.bfloat16, (128, 128), 0.0, True, "varlen"),
        (CUDA, torch.float16, (256, 256), 0.0, True, "varlen"),
        (CUDA, torch.bfloat16, (128, 128), 0.0, False, "flex"),
        (CUDA, torch.float32, (128, 128), 0.0, True, "flex"),
        (CUDA, torch.bfloat16, (264, 264), 0.0, True, "flex"),
        (CUDA, torch.bfloat16, (20, 20), 0.0, True, "flex"),
        (CUDA, torch.bfloat16, (192, 128), 0.0, True, "flex"),
        (CUDA, torch.float32, (8, 8), 0.0, True, "sdpa"),
        (CUDA, torch.bfloat16, (8, 8), 0.0, True, "varlen"),
        (CUDA, torch.bfloat16, (128, 128), 0.1, True, "sdpa"),
        (torch.device("cpu"), torch.bfloat16, (128, 128), 0.0, True, "tiles"),
        (torch.device("cpu"), torch.float32, (192, 128), 0.0, True, "sdpa"),
        (torch.device("cpu"), torch.float32, (128, 128), 0.1, True, "sdpa"),
        (torch.device("mps"), torch.float32, (128, 128), 0.0, True, "sdpa"),
    ],
)
def test_the_path(monkeypatch, device, dtype, sizes, dropout, flash, path):
    monkeypatch.setattr(attention, "has_flash", lambda device: flash)
    assert choose_path(SegmentPlan(SEGMENTS, device), dtype, sizes, dropout) == path


def test_the_path_goes_by_lengths(monkeypatch):
    monkeypatch.setattr(attention, "has_flash", lambda device: False)
    for length, path in ((127, "sdpa"), (128, "flex")):
        assert choose_path(SegmentPlan(((0, length, 0, 0),), CUDA), torch.float32, (64, 64)) == path
    # What a segment sees decides on a CPU: 4000 + 96 keys, and one more.
    for length, path in ((4096, "tiles"), (4097, "sdpa")):
        plan = SegmentPlan(((0, 4050, 0, 0), (4050, 4050 + length - 4000, 0, 4000)), "cpu")
        assert choose_path(plan, torch.float32, (64, 64)) == path


@pytest.mark.parametrize(
    ("kernel", "capability", "hip", "found"),
    [
        (kernel_2_12, (8, 0), None, True),
        (kernel_2_11, (9, 0), None, True),
        (kernel_2_10, (9, 0), None, False),
        (None, (9, 0), None, False),
        (kernel_2_12, (7, 5), None, False),
        (kernel_2_12, (9, 4), "6.4", False),
    ],
)
def test_flash_is_known_by_version_and_device(monkeypatch, kernel, capability, hip, found):
    monkeypatch.setattr(kernels_cuda, "varlen_attn", kernel)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert kernels_cuda.has_flash.__wrapped__(CUDA) is found


def make(kind="llama", window=None):
    torch.manual_seed(3)
    config = AutoConfig.for_model(
        kind,
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
        **({} if window is None else {"sliding_window": window}),
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation=register_segment_attention())
    return CausalBackbone(model.float().eval())


def make_batch(collator, device="cpu"):
    generator = random.Random(1)
    parts = [[generator.randrange(3, 96) for _ in range(n)] for n in (40, 30, 12, 5, 17, 60)]
    pairs = [TokenizedPair(*parts[:3]), TokenizedPair(*parts[3:])]
    return collator(0)([0, 1], pairs, [1.0, 1.0], 2).to(device)


def logps_and_gradients(backbone, collator, device="cpu"):
    batch = make_batch(collator, device)
    logps = pair_logps(backbone(batch), batch)
    found = torch.cat([logps.chosen, logps.rejected])
    backbone.zero_grad()
    (found * torch.linspace(-1, 1, 4, device=device)).sum().backward()
    return found.detach(), {name: p.grad.clone() for name, p in backbone.named_parameters()}


def check_layouts(backbone, collator, device="cpu", tolerance=2e-6, gradient_tolerance=5e-5):
    """Packed rows against padded ones, which go through plain SDPA; tolerances are relative."""
    found, gradients = logps_and_gradients(backbone, collator, device)
    expected, expected_gradients = logps_and_gradients(backbone, PaddedCollator, device)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=0)
    for name, gradient in expected_gradients.items():
        assert (gradients[name] - gradient).norm() <= gradient_tolerance * gradient.norm(), name


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize(("kind", "window"), [("llama", None), ("mistral", 9)])
@pytest.mark.parametrize("collator", [SharedPrefixCollator, PackedCollator])
@pytest.mark.parametrize("path", ["varlen", "flex"])
def test_a_model_takes_the_path(monkeypatch, kind, window, collator, path):
    built = []
    for name in ("build_key_index", "build_block_mask"):
        build = getattr(attention, name)
        monkeypatch.setattr(attention, name, lambda *args, build=build: built.append(build) or build(*args))
    monkeypatch.setattr(kernels_cuda, "varlen_attn", kernel_2_12)
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(attention, "choose_path", lambda *args: path)
    check_layouts(make(kind, window), collator)
    # Once for the three layers; padded rows need none.
    assert built == [kernels_cuda.build_key_index if path == "varlen" else kernels_cuda.build_block_mask]


def test_one_block_mask_for_each_window(monkeypatch):
    plan = SegmentPlan(SEGMENTS, "cpu")
    assert plan.block_mask(7) is plan.block_mask(7)
    assert plan.block_mask(7) is not plan.block_mask(8)
    # The longest sees 150 keys, so that a window of 150 hides none.
    assert plan.block_mask(150) is plan.block_mask(None)
    assert plan.block_mask(149) is not plan.block_mask(None)


@pytest.mark.parametrize("kind", ["mistral", "gemma3_text"])
def test_packed_rows_need_no_mask_of_transformers(monkeypatch, kind):
    masks = []

    def counted(*args, **kwargs):
        masks.append(full(*args, **kwargs))
        return masks[-1]

    full = attention.sdpa_mask
    monkeypatch.setattr(attention, "sdpa_mask", counted)
    backbone = make(kind, window=9)
    with torch.no_grad():
        backbone(make_batch(SharedPrefixCollator))
        assert masks == []
        # A plain forward has its window, before and after: token 20 sees 12 ... 20.
        backbone.model(input_ids=torch.arange(3, 33)[None])
        (mask,) = [mask for mask in masks if mask is not None]
        assert mask.shape == (1, 1, 30, 30) and mask[0, 0, 20].nonzero().flatten().tolist() == list(range(12, 21))
        masks.clear()
        backbone(make_batch(PaddedCollator))
        assert masks != [] and all(mask is not None for mask in masks)


def test_an_error_leaves_packed_rows():
    with pytest.raises(ZeroDivisionError), attention.packed_rows():
        assert attention._segment_mask(1, 4, 4) is None
        _ = 1 / 0
    # Not even a causal mask may be left out here: 4 x 4, 10 visible.
    assert attention._segment_mask(1, 4, 4, allow_is_causal_skip=False).sum() == 10


@gpu
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_varlen_on_a_gpu(window, kv_heads, dtype):
    if not kernels_cuda.has_flash(CUDA):
        pytest.skip("no variable-length flash attention here")
    compare("varlen", window, kv_heads, CUDA, dtype, tolerance=2e-2)


@gpu
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_flex_on_a_gpu(window, kv_heads, dtype, tolerance):
    compare("flex", window, kv_heads, CUDA, dtype, tolerance)


@gpu
def test_alignment_on_a_gpu():
    check_alignment("flex", CUDA)
    if kernels_cuda.has_flash(CUDA):
        check_alignment("varlen", CUDA, torch.bfloat16)


@gpu
@pytest.mark.parametrize(("kind", "window"), [("llama", None), ("mistral", 9)])
@pytest.mark.parametrize("collator", [SharedPrefixCollator, PackedCollator])
@pytest.mark.parametrize("bf16", [False, True])
def test_a_model_on_a_gpu(monkeypatch, kind, window, collator, bf16):
    paths, choose = set(), attention.choose_path
    monkeypatch.setattr(attention, "choose_path", lambda *args: paths.add(choose(*args)) or choose(*args))
    backbone = make(kind, window).to(CUDA)
    with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
        check_layouts(backbone, collator, CUDA, *((3e-3, 0.1) if bf16 else (5e-6, 1e-4)))
    assert paths == {"varlen" if bf16 and kernels_cuda.has_flash(CUDA) else "flex"}


@pytest.mark.parametrize("accelerator", ["cpu", pytest.param("gpu", marks=gpu)])
def test_resume_is_exact_with_deterministic_kernels(tmp_path, tiny_model_dir, accelerator):
    """9 and 7 pairs, 2 a step: 5 and 4 steps. Stopped after step 7, in stage 2, and gone on with."""
    found = made_sources(tmp_path, {"a": 9, "b": 7})
    # Padded rows run the plain kernels of PyTorch, which have deterministic variants.
    arguments = {"accelerator": accelerator, "devices": 1, "deterministic": True, "precision": "32-true"}
    try:
        fit(tmp_path / "whole", tiny_model_dir, found, layout="padded", trainer_args=arguments)
        stop = arguments | {"max_steps": 7}
        fit(tmp_path / "cut", tiny_model_dir, found, layout="padded", trainer_args=stop)
        [checkpoint] = (tmp_path / "cut" / "checkpoints").glob("*.ckpt")
        assert "step=7" in checkpoint.name
        fit(tmp_path / "cut", tiny_model_dir, found, checkpoint, layout="padded", trainer_args=arguments)
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(losses(tmp_path / "whole")) == 5 + 4
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    for folder in ("01-a", "02-b"):
        assert_same_weights(tmp_path / "cut" / "stages" / folder, tmp_path / "whole" / "stages" / folder)
