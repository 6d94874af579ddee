"""One rank of one node, in the node's own folder: `node_script.py RUN STRATEGY REFERENCE [CHECKPOINT]`."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
from runs import fit

import sdpo_lightning
from sdpo_lightning import PreferenceSource


def main() -> None:
    """Train, then leave at once: gloo's threads now and then keep an interpreter from ending."""
    torch.set_num_threads(1)
    run, strategy, reference, *checkpoint = sys.argv[1:]
    sources = [PreferenceSource(name, f"{name}.jsonl") for name in "ab"]
    trainer = {"devices": 1, "num_nodes": 2, "strategy": strategy}
    data = {"batch_size": 1, "order": "easy_to_hard", "val_fraction": 0.2}
    code = 0
    try:
        fit(
            Path(run), "model", sources, *map(Path, checkpoint), reference=getattr(sdpo_lightning, reference)(),
            trainer_args=trainer, **data,
        )  # fmt: skip
        dist.barrier()
    except Exception:  # noqa: BLE001
        traceback.print_exc()
        code = 1
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
