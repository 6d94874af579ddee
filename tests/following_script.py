"""Sharded runs with references that follow, for ranks of `torchrun`: `following_script.py OUT MODEL RUN...`.

Each leaves its run in OUT/<run>, and `facts.json` there. A run `<scenario>-<ranks>` goes from start to end, and
`<scenario>-<ranks>-from-<others>` goes on from the middle of stage 2 of such a run.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from runs import fit, run_as_rank
from torch.distributed.tensor import DTensor

from sdpo_lightning import (
    BackgroundWrites,
    FSDP2Strategy,
    KLBoundReference,
    LoraSettings,
    PreferenceSource,
    StageCheckpoint,
    UpdatingReference,
)

LORA = {"lora": LoraSettings(r=4)}
# By AdamW's own epsilon a gradient that is rounding alone makes a step of full length, which no two orders of summation
# share.
STEADY = {
    "lr_scheduler": "constant",
    "warmup_ratio": 0.0,
    "optimizer": lambda params: torch.optim.AdamW(params, lr=1e-3, eps=1e-5),
}
# Within stage 2, whose reference has moved by then.
MIDDLE = "epoch=1-step=8.ckpt"


class Bound(KLBoundReference):
    """Keeps behind which steps of their stage it has moved."""

    def __init__(self, max_kl: float) -> None:
        super().__init__(max_kl)
        self.moves: list[bool] = []

    def follow(self, policy, step):
        self.moves.append(super().follow(policy, step))
        return self.moves[-1]


class Late(BackgroundWrites):
    """Writes once the next step has been taken."""

    def begin(self, write):
        def later():
            time.sleep(0.4)
            write()

        super().begin(later)


def scenarios() -> dict:
    """Name -> what makes the reference, settings of the module, how checkpoints are written."""
    return {
        "soft": (lambda: UpdatingReference(1, 0.3), {}, lambda: None),
        "hard": (lambda: UpdatingReference(2), {}, lambda: None),
        "bound": (lambda: Bound(0.02), {}, lambda: None),
        "late": (lambda: UpdatingReference(1, 0.3, offload=True), {}, Late),
        "replicas": (lambda: UpdatingReference(1, 0.3), {}, lambda: None),
        "adapter": (lambda: UpdatingReference(2), LORA, lambda: None),
        "adapter-bound": (lambda: Bound(1e-5), LORA, lambda: None),
    }


def sources(out: Path) -> list[PreferenceSource]:
    """Two files of ten pairs: by two, five steps a stage."""
    return [PreferenceSource(name, str(out / f"{name}.jsonl")) for name in "ab"]


def start(out: Path, model: str, name: str, ranks: int, **trainer_args):
    """The run `name` on so many ranks; returns its module."""
    scenario, _, origin = name.partition("-from-")
    scenario, run = scenario.rpartition("-")[0], out / name
    make, module_args, writes = scenarios()[scenario]
    ckpt_path = None
    if origin:
        before = out / f"{scenario}-{origin}"
        ckpt_path = before / "checkpoints" / MIDDLE
        if int(os.environ["RANK"]) == 0:
            # As the interrupted run had left it.
            shutil.copytree(before / "stages" / "01-a", run / "stages" / "01-a")
    saves = StageCheckpoint(every_n_train_steps=4, save_top_k=-1, writes=writes())
    return fit(
        run, model, sources(out), ckpt_path, make(), [saves], module_args=STEADY | module_args,
        trainer_args=trainer_args, batch_size=2 // ranks,
    )[1]  # fmt: skip


def facts(module) -> dict:
    """What only a rank inside can see: all weights of the reference are shards; where it moved, on each rank."""
    reference = module.reference
    moves = reference.moves if isinstance(reference, Bound) else []
    told = [moves] * dist.get_world_size()
    dist.all_gather_object(told, moves)
    return {"sharded": all(isinstance(t, DTensor) for t in reference.held.weights().values()), "moves": told}


def main() -> None:
    """Run the scenarios one after the other."""
    out, model = Path(sys.argv[1]), sys.argv[2]
    ranks = int(os.environ["WORLD_SIZE"])
    for name in sys.argv[3:]:
        # With as many replicas as ranks each holds all shards, and none is cut in two.
        strategy = FSDP2Strategy(ranks if name.startswith("replicas") else 1)
        found = facts(start(out, model, name, ranks, devices=ranks, strategy=strategy))
        if int(os.environ["RANK"]) == 0:
            (out / name / "facts.json").write_text(json.dumps(found))


if __name__ == "__main__":
    run_as_rank(main)
