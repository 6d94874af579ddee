"""Host memory of all ranks of a node while a model is read, cut and exported: `memory_script.py OUT MODEL`.

Times are many and short, so rank 0 samples `/proc` of every rank. On a CPU the shards themselves are host memory.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoTokenizer

from sdpo_lightning.backbone import load_policy, load_skeleton
from sdpo_lightning.hf_folder import save_hf
from sdpo_lightning.loading import load_on_ranks
from sdpo_lightning.sharding import Sharding


class Sampler:
    """Highest sum of the ranks' anonymous and of their whole memory, bytes above the start."""

    def __init__(self, pids: list[int]) -> None:
        self._pids = pids
        self._start = self._now()
        self.peak = [0, 0]
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _now(self) -> list[int]:
        anonymous = whole = 0
        for pid in self._pids:
            fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
            anonymous += int(fields["RssAnon"].split()[0]) * 1024
            whole += int(fields["VmRSS"].split()[0]) * 1024
        return [anonymous, whole]

    def _watch(self) -> None:
        while not self._done.is_set():
            self.peak = [max(p, n - s) for p, n, s in zip(self.peak, self._now(), self._start, strict=True)]
            time.sleep(0.002)

    def stop(self) -> list[int]:
        self._done.set()
        self._thread.join()
        return self.peak


def measure(pids, work):
    """What `work` gives, and the peak that rank 0 saw."""
    dist.barrier()
    sampler = Sampler(pids) if dist.get_rank() == 0 else None
    result = work()
    dist.barrier()
    peak = sampler.stop() if sampler else None
    dist.barrier()
    return result, peak


def main() -> None:
    """Read, then export."""
    out, model = Path(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    pids = [None] * dist.get_world_size()
    dist.all_gather_object(pids, os.getpid())
    device = torch.device("cpu")
    sharding = Sharding(init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("shard",)), device)
    policy, loading = measure(
        pids, lambda: load_on_ranks(lambda: load_policy(model), lambda: load_skeleton(model), device, sharding)
    )
    tokenizer = AutoTokenizer.from_pretrained(model)
    _, exporting = measure(pids, lambda: save_hf(policy, out / "exported", tokenizer))
    if dist.get_rank() == 0:
        copy = sum(p.numel() * 4 for p in policy.parameters())
        facts = {"copy": copy, "loading": loading, "exporting": exporting}
        (out / "memory.json").write_text(json.dumps(facts))
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
