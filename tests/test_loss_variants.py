"""Every loss of `model.loss` against TRL's own code, by hand, and in a `fit`."""

from __future__ import annotations

import math
import shutil
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
import yaml
from helpers import make_rows, write_jsonl
from runs import assert_same_weights, fit, losses
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from sdpo_lightning import PreferenceSource, StageCheckpoint
from sdpo_lightning import batch_objectives as across
from sdpo_lightning import objectives as single
from sdpo_lightning.backbone import CausalBackbone, load_policy
from sdpo_lightning.cli import main
from sdpo_lightning.completion_logps import SummedLogps, WPOLogps
from sdpo_lightning.data.collate import TokenizedPair
from sdpo_lightning.divergences import AlphaDivergence, ForwardKL, JensenShannon, ReverseKL
from sdpo_lightning.exactness import COLLATORS
from sdpo_lightning.logprobs import alignment_weights, pair_logps
from sdpo_lightning.losses_free import orpo_loss, simpo_loss
from sdpo_lightning.types import ConfigurationError, PairLogps, ResumeError

trl_dpo = pytest.importorskip("trl.trainer.dpo_trainer")

# TRL's name -> ours, with the label smoothing that both are given.
LOSSES = {
    "sigmoid": (single.SigmoidLoss(), 0.0),
    "sigmoid_norm": (single.SigmoidNormLoss(), 0.0),
    "hinge": (single.HingeLoss(), 0.0),
    "ipo": (single.IPOLoss(), 0.0),
    "robust": (single.RobustLoss(0.2), 0.2),
    "exo_pair": (single.EXOPairLoss(0.1), 0.1),
    "nca_pair": (single.NCAPairLoss(), 0.0),
    "bco_pair": (single.BCOPairLoss(), 0.0),
    "sppo_hard": (single.SPPOHardLoss(), 0.0),
    "aot": (across.AOTLoss(0.1), 0.1),
    "aot_unpaired": (across.AOTUnpairedLoss(0.1), 0.1),
    "apo_zero": (single.APOZeroLoss(), 0.0),
    "apo_down": (single.APODownLoss(), 0.0),
    "discopop": (single.DiscoPOPLoss(0.05), 0.0),
}
DIVERGENCES = {
    "reverse_kl": ReverseKL(),
    "forward_kl": ForwardKL(),
    "js_divergence": JensenShannon(),
    "alpha_divergence": AlphaDivergence(0.5),
}
SCORED = [name for name in LOSSES if "divergence" in vars(LOSSES[name][0])]


class Sides:
    """Completions of 2B sequences as token logps `[2B, T]`, in the form that TRL takes, and in ours."""

    def __init__(self, lengths: list[int], scale: float, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.lengths = torch.tensor(lengths)
        shape = (len(lengths), max(lengths))
        self.real = torch.arange(shape[1]) < self.lengths[:, None]
        draw = [-torch.rand(shape, generator=generator) * scale * self.real for _ in range(3)]
        self.tokens = draw[0].requires_grad_()
        self.reference, self.collisions = draw[1].sum(1), draw[2] / scale
        # One prompt token before each.
        self.mask = torch.cat([torch.zeros(shape[0], 1), self.real], 1).long()

    def ours(self, **extra) -> tuple[PairLogps, PairLogps]:
        policy, lengths = self.tokens.sum(1).chunk(2), self.lengths.chunk(2)
        return PairLogps(*policy, *lengths, **extra), PairLogps(*self.reference.chunk(2), *lengths)


def trl_loss(
    sides: Sides, names, beta, label_smoothing=0.0, weights=None, divergence="reverse_kl", **more
) -> torch.Tensor:
    """The mean loss of a batch by TRL's `_compute_loss`, run on a stand-in for the trainer and for the model."""
    outputs = SimpleNamespace(
        log_probs=sides.tokens,
        log_sum_sq_probs=sides.collisions,
        entropy=torch.zeros_like(sides.tokens),
        mean_logits=torch.zeros_like(sides.tokens),
        is_top1=torch.zeros_like(sides.tokens, dtype=torch.bool),
    )

    class Model:
        training = True

        def __call__(self, **_):
            return outputs

    chosen, rejected = sides.reference.chunk(2)
    trainer = SimpleNamespace(
        model=Model(),
        accelerator=SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x),
        args=SimpleNamespace(discopop_tau=0.05),
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        f_divergence_type=divergence,
        f_alpha_divergence_coef=0.5,
        loss_types=names,
        loss_weights=weights or [1.0] * len(names),
        beta=beta,
        label_smoothing=label_smoothing,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
        **({"ld_alpha": None, "use_weighting": False} | more),
    )
    inputs = {
        "input_ids": sides.mask,
        "attention_mask": torch.ones_like(sides.mask),
        "completion_mask": sides.mask,
        "ref_chosen_logps": chosen,
        "ref_rejected_logps": rejected,
    }
    return trl_dpo.DPOTrainer._compute_loss(trainer, trainer.model, inputs, False)


def same(ours: torch.Tensor, theirs: torch.Tensor, sides: Sides) -> None:
    """Values, and gradients of every token, within 1e-6 of the larger of 1 and their size."""
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    mine, other = (torch.autograd.grad(loss, sides.tokens, retain_graph=True)[0] for loss in (ours, theirs))
    torch.testing.assert_close(mine * sides.real, other * sides.real, rtol=1e-6, atol=1e-6)
    assert float(other.abs().sum()) > 0 or float(theirs) in (0.0, 2.0)


RANDOM = [3, 7, 1, 5, 6, 2, 4, 9]


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("scale, beta", [(1.0, 0.1), (3.0, 1.0), (100.0, 0.01)])
def test_a_loss_is_trl_s(name, scale, beta):
    loss, label_smoothing = LOSSES[name]
    sides = Sides(RANDOM, scale)
    same(loss(*sides.ours(), beta).mean(), trl_loss(sides, [name], beta, label_smoothing), sides)


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "discopop"])
def test_a_loss_is_trl_s_where_logps_are_extreme(name):
    """Logps to -1e4 and beta 10. TRL's `discopop` is NaN there; ours is looked at below."""
    loss, label_smoothing = LOSSES[name]
    sides = Sides(RANDOM, 2000.0)
    ours, theirs = loss(*sides.ours(), 10.0).mean(), trl_loss(sides, [name], 10.0, label_smoothing)
    assert math.isfinite(ours)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    mine, other = (torch.autograd.grad(value, sides.tokens)[0] for value in (ours, theirs))
    assert bool(mine.isfinite().all())
    torch.testing.assert_close(mine * sides.real, other * sides.real, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("name", SCORED)
def test_divergences_are_trl_s(name, divergence):
    loss, label_smoothing = LOSSES[name]
    loss = type(loss)(**vars(loss) | {"divergence": DIVERGENCES[divergence]})
    sides = Sides(RANDOM, 0.5)
    theirs = trl_loss(sides, [name], 0.5, label_smoothing, divergence=divergence)
    same(loss(*sides.ours(), 0.5).mean(), theirs, sides)


def test_a_weighted_sum_is_trl_s():
    sides = Sides(RANDOM, 1.0)
    loss = across.WeightedSum([single.SigmoidLoss(), single.BCOPairLoss(), single.HingeLoss()], [0.8, 0.2, 1.5])
    theirs = trl_loss(sides, ["sigmoid", "bco_pair", "hinge"], 0.3, weights=[0.8, 0.2, 1.5])
    same(loss(*sides.ours(), 0.3).mean(), theirs, sides)


@pytest.mark.parametrize("name", ["sigmoid", "ipo", "apo_zero"])
def test_weights_of_pairs_are_trl_s(name):
    sides = Sides(RANDOM, 1.0)
    theirs = trl_loss(sides, [name], 0.3, use_weighting=True)
    aligned = ((sides.tokens.detach() - sides.collisions) * sides.real).sum(1) / sides.lengths
    chosen, rejected = aligned.exp().chunk(2)
    same(LOSSES[name][0](*sides.ours(pair_weights=chosen * rejected), 0.3).mean(), theirs, sides)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_simpo_is_trl_s(label_smoothing):
    cpo = pytest.importorskip("trl.experimental.cpo.cpo_trainer")
    sides = Sides(RANDOM, 2.0)
    policy, _ = sides.ours()
    means = policy.chosen / policy.chosen_lengths, policy.rejected / policy.rejected_lengths
    trainer = SimpleNamespace(
        loss_type="simpo", simpo_gamma=0.7, beta=2.5, label_smoothing=label_smoothing,
        accelerator=SimpleNamespace(device="cpu"), alpha=0.0,
    )  # fmt: skip
    theirs = cpo.CPOTrainer.cpo_loss(trainer, *means)[0].mean()
    same(simpo_loss(policy, 2.5, 0.7, label_smoothing).mean(), theirs, sides)


def test_orpo_s_odds_are_trl_s():
    orpo = pytest.importorskip("trl.experimental.orpo.orpo_trainer")
    sides = Sides(RANDOM, 2.0)
    policy, _ = sides.ours()
    means = policy.chosen / policy.chosen_lengths, policy.rejected / policy.rejected_lengths
    trainer = SimpleNamespace(beta=0.3, accelerator=SimpleNamespace(device="cpu"))
    # TRL gives beta * log sigmoid; its trainer takes it off the SFT loss, which here is that of the answer.
    theirs = (-means[0] - orpo.ORPOTrainer.odds_ratio_loss(trainer, *means)[0]).mean()
    same(orpo_loss(policy, 0.3).mean(), theirs, sides)


# ---- by hand


def pair(chosen, rejected, lengths=(4, 2)) -> PairLogps:
    sums = (torch.tensor([float(value)], dtype=torch.float64) for value in (chosen, rejected))
    return PairLogps(*sums, *map(torch.tensor, lengths))


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


# Log-ratios: chosen -10 + 12 = 2, rejected -14 + 13 = -1; their difference 3; per token 2/4 and -1/2: 1.
POLICY, REFERENCE = pair(-10, -14), pair(-12, -13)


@pytest.mark.parametrize(
    "loss, expected",
    [
        # beta is 0.5 throughout: rewards 1 and -0.5, z = 1.5.
        (single.SigmoidLoss(), math.log(1 + math.exp(-1.5))),
        (single.SigmoidNormLoss(), math.log(1 + math.exp(-0.5))),
        (single.HingeLoss(), 0.0),
        (single.IPOLoss(), (1 - 1) ** 2),
        (single.SummedIPOLoss(), (3 - 1) ** 2),
        (single.RobustLoss(0.25), (-0.75 * math.log(sigmoid(1.5)) + 0.25 * math.log(sigmoid(-1.5))) / 0.5),
        (
            single.EXOPairLoss(0.1),
            sigmoid(1.5) * math.log(sigmoid(1.5) / 0.9) + sigmoid(-1.5) * math.log(sigmoid(-1.5) / 0.1),
        ),
        (
            single.NCAPairLoss(),
            -math.log(sigmoid(1)) - (math.log(sigmoid(-1)) + math.log(sigmoid(0.5))) / 2,
        ),
        (single.BCOPairLoss(), -math.log(sigmoid(1)) - math.log(sigmoid(0.5))),
        (single.SPPOHardLoss(), (2 - 1) ** 2 + (-1 + 1) ** 2),
        (single.APOZeroLoss(), 1 - sigmoid(1) + sigmoid(-0.5)),
        (single.APODownLoss(), sigmoid(1) + 1 - sigmoid(1.5)),
        # m = sigmoid(1.5 / 0.5).
        (single.DiscoPOPLoss(0.5), (1 - sigmoid(3)) * math.log(1 + math.exp(-1.5)) + sigmoid(3) * math.exp(-1.5)),
        # The chosen answer has risen: no penalty.
        (single.DPOPLoss(50.0), math.log(1 + math.exp(-1.5))),
        (across.SFTLoss(), 10 / 4),
        # Means -2.5 and -7: 0.5 * 4.5 - 0.25 = 2.
        (across.SimPOLoss(0.25), math.log(1 + math.exp(-2.0))),
        (
            across.ORPOLoss(),
            2.5
            - 0.5 * math.log(sigmoid((-2.5 + 7) - (math.log(1 - math.exp(-2.5)) - math.log(1 - math.exp(-7.0))))),
        ),
        # One pair: AOT is DPO; unpaired it compares the log-ratios 2 and -1, which is the same here.
        (across.AOTLoss(), math.log(1 + math.exp(-1.5))),
        (across.AOTUnpairedLoss(), math.log(1 + math.exp(-1.5))),
        (across.WeightedSum([single.SigmoidLoss(), across.SFTLoss()], [1.0, 0.2]), math.log(1 + math.exp(-1.5)) + 0.5),
    ],
)  # fmt: skip
def test_losses_by_hand(loss, expected):
    assert loss(POLICY, REFERENCE, 0.5).item() == pytest.approx(expected, abs=1e-9)


def test_dpop_by_hand():
    # Chosen -12 + 11 = -1, rejected -13 + 17 = 4: 0.5 * (-5 - 3 * 1) = -4.
    loss = single.DPOPLoss(3.0)(pair(-12, -13), pair(-11, -17), 0.5)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(4.0)), abs=1e-9)


def test_aot_by_hand():
    """Gammas 1, 5 of the policy and 4, 0 of the reference: sorted, 1 meets 0 and 5 meets 4."""
    lengths = torch.ones(2, dtype=torch.long)
    policy = PairLogps(torch.tensor([-1.0, -1.0]), torch.tensor([-2.0, -6.0]), lengths, lengths)
    reference = PairLogps(torch.tensor([-1.0, -1.0]), torch.tensor([-5.0, -1.0]), lengths, lengths)
    found = across.AOTLoss()(policy, reference, 1.0)
    assert found.tolist() == pytest.approx([math.log(1 + math.exp(-1.0))] * 2, abs=1e-6)


def test_discopop_far_below_is_finite():
    policy, reference = pair(-1e4, 0), pair(0, -1e4)
    # z = -2e4: the weight of exp(-z) is 0 to the last digit, and -log sigmoid(z) is 2e4.
    assert single.DiscoPOPLoss()(policy, reference, 1.0).item() == pytest.approx(2e4)


def test_a_sure_answer_under_orpo_is_finite():
    policy = PairLogps(*(torch.zeros(1, requires_grad=True) for _ in range(2)), *[torch.ones(1, dtype=torch.long)] * 2)
    loss = orpo_loss(policy, 1.0).sum()
    loss.backward()
    assert math.isfinite(loss.item()) and bool(policy.chosen.grad.isfinite().all())


@pytest.mark.parametrize("loss", [across.AOTLoss(), across.AOTUnpairedLoss(), across.BCOShiftedLoss()])
def test_filler_pairs_disturb_no_real_one(loss):
    sides = Sides(RANDOM, 3.0)
    real = torch.tensor([True, True, True, False])
    whole = loss(*sides.ours(real=real), 0.3)[:3]
    keep = torch.tensor([0, 1, 2, 4, 5, 6])
    fewer = Sides(RANDOM, 3.0)
    fewer.tokens, fewer.reference, fewer.lengths = (v[keep] for v in (fewer.tokens, fewer.reference, fewer.lengths))
    torch.testing.assert_close(whole, type(loss)()(*fewer.ours(), 0.3))


def test_bco_s_shift_by_hand():
    loss = across.BCOShiftedLoss()
    graph = pair(-10, -14)
    graph.chosen.requires_grad_()
    # Rewards 1 and -0.5: their mean is 0.25.
    first = loss(graph, REFERENCE, 0.5)
    assert first.item() == pytest.approx(-math.log(sigmoid(0.75)) - math.log(sigmoid(0.75)), abs=1e-6)
    # Held-out pairs use the mean and leave it: rewards 0 and 0.
    still = loss(REFERENCE, REFERENCE, 0.5)
    assert still.item() == pytest.approx(-math.log(sigmoid(-0.25)) - math.log(sigmoid(0.25)), abs=1e-6)
    # Two more rewards of 0: 0.5 / 4 = 0.125.
    graph = pair(-12, -13)
    graph.chosen.requires_grad_()
    second = loss(graph, REFERENCE, 0.5).item()
    assert second == pytest.approx(-math.log(sigmoid(-0.125)) - math.log(sigmoid(0.125)), abs=1e-6)
    again = across.BCOShiftedLoss()
    again.load_state_dict(loss.state_dict())
    assert again.state_dict() == loss.state_dict() == {"sum_and_count": [0.5, 4.0]}
    loss.start_stage()
    assert loss.state_dict() == {"sum_and_count": [0.0, 0.0]}


@pytest.mark.parametrize(
    "make, text",
    [
        (lambda: single.RobustLoss(0.5), "`label_smoothing` of RobustLoss is 0.5"),
        (lambda: single.EXOPairLoss(0.0), "`label_smoothing` of EXOPairLoss is 0.0, expected within .0, 0.5."),
        (lambda: single.DiscoPOPLoss(0.0), "`tau` of DiscoPOPLoss is 0.0"),
        (lambda: single.DPOPLoss(-1.0), "`penalty` of DPOPLoss is -1.0"),
        (lambda: SummedLogps(1.5), "`ld_alpha` of `model.logps` is 1.5"),
        (lambda: across.WeightedSum([single.SigmoidLoss()], []), "1 losses and 0 weights"),
        (lambda: across.check_loss(single.HingeLoss(), 0.1, SummedLogps()), "`model.label_smoothing` is 0.1 and"),
        (lambda: across.check_loss(across.AOTLoss(), 0.0, WPOLogps()), "AOTLoss, which sorts"),
        (lambda: across.check_loss(across.SimPOLoss(), 0.0, SummedLogps(0.5)), "SimPOLoss, a mean over whole answers"),
    ],
)
def test_what_is_refused(make, text):
    with pytest.raises(ConfigurationError, match=text):
        make()


# ---- logps of LD-DPO and WPO, in every layout


def _batch(layout):
    pairs = [
        TokenizedPair([1, 2, 3], [4, 5], [6, 7, 8, 9]),
        TokenizedPair([9, 8], [7, 6, 5, 4, 3], [2]),
        TokenizedPair([5], [6, 6], [7, 7]),
    ]
    batch = COLLATORS[layout](0, 1)([0, 1, 2], pairs, [1.0] * 3, 3)
    return pairs, batch


@pytest.mark.parametrize("layout", ["padded", "packed", "shared_prefix"])
def test_ld_alpha_and_weights_in_every_layout(layout, tiny_model_dir):
    backbone = load_policy(str(tiny_model_dir))
    pairs, batch = _batch(layout)
    found = SummedLogps(0.25)(backbone, batch)
    weighed = WPOLogps()(backbone, batch)
    for row, given in enumerate(pairs):
        sums, weights = [], 1.0
        for answer in (given.chosen_ids, given.rejected_ids):
            ids = torch.tensor([list(given.prompt_ids) + list(answer)])
            with torch.no_grad():
                logits = backbone.model(ids).logits[0, len(given.prompt_ids) - 1 : -1].float().log_softmax(-1)
            tokens = logits.gather(1, torch.tensor(answer)[:, None]).squeeze(1)
            shorter = min(len(given.chosen_ids), len(given.rejected_ids))
            sums.append(tokens[:shorter].sum() + 0.25 * tokens[shorter:].sum())
            weights *= (tokens - logits.exp().square().sum(1).log()).mean().exp()
        assert found.chosen[row].item() == pytest.approx(sums[0].item(), abs=2e-5)
        assert found.rejected[row].item() == pytest.approx(sums[1].item(), abs=2e-5)
        assert weighed.pair_weights[row].item() == pytest.approx(float(weights), rel=1e-4)
    assert not weighed.pair_weights.requires_grad and weighed.chosen.requires_grad


def _llama(tiny_model_dir):
    return AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)


def test_ld_alpha_is_trl_s():
    sides = Sides(RANDOM, 1.0)
    lengths = sides.lengths
    flat = sides.tokens[sides.real]
    owner = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    count = len(lengths) // 2
    batch = SimpleNamespace(
        sequence_index=owner, completion_lengths=lengths, num_pairs=count, weights=torch.ones(count)
    )
    policy = pair_logps(flat, batch, 0.3)
    _, reference = sides.ours()
    # TRL takes precomputed logps of the reference as they are.
    theirs = trl_loss(sides, ["sigmoid"], 0.5, ld_alpha=0.3)
    same(single.SigmoidLoss()(policy, reference, 0.5).mean(), theirs, sides)
    weights = alignment_weights(flat, sides.collisions[sides.real], batch)
    assert weights.shape == (4,) and not weights.requires_grad


# ---- a mixture's load-balancing loss


def _mixture(**more):
    return MixtralConfig(
        vocab_size=67, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=3, num_experts_per_tok=2, router_aux_loss_coef=0.5, **more,
    )  # fmt: skip


def test_a_mixture_s_loss_is_transformers_s():
    torch.manual_seed(0)
    model = MixtralForCausalLM(_mixture(output_router_logits=True)).train()
    backbone = CausalBackbone(model)
    backbone.router.set_coefficient(None)
    _, batch = _batch("padded")
    backbone(batch)
    ours = backbone.router.take()
    theirs = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, output_router_logits=True).aux_loss
    assert ours.item() == pytest.approx(0.5 * theirs.item(), rel=1e-5)
    gate = next(p for name, p in model.named_parameters() if "gate" in name and "experts" not in name)
    mine, other = (torch.autograd.grad(value, gate, retain_graph=True)[0] for value in (ours, 0.5 * theirs))
    torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-7)
    # Once, and none without gradients.
    assert backbone.router.take() == 0.0
    with torch.no_grad():
        backbone(batch)
    assert backbone.router.take() == 0.0


def test_a_mixture_adds_nothing_unasked():
    backbone = CausalBackbone(MixtralForCausalLM(_mixture()))
    backbone.router.set_coefficient(None)
    assert backbone.router.coefficient == 0.0
    backbone.router.set_coefficient(0.1)
    assert backbone.router.coefficient == 0.1


def test_a_dense_model_has_no_router(tiny_model_dir):
    with pytest.raises(ConfigurationError, match="no mixture of experts"):
        CausalBackbone(_llama(tiny_model_dir)).router.set_coefficient(0.1)


# ---- in a run


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    paths = {name: write_jsonl(folder / f"{name}.jsonl", make_rows(6, 0, name)) for name in ("a", "b")}
    return [PreferenceSource(name, str(path)) for name, path in paths.items()]


def test_a_run_with_a_memory_resumes_exactly(tmp_path, tiny_model_dir, sources):
    each = StageCheckpoint(every_n_train_steps=1, save_top_k=-1)
    fit(tmp_path / "run", tiny_model_dir, sources, callbacks=[each], module_args={"loss": across.BCOShiftedLoss()})
    fit(tmp_path / "plain", tiny_model_dir, sources, module_args={"loss": single.BCOPairLoss()})
    whole, plain = losses(tmp_path / "run"), losses(tmp_path / "plain")
    # 2 ln 2 at the first step of each stage: rewards are 0, and so is their mean. Then the shift tells.
    assert [whole[0], whole[3]] == pytest.approx([2 * math.log(2)] * 2, abs=1e-6)
    # The first step of a stage is one of no learning rate.
    assert whole[:2] == plain[:2] and whole[2] != plain[2]
    for step in (1, 2, 5):
        [path] = (tmp_path / "run" / "checkpoints").glob(f"*step={step}.ckpt")
        state = torch.load(path, weights_only=True)["loss_state"]
        assert state["sum_and_count"][1] == 4 * (step if step < 4 else step - 3)
        run = tmp_path / f"from-{step}"
        shutil.copytree(tmp_path / "run", run)
        fit(run, tiny_model_dir, sources, path, module_args={"loss": across.BCOShiftedLoss()})
        assert losses(run) == whole
        assert_same_weights(run / "stages" / "02-b", tmp_path / "run" / "stages" / "02-b")


def test_another_loss_is_refused_on_resume(tmp_path, tiny_model_dir, sources):
    args = {"loss": single.HingeLoss()}
    fit(tmp_path / "run", tiny_model_dir, sources, module_args=args, trainer_args={"max_steps": 2})
    checkpoint = tmp_path / "run" / "checkpoints" / "stopped-step=2.ckpt"
    with pytest.raises(ResumeError, match="model.loss: .*HingeLoss.* -> None"):
        fit(tmp_path / "run", tiny_model_dir, sources, checkpoint)
    with pytest.raises(ResumeError, match="model.logps: .*1.0.* -> .*0.5"):
        fit(tmp_path / "run", tiny_model_dir, sources, checkpoint, module_args=args | {"logps": SummedLogps(0.5)})


def test_by_command_line(tmp_path, tiny_model_dir, sources):
    names = "sdpo_lightning.objectives.SigmoidLoss", "sdpo_lightning.batch_objectives.SFTLoss"
    loss = {
        "class_path": "sdpo_lightning.batch_objectives.WeightedSum",
        "init_args": {"losses": [{"class_path": name} for name in names], "weights": [1.0, 0.5]},
    }
    content = {
        "trainer": {"accelerator": "cpu", "enable_progress_bar": False, "default_root_dir": str(tmp_path / "run")},
        "model": {"model_name_or_path": str(tiny_model_dir), "loss": loss},
        "data": {"sources": [{"name": s.name, "path": s.path} for s in sources], "order": "given", "batch_size": 2},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    main(["fit", "--config", str(path)])
    rows = losses(tmp_path / "run")
    # ln 2 of the first, and half of some nats per token of the second.
    assert rows[0] > math.log(2) + 0.5
    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert written["model"]["loss"]["init_args"]["weights"] == [1.0, 0.5]
