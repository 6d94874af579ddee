"""Bytes that sharded training moves, counted and by formula: `python -m benchmarks.communication [--json OUT]`.

Runs on 2 and 4 gloo ranks of this machine. The counter sees what torch hands to the process group: for an all-gather
the whole tensor, for a reduce-scatter the whole gradient. A ring sends (R - 1) / R of it over each link.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

VOCAB, HIDDEN, INNER, LAYERS = 256, 64, 128, 4
# RMS norms and heads all divide by 4, so that no shard is padded.
SETTINGS = {"fp32": 4, "bf16": 2}


def parameters() -> tuple[int, int]:
    """Weights of a layer, and of embedding, head and last norm."""
    return 4 * HIDDEN**2 + 3 * HIDDEN * INNER + 2 * HIDDEN, 2 * VOCAB * HIDDEN + HIDDEN


def expected(gathered_bytes: int) -> dict[str, dict[str, int]]:
    """Bytes by phase and collective, whatever the number of ranks.

    Args:
        gathered_bytes: of a gathered weight: 4 in fp32, 2 in bf16. Gradients are reduced in fp32.
    """
    layer, ends = parameters()
    weights = LAYERS * layer + ends
    return {
        "reference, first cut": {},
        "reference, forward": {"all_gather": weights * gathered_bytes},
        # Gathered for the forward pass and again for the backward pass.
        "policy, step": {"all_gather": 2 * weights * gathered_bytes, "reduce_scatter": weights * 4},
        # What is recomputed lies within the backward pass, where the weights are there already.
        "policy, step with checkpointing": {"all_gather": 2 * weights * gathered_bytes, "reduce_scatter": weights * 4},
        "stage swap": {},
    }


def counter() -> Any:
    """A dispatch mode that adds up the bytes of each collective."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_flatten

    class Bytes(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.moved: Counter[str] = Counter()

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = func._schema.name
            if name.startswith(("c10d::", "_c10d_functional::")) and "wait" not in name and "barrier" not in name:
                import torch

                tensors = [t for t in tree_flatten(args)[0] if isinstance(t, torch.Tensor)]
                kind = "all_gather" if "gather" in name else "reduce_scatter" if "scatter" in name else name
                self.moved[kind] += max(t.numel() * t.element_size() for t in tensors)
            return func(*args, **(kwargs or {}))

    return Bytes


def run_rank(folder: Path) -> None:
    """One rank: cut, forward of the reference, step of the policy, swap; counted."""
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from transformers import LlamaConfig, LlamaForCausalLM

    from sdpo_lightning.backbone import copy_weights_, load_policy, load_skeleton
    from sdpo_lightning.data.collate import SharedPrefixCollator, TokenizedPair
    from sdpo_lightning.loading import load_on_ranks
    from sdpo_lightning.logprobs import pair_logps
    from sdpo_lightning.sharding import Sharding

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    model = str(folder / "model")
    if dist.get_rank() == 0:
        sizes = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": LAYERS}
        LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4)).save_pretrained(model)
    dist.barrier()
    device, Bytes, found = torch.device("cpu"), counter(), {}
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("shard",))
    pair = TokenizedPair(list(range(1, 20)), list(range(20, 50)), list(range(60, 80)))
    batch = SharedPrefixCollator(0, 1)([0], [pair], [1.0], 1)
    for name, dtype in (("fp32", None), ("bf16", torch.bfloat16)):
        sharding = Sharding(mesh, device, dtype)
        policy = load_on_ranks(lambda: load_policy(model), lambda: load_skeleton(model), device, sharding).train()
        moved = {}
        with Bytes() as count:
            reference = policy.frozen_copy().eval()
        moved["reference, first cut"] = dict(count.moved)
        with Bytes() as count, torch.no_grad():
            pair_logps(reference(batch), batch)
        moved["reference, forward"] = dict(count.moved)
        with Bytes() as count:
            pair_logps(policy(batch), batch).chosen.sum().backward()
        moved["policy, step"] = dict(count.moved)
        policy.model.gradient_checkpointing_enable({"use_reentrant": False})
        with Bytes() as count:
            pair_logps(policy(batch), batch).chosen.sum().backward()
        moved["policy, step with checkpointing"] = dict(count.moved)
        with Bytes() as count:
            copy_weights_(reference, policy)
        moved["stage swap"] = dict(count.moved)
        found[name] = moved
    if dist.get_rank() == 0:
        (folder / "found.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)


def measure(ranks: int) -> dict[str, Any]:
    """Counted bytes on so many ranks: dtype -> phase -> collective -> bytes."""
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        root = str(Path(__file__).resolve().parent.parent)
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([root, *sys.path]), "OMP_NUM_THREADS": "1"}
        subprocess.run(
            [*words, __file__, "--rank-in", folder], check=True, env=environment, capture_output=True, timeout=200
        )
        return json.loads((Path(folder) / "found.json").read_text())


def main() -> None:
    """Count on 2 and 4 ranks and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json")
    parser.add_argument("--rank-in", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank_in:
        run_rank(Path(options.rank_in))
        return
    report = {"weights": LAYERS * parameters()[0] + parameters()[1], "counted": {}, "formula": {}}
    for name, width in SETTINGS.items():
        report["formula"][name] = expected(width)
    for ranks in (2, 4):
        report["counted"][str(ranks)] = measure(ranks)
        for name in SETTINGS:
            for phase, moved in report["counted"][str(ranks)][name].items():
                same = moved == report["formula"][name][phase]
                print(f"{ranks} ranks, {name}, {phase}: {moved or 'nothing'} {'as' if same else 'UNLIKE'} the formula")
    if options.json:
        Path(options.json).write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
