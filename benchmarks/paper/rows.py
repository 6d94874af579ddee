"""The rows of the comparison: what each changes against stepwise DPO."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch.optim.lr_scheduler import LambdaLR

from sdpo_lightning import DPOLitModule, ReferencePolicy, ResidentReference
from sdpo_lightning.data.partitions import DropHardest, Replay
from sdpo_lightning.external_reference import ExternalReference
from sdpo_lightning.fixed_reference import FixedReference
from sdpo_lightning.schedules import learning_rate_factor, warmup_steps
from sdpo_lightning.updating_reference import UpdatingReference

BETAS, LEARNING_RATES = (0.03, 0.1, 0.3, 1.0), (5e-5, 1e-4, 2e-4)


@dataclass(frozen=True)
class Settings:
    """What all rows have in common.

    Attributes:
        beta: of the loss.
        lr: of AdamW.
        epochs: passes over each chunk.
        batch_size: pairs a step.
        pairs: of each source, in training.
        held_out: test pairs of each source.
        sft_steps: of S.
        hidden: width of the model.
        per_prompt: sampled answers to each prompt.
        prompts: of test and of validation, at most.
    """

    beta: float = 0.1
    lr: float = 1e-4
    epochs: int = 2
    batch_size: int = 32
    pairs: Mapping[str, int] = field(default_factory=lambda: {"feedback": 1600, "orca": 320})
    held_out: int = 200
    sft_steps: int = 400
    hidden: int = 64
    per_prompt: int = 8
    prompts: int = 128

    @property
    def stages(self) -> int:
        """T: a stage a source."""
        return len(self.pairs)

    @property
    def steps(self) -> int:
        """Optimizer steps of a run by source."""
        return self.epochs * sum(-(-count // self.batch_size) for count in self.pairs.values())


@dataclass(frozen=True)
class Inputs:
    """Folders of one seed's models: S, and one that was aligned on other pairs."""

    sft: Path
    external: Path


class Miniature(DPOLitModule):
    """Leaves Lightning's own logging out: it takes longer than the step, and `metrics.csv` doesn't need it."""

    def log(self, *args: Any, **options: Any) -> None:
        """Nothing."""

    def log_dict(self, *args: Any, **options: Any) -> None:
        """Nothing."""


class OneOptimizer(Miniature):
    """Optimizer and schedule go through all stages: one warm-up, one decay, moments that are kept."""

    _made: dict[str, Any] | None = None

    def configure_optimizers(self) -> dict[str, Any]:
        """The same ones at each boundary."""
        if self._made is None:
            optimizer = self.make_optimizer(self.trainable())
            schedule = LambdaLR(optimizer, self._factor)
            self._made = {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
        return self._made

    def _factor(self, step: int) -> float:
        data = self.trainer.datamodule
        # Asked for step 0 before there is a plan.
        steps = sum(stage.num_steps for stage in data.stages()) if data.is_ranked else 10**6
        return learning_rate_factor("linear", step, steps, warmup_steps(steps, self.run_values["warmup_ratio"]))


def _moving(settings: Settings, inputs: Inputs) -> ReferencePolicy:
    return ResidentReference()


def _fixed(settings: Settings, inputs: Inputs) -> ReferencePolicy:
    return FixedReference()


def _external(settings: Settings, inputs: Inputs) -> ReferencePolicy:
    return ExternalReference(str(inputs.external))


def _following(settings: Settings, inputs: Inputs) -> ReferencePolicy:
    return UpdatingReference(every_n_steps=max(1, settings.steps // 4), mix=0.6)


@dataclass(frozen=True)
class Row:
    """One training.

    Attributes:
        title: in the table.
        partition: `data.partition`.
        order: `data.order`.
        reference: maker of `model.reference`.
        module: class of the module.
        policy_starts_at: `model.policy_starts_at`.
        beta: of the loss; None is the settings' own.
        lr: of AdamW; None is the settings' own.
        epochs: passes over each chunk; None is the settings' own.
    """

    title: str
    partition: Any = "by_source"
    order: str = "easy_to_hard"
    reference: Callable[[Settings, Inputs], ReferencePolicy] = _moving
    module: type[DPOLitModule] = Miniature
    policy_starts_at: str = "previous"
    beta: float | None = None
    lr: float | None = None
    epochs: int | None = None

    def settings(self, common: Settings) -> dict[str, Any]:
        """Plain values that a kept result must agree on."""
        return {
            "partition": repr(self.partition),
            "order": self.order,
            "reference": self.reference.__name__,
            "module": self.module.__name__,
            "policy_starts_at": self.policy_starts_at,
            "beta": self.beta or common.beta,
            "lr": self.lr or common.lr,
            "epochs": self.epochs or common.epochs,
        }


def grid_name(beta: float, lr: float, settings: Settings) -> str:
    """Name of one point of the grid of plain DPO; the row `dpo` is one of them."""
    return "dpo" if (beta, lr) == (settings.beta, settings.lr) else f"dpo beta={beta:g} lr={lr:g}"


def make_rows(settings: Settings) -> dict[str, Row]:
    """Name -> row, without S and without the best of the grid, which train nothing of their own."""
    rows = {
        "dpo": Row("DPO on all (pooled)", "pooled"),
        "dpo_beta_t": Row("DPO, beta / T", "pooled", beta=settings.beta / settings.stages),
        "order_only": Row("order alone: reference S, no restarts", reference=_fixed, module=OneOptimizer),
        "fixed": Row("same stages, order, restarts; reference S", reference=_fixed),
        "sdpo": Row("sDPO"),
        "no_restarts": Row("sDPO without restarts", module=OneOptimizer),
        "drop_hardest": Row("sDPO, `drop_hardest` 0.2", DropHardest(0.2)),
        "replay": Row("sDPO, `replay` 0.1", Replay(0.1)),
        "random": Row("sDPO random", "random"),
        "reversed": Row("sDPO reversed", order="reversed"),
        "target_s": Row("sDPO, target = S", policy_starts_at="sft"),
        "external": Row("DPO, external aligned reference", "pooled", reference=_external),
        "tr_dpo": Row("TR-DPO (soft, 0.6, 4 times)", "pooled", reference=_following),
    }
    return rows | line(settings) | sdpo_grid(settings) | grid(settings)


def line(settings: Settings) -> dict[str, Row]:
    """Plain DPO at one learning rate from much to little restraint: what it reaches at each KL."""
    long = Row("DPO, half again as many steps", "pooled", epochs=settings.epochs + settings.epochs // 2)
    return grid(settings, [settings.lr]) | {"dpo long": long}


def sdpo_grid(settings: Settings) -> dict[str, Row]:
    """sDPO with every beta and every learning rate of the grid, but for the row `sdpo` itself."""
    found = {}
    for beta in BETAS:
        for lr in (settings.lr, *(rate for rate in LEARNING_RATES if rate != settings.lr)):
            if (beta, lr) == (settings.beta, settings.lr):
                continue
            name = f"sdpo beta={beta:g}" + ("" if lr == settings.lr else f" lr={lr:g}")
            found[name] = Row(f"sDPO, beta {beta:g}, lr {lr:g}", beta=beta, lr=lr)
    return found


def grid(settings: Settings, rates: Sequence[float] = LEARNING_RATES) -> dict[str, Row]:
    """Plain DPO with every beta and these learning rates."""
    return {
        grid_name(beta, lr, settings): Row(f"DPO, beta {beta:g}, lr {lr:g}", "pooled", beta=beta, lr=lr)
        for beta in BETAS
        for lr in rates
        if (beta, lr) != (settings.beta, settings.lr)
    }
