"""Losses, log-probabilities and schedules against hand-written arithmetic and independent code."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import get_scheduler

from sdpo_lightning import logprobs
from sdpo_lightning.data.collate import PaddedCollator, TokenizedPair
from sdpo_lightning.logprobs import gather_logps, linear_token_logps, pair_logps, token_logps
from sdpo_lightning.losses import dpo_loss, implicit_rewards
from sdpo_lightning.schedules import learning_rate_factor, warmup_steps
from sdpo_lightning.types import PairLogps


def logps(chosen, rejected, dtype=torch.float32, requires_grad=False) -> PairLogps:
    chosen, rejected = (torch.tensor(s, dtype=dtype, requires_grad=requires_grad) for s in (chosen, rejected))
    lengths = torch.ones(len(chosen), dtype=torch.long)
    return PairLogps(chosen, rejected, lengths, lengths)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# ---- dpo_loss, implicit_rewards


def test_dpo_loss_by_hand():
    policy = logps([-10.0, -20.0], [-14.0, -15.0])
    reference = logps([-12.0, -21.0], [-13.0, -18.0])
    # gamma: 4 and -5; gamma_ref: 1 and -3; 0.5 * (4 - 1) = 1.5; 0.5 * (-5 + 3) = -1.
    expected = [math.log(1 + math.exp(-1.5)), math.log(1 + math.exp(1.0))]
    losses = dpo_loss(policy, reference, beta=0.5)
    assert losses.shape == (2,)
    assert losses.tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 0.4])
def test_loss_is_ln2_where_policy_is_reference(label_smoothing):
    same = logps([-3.0, -400.0], [-7.0, -1.0])
    losses = dpo_loss(same, same, beta=0.1, label_smoothing=label_smoothing)
    # -(1 - eps) ln(1/2) - eps ln(1/2) = ln 2
    assert losses.tolist() == pytest.approx([math.log(2)] * 2, abs=1e-7)


def test_label_smoothing_by_hand():
    policy, reference = logps([-10.0], [-14.0]), logps([-12.0], [-13.0])
    # z = 0.5 * (4 - 1) = 1.5, eps = 0.2
    expected = -0.8 * math.log(sigmoid(1.5)) - 0.2 * math.log(sigmoid(-1.5))
    assert dpo_loss(policy, reference, 0.5, 0.2).item() == pytest.approx(expected, abs=1e-6)
    # The same as the loss without smoothing + eps * z.
    assert expected == pytest.approx(-math.log(sigmoid(1.5)) + 0.2 * 1.5, abs=1e-12)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_gradient_by_hand(label_smoothing):
    policy = logps([-10.0, -20.0], [-14.0, -15.0], requires_grad=True)
    reference = logps([-12.0, -21.0], [-13.0, -18.0])
    dpo_loss(policy, reference, 0.5, label_smoothing).sum().backward()
    # d/dz of -(1 - eps) ln s(z) - eps ln s(-z) is -(1 - eps) s(-z) + eps s(z); dz / d(chosen) = beta.
    eps = label_smoothing
    expected = [0.5 * (-(1 - eps) * sigmoid(-z) + eps * sigmoid(z)) for z in (1.5, -1.0)]
    assert policy.chosen.grad.tolist() == pytest.approx(expected, abs=1e-6)
    assert policy.rejected.grad.tolist() == pytest.approx([-g for g in expected], abs=1e-6)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_extreme_logps_stay_finite_and_equal_fp64(label_smoothing):
    chosen, rejected = [-1e4, -1.0, -1e4, -9999.0], [-1.0, -1e4, -1e4, -1e4]
    found = {}
    for dtype in (torch.float32, torch.float64):
        policy = logps(chosen, rejected, dtype, requires_grad=True)
        losses = dpo_loss(policy, logps([-1.0] * 4, [-1.0] * 4, dtype), 10.0, label_smoothing)
        losses.sum().backward()
        found[dtype] = [losses.detach(), policy.chosen.grad, policy.rejected.grad]
    for single, double in zip(found[torch.float32], found[torch.float64], strict=True):
        assert torch.isfinite(single).all()
        torch.testing.assert_close(single.double(), double, rtol=1e-6, atol=1e-6)
    # z = 10 * (-1e4 + 1) = -99990: the first loss is (1 - eps) * 99990, the second eps * 99990.
    assert found[torch.float64][0][0].item() == pytest.approx((1 - label_smoothing) * 99990, rel=1e-12)
    assert found[torch.float64][0][1].item() == pytest.approx(label_smoothing * 99990, abs=1e-9)
    assert found[torch.float64][0][2].item() == pytest.approx(math.log(2), abs=1e-12)


@pytest.mark.parametrize("beta, label_smoothing", [(0.1, 0.0), (0.3, 0.25), (1.0, 0.0)])
def test_dpo_loss_equals_direct_fp64_computation(beta, label_smoothing):
    generator = torch.Generator().manual_seed(3)
    columns = -80 * torch.rand(4, 64, generator=generator)
    lengths = torch.ones(64, dtype=torch.long)
    policy, reference = (PairLogps(a, b, lengths, lengths) for a, b in (columns[:2], columns[2:]))
    w, lo, ref_w, ref_l = columns.double()
    # log sigmoid(z) as log of a ratio: (pi_w / ref_w)^beta against (pi_l / ref_l)^beta.
    win, lose = torch.exp(beta * (w - ref_w)), torch.exp(beta * (lo - ref_l))
    right, wrong = win / (win + lose), lose / (win + lose)
    direct = -(1 - label_smoothing) * right.log() - label_smoothing * wrong.log()
    found = dpo_loss(policy, reference, beta, label_smoothing).double()
    torch.testing.assert_close(found, direct, rtol=2e-5, atol=1e-5)


def test_implicit_rewards_by_hand():
    policy = logps([-10.0, -20.0], [-14.0, -15.0], requires_grad=True)
    reference = logps([-12.0, -21.0], [-13.0, -18.0])
    chosen, rejected = implicit_rewards(policy, reference, beta=0.5)
    # 0.5 * (-10 + 12), 0.5 * (-20 + 21); 0.5 * (-14 + 13), 0.5 * (-15 + 18)
    assert chosen.tolist() == [1.0, 0.5]
    assert rejected.tolist() == [-0.5, 1.5]
    assert not chosen.requires_grad and not rejected.requires_grad


# ---- token_logps, pair_logps

VOCAB, WIDTH = 23, 8
PAIRS = [TokenizedPair([1, 2, 3], [4, 5, 6], [7]), TokenizedPair([8], [9, 10], [11, 12, 13, 14])]
# Completion tokens: (3 + 2) chosen, (1 + 4) rejected.
TOKENS = 10


@pytest.fixture
def batch():
    return PaddedCollator(0)([0, 1], PAIRS, [1.0, 1.0], 2)


class Tied(nn.Module):
    """One weight as embedding and head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)

    def forward(self, hidden):
        return F.linear(hidden, self.embedding.weight)


def hidden_and_head(kind, batch):
    torch.manual_seed(5)
    if kind == "tied":
        head = Tied()
        return head.embedding(batch.input_ids).tanh(), head
    return torch.randn(*batch.input_ids.shape, WIDTH).requires_grad_(), nn.Linear(WIDTH, VOCAB, bias=True)


def values_and_gradients(kind, batch, compute):
    hidden, head = hidden_and_head(kind, batch)
    hidden.retain_grad()
    found = compute(hidden, head)
    # Unequal weights, so that tokens can't be mistaken for each other.
    (found * torch.arange(1, TOKENS + 1)).sum().backward()
    return [found.detach(), hidden.grad, *(parameter.grad for parameter in head.parameters())]


def by_full_logits(batch):
    def compute(hidden, head):
        table = head(hidden).log_softmax(-1)
        rows = []
        for row, (prompt, completion) in enumerate(
            [(p.prompt_ids, p.chosen_ids) for p in PAIRS] + [(p.prompt_ids, p.rejected_ids) for p in PAIRS]
        ):
            rows += [table[row, len(prompt) - 1 + k, token] for k, token in enumerate(completion)]
        return torch.stack(rows)

    return compute


@pytest.mark.parametrize("kind", ["linear", "tied"])
@pytest.mark.parametrize("rows_at_once", [1, 3, TOKENS])
def test_token_logps_equal_log_softmax_of_full_logits(kind, rows_at_once, batch):
    # 4 bytes * 23 logits a row.
    budget = rows_at_once * 4 * VOCAB / 2**20
    calls = []

    def ours(hidden, head):
        def counted(part):
            calls.append(len(part))
            return head(part)

        return token_logps(hidden, batch, counted, VOCAB, budget)

    found = values_and_gradients(kind, batch, ours)
    expected = values_and_gradients(kind, batch, by_full_logits(batch))
    assert found[0].shape == (TOKENS,) and found[0].dtype == torch.float32
    for ours_, theirs in zip(found, expected, strict=True):
        scale = max(1.0, theirs.abs().max().item())
        torch.testing.assert_close(ours_, theirs, rtol=0, atol=1e-6 * scale)
    assert max(calls) <= rows_at_once
    # Chunks are computed again in the backward pass; one chunk is not.
    assert sum(calls) == (TOKENS if rows_at_once == TOKENS else 2 * TOKENS)


@pytest.mark.parametrize("kind", ["linear", "tied"])
def test_chunked_equals_unchunked(kind, batch):
    def with_budget(budget):
        return lambda hidden, head: token_logps(hidden, batch, head, VOCAB, budget)

    # A budget below one row still makes progress, a row at a time.
    chunked = values_and_gradients(kind, batch, with_budget(1e-9))
    whole = values_and_gradients(kind, batch, with_budget(256.0))
    for left, right in zip(chunked, whole, strict=True):
        scale = max(1.0, right.abs().max().item())
        torch.testing.assert_close(left, right, rtol=0, atol=1e-6 * scale)


def test_gather_logps_of_bf16_logits_is_fp32():
    logits = torch.tensor([[300.0, 0.0, -20.0], [1.0, 1.0, 1.0]], dtype=torch.bfloat16)
    found = gather_logps(logits, torch.tensor([1, 2]))
    assert found.dtype == torch.float32
    # 0 - logsumexp(300, 0, -20) = -300; 1 - (1 + ln 3) = -ln 3
    assert found.tolist() == pytest.approx([-300.0, -math.log(3)], abs=1e-6)


def test_pair_logps_sums_each_completion(batch):
    # Tokens in the order chosen of pair 0 (3), chosen of pair 1 (2), rejected of pair 0 (1), of pair 1 (4).
    per_token = -torch.tensor([1.0, 2.0, 3.0, 10.0, 20.0, 100.0, 0.5, 0.25, 0.125, 4.0])
    found = pair_logps(per_token, batch)
    assert found.chosen.tolist() == [-6.0, -30.0]
    assert found.rejected.tolist() == [-100.0, -4.875]
    assert found.chosen_lengths.tolist() == [3, 2]
    assert found.rejected_lengths.tolist() == [1, 4]
    assert found.gamma.tolist() == [94.0, -25.125]


# ---- schedules

THEIRS = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}


@pytest.mark.parametrize("name", THEIRS)
@pytest.mark.parametrize("num_steps, warmup", [(1, 0), (1, 1), (2, 1), (7, 0), (10, 3), (25, 24), (12, 12)])
def test_schedule_equals_transformers(name, num_steps, warmup):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = get_scheduler(THEIRS[name], optimizer, num_warmup_steps=warmup, num_training_steps=num_steps)
    theirs = []
    for _ in range(num_steps):
        theirs.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    ours = [learning_rate_factor(name, step, num_steps, warmup) for step in range(num_steps)]
    assert ours == pytest.approx(theirs, abs=1e-12)


def test_schedule_by_hand():
    # 2 of 6 steps warm up: 0, 1/2; then 4 steps down: 1, 3/4, 1/2, 1/4.
    assert [learning_rate_factor("linear", s, 6, 2) for s in range(6)] == [0.0, 0.5, 1.0, 0.75, 0.5, 0.25]
    # Half-way down a cosine is 1/2; the end and anything beyond is 0.
    assert learning_rate_factor("cosine", 4, 6, 2) == pytest.approx(0.5)
    for name in ("linear", "cosine"):
        beyond = [learning_rate_factor(name, step, 6, 2) for step in (6, 7, 100)]
        assert beyond == pytest.approx([0.0] * 3, abs=1e-12)


@pytest.mark.parametrize("name", THEIRS)
@pytest.mark.parametrize("num_steps, warmup", [(3, 3), (3, 5), (1, 1)])
def test_a_warmup_as_long_as_the_stage_divides_by_nothing(name, num_steps, warmup):
    factors = [learning_rate_factor(name, step, num_steps, warmup) for step in range(num_steps + 4)]
    assert all(0.0 <= factor <= 1.0 for factor in factors)
    assert factors[:num_steps] == pytest.approx([step / warmup for step in range(num_steps)])


@pytest.mark.parametrize(
    "num_steps, ratio, expected", [(10, 0.0, 0), (10, 0.1, 1), (25, 0.1, 3), (2, 1.0, 2), (7, 1.0, 7)]
)
def test_warmup_steps_round_up(num_steps, ratio, expected):
    assert warmup_steps(num_steps, ratio) == expected


@pytest.mark.parametrize("name", THEIRS)
@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 10])
def test_the_last_step_of_a_stage_trains(name, ratio, num_steps):
    factors = [learning_rate_factor(name, k, num_steps, warmup_steps(num_steps, ratio)) for k in range(num_steps)]
    assert factors[-1] > 0


# ---- the fused head


class Positions:
    """The part of a batch that the head needs."""

    def __init__(self, count, vocab):
        self.source_index = torch.arange(count)
        self.target_ids = torch.arange(count) * 7 % vocab


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("budget", [256.0, 20 * 8 * 3 / 2**20], ids=["kept", "made again, 3 columns at a time"])
def test_fused_head_equals_autograd(bias, scale, budget):
    torch.manual_seed(0)
    batch, hidden = Positions(20, 37), torch.randn(1, 20, 8)
    found = []
    for fused in (True, False):
        torch.manual_seed(1)
        head = torch.nn.Linear(8, 37, bias=bias)
        inputs = hidden.clone().requires_grad_()
        if fused:
            logps = linear_token_logps(inputs, batch, head, scale, budget)
        else:
            logps = gather_logps(head(inputs[0]) * scale, batch.target_ids)
        (logps * torch.linspace(-1, 2, 20)).sum().backward()
        found.append([logps.detach(), inputs.grad, *(p.grad for p in head.parameters())])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
        assert theirs.abs().max() > 0.1


def test_fused_head_trains_only_what_asks_for_it():
    batch, head = Positions(6, 11), torch.nn.Linear(4, 11)
    head.requires_grad_(False)
    hidden = torch.randn(1, 6, 4, requires_grad=True)
    linear_token_logps(hidden, batch, head).sum().backward()
    assert head.weight.grad is None and head.bias.grad is None and hidden.grad.abs().max() > 0
    assert not linear_token_logps(hidden.detach(), batch, head).requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_head_keeps_no_logits_without_gradients(dtype, monkeypatch):
    kept = []
    kept_tile = logprobs._kept_tile
    monkeypatch.setattr(logprobs, "_kept_tile", lambda *given: kept.append(1) or kept_tile(*given))
    batch, head, hidden = Positions(6, 11), torch.nn.Linear(4, 11), torch.randn(1, 6, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16, cache_enabled=False):
        with torch.no_grad():
            quiet = linear_token_logps(hidden, batch, head)
        assert not kept
        loud = linear_token_logps(hidden, batch, head)
    # One tile, whose softmax becomes its gradient.
    assert kept == [1] and torch.equal(quiet, loud.detach())


def test_fused_head_gives_the_same_gradient_twice():
    batch, head, hidden = Positions(6, 11), torch.nn.Linear(4, 11), torch.randn(1, 6, 4, requires_grad=True)
    loss = linear_token_logps(hidden, batch, head).sum()
    first = torch.autograd.grad(loss, hidden, retain_graph=True)[0]
    # The kept buffer is consumed by the first pass.
    torch.testing.assert_close(torch.autograd.grad(loss, hidden)[0], first, rtol=1e-6, atol=1e-6)


def test_fused_head_in_bf16_keeps_the_gradient_of_a_sure_token():
    # p = 1 - 1e-3 rounds to 1 in bf16, which would leave no gradient at the target.
    hidden = torch.ones(1, 1, 1, requires_grad=True)
    head = torch.nn.Linear(1, 2, bias=False)
    head.weight.data = torch.tensor([[math.log(999.0)], [0.0]])
    batch = Positions(1, 2)
    with torch.autocast("cpu", torch.bfloat16):
        linear_token_logps(hidden, batch, head).sum().backward()
    # d logp / d logit of the target is 1 - p; its weight rounds to 6.9062 in bf16.
    p = 1 / (1 + math.exp(-6.90625))
    assert head.weight.grad[0, 0].item() == pytest.approx(1 - p, rel=1e-2)


def test_the_heads_gradient_is_in_the_dtype_of_its_weight():
    """Under autocast and in tiles: each is one product over all rows, rounded once; the bias is summed in fp32."""
    torch.manual_seed(0)
    head, batch, hidden = torch.nn.Linear(8, 96), Positions(20, 96), torch.randn(1, 20, 8).bfloat16().float()
    head.weight.data = head.weight.data.bfloat16().float()
    gather_logps(head(hidden[0]), batch.target_ids).sum().backward()
    exact = [p.grad.clone() for p in head.parameters()]
    head.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
        # 5 tiles of 20 columns, the last of 16: 3200 bytes are 20 rows of 20 fp32 logits and of their softmax, and
        # [20, 96] in bf16 is above them.
        linear_token_logps(hidden, batch, head, 1.0, 20 * 20 * 8 / 2**20).sum().backward()
    for gradient, reference in zip([head.weight.grad, head.bias.grad], exact, strict=True):
        assert gradient.dtype == torch.float32
        # Each of 20 terms is rounded to 8 bits, and so is the sum.
        assert (gradient - reference).abs().max() < 2**-7 * reference.abs().max()
    assert (head.bias.grad != head.bias.grad.bfloat16().float()).any()
