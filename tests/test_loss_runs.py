"""LD-DPO, WPO and a router's loss on real models in all layouts; losses by class_path through the command line."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from runs import assert_same_weights, fit, losses, made_sources, reproducible
from test_layouts import make, make_pairs
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from sdpo_lightning import StageCheckpoint, StageSettings
from sdpo_lightning.batch_objectives import BCOShiftedLoss, SimPOLoss
from sdpo_lightning.cli import main
from sdpo_lightning.completion_logps import SummedLogps, WPOLogps
from sdpo_lightning.data.collate import PackedCollator, PaddedCollator, SharedPrefixCollator
from sdpo_lightning.objectives import HingeLoss, SigmoidLoss
from sdpo_lightning.router import RouterLoss
from sdpo_lightning.types import ConfigurationError, ResumeError

pytestmark = pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")
LAYOUTS = [SharedPrefixCollator, PackedCollator, PaddedCollator]


def token_table(backbone, pairs):
    """Per sequence, chosen ones first: log p of its completion tokens and log sum_v p_v^2, from the full logits."""
    found = []
    for side in ("chosen_ids", "rejected_ids"):
        for pair in pairs:
            ids = torch.tensor([pair.prompt_ids + getattr(pair, side)])
            logits = backbone.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, :-1]
            p = logits.log_softmax(1)[len(pair.prompt_ids) - 1 :]
            targets = ids[0, len(pair.prompt_ids) :]
            found.append((p[range(len(targets)), targets], (p.exp() ** 2).sum(1).log()))
    return found


@pytest.mark.parametrize("name", ["llama", "granite", "cohere"])
@pytest.mark.parametrize("collator", LAYOUTS)
def test_ld_alpha(name, collator):
    backbone, pairs = make(name), make_pairs()
    table = token_table(backbone, pairs)
    expected = []
    for number, (tokens, _) in enumerate(table):
        shorter = min(len(tokens), len(table[(number + 4) % 8][0]))
        expected.append(tokens[:shorter].sum() + 0.25 * tokens[shorter:].sum())
    batch = collator(0)(range(4), pairs, [1.0] * 4, 4)
    found = SummedLogps(0.25)(backbone, batch)
    assert any(len(p.chosen_ids) != len(p.rejected_ids) for p in pairs)
    torch.testing.assert_close(torch.cat([found.chosen, found.rejected]), torch.stack(expected), rtol=1e-5, atol=1e-4)
    assert found.chosen_lengths.tolist() == [len(p.chosen_ids) for p in pairs]


@pytest.mark.parametrize("budget", [256.0, 96 * 4 * 5 / 2**20])
@pytest.mark.parametrize("name", ["llama", "granite"])
@pytest.mark.parametrize("collator", LAYOUTS)
def test_wpo(name, collator, budget):
    backbone, pairs = make(name), make_pairs()
    backbone.logits_budget_mb = budget
    table = token_table(backbone, pairs)
    weights = [(tokens - collisions).mean().exp() for tokens, collisions in table]
    # WPO's Eq. 1: the product over both answers.
    expected = torch.stack([weights[i] * weights[i + 4] for i in range(4)]).detach()
    batch = collator(0)(range(4), pairs, [1.0] * 4, 4)
    policy, plain = WPOLogps()(backbone, batch), SummedLogps()(backbone, batch)
    assert not policy.pair_weights.requires_grad
    torch.testing.assert_close(policy.pair_weights, expected, rtol=1e-4, atol=1e-6)
    loss = SigmoidLoss()
    torch.testing.assert_close(
        loss(policy, plain.detach(), 0.1), loss(plain, plain.detach(), 0.1) * expected, rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("collator", LAYOUTS)
def test_router_loss_as_transformers(collator):
    backbone, pairs = make("mixtral").train(), make_pairs()
    padded = PaddedCollator(0)(range(4), pairs, [1.0] * 4, 4)
    mask = padded.attention_mask.clone()
    given = {"input_ids": padded.input_ids, "attention_mask": mask, "output_router_logits": True}
    outputs = backbone.model(**given)
    expected = outputs.aux_loss
    if collator is SharedPrefixCollator:
        # A shared prompt runs, and counts, once.
        for number, pair in enumerate(pairs):
            mask[4 + number, : len(pair.prompt_ids)] = 0
        expected = load_balancing_loss_func(outputs.router_logits, 4, 2, mask)
    # Padding at the end of a packed row isn't counted either.
    batch = collator(0, pad_to_multiple_of=64)(range(4), pairs, [1.0] * 4, 4)
    backbone.router.set_coefficient(0.5)
    backbone(batch)
    found = backbone.router.take()
    torch.testing.assert_close(found, 0.5 * expected, rtol=1e-5, atol=1e-6)
    gate = next(p for n, p in backbone.named_parameters() if "gate." in n)
    ours, theirs = (torch.autograd.grad(loss, gate)[0] for loss in (found, 0.5 * expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert backbone.router.take() == 0.0
    with torch.no_grad():
        backbone(batch)
    assert backbone.router.take() == 0.0


def test_router_coefficient():
    dense, mixture = RouterLoss({}), RouterLoss({"output_router_logits": False, "router_aux_loss_coef": 0.02})
    dense.set_coefficient(None)
    mixture.set_coefficient(None)
    assert (dense.coefficient, mixture.coefficient) == (0.0, 0.02)
    mixture.set_coefficient(0.0)
    assert mixture.coefficient == 0.0
    with pytest.raises(ConfigurationError, match="no mixture of experts"):
        dense.set_coefficient(0.1)


# ---- runs


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return made_sources(tmp_path_factory.mktemp("sources"), {"a": 6, "b": 5})


def test_bco_resumes_bit_for_bit(tmp_path, tiny_model_dir, sources):
    def run(run_dir, ckpt_path=None):
        every = StageCheckpoint(every_n_train_steps=1, save_top_k=-1)
        module_args = {"loss": BCOShiftedLoss(), "beta": 0.5}
        return fit(run_dir, tiny_model_dir, sources, ckpt_path, callbacks=[every], module_args=module_args)

    whole = tmp_path / "whole"
    run(whole)
    checkpoints = sorted((whole / "checkpoints").glob("*.ckpt"))
    states = [torch.load(path, weights_only=True) for path in checkpoints]
    counts = [state["loss_state"]["sum_and_count"][1] for state in states]
    # Two answers a pair, six and five pairs, two a step; the count begins again with stage 2.
    assert sorted(counts) == [4.0, 4.0, 8.0, 8.0, 10.0, 12.0]
    for checkpoint, state in zip(checkpoints, states, strict=True):
        resumed = tmp_path / checkpoint.stem
        shutil.copytree(whole, resumed, ignore=shutil.ignore_patterns("checkpoints"))
        folders = sorted(path.name for path in (whole / "stages").glob("0*"))
        for folder in folders[state["stage_record"]["entered"] - 1 :]:
            shutil.rmtree(resumed / "stages" / folder)
        run(resumed, checkpoint)
        for folder in folders:
            assert_same_weights(whole / "stages" / folder, resumed / "stages" / folder)
        assert reproducible(resumed) == reproducible(whole), checkpoint.name


def test_a_changed_loss_is_refused_on_resume(tmp_path, tiny_model_dir, sources):
    trainer, _ = fit(tmp_path / "run", tiny_model_dir, sources, module_args={"loss": HingeLoss()})
    checkpoint = trainer.checkpoint_callback.best_model_path or trainer.checkpoint_callback.last_model_path
    for loss in (None, SimPOLoss(), SigmoidLoss(0.1)):
        with pytest.raises(ResumeError, match="model.loss"):
            fit(tmp_path / "run", tiny_model_dir, sources, checkpoint, module_args={"loss": loss})
    with pytest.raises(ResumeError, match="model.logps"):
        changed = {"loss": HingeLoss(), "logps": SummedLogps(0.5)}
        fit(tmp_path / "run", tiny_model_dir, sources, checkpoint, module_args=changed)


def test_label_smoothing_of_a_stage_needs_the_default_loss(tmp_path, tiny_model_dir, sources):
    own = {"2": StageSettings(label_smoothing=0.1)}
    with pytest.raises(ConfigurationError, match="`model.loss` is HingeLoss"):
        fit(tmp_path, tiny_model_dir, sources, module_args={"loss": HingeLoss()}, stage_settings=own)


PAIRS = "sdpo_lightning.objectives."
OVER = "sdpo_lightning.batch_objectives."
RPO = {
    "class_path": OVER + "WeightedSum",
    "init_args": {
        "losses": [
            {"class_path": PAIRS + "SigmoidLoss", "init_args": {"label_smoothing": 0.1}},
            {"class_path": OVER + "SFTLoss"},
        ],
        "weights": [1.0, 0.5],
    },
}
DIVERGENT = {
    "class_path": PAIRS + "SigmoidLoss",
    "init_args": {"divergence": {"class_path": "sdpo_lightning.divergences.JensenShannon"}},
}
WPO = {"class_path": "sdpo_lightning.completion_logps.WPOLogps", "init_args": {"ld_alpha": 0.5}}


@pytest.mark.parametrize(
    ("extra", "first"),
    [
        # Policy and reference agree at first: ln 2, and by the SFT term more.
        ({"loss": RPO}, None),
        ({"loss": DIVERGENT}, 0.6931472),
        ({"loss": {"class_path": PAIRS + "APOZeroLoss"}}, 1.0),
        ({"logps": WPO}, None),
    ],
    ids=["rpo", "js", "apo", "wpo"],
)
def test_command_line(tmp_path, tiny_model_dir, sources, extra, first):
    run = tmp_path / "run"
    main(
        [
            "fit",
            f"--trainer.default_root_dir={run}",
            "--trainer.accelerator=cpu",
            "--trainer.enable_progress_bar=false",
            f"--model.model_name_or_path={tiny_model_dir}",
            f"--data.sources={json.dumps([{'name': s.name, 'path': s.path} for s in sources])}",
            "--data.order=given",
            "--data.max_length=64",
            *(f"--model.{key}={json.dumps(value)}" for key, value in extra.items()),
        ]
    )
    found = losses(run)
    assert len(found) >= 2
    assert len(list((run / "stages").glob("0*"))) == 2
    if first is not None:
        assert found[0] == pytest.approx(first, abs=1e-5)
    elif "loss" in extra:
        assert found[0] > 0.6931472
    else:
        # Weights below 1 shrink ln 2.
        assert 0 < found[0] != pytest.approx(0.6931472, abs=1e-4)
