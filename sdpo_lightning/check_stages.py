"""Rank 6: what the verb `check` says of single stages: how each is judged, and by which loss it is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sdpo_lightning.data.findings import Finding
from sdpo_lightning.data.prepare import SourceReport
from sdpo_lightning.data.stage_settings import check_stage_keys, layers_of
from sdpo_lightning.data.staging import Staging
from sdpo_lightning.stage_judge import STOP, WEIGHTS, check_interval
from sdpo_lightning.stop_rule import HELD_OUT_LOSS, StopRule, check_judged, metric_names
from sdpo_lightning.types import ConfigurationError, Stage


def judged_lines(
    trainer: Mapping[str, Any], staging: Staging, stages: Sequence[Stage], reports: Sequence[SourceReport]
) -> list[Finding]:
    """How the validations of each stage decide, or why they can't.

    Args:
        trainer: parsed group, as plain values.
        staging: knows the groups and passes.
        stages: of the run.
        reports: of the sources, in their order.
    """
    given = _given(trainer)
    try:
        stop = None if given.get("stop") is None else StopRule(**given["stop"])
        choice = _monitor(given.get("stage_weights"))
        monitors = [] if stop is None else [(STOP, None if stop.patience is None else stop.monitor)]
        for where, monitor in [*monitors, *([] if choice is None else [(WEIGHTS, choice[0])])]:
            held_out = [report.name for report in reports if report.val_ids and trainer.get("limit_val_batches") != 0]
            check_judged(where, monitor, staging.judged_groups, held_out)
            check_interval(where, trainer.get("val_check_interval"), max(staging.epochs(staging.names())))
    except (ConfigurationError, TypeError) as error:
        return [Finding("error", " ".join(str(error).split()))]
    lines = []
    for stage in stages:
        named = f"stage {stage.index} {stage.name!r}"
        # Pairs that are made just before their stage are of no source.
        used = [index for index in sorted({i >> 40 for i in stage.pair_ids}) if index < len(reports)]
        own = [reports[index].name for index in used if reports[index].val_ids]
        if stop is not None:
            lines.append(Finding("info", f"{named}: ends before its plan where {stop.text(own)}"))
        if choice is not None:
            best = ("lowest " if choice[1] == "min" else "highest ") + " and ".join(metric_names(choice[0], own))
            lines.append(Finding("info", f"{named}: M_{stage.index} is its weights with the {best}"))
    return lines


def loss_lines(model: Mapping[str, Any], staging: Staging, stages: Sequence[Stage]) -> list[Finding]:
    """The loss of each stage, where `model.loss` is `StageLosses`.

    Args:
        model: parsed group, as plain values.
        staging: knows the names.
        stages: of the run.
    """
    given = model.get("loss")
    if not isinstance(given, Mapping) or not str(given.get("class_path", "")).endswith("StageLosses"):
        return []
    losses = (given.get("init_args") or {}).get("losses") or {}
    mergeable = staging.sources if staging.merge_ties else []
    try:
        check_stage_keys("model.loss.init_args.losses", list(losses), staging.names(), mergeable)
    except ConfigurationError as error:
        return [Finding("error", str(error))]
    lines = []
    for stage in stages:
        layers = layers_of(losses, stage.index, stage.name)
        name = layers[0]["class_path"].rpartition(".")[2] if layers else "SigmoidLoss"
        lines.append(Finding("info", f"stage {stage.index} {stage.name!r}: loss {name}"))
    return lines


def _given(trainer: Mapping[str, Any]) -> Mapping[str, Any]:
    """The arguments of the run's StageTransition, or of a subclass that takes the same."""
    callbacks = trainer.get("callbacks") or []
    for callback in callbacks if isinstance(callbacks, list) else [callbacks]:
        arguments = callback.get("init_args") or {} if isinstance(callback, Mapping) else {}
        if arguments.get("stop") is not None or arguments.get("stage_weights") is not None:
            return arguments
    return {}


def _monitor(weights: Any) -> tuple[str, str] | None:
    """Monitor and mode of `BestOfStage`; None of another class, which has its own."""
    if not isinstance(weights, Mapping) or not str(weights.get("class_path", "")).endswith("BestOfStage"):
        return None
    arguments = weights.get("init_args") or {}
    return arguments.get("monitor", HELD_OUT_LOSS), arguments.get("mode", "min")
