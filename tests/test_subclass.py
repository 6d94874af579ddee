"""What another project overrides, each in about 20 lines, through the command line (DESIGN: the hooks)."""

import json

import pytest
import torch
import torch.nn.functional as F
from helpers import make_rows
from runs import command_line, losses, metrics

from sdpo_lightning import (
    Chunk,
    CurriculumDataModule,
    DPOLitModule,
    PairLogps,
    ResidentReference,
    StageTransition,
)
from sdpo_lightning.cli import CurriculumCLI
from sdpo_lightning.reference import ReferencePolicy

pytestmark = pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")


class HingeModule(DPOLitModule):
    """Own loss."""

    def preference_loss(self, policy, reference):
        return F.relu(1 - self.beta * (policy.gamma - reference.gamma))


class LengthNormalised(DPOLitModule):
    """Own logps: per token, for policy, reference and ranking alike."""

    def compute_logps(self, model, batch):
        logps = super().compute_logps(model, batch)
        return PairLogps(
            logps.chosen / logps.chosen_lengths,
            logps.rejected / logps.rejected_lengths,
            logps.chosen_lengths,
            logps.rejected_lengths,
        )


class NoisyReference(ResidentReference):
    """Own reference: shifted, so it doesn't start at the policy."""

    starts_at_policy = False

    def logps(self, batch):
        logps = super().logps(batch)
        return PairLogps(logps.chosen - 1.0, logps.rejected, logps.chosen_lengths, logps.rejected_lengths)


class ZeroReference(ReferencePolicy):
    """Own reference from nothing: a reference-free loss."""

    starts_at_policy = False

    def advance(self, policy, stage, inputs):
        pass

    def restore(self, load_weights, stage, inputs):
        pass

    def logps(self, batch):
        zeros = torch.zeros(batch.num_pairs)
        lengths = batch.completion_lengths.chunk(2)
        return PairLogps(zeros, zeros, *lengths)


class ShortFirst(CurriculumDataModule):
    """Own difficulty: a pair is easy if its chosen answer is the shorter one."""

    def pair_scores(self, logps):
        return (logps.rejected_lengths - logps.chosen_lengths).float()


class TwoHalves(CurriculumDataModule):
    """Own partition: all pairs by score, cut into an easy and a hard half."""

    def partition(self, scores):
        self.source_order = list(scores)
        ids = [i for name in scores for i in self.reports[name].train_ids]
        order = torch.cat(list(scores.values())).argsort(descending=True).tolist()
        ranked = [ids[i] for i in order]
        return [Chunk("easy", ranked[: len(ranked) // 2]), Chunk("hard", ranked[len(ranked) // 2 :])]


class HoldsBack(StageTransition):
    """Own boundary: the reference stays M_0."""

    def should_advance(self, trainer, stage):
        return False


class OwnOptimizer(DPOLitModule):
    """Own optimizer and schedule, with the stage's length."""

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.policy.parameters(), lr=0.05)
        steps = self.stage.num_steps if self.stage else 1
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0, steps)}


@pytest.fixture
def arguments(tmp_path, tiny_model_dir):
    own = ["--model.optimizer.init_args.lr=1e-2", "--model.warmup_ratio=0", "--data.batch_size=4"]
    return ["fit", *command_line(tmp_path, tiny_model_dir, {"a": 8, "b": 8}), *own]


def first_losses(run_dir):
    first = {}
    for row in metrics(run_dir):
        first.setdefault(row["stage/index"], float(row["train/loss"]))
    return list(first.values())


def test_own_loss(arguments, tmp_path):
    CurriculumCLI(HingeModule, args=arguments)
    # Policy == reference, so every hinge is 1 - beta * 0.
    assert first_losses(tmp_path / "run") == pytest.approx([1.0, 1.0], abs=1e-6)


def test_own_logps_reach_policy_reference_and_ranking(arguments, tmp_path):
    CurriculumCLI(LengthNormalised, args=arguments)
    assert first_losses(tmp_path / "run") == pytest.approx([0.693147, 0.693147], abs=1e-5)
    sources = json.loads((tmp_path / "run" / "curriculum.json").read_text())["sources"]
    # Ranked by per-token logps: `sum_logps` then sees what `mean_logps` sees without the override,
    # and the metric of logps is per token: far above the sum over at least 2 tokens.
    assert all(source["reward_accuracy"] is not None for source in sources)
    normalised = float(metrics(tmp_path / "run")[0]["train/logps/chosen"])
    CurriculumCLI(args=[*arguments, f"--trainer.default_root_dir={tmp_path / 'plain'}"])
    summed = float(metrics(tmp_path / "plain")[0]["train/logps/chosen"])
    assert summed < 2 * normalised < 0


@pytest.mark.parametrize("reference, expected", [("NoisyReference", -1.0), ("ZeroReference", None)])
def test_own_reference(arguments, tmp_path, reference, expected):
    CurriculumCLI(args=[*arguments, f"--model.reference={__name__}.{reference}"])
    row = metrics(tmp_path / "run")[0]
    if expected is None:
        assert float(row["train/gamma_ref"]) == 0.0
    else:
        # gamma_ref = gamma - 1 at the first step.
        assert float(row["train/gamma_ref"]) - float(row["train/gamma"]) == pytest.approx(expected, abs=1e-4)


def test_own_difficulty(arguments, tmp_path):
    CurriculumCLI(datamodule_class=ShortFirst, args=arguments)
    curriculum = json.loads((tmp_path / "run" / "curriculum.json").read_text())
    for source, seed in (("a", 0), ("b", 1)):
        rows = make_rows(8, seed, source)
        differences = [len(row["rejected"].split()) - len(row["chosen"].split()) for row in rows]
        accuracy = sum(1.0 if d > 0 else 0.5 if d == 0 else 0.0 for d in differences) / 8
        [found] = [row for row in curriculum["sources"] if row["name"] == source]
        assert found["reward_accuracy"] == pytest.approx(accuracy)


def test_own_partition(arguments, tmp_path):
    cli = CurriculumCLI(datamodule_class=TwoHalves, args=arguments)
    assert sorted(path.name for path in (tmp_path / "run" / "stages").iterdir()) == ["01-easy", "02-hard"]
    easy, hard = cli.datamodule.stages()
    m0 = cli.model.m0_logps
    gammas = [m0.lookup(torch.tensor(stage.pair_ids))[0].gamma for stage in (easy, hard)]
    assert gammas[0].min() >= gammas[1].max()


def test_own_boundary(arguments, tmp_path):
    CurriculumCLI(args=[*arguments, f"--trainer.callbacks+={__name__}.HoldsBack"])
    first = first_losses(tmp_path / "run")
    assert first[0] == pytest.approx(0.693147, abs=1e-6)
    # The policy has moved away from M_0 by the start of stage 2.
    assert abs(first[1] - 0.693147) > 1e-3


def test_own_optimizer(arguments, tmp_path):
    CurriculumCLI(OwnOptimizer, args=arguments)
    assert [float(row["train/lr"]) for row in metrics(tmp_path / "run")] == [0.05] * 4
    assert len(losses(tmp_path / "run")) == 4


def test_optimizer_class_path_of_bitsandbytes(arguments, tmp_path):
    pytest.importorskip("bitsandbytes")
    words = ["--model.optimizer=bitsandbytes.optim.AdamW8bit", "--model.optimizer.init_args.lr=1e-2"]
    cli = CurriculumCLI(args=[*arguments, *words])
    assert type(cli.trainer.optimizers[0]).__module__.startswith("bitsandbytes")
    assert losses(tmp_path / "run")[1] != losses(tmp_path / "run")[0]
