"""One rank of one node, in the node's own folder: `node_script.py RUN STRATEGY REFERENCE [MORE OPTIONS]`.

With more options it is the command line that trains, else a plain Trainer.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
from runs import fit

import sdpo_lightning
from sdpo_lightning import PreferenceSource
from sdpo_lightning.cli import main


def _words(run: str, strategy: str, reference: str) -> list[str]:
    sources = [{"name": name, "path": f"{name}.jsonl"} for name in "ab"]
    words = ["fit", f"--trainer.default_root_dir={run}", f"--trainer.strategy={strategy}", "--trainer.accelerator=cpu"]
    words += ["--trainer.devices=1", "--trainer.num_nodes=2", "--trainer.enable_progress_bar=false"]
    words += ["--model.model_name_or_path=model", f"--model.reference={reference}"]
    words += ["--model.optimizer=torch.optim.AdamW", "--model.optimizer.lr=1e-3"]
    words += [f"--data.sources={json.dumps(sources)}", "--data.batch_size=1"]
    return [*words, "--data.max_length=64", "--data.val_fraction=0.2"]


def train() -> None:
    """Train, then leave at once: gloo's threads now and then keep an interpreter from ending."""
    torch.set_num_threads(1)
    run, strategy, reference, *options = sys.argv[1:]
    sources = [PreferenceSource(name, f"{name}.jsonl") for name in "ab"]
    trainer = {"devices": 1, "num_nodes": 2, "strategy": strategy}
    data = {"batch_size": 1, "order": "easy_to_hard", "val_fraction": 0.2}
    code = 0
    try:
        if options:
            main([*_words(run, strategy, reference), *options])
        else:
            made = getattr(sdpo_lightning, reference)()
            fit(Path(run), "model", sources, reference=made, trainer_args=trainer, **data)
        # The command line has left the group.
        if dist.is_initialized():
            dist.barrier()
    except SystemExit as stop:
        code = stop.code
    except Exception:  # noqa: BLE001
        traceback.print_exc()
        code = 1
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    train()
