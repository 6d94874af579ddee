"""Rank 1: what `parity` compares: the settings that both sides can share, the figures, the verdict. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdpo_lightning.types import ConfigurationError

Config = Mapping[str, Any]

# Losses without settings that both sides have (docs/losses.md): class -> TRL's `loss_type`.
_LOSSES = {
    "SigmoidLoss": "sigmoid",
    "SigmoidNormLoss": "sigmoid_norm",
    "HingeLoss": "hinge",
    "IPOLoss": "ipo",
    "NCAPairLoss": "nca_pair",
    "BCOPairLoss": "bco_pair",
    "SPPOHardLoss": "sppo_hard",
    "APOZeroLoss": "apo_zero",
    "APODownLoss": "apo_down",
}
_REFERENCES = ("ResidentReference", "CachedReference")
_SCHEDULES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}
# Largest difference of a step's loss that counts as the same training.
_TOLERANCES = {"32-true": 1e-3, "bf16-mixed": 2e-2}

# What the comparison sets, so that both sides see the same pairs in the same steps and nothing else takes time.
SHARED: Mapping[str, Mapping[str, Any]] = {
    "trainer": {
        "devices": 1,
        "num_nodes": 1,
        "strategy": "auto",
        "logger": False,
        "callbacks": [
            {"class_path": "sdpo_lightning.StageExport", "init_args": {"keep_last": 1}},
            {"class_path": "sdpo_lightning.StageSamples", "init_args": {"prompts": []}},
            {"class_path": "sdpo_lightning.StageEvaluation", "init_args": {"pairs_per_source": 0}},
        ],
        "fast_dev_run": False,
        "max_epochs": -1,
        "max_steps": -1,
        "max_time": None,
        "limit_train_batches": None,
        "limit_val_batches": 0,
        "val_check_interval": None,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
        "profiler": None,
    },
    "model": {"disable_dropout": True},
    "data": {
        "partition": "by_source",
        "order": "given",
        "stages": None,
        "merge_ties": False,
        "shuffle": False,
        "epochs_per_stage": 1,
        "stage_settings": None,
        "batch_tokens": None,
        "bucket_window": 0,
        "val_fraction": 0.0,
    },
}


def shared_config(config: Config, precision: str, run_dir: Path) -> dict[str, Any]:
    """The config of our side.

    Args:
        config: parsed groups `trainer`, `model` and `data` of `fit`, as plain values.
        precision: of both sides.
        run_dir: of our side.

    Raises:
        ConfigurationError: a setting that TRL has nothing for, with its name.
    """
    groups = {group: {**config[group], **SHARED[group]} for group in ("trainer", "model", "data")}
    groups["trainer"] |= {"precision": precision, "default_root_dir": str(run_dir)}
    groups["data"]["sources"] = [{**source, "val_path": None} for source in config["data"]["sources"]]
    _refuse(config, precision)
    return {"seed_everything": config.get("seed_everything", 0), **groups}


def _refuse(config: Config, precision: str) -> None:
    model, trainer = config["model"], config["trainer"]
    neutral = {
        "model.lora": (model.get("lora"), (None,)),
        "model.quantization": (model.get("quantization"), (None,)),
        "model.logps": (_class(model.get("logps")), ("", "SummedLogps")),
        "model.reference": (_class(model.get("reference")), ("", *_REFERENCES)),
        "model.router_aux_loss": (model.get("router_aux_loss"), (None, 0, 0.0)),
        "model.policy_starts_at": (model.get("policy_starts_at"), ("previous",)),
        "model.label_smoothing": (model.get("label_smoothing"), (0.0,)),
        "trainer.gradient_clip_algorithm": (trainer.get("gradient_clip_algorithm"), (None, "norm")),
        "trainer.precision": (precision, tuple(_TOLERANCES)),
    }
    for key, (value, allowed) in neutral.items():
        if value not in allowed:
            expected = " or ".join(str(a or "none") for a in allowed)
            raise ConfigurationError(
                f"`parity` compares full fine-tuning with TRL's, and for `{key}` = {value!r} it has no counterpart; "
                f"expected {expected}: give `--{key}` for the comparison"
            )
    trl_loss(model.get("loss"))


def _class(value: Any) -> str:
    """Last part of a class path; nothing where there is none."""
    return str((value or {}).get("class_path", "")).rsplit(".", 1)[-1]


def trl_loss(loss: Config | None) -> str:
    """TRL's `loss_type` for `model.loss`.

    Raises:
        ConfigurationError: it has none, or the loss has settings.
    """
    name = _class(loss) or "SigmoidLoss"
    settings = {key: value for key, value in ((loss or {}).get("init_args") or {}).items() if value}
    if name not in _LOSSES or settings:
        raise ConfigurationError(
            f"`parity`: TRL has no counterpart of `model.loss` {name} with {settings}; expected one of "
            f"{sorted(_LOSSES)} without settings"
        )
    return _LOSSES[name]


def trl_settings(config: Config, cuda: bool) -> dict[str, Any]:
    """Settings of TRL's side: keys of `DPOConfig` but for the warm-up, and what `DPOTrainer` is given.

    Args:
        config: of our side.
        cuda: on a GPU.
    """
    trainer, model, data = config["trainer"], config["model"], config["data"]
    return {
        "model": model["model_name_or_path"],
        "tokenizer": data.get("tokenizer") or model["model_name_or_path"],
        "optimizer": model["optimizer"],
        "warmup_ratio": model["warmup_ratio"],
        "cuda": cuda,
        "config": {
            "per_device_train_batch_size": data["batch_size"],
            "gradient_accumulation_steps": trainer["accumulate_grad_batches"],
            "lr_scheduler_type": _SCHEDULES[model["lr_scheduler"]],
            "num_train_epochs": 1,
            "max_length": data["max_length"],
            "max_grad_norm": trainer.get("gradient_clip_val") or 0.0,
            "beta": model["beta"],
            "loss_type": [trl_loss(model.get("loss"))],
            "bf16": trainer["precision"] == "bf16-mixed",
            "fp16": False,
            "gradient_checkpointing": bool(model["gradient_checkpointing"]),
            "logging_steps": 1,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            "use_cpu": not cuda,
            "seed": config["seed_everything"] if isinstance(config["seed_everything"], int) else 0,
        },
    }


@dataclass(frozen=True)
class Side:
    """Figures of one side.

    Attributes:
        losses: stage -> loss of each step.
        grad_norms: stage -> norm of each step's gradient, before clipping.
        seconds: of the steps, and of a reference's pass over a chunk.
        pairs: that were trained on.
        peak: bytes; of the GPU, or of the process above what its imports take.
    """

    losses: Mapping[str, Sequence[float]]
    grad_norms: Mapping[str, Sequence[float]]
    seconds: float
    pairs: int
    peak: float

    @property
    def speed(self) -> float:
        """Pairs a second."""
        return self.pairs / self.seconds


def difference(left: Sequence[float], right: Sequence[float]) -> float:
    """Largest difference of two rows of numbers; infinite where one isn't finite or one row is longer."""
    if len(left) != len(right):
        return math.inf
    return max((abs(a - b) if math.isfinite(a - b) else math.inf for a, b in zip(left, right, strict=True)), default=0)


def relative(left: Sequence[float], right: Sequence[float]) -> float:
    """Largest difference of two rows of positive numbers, as a share of the right one."""
    return difference([a / b for a, b in zip(left, right, strict=True)], [1.0] * len(right))


def tolerance(precision: str, spread: float) -> float:
    """Largest difference of losses that passes: a fixed one, or three times what TRL differs from itself.

    Args:
        precision: of both sides.
        spread: between two runs of TRL.
    """
    return max(_TOLERANCES[precision], 3 * spread)


def compare(ours: Side, theirs: Side, again: Side | None, precision: str) -> dict[str, Any]:
    """Per stage and over all: differences, spread, speed, memory, and whether it is the same training.

    Args:
        ours: of this package.
        theirs: of TRL.
        again: of TRL once more; None where there was no time.
        precision: of both sides.
    """
    stages = []
    for name, losses in ours.losses.items():
        spread = None if again is None else difference(theirs.losses[name], again.losses[name])
        found, limit = difference(losses, theirs.losses[name]), tolerance(precision, spread or 0.0)
        stages.append(
            {
                "name": name,
                "steps": len(losses),
                "loss_first": [losses[0], theirs.losses[name][0]],
                "loss_last": [losses[-1], theirs.losses[name][-1]],
                "difference": found,
                "spread": spread,
                "tolerance": limit,
                "grad_norm_difference": relative(ours.grad_norms[name], theirs.grad_norms[name]),
                "same": found <= limit,
                "losses": [list(losses), list(theirs.losses[name])],
                "grad_norms": [list(ours.grad_norms[name]), list(theirs.grad_norms[name])],
            }
        )
    return {
        "same": all(stage["same"] for stage in stages),
        "stages": stages,
        "pairs": ours.pairs,
        "pairs_a_second": [ours.speed, theirs.speed],
        "peak_bytes": [ours.peak, theirs.peak],
    }


def table(found: Mapping[str, Any]) -> str:
    """The comparison in words, for a terminal."""
    lines = [
        f"{'stage':20} {'steps':>5} {'first loss (TRL)':>19} {'last loss (TRL)':>19} {'largest diff.':>13} "
        f"{'TRL to itself':>13} {'grad. norm':>10}"
    ]
    for stage in found["stages"]:
        spread = "not measured" if stage["spread"] is None else f"{stage['spread']:.1e}"
        first, last = (f"{a:.4f} ({b:.4f})" for a, b in (stage["loss_first"], stage["loss_last"]))
        lines.append(
            f"{stage['name']:20} {stage['steps']:5} {first:>19} {last:>19} {stage['difference']:13.1e} {spread:>13} "
            f"{stage['grad_norm_difference']:10.1e}"
        )
    (fast, slow), (low, high) = found["pairs_a_second"], found["peak_bytes"]
    lines.append(f"pairs a second: {fast:.2f}, TRL {slow:.2f} (x {fast / slow:.2f})")
    # Where the system doesn't say, they are 0.
    share = f" (x {low / high:.2f})" if min(low, high) > 0 else ", not measured"
    lines.append(f"peak memory: {low / 2**30:.2f} GiB, TRL {high / 2**30:.2f} GiB{share}")
    worst = max(found["stages"], key=lambda stage: stage["difference"])
    said = "the same training" if found["same"] else "NOT the same training"
    lines.append(f"{said}: losses differ by {worst['difference']:.1e} at most, {worst['tolerance']:.1e} is allowed")
    return "\n".join(lines)
