"""Runs of two ranks that `torchrun` has started: `stop_script.py OUT MODEL`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch.distributed as dist
from runs import adamw, fit

from sdpo_lightning import BestOfStage, DPOLitModule, PreferenceSource, StageTransition, StopRule


class LogsItsOwn(DPOLitModule):
    """Logs |step - 2|, and on the second rank another number, which isn't brought together."""

    def on_validation_epoch_end(self):
        super().on_validation_epoch_end()
        step = self.trainer.global_step
        self.log("mine", float(abs(step - 2) if self.trainer.global_rank == 0 else -step), sync_dist=False)


def scenarios() -> dict:
    """Name -> strategy of two ranks, and the StageTransition."""
    return {
        "own": ("ddp", lambda: StageTransition(StopRule(monitor="mine", patience=1), BestOfStage("mine"))),
        "kl": ("ddp", lambda: StageTransition(StopRule(max_kl=0.05))),
        "kl-sharded": ("fsdp2", lambda: StageTransition(StopRule(max_kl=0.05))),
    }


def sources(out: Path) -> list[PreferenceSource]:
    """Two files of an even number of pairs, so that two ranks see what one process does."""
    return [PreferenceSource(n, str(out / f"{n}.jsonl"), val_path=str(out / f"{n}-val.jsonl")) for n in "ab"]


def start(run_dir: Path, model: str, listed: list[PreferenceSource], make, batch_size: int, **trainer_args) -> None:
    """A validation after each step."""
    fit(
        run_dir, model, listed, callbacks=[make()], module_class=LogsItsOwn, batch_size=batch_size,
        module_args={"optimizer": adamw(1e-2), "lr_scheduler": "constant", "warmup_ratio": 0.0},
        trainer_args={"val_check_interval": 1} | trainer_args, on_val_overlap="warn",
    )


if __name__ == "__main__":
    out, model = Path(sys.argv[1]), sys.argv[2]
    for name, (strategy, make) in scenarios().items():
        start(out / name, model, sources(out), make, 1, devices=2, strategy=strategy)
    dist.destroy_process_group()
