"""Against TRL and a packed baseline on a CUDA GPU: `python -m benchmarks.gpu [--setting 1b|8b|8b_lora] [--json OUT]`.

Random weights made on the device, seeded pairs of ids, each variant in a process of its own. Every process first
takes three optimizer steps on the same pairs: their losses are compared before any time is, and warm it up. Then
it is timed: one reference pass over the pairs and one training pass, an optimizer step every `--step-pairs` pairs,
gradients clipped at 1. What is timed of ours is the bare loop, without Lightning.

| variant | what it is |
|---|---|
| ours | shared prompts, reference logps cached; `--compile` compiles the layers |
| packed | the same parts with sharing off: separate sequences in one row, cached logps, compiled layers |
| trl_default | TRL's `DPOTrainer` with its default flags: resident reference, gradient checkpointing |
| trl_best | reference logps computed beforehand, no checkpointing where that fits, pairs sorted by length, Liger |

Each takes the largest micro-batch that fits; a ratio is taken at the largest that fits both. A `--length` up to 1024
cuts pairs with UltraFeedback-like lengths; above, it is that of prompt + answer, on both sides of one pair a step.
Useful MFU counts the floor (prompts once, one reference pass), executed MFU what the variant computes; see `flops.py`.
`--device cpu --setting tiny` runs the same code anywhere and measures nothing.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.flops import Flops, executed_forward, floor_forward, left_out, peak_flops, training_flops
from benchmarks.gpu_jobs import SETTINGS, VARIANTS, Job, Setting

LAYOUTS = {"ours": "shared_prefix", "packed": "packed", "trl_default": "padded", "trl_best": "padded"}
NO_GPU = "no CUDA GPU was found and nothing was measured"


def missing(variant: str, setting: Setting) -> str:
    """Packages that a variant needs and that aren't installed, or an empty string."""
    needed = ["trl", "datasets"] if variant.startswith("trl") else []
    needed += ["peft"] if setting.lora else []
    needed += ["bitsandbytes"] if setting.eight_bit else []
    return ", ".join(name for name in needed if find_spec(name) is None)


def run_job(job: Job) -> dict[str, Any]:
    """Run a job in a process of its own; its figures, with a `status`."""
    words = [sys.executable, "-m", "benchmarks.gpu", "--job", json.dumps(asdict(job))]
    done = subprocess.run(words, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines and any(words in done.stderr for words in ("out of memory", "ALLOC_FAILED")):
        # Libraries and drivers say it in errors of their own.
        return {"status": "out of memory"}
    if not lines:
        return {"status": "failed", "error": done.stderr[-2000:]}
    result = json.loads(lines[-1].removeprefix("RESULT "))
    if result["status"] == "measured":
        result |= rates(job, result)
    return result


def child(job: Job) -> None:
    """Run a job in this process and print its figures as JSON."""
    import torch

    from benchmarks.gpu_variants import run

    try:
        result = {"status": "measured"} | run(job)
    except torch.cuda.OutOfMemoryError:
        result = {"status": "out of memory"}
    print("RESULT " + json.dumps(result))


def rates(job: Job, result: dict[str, Any]) -> dict[str, Any]:
    """Pairs a second and both MFUs, None where the device's peak isn't known."""
    setting, pairs = SETTINGS[job.setting], job.timed_pairs
    useful = training_flops(floor_forward(setting.shape, pairs), setting.lora)
    peak = peak_flops(result["device"])
    share = {"useful_mfu": useful, "executed_mfu": executed_flops(job)}
    mfu = {name: flops / result["seconds"] / peak if peak else None for name, flops in share.items()}
    return {"pairs_per_second": len(pairs) / result["seconds"], **mfu}


def executed_flops(job: Job) -> float:
    """What the variant computes for the timed pairs."""
    setting, pairs, total = SETTINGS[job.setting], job.timed_pairs, 0.0
    for start in range(0, len(pairs), job.micro_batch):
        part = pairs[start : start + job.micro_batch]
        sizes = (setting.shape, part, LAYOUTS[job.variant], job.micro_batch)
        forward: Flops = executed_forward(*sizes)
        if job.variant in ("ours", "packed") and not job.compiled:
            forward = replace(forward, body=forward.body - left_out(*sizes))
        logits = 2 * setting.shape.vocab * sum(chosen + rejected for _, chosen, rejected in part)
        # TRL's head never keeps its logits.
        again = job.variant.startswith("trl") or logits > job.logits_budget_mb * 2**20
        total += training_flops(forward, setting.lora, job.checkpointing, again)
    return total


def attempts(job: Job) -> list[Job]:
    """What to try for a variant until one fits, the largest micro-batch first."""
    sizes = [size for size in range(job.step_pairs, 0, -1) if job.step_pairs % size == 0]
    jobs = [replace(job, micro_batch=size) for size in sizes]
    if job.variant == "trl_best" and not job.checkpointing:
        jobs += [replace(one, checkpointing=True) for one in jobs]
    return jobs


def largest_fit(job: Job, most: int) -> dict[str, Any]:
    """Figures at the largest micro-batch up to `most` that fits."""
    result: dict[str, Any] = {"status": "out of memory"}
    for attempt in attempts(job):
        if attempt.micro_batch > most:
            continue
        result = run_job(attempt)
        result |= {"micro_batch": attempt.micro_batch, "checkpointing": attempt.checkpointing}
        if result["status"] != "out of memory":
            break
    shown = {k: v for k, v in result.items() if k != "losses"}
    print(job.variant, f"length {job.length}", shown, flush=True)
    return result


def compare(ours: dict[str, Any], peer: dict[str, Any], tolerance: float) -> dict[str, Any]:
    """Ours over the peer's, in pairs a second and in memory; only where their losses agree.

    Losses that stay at log 2 would agree whatever is computed: they have to move by more than the tolerance.
    """
    difference = max(abs(a - b) for a, b in zip(ours["losses"], peer["losses"], strict=True))
    moved = max(ours["losses"]) - min(ours["losses"])
    agree = difference <= tolerance < moved
    found = {"micro_batch": ours["micro_batch"], "loss_difference": difference, "loss_moved": moved}
    found |= {"tolerance": tolerance, "losses_agree": agree, "speed": None, "memory": None}
    if agree:
        found["speed"] = ours["pairs_per_second"] / peer["pairs_per_second"]
    if agree and ours["peak_mb"]:
        found["memory"] = ours["peak_mb"] / peer["peak_mb"]
    return found


def measure_length(base: Job, variants: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """All variants at one length, and ours against each other one."""
    setting, largest, ratios = SETTINGS[base.setting], {}, {}
    jobs = {name: job_of(base, name, options) for name in variants}
    for name, job in jobs.items():
        absent = missing(name, setting)
        largest[name] = {"status": f"not installed: {absent}"} if absent else largest_fit(job, job.step_pairs)
    measured = {name: found for name, found in largest.items() if found["status"] == "measured"}
    for name in measured.keys() - {"ours"} if "ours" in measured else ():
        most = min(measured["ours"]["micro_batch"], measured[name]["micro_batch"])
        pair = [
            measured[key] if measured[key]["micro_batch"] == most else largest_fit(jobs[key], most)
            for key in ("ours", name)
        ]
        if pair[0]["status"] == pair[1]["status"] == "measured":
            ratios[name] = compare(*pair, setting.tolerance)
    return {"length": base.length, "pairs": base.pairs, "variants": largest, "ours_against": ratios}


def job_of(base: Job, variant: str, options: argparse.Namespace) -> Job:
    """The base job for one variant, with the flags that this variant takes."""
    checkpointing = variant == "trl_default" or options.checkpointing == "full"
    compiled = options.compile if variant == "ours" else variant == "packed" and options.device != "cpu"
    return replace(base, variant=variant, checkpointing=checkpointing, compiled=compiled)


def base_job(options: argparse.Namespace, length: int) -> Job:
    """What the options say about every variant at one length."""
    long = length > 1024
    return Job(
        setting=options.setting,
        device=options.device,
        length=length,
        pairs=4 if long else options.pairs,
        step_pairs=1 if long else options.step_pairs,
        shared_nothing=options.shared_nothing,
        offload=options.offload,
        logits_budget_mb=options.logits_budget_mb,
    )


def report_of(options: argparse.Namespace) -> dict[str, Any]:
    """Measure all lengths; or say why nothing was measured."""
    import torch

    setting = SETTINGS[options.setting]
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        return {"measured": False, "reason": NO_GPU}
    if absent := missing("ours", setting):
        return {"measured": False, "reason": f"setting {options.setting} needs {absent}; nothing was measured"}
    lengths = [measure_length(base_job(options, length), options.variants, options) for length in options.length]
    keys = ("checkpointing", "offload", "compile", "shared_nothing", "step_pairs", "logits_budget_mb")
    return {
        "measured": True,
        "setting": options.setting,
        **setting.described(),
        "device": torch.cuda.get_device_name() if options.device.startswith("cuda") else options.device,
        "options": {key: getattr(options, key) for key in keys},
        "lengths": lengths,
        "versions": {name: _version(name) for name in ("torch", "transformers", "peft", "trl", "bitsandbytes")},
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--setting", choices=list(SETTINGS), default="1b")
    parser.add_argument("--length", nargs="+", type=int, default=[1024])
    parser.add_argument("--json", help="file to write the figures to")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--pairs", type=int, default=64, help="timed pairs, a multiple of --step-pairs")
    parser.add_argument("--step-pairs", type=int, default=16, help="pairs an optimizer step")
    parser.add_argument("--checkpointing", choices=("full", "none"), default="none", help="not of trl_default")
    parser.add_argument("--offload", action="store_true", help="activations to pinned memory of the host")
    parser.add_argument("--compile", action="store_true", help="compile the layers of ours too")
    parser.add_argument("--shared-nothing", action="store_true", help="prompts of one token")
    parser.add_argument("--logits-budget-mb", type=float, default=256.0)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.pairs % options.step_pairs:
        parser.error(f"--pairs {options.pairs} is no multiple of --step-pairs {options.step_pairs}")
    return options


def main() -> None:
    """Measure, print, write."""
    options = parse()
    if options.job:
        return child(Job(**json.loads(options.job)))
    report = report_of(options)
    text = json.dumps(report, indent=2)
    print(text if report["measured"] else report["reason"])
    if options.json:
        Path(options.json).write_text(text + "\n")


if __name__ == "__main__":
    main()
