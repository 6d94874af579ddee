"""Rank 1: when a stage ends before its plan does, judged after each validation. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from sdpo_lightning.types import ConfigurationError

Mode = Literal["min", "max"]

# Stands for the sources of the stage under way.
SOURCE = "{source}"
HELD_OUT_LOSS = f"val/{SOURCE}/loss"


@dataclass(frozen=True)
class StopRule:
    """Ends a stage where its validations say so; each stage is judged anew.

    Attributes:
        monitor: name of a logged metric. With `{source}` in it, the mean over the sources that the stage trains on,
            weighted by their held-out pairs.
        mode: `min` if lower is better, `max` if higher is.
        patience: validations in a row without an improvement that end the stage; None leaves `monitor` out.
        min_delta: by how much more a value must be better than the best one of the stage to be an improvement.
        max_kl: the stage ends where the distance from its reference on held-out completions is above this, in nats a
            completion; see `held_out_kl` in `stage_judge.py`. None is no bound.

    Raises:
        ConfigurationError: a number outside its range, or a rule that could never end a stage.
    """

    monitor: str = HELD_OUT_LOSS
    mode: Mode = "min"
    patience: int | None = None
    min_delta: float = 0.0
    max_kl: float | None = None

    def __post_init__(self) -> None:
        where = "`stop` of StageTransition"
        if self.patience is None and self.max_kl is None:
            raise ConfigurationError(f"{where} has neither `patience` nor `max_kl`: it ends no stage; set one")
        if self.patience is not None and self.patience < 1:
            raise ConfigurationError(f"{where}: `patience` is {self.patience}, expected at least 1")
        if not (math.isfinite(self.min_delta) and self.min_delta >= 0):
            raise ConfigurationError(f"{where}: `min_delta` is {self.min_delta}, expected 0 or more")
        if self.max_kl is not None and not self.max_kl > 0:
            raise ConfigurationError(f"{where}: `max_kl` is {self.max_kl}, expected above 0")
        check_mode(where, self.mode)

    def settings(self) -> dict[str, Any]:
        """Plain values that a resumed run must agree on."""
        return asdict(self)

    def text(self, sources: Sequence[str]) -> str:
        """What it says of a stage, in words.

        Args:
            sources: of the stage.
        """
        parts = []
        if self.patience is not None:
            better = f" by more than {self.min_delta:g}" if self.min_delta else ""
            names = " and ".join(metric_names(self.monitor, sources))
            parts.append(f"{names} is no better{better} in {self.patience} validations ({self.mode})")
        if self.max_kl is not None:
            parts.append(f"KL to the reference on held-out completions is above {self.max_kl:g}")
        return " or ".join(parts)


@dataclass(frozen=True)
class StopState:
    """What a rule remembers of the stage under way.

    Attributes:
        best: value; None before the first one.
        waited: validations since then.
    """

    best: float | None = None
    waited: int = 0


def check_mode(where: str, mode: str) -> None:
    """Refuse another mode than `min` and `max`.

    Raises:
        ConfigurationError: naming the setting.
    """
    if mode not in ("min", "max"):
        raise ConfigurationError(f"{where}: `mode` is {mode!r}, expected 'min' or 'max'")


def is_better(value: float, best: float | None, mode: Mode, min_delta: float = 0.0) -> bool:
    """Whether a value improves on the best one by more than `min_delta`; one that isn't finite never does."""
    if not math.isfinite(value):
        return False
    if best is None:
        return True
    return value < best - min_delta if mode == "min" else value > best + min_delta


def judge(rule: StopRule, state: StopState, value: float | None, kl: float | None) -> tuple[StopState, str]:
    """Judge one validation.

    Args:
        rule: what counts.
        state: of the validations of the stage before it.
        value: of `rule.monitor`; None where there is no `patience`.
        kl: on held-out completions; None where there is no `max_kl`.

    Returns:
        The state after it, and why the stage ends; "" if it goes on.
    """
    if rule.patience is not None and value is not None:
        better = is_better(value, state.best, rule.mode, rule.min_delta)
        state = StopState(value, 0) if better else StopState(state.best, state.waited + 1)
    # Not "kl > bound": a KL that isn't a number is no reason to go on.
    if rule.max_kl is not None and kl is not None and not kl <= rule.max_kl:
        return state, f"KL {kl:.4g} on held-out completions is above {rule.max_kl:g}"
    if rule.patience is not None and state.waited >= rule.patience:
        best = "no finite value" if state.best is None else f"{state.best:.6g}"
        return state, f"{rule.monitor} is no better than {best} in {state.waited} validations"
    return state, ""


def metric_names(monitor: str, sources: Sequence[str]) -> list[str]:
    """Names of the metrics that a monitor stands for in a stage.

    Args:
        monitor: perhaps with `{source}`.
        sources: of the stage.
    """
    return [monitor.replace(SOURCE, name) for name in sources] if SOURCE in monitor else [monitor]


def monitored(
    monitor: str, sources: Mapping[str, int], metrics: Mapping[str, float], where: str
) -> float:
    """The value of a monitor after a validation.

    Args:
        monitor: perhaps with `{source}`.
        sources: of the stage that have held-out pairs -> how many.
        metrics: name -> logged value.
        where: names the setting.

    Raises:
        ConfigurationError: it was never logged.
    """
    names = metric_names(monitor, list(sources))
    missing = [name for name in names if name not in metrics]
    if missing or not names:
        what = ", ".join(missing) or f"held-out pairs of the stage's sources for {monitor}"
        raise ConfigurationError(
            f"{where}: there is no {what} after a validation; logged are {sorted(metrics)}. Set `monitor` to one of "
            "them, or log it in `validation_step`"
        )
    if SOURCE not in monitor:
        return metrics[monitor]
    return sum(count * metrics[name] for name, count in zip(names, sources.values(), strict=True)) / sum(
        sources.values()
    )


def check_judged(
    where: str,
    monitor: str | None,
    groups: Sequence[Sequence[str]],
    held_out: Sequence[str],
) -> None:
    """Refuse, before anything is loaded, what no validation will say.

    Args:
        where: names the setting.
        monitor: perhaps with `{source}`; None if none is needed.
        groups: names of sources that train together.
        held_out: sources with held-out pairs.

    Raises:
        ConfigurationError: with what to set.
    """
    if not held_out:
        raise ConfigurationError(
            f"{where} is judged after validations, and there are none: set `data.val_fraction`, or `val_path` of "
            "`data.sources`, and leave `trainer.limit_val_batches` above 0"
        )
    if monitor is not None and SOURCE in monitor:
        for group in groups:
            if not set(group) & set(held_out):
                raise ConfigurationError(
                    f"{where}: `monitor` {monitor!r} needs held-out pairs of stage {'+'.join(group)!r}, which has "
                    "none; set `data.val_fraction`, or `val_path` of its sources, or a `monitor` without {source} (of "
                    "made pairs none are held out)"
                )
