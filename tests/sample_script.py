"""A run of two ranks with SampleStatistics that `torchrun` has started: `sample_script.py OUT MODEL FILE...`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch.distributed as dist
from runs import fit

from sdpo_lightning import PreferenceSource, SampleStatistics

if __name__ == "__main__":
    out, model, *files = sys.argv[1:]
    sources = [PreferenceSource(Path(path).stem, path) for path in files]
    callback = SampleStatistics(2, num_prompts=3, max_new_tokens=5)
    fit(Path(out), model, sources, callbacks=[callback], trainer_args={"devices": 2, "strategy": "ddp"}, batch_size=1)
    dist.destroy_process_group()
