"""Every loss against TRL's own code, the paper's formula in float64 and arithmetic by hand."""

from __future__ import annotations

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from sdpo_lightning.batch_objectives import (
    AOTLoss,
    AOTUnpairedLoss,
    BCOShiftedLoss,
    ORPOLoss,
    SFTLoss,
    SimPOLoss,
    WeightedSum,
    check_loss,
)
from sdpo_lightning.completion_logps import SummedLogps, WPOLogps
from sdpo_lightning.divergences import AlphaDivergence, ForwardKL, JensenShannon, ReverseKL
from sdpo_lightning.objectives import (
    APODownLoss,
    APOZeroLoss,
    BCOPairLoss,
    DiscoPOPLoss,
    DPOPLoss,
    EXOPairLoss,
    HingeLoss,
    IPOLoss,
    NCAPairLoss,
    RobustLoss,
    SigmoidLoss,
    SigmoidNormLoss,
    SPPOHardLoss,
    SummedIPOLoss,
)
from sdpo_lightning.types import ConfigurationError, PairLogps

EPS = 0.1
SAME_AS_TRL = {
    "sigmoid": SigmoidLoss(),
    "sigmoid_norm": SigmoidNormLoss(),
    "hinge": HingeLoss(),
    "ipo": IPOLoss(),
    "robust": RobustLoss(EPS),
    "exo_pair": EXOPairLoss(EPS),
    "nca_pair": NCAPairLoss(),
    "bco_pair": BCOPairLoss(),
    "sppo_hard": SPPOHardLoss(),
    "apo_zero": APOZeroLoss(),
    "apo_down": APODownLoss(),
    "discopop": DiscoPOPLoss(),
    "aot": AOTLoss(EPS),
    "aot_unpaired": AOTUnpairedLoss(EPS),
    "sft": SFTLoss(),
}
DIVERGENCES = {
    "reverse_kl": ReverseKL(),
    "forward_kl": ForwardKL(),
    "js_divergence": JensenShannon(),
    "alpha_divergence": AlphaDivergence(0.3),
}
WITH_DIVERGENCE = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "robust", "exo_pair", "discopop")
LENGTHS = torch.tensor([3, 1, 7, 4, 2, 5]), torch.tensor([2, 6, 1, 4, 9, 3])


def draws(scale: float) -> tuple[PairLogps, PairLogps]:
    """Six pairs: logps of the policy with a graph, and those of the reference, down to -`scale` nats."""
    generator = torch.Generator().manual_seed(int(scale))
    chosen, rejected, near, far = (-scale * torch.rand(6, generator=generator) for _ in range(4))
    # A pair where both agree, and one that lies close.
    near[0], far[0] = chosen[0], rejected[0]
    near[1], far[1] = chosen[1] + 0.5, rejected[1] - 0.25
    policy = PairLogps(chosen.requires_grad_(), rejected.requires_grad_(), *LENGTHS)
    return policy, PairLogps(near, far, *LENGTHS)


def trl_loss(policy, reference, kinds, beta, weights=None, divergence="reverse_kl", **settings) -> torch.Tensor:
    """Mean loss by `DPOTrainer._compute_loss`, on a model that answers with the given logps."""
    trl = pytest.importorskip("trl")
    lengths = torch.cat([policy.chosen_lengths, policy.rejected_lengths])
    mask = (torch.arange(int(lengths.max()) + 1) <= lengths[:, None]).long()
    mask[:, 0] = 0  # the prompt: one token
    totals = torch.cat([policy.chosen, policy.rejected])
    # All of a completion's logp lies on its first token.
    tokens = F.pad(totals[:, None], (0, mask.shape[1] - 2))
    zeros = torch.zeros_like(tokens).detach()
    outputs = SimpleNamespace(log_probs=tokens, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())

    def model(**_):
        return outputs

    model.training = False
    accelerator = SimpleNamespace(device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x)
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False),
        accelerator=accelerator,
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type=divergence,
        f_alpha_divergence_coef=0.3,
        loss_types=kinds,
        loss_weights=weights or [1.0] * len(kinds),
        beta=beta,
        label_smoothing=EPS,
        args=SimpleNamespace(discopop_tau=0.05),
        use_weighting=False,
        _metrics={"eval": defaultdict(list)},
        _total_train_tokens=0,
        **settings,
    )
    inputs = {
        "input_ids": torch.zeros_like(mask),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
        "ref_chosen_logps": reference.chosen,
        "ref_rejected_logps": reference.rejected,
    }
    return trl.DPOTrainer._compute_loss(trainer, model, inputs, False)


def one(logps: PairLogps, index: int) -> PairLogps:
    part = slice(index, index + 1)
    return PairLogps(logps.chosen[part], logps.rejected[part], logps.chosen_lengths[part], logps.rejected_lengths[part])


def gradients(loss: torch.Tensor, policy: PairLogps) -> torch.Tensor:
    return torch.stack(
        torch.autograd.grad(loss, [policy.chosen, policy.rejected], retain_graph=True, materialize_grads=True)
    )


def compare(loss, policy, reference, beta, kinds, **settings) -> None:
    """Pair by pair, value and gradient; the whole batch where a loss looks at all pairs."""
    if loss.across_pairs:
        parts = [(policy, reference)]
    else:
        parts = [(one(policy, i), one(reference, i)) for i in range(len(policy.chosen))]
    compared = 0
    for ours, theirs in parts:
        found, expected = loss(ours, theirs, beta).mean(), trl_loss(ours, theirs, kinds, beta, **settings)
        if kinds == ["discopop"] and not expected.isfinite():
            # inf * 0 there, below z = -88; the scores of a forward KL may be infinite themselves.
            assert settings or found.isfinite() and gradients(found, policy).isfinite().all()
            continue
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6, equal_nan=True)
        torch.testing.assert_close(
            gradients(found, policy), gradients(expected, policy), rtol=1e-6, atol=1e-6, equal_nan=True
        )
        compared += 1
    assert compared >= min(2, len(parts))


@pytest.mark.parametrize("scale", [1.0, 60.0, 1e4])
@pytest.mark.parametrize("beta", [0.1, 10.0])
@pytest.mark.parametrize("kind", SAME_AS_TRL)
def test_as_trl(kind, beta, scale):
    compare(SAME_AS_TRL[kind], *draws(scale), beta, [kind])


@pytest.mark.parametrize("scale", [1.0, 60.0, 1e4])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("kind", WITH_DIVERGENCE)
def test_divergences_as_trl(kind, divergence, scale):
    settings = {"label_smoothing": EPS} if kind in ("robust", "exo_pair") else {}
    loss = type(SAME_AS_TRL[kind])(**settings, divergence=DIVERGENCES[divergence])
    compare(loss, *draws(scale), 0.1, [kind], divergence=divergence)


def test_weighted_sum_as_trl():
    loss = WeightedSum([SigmoidLoss(), IPOLoss(), SFTLoss()], [0.5, 2.0, 0.25])
    kinds = ["sigmoid", "ipo", "sft"]
    compare(loss, *draws(60.0), 0.1, kinds, weights=[0.5, 2.0, 0.25])


@pytest.mark.parametrize("scale", [1.0, 60.0, 1e4])
@pytest.mark.parametrize("beta", [0.1, 10.0])
def test_simpo_as_trl(beta, scale):
    cpo = pytest.importorskip("trl.experimental.cpo")
    trainer = SimpleNamespace(
        alpha=0.0,
        beta=beta,
        loss_type="simpo",
        simpo_gamma=0.5,
        label_smoothing=EPS,
        accelerator=SimpleNamespace(device="cpu"),
    )
    policy, reference = draws(scale)
    means = policy.chosen / LENGTHS[0], policy.rejected / LENGTHS[1]
    expected = cpo.CPOTrainer.cpo_loss(trainer, *means)[0]
    found = SimPOLoss(0.5, EPS)(policy, reference, beta)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    theirs = gradients(expected.sum(), policy)
    torch.testing.assert_close(gradients(found.sum(), policy), theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 60.0, 1e4])
def test_orpo_as_trl_and_as_the_paper(scale):
    orpo = pytest.importorskip("trl.experimental.orpo")
    policy, reference = draws(scale)
    means = policy.chosen / LENGTHS[0], policy.rejected / LENGTHS[1]
    trainer = SimpleNamespace(beta=0.3, accelerator=SimpleNamespace(device="cpu"))
    # TRL's part is beta * log sigmoid, which it takes off the SFT loss.
    expected = -means[0] - orpo.ORPOTrainer.odds_ratio_loss(trainer, *means)[0]
    found = ORPOLoss()(policy, reference, 0.3)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    theirs = gradients(expected.sum(), policy)
    torch.testing.assert_close(gradients(found.sum(), policy), theirs, rtol=1e-6, atol=1e-6)
    # Eqs. 4, 6, 7 in float64.
    p, q = (m.detach().double() for m in means)
    odds = (p - torch.log1p(-p.exp())) - (q - torch.log1p(-q.exp()))
    torch.testing.assert_close(found.double(), -p - 0.3 * F.logsigmoid(odds), rtol=1e-5, atol=1e-5)


def test_a_sure_answer_has_finite_odds():
    policy = PairLogps(
        torch.zeros(1, requires_grad=True), torch.full((1,), -1e4, requires_grad=True), *[side[:1] for side in LENGTHS]
    )
    loss = ORPOLoss()(policy, policy, 0.3)
    assert loss.isfinite().all() and gradients(loss.sum(), policy).isfinite().all()


# ---- by hand: log-ratios 2 (chosen) and -1 (rejected) over 4 and 2 tokens, beta 0.5; r_w = 1, r_l = -0.5, z = 1.5


def sig(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def nls(x: float) -> float:
    return math.log(1 + math.exp(-x))


def hand() -> tuple[PairLogps, PairLogps]:
    def row(chosen, rejected):
        return PairLogps(torch.tensor([chosen]), torch.tensor([rejected]), torch.tensor([4]), torch.tensor([2]))

    return row(-4.0, -6.0), row(-6.0, -5.0)


BY_HAND = [
    (SigmoidLoss(0.2), 0.8 * nls(1.5) + 0.2 * nls(-1.5)),
    # 2 / 4 - -1 / 2 = 1; half of it.
    (SigmoidNormLoss(), nls(0.5)),
    # 1 - 1.5 < 0
    (HingeLoss(), 0.0),
    # 1 - 1 / (2 * 0.5) = 0
    (IPOLoss(), 0.0),
    # (3 - 1)^2
    (SummedIPOLoss(), 4.0),
    (RobustLoss(0.1), (0.9 * nls(1.5) - 0.1 * nls(-1.5)) / 0.8),
    (EXOPairLoss(0.1), sig(1.5) * math.log(sig(1.5) / 0.9) + sig(-1.5) * math.log(sig(-1.5) / 0.1)),
    (NCAPairLoss(), nls(1.0) + 0.5 * nls(-1.0) + 0.5 * nls(0.5)),
    (BCOPairLoss(), nls(1.0) + nls(0.5)),
    # (2 - 1)^2 + (-1 + 1)^2
    (SPPOHardLoss(), 1.0),
    (APOZeroLoss(), 1 - sig(1.0) + sig(-0.5)),
    (APODownLoss(), sig(1.0) + 1 - sig(1.5)),
    # tau 0.5: m = sigmoid(3)
    (DiscoPOPLoss(0.5), (1 - sig(3.0)) * nls(1.5) + sig(3.0) * math.exp(-1.5)),
    # One pair alone: sorting changes nothing.
    (AOTLoss(), nls(1.5)),
    (AOTUnpairedLoss(), nls(1.5)),
    # The chosen answer hasn't fallen: no penalty.
    (DPOPLoss(), nls(1.5)),
    (SFTLoss(), 1.0),
    # Means -1 and -3: 0.5 * 2 - 0.25.
    (SimPOLoss(0.25), nls(0.75)),
    (
        ORPOLoss(),
        1.0 + 0.5 * nls(math.log(math.exp(-1) / (1 - math.exp(-1))) - math.log(math.exp(-3) / (1 - math.exp(-3)))),
    ),
    # RPO.
    (WeightedSum([SigmoidLoss(), SFTLoss()], [1.0, 2.0]), nls(1.5) + 2 * 1.0),
    # f' = 1 - 1/u: 1 - e^-2 and 1 - e^1.
    (SigmoidLoss(divergence=ForwardKL()), nls(0.5 * (math.exp(1) - math.exp(-2)))),
    # log(2u / (1 + u)): the 2 cancels.
    (SigmoidLoss(divergence=JensenShannon()), nls(0.5 * (math.log(sig(2.0)) - math.log(sig(-1.0))))),
    # (u^-0.5 - 1) / -0.5: 2 - 2 e^-1 and 2 - 2 e^0.5.
    (SigmoidLoss(divergence=AlphaDivergence(0.5)), nls(0.5 * 2 * (math.exp(0.5) - math.exp(-1)))),
]


@pytest.mark.parametrize(("loss", "expected"), BY_HAND, ids=[type(loss).__name__ for loss, _ in BY_HAND])
def test_by_hand(loss, expected):
    assert loss(*hand(), 0.5).tolist() == pytest.approx([expected], abs=1e-6)


def test_dpop_penalty_by_hand():
    policy, reference = hand()
    # The other way round: log-ratios -2 and 1, so 0.5 * (-3 - 5 * 2) = -6.5.
    assert DPOPLoss(5.0)(reference, policy, 0.5).tolist() == pytest.approx([nls(-6.5)], abs=1e-6)


def test_bco_shift_by_hand():
    loss, (policy, reference) = BCOShiftedLoss(), hand()
    policy.chosen.requires_grad_()
    # Rewards 1 and -0.5: their mean is 0.25.
    assert loss(policy, reference, 0.5).tolist() == pytest.approx([nls(0.75) + nls(0.75)], abs=1e-6)
    # Then rewards -1 and 0.5 as well: the mean of all four is 0.
    swapped = PairLogps(reference.chosen.clone().requires_grad_(), reference.rejected, *LENGTHS)
    assert loss(swapped, hand()[0], 0.5).tolist() == pytest.approx([nls(-1.0) + nls(-0.5)], abs=1e-6)
    assert loss.state_dict() == {"sum_and_count": [0.0, 4.0]}
    # Held-out pairs only use it.
    assert loss(*hand(), 0.5).tolist() == pytest.approx([nls(1.0) + nls(0.5)], abs=1e-6)
    assert loss.state_dict() == {"sum_and_count": [0.0, 4.0]}
    loss.start_stage()
    assert loss.state_dict() == {"sum_and_count": [0.0, 0.0]}


def test_aot_by_hand():
    ones = torch.ones(2, dtype=torch.long)
    policy = PairLogps(torch.tensor([3.0, 1.0]), torch.tensor([0.0, 0.0]), ones, ones)
    reference = PairLogps(torch.tensor([0.0, 2.0]), torch.tensor([0.0, 1.5]), ones, ones)
    # gamma 3, 1 and 0, 0.5: sorted 1 - 0 and 3 - 0.5; the first pair holds the larger one.
    assert AOTLoss()(policy, reference, 1.0).tolist() == pytest.approx([nls(2.5), nls(1.0)], abs=1e-6)
    # Log-ratios of chosen 3, -1, of rejected 0, -1.5: sorted -1 + 1.5 and 3 - 0.
    assert AOTUnpairedLoss()(policy, reference, 1.0).tolist() == pytest.approx([nls(3.0), nls(0.5)], abs=1e-6)


@pytest.mark.parametrize("loss", [*SAME_AS_TRL.values(), BCOShiftedLoss(), SimPOLoss(), ORPOLoss()])
def test_filler_pairs_change_nothing(loss):
    policy, reference = draws(10.0)
    loss.start_stage()
    alone = loss(policy, reference, 0.5)
    expected = gradients(alone.sum(), policy)
    loss.start_stage()
    real = torch.tensor([True] * 6 + [False] * 2)

    def filled(logps):
        sides = [torch.cat([s, torch.tensor([-1e4, -3.0])]) for s in (logps.chosen, logps.rejected)]
        # Without a single token.
        return PairLogps(*sides, *(torch.cat([n, torch.zeros(2, dtype=n.dtype)]) for n in LENGTHS), real=real)

    found = loss(filled(policy), filled(reference), 0.5)
    torch.testing.assert_close(found[:6], alone, rtol=1e-6, atol=1e-6)
    # As the training step masks them.
    total = torch.where(real, found * real, 0.0).sum()
    torch.testing.assert_close(gradients(total, policy), expected, rtol=1e-6, atol=1e-6)


# ---- settings that are refused


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: SigmoidLoss(0.5), "`label_smoothing` of SigmoidLoss is 0.5"),
        (lambda: EXOPairLoss(0.0), r"expected within \(0, 0.5\)"),
        (lambda: DiscoPOPLoss(0.0), "`tau`"),
        (lambda: DPOPLoss(-1.0), "`penalty`"),
        (lambda: AlphaDivergence(math.inf), "`alpha`"),
        (lambda: SummedLogps(1.5), "`ld_alpha`"),
        (lambda: WeightedSum([SigmoidLoss()], [1.0, 2.0]), "1 losses and 2 weights"),
        (lambda: check_loss(HingeLoss(), 0.1, SummedLogps()), "`model.label_smoothing` is 0.1"),
        (lambda: check_loss(AOTLoss(), 0.0, WPOLogps()), "weighs single pairs"),
        (lambda: check_loss(WeightedSum([SFTLoss()], [1.0]), 0.0, SummedLogps(0.5)), "`ld_alpha` of `model.logps`"),
    ],
)
def test_refused(make, words):
    with pytest.raises(ConfigurationError, match=words):
        make()
