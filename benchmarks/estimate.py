"""Measured against estimated peak of memory, for four settings on a CPU: `python -m benchmarks.estimate --json OUT`.

Each setting is a config that `sdpo-lightning fit` trains in a process of its own (random weights, two stages, their
checkpoints and exports included). Measured is the peak of resident memory above what the imports take; estimated is
what `sdpo-lightning estimate` says for the same config. One run a setting has an
allocator that gives freed blocks back, so that only what exists counts; it is slow.

| setting | what it is |
|---|---|
| resident | Llama h512 L8 V16000, fp32, a second copy as reference, 4 pairs |
| cached | the same model, bf16-mixed, cached reference, 2 pairs, 2 micro-batches a step |
| recomputed | the same model, fp32, cached reference, layers recomputed, a logits budget of 8 MiB, 1 pair of 4 |
| sgd | Llama h768 L4 V32000, tied, fp32, resident reference, SGD, padded rows, 2 pairs |
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from benchmarks.flops import Shape
from benchmarks.workloads import llama_config, pair_ids, pair_lengths, pair_rows, peak_resident

WIDE = Shape(hidden=512, layers=8, heads=8, kv_heads=4, intermediate=1344, vocab=16_000, tied=False)
SHALLOW = Shape(hidden=768, layers=4, heads=12, kv_heads=12, intermediate=2048, vocab=32_000, tied=True)
SETTINGS: dict[str, tuple[Shape, dict[str, Any]]] = {
    "resident": (WIDE, {"model": {"reference": "ResidentReference"}, "data": {"batch_size": 4}}),
    "cached": (
        WIDE,
        {
            "trainer": {"precision": "bf16-mixed", "accumulate_grad_batches": 2},
            "model": {"reference": "CachedReference"},
            "data": {"batch_size": 2},
        },
    ),
    "recomputed": (
        WIDE,
        {
            "trainer": {"accumulate_grad_batches": 4},
            "model": {"reference": "CachedReference", "gradient_checkpointing": True, "logits_budget_mb": 8},
            "data": {"batch_size": 1},
        },
    ),
    "sgd": (
        SHALLOW,
        {
            "model": {"optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 1e-3}}},
            "data": {"batch_size": 2, "layout": "padded"},
        },
    ),
}


def write_setting(name: str, folder: Path, pairs: int, max_length: int = 512, scale: int = 1) -> Path:
    """A setting's model, data and config.

    Args:
        name: of the setting.
        folder: where all of it goes.
        pairs: of both stages together.
        max_length: most tokens of prompt + answer.
        scale: divides the sizes of the model.

    Returns:
        The config's path.
    """
    shape, groups = SETTINGS[name]
    if scale > 1:
        sizes = {key: getattr(shape, key) // scale for key in ("hidden", "intermediate", "vocab")}
        shape = replace(shape, **sizes)
    make_model(shape, folder / "model", 2 * max_length)
    rows = pair_rows(pair_ids(pair_lengths(pairs, max_length, max_length / 1024), shape.vocab))
    sources = []
    for index in range(2):
        path = folder / f"s{index}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows[index::2]))
        sources.append({"name": f"s{index}", "path": str(path)})
    trainer = {
        "default_root_dir": str(folder / "run"),
        "accelerator": "cpu",
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    config = {
        "trainer": trainer | groups.get("trainer", {}),
        "model": {"model_name_or_path": str(folder / "model")} | groups["model"],
        "data": {"sources": sources, "order": "given", "max_length": max_length} | groups["data"],
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def make_model(shape: Shape, folder: Path, positions: int) -> None:
    """A Llama with random weights, and a word-level tokenizer whose word t5 has id 5."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", *(f"t{i}" for i in range(2, shape.vocab))]
    core = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    core.pre_tokenizer = WhitespaceSplit()
    torch.manual_seed(0)
    LlamaForCausalLM(llama_config(shape, positions)).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>").save_pretrained(folder)


def child(config: Path) -> None:
    """Train one setting in this process and print its peak above the imports, in MiB."""
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401

    from sdpo_lightning.cli import main as command

    torch.set_num_threads(1)
    imported = peak_resident()
    command(["fit", "--config", str(config)])
    print(f"RESULT {(peak_resident() - imported) / 1024}")


def measure(config: Path, cpu: int | None = 0, returns: bool = False) -> float:
    """Peak of a run above the imports, in MiB, in a process pinned to one core.

    Args:
        config: of the run.
        cpu: the core; None pins to none.
        returns: have the allocator give freed blocks from 128 KiB on back at once, so that only what exists counts.
    """
    words = [sys.executable, "-m", "benchmarks.estimate", "--child", str(config)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    # One heap: several keep freed memory each, as many as threads happen to run.
    environment |= {"MALLOC_ARENA_MAX": "1"}
    if returns:
        environment["MALLOC_MMAP_THRESHOLD_"] = str(2**17)
    pinned = [] if cpu is None else ["taskset", "-c", str(cpu)]
    done = subprocess.run([*pinned, *words], capture_output=True, text=True, env=environment)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        raise RuntimeError(f"{config} failed:\n{done.stderr[-2000:]}")
    return float(lines[-1].split()[1])


def estimated(config: Path) -> float:
    """Peak of the largest stage by the arithmetic, in MiB."""
    from sdpo_lightning.cli import EstimateCLI
    from sdpo_lightning.estimate import moments

    cli = EstimateCLI(args=["--config", str(config)], run=False)
    return max(moment.total for stage in cli.loads for moment in moments(cli.sizes, stage)) / 2**20


def main() -> None:
    """Measure each setting a few times and set the estimate beside it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=24)
    parser.add_argument("--cpu", type=int, default=0, help="core that the runs are pinned to")
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(Path(options.child))
        return
    rows = {name: compare(name, options) for name in options.settings}
    result = {
        "settings": rows,
        "method": "MiB, VmHWM of a whole `fit` above that of the imports, a process a run, one core, "
        "MALLOC_ARENA_MAX=1; `returns`: MALLOC_MMAP_THRESHOLD_=128 KiB, so that only what exists counts",
        "pairs": options.pairs,
        "rounds": options.rounds,
        "machine": platform.processor() or platform.machine(),
        "versions": {name: version(name) for name in ("torch", "lightning", "transformers", "safetensors")},
    }
    text = json.dumps(result, indent=2)
    print(text)
    if options.json:
        Path(options.json).write_text(text + "\n")


def compare(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Estimated and measured peaks of one setting, in MiB."""
    with tempfile.TemporaryDirectory() as scratch:
        config = write_setting(name, Path(scratch), options.pairs)
        expected = estimated(config)
        measured: dict[str, list[float]] = {"default": [], "returns": []}
        for number in range(options.rounds):
            for kind in measured if number == 0 else ("default",):
                # A folder holds one run.
                shutil.rmtree(Path(scratch) / "run", ignore_errors=True)
                measured[kind].append(measure(config, options.cpu, kind == "returns"))
                print(number, name, kind, measured[kind][-1], flush=True)
    median, once = statistics.median(measured["default"]), measured["returns"][0]
    ratios = {"estimate_over_measured": round(expected / median, 3), "estimate_over_returns": round(expected / once, 3)}
    return {"estimated": expected, "measured": measured, **ratios}


if __name__ == "__main__":
    main()
