"""Time and memory as the work grows: `python -m benchmarks.scaling [--json OUT] [--table OUT.md] [--plot OUT.png]`.

Each point runs in a process of its own on one pinned core; the points take turns over the rounds. CPU time, and the
peak memory above what the imports take. A small Llama with random weights, bf16 where the processor has it. The
FLOPs of a point are arithmetic (`flops.py`): the floor of its pairs, one training pass and one reference pass.

| axis | what grows | what is timed |
|---|---|---|
| vocabulary | the head, 8k to 128k | a bare loop: reference pass and step of 8 pairs |
| length | every prompt and answer, x1 to x4 | the same |
| pairs | the pairs of one stage | a whole `Trainer.fit` |
| stages | stages that the same pairs are cut into | a whole `Trainer.fit` |
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.flops import Shape, floor_forward, training_flops
from benchmarks.scaling_report import markdown, plot
from benchmarks.vs_trl import has_bf16
from benchmarks.workloads import llama_config, pair_ids, pair_lengths, pair_rows, peak_resident

SHAPE = Shape(hidden=256, layers=4, heads=4, kv_heads=2, intermediate=704, vocab=8_192)
MICRO_BATCH, STEP_PAIRS = 4, 8
# At scale 1: UltraFeedback's lengths, halved.
MAX_LENGTH, SCALE = 1024, 0.5
ALLOWED = 1.1
POSITIONS = 4096


@dataclass(frozen=True)
class Point:
    """One workload.

    Attributes:
        axis: what grows along with `value`.
        value: place on the axis.
        vocab: rows of the head.
        scale: factor on the lengths of the pairs.
        pairs: pairs that are trained on.
        stages: that the pairs are cut into.
        repeats: steps over the same pairs that are averaged; a bare loop only.
        trainer: a whole `fit`, else a bare loop.
    """

    axis: str
    value: float
    vocab: int = 8_192
    scale: float = SCALE
    pairs: int = STEP_PAIRS
    stages: int = 1
    repeats: int = 1
    trainer: bool = False

    @property
    def work(self) -> Point:
        """Equal for points that do the same on two axes: it is then measured once."""
        return replace(self, axis="", value=0.0)

    @property
    def shape(self) -> Shape:
        """Of the model."""
        return replace(SHAPE, vocab=self.vocab)

    @property
    def flops(self) -> float:
        """One pass of training and one of the reference over the pairs."""
        return training_flops(floor_forward(self.shape, pair_lengths(self.pairs, MAX_LENGTH, self.scale)))


POINTS = (
    *(Point("vocabulary", v, vocab=v, repeats=2) for v in (8_192, 16_384, 32_768)),
    *(Point("vocabulary", v, vocab=v) for v in (65_536, 131_072)),
    Point("length", 1, vocab=16_384, repeats=2),
    *(Point("length", factor, vocab=16_384, scale=factor * SCALE) for factor in (2, 4)),
    *(Point("pairs", pairs, pairs=pairs, trainer=True) for pairs in (24, 48, 96)),
    *(Point("stages", stages, pairs=96, stages=stages, trainer=True) for stages in (1, 2, 8)),
)


def bare_loop(point: Point) -> float:
    """CPU seconds of a reference pass and an optimizer step without a Trainer, the first one left out."""
    import torch
    from transformers import LlamaForCausalLM

    from sdpo_lightning.attention import register_segment_attention
    from sdpo_lightning.backbone import CausalBackbone
    from sdpo_lightning.data.collate import SharedPrefixCollator, TokenizedPair
    from sdpo_lightning.logprobs import pair_logps
    from sdpo_lightning.losses import dpo_loss

    torch.manual_seed(0)
    config = llama_config(point.shape, POSITIONS)
    config._attn_implementation = register_segment_attention()
    model = CausalBackbone(LlamaForCausalLM(config)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.0, fused=True)
    pairs = [TokenizedPair(*ids) for ids in pair_ids(pair_lengths(point.pairs, MAX_LENGTH, point.scale), point.vocab)]
    starts = range(0, len(pairs), MICRO_BATCH)
    parts = [(range(s, s + MICRO_BATCH), pairs[s : s + MICRO_BATCH]) for s in starts]
    collate = SharedPrefixCollator(0, pad_to_multiple_of=64)
    batches = [collate(ids, part, [1.0] * len(part), len(pairs)) for ids, part in parts]

    def score(batch):
        with torch.autocast("cpu", torch.bfloat16, enabled=has_bf16()):
            return pair_logps(model(batch), batch)

    def step() -> None:
        with torch.no_grad():
            references = [score(batch) for batch in batches]
        for batch, reference in zip(batches, references, strict=True):
            (dpo_loss(score(batch), reference, 0.1).sum() / len(pairs)).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    start = time.process_time()
    for _ in range(point.repeats):
        step()
    return (time.process_time() - start) / point.repeats


def make_model(folder: Path) -> None:
    """The model with random weights, and a word-level tokenizer whose word t5 has id 5."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", *(f"t{i}" for i in range(2, SHAPE.vocab))]
    core = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    core.pre_tokenizer = WhitespaceSplit()
    torch.manual_seed(0)
    LlamaForCausalLM(llama_config(SHAPE, POSITIONS)).save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")
    tokenizer.save_pretrained(folder)


def whole_fit(point: Point, model_dir: Path, out: Path) -> float:
    """A whole `fit`; its CPU seconds, the loading of model and data included."""
    import lightning.pytorch as pl
    import torch

    from sdpo_lightning import CachedReference, CurriculumDataModule, DPOLitModule, PreferenceSource

    rows = pair_rows(pair_ids(pair_lengths(point.pairs, MAX_LENGTH, point.scale), point.vocab))
    sources, size = [], point.pairs // point.stages
    for index in range(point.stages):
        path = out / f"s{index}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows[index * size : (index + 1) * size]))
        sources.append(PreferenceSource(f"s{index}", str(path)))
    start = time.process_time()
    data = CurriculumDataModule(sources, order="given", batch_size=MICRO_BATCH, max_length=MAX_LENGTH, shuffle=False)
    model = DPOLitModule(
        str(model_dir),
        reference=CachedReference(),
        optimizer=lambda params: torch.optim.AdamW(params, lr=1e-5, weight_decay=0.0, fused=True),
    )
    trainer = pl.Trainer(
        default_root_dir=out,
        accelerator="cpu",
        precision="bf16-mixed" if has_bf16() else "32-true",
        accumulate_grad_batches=STEP_PAIRS // MICRO_BATCH,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, data)
    return time.process_time() - start


def child(point: Point, model_dir: Path) -> None:
    """One point, in this process; prints its figures as JSON."""
    import torch

    import sdpo_lightning.backbone  # noqa: F401

    torch.set_num_threads(1)
    if point.trainer:
        import sdpo_lightning.data.datamodule  # noqa: F401
        import sdpo_lightning.module  # noqa: F401
    else:
        from transformers import LlamaForCausalLM  # noqa: F401
    imported = peak_resident()
    with tempfile.TemporaryDirectory() as out:
        seconds = whole_fit(point, model_dir, Path(out)) if point.trainer else bare_loop(point)
    peak = peak_resident() - imported
    print("RESULT " + json.dumps({"seconds": seconds, "peak_mb": peak / 1024}))


def run_child(core: int, arguments: list[str]) -> str:
    """Run this script in a process pinned to one core; its output."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment |= {"MALLOC_ARENA_MAX": "1"}
    words = ["taskset", "-c", str(core), sys.executable, "-m", "benchmarks.scaling", *arguments]
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{arguments} failed:\n{done.stderr[-2000:]}")
    return done.stdout


def measure(point: Point, model_dir: Path, core: int) -> dict[str, float]:
    """Seconds and peak MB of one point."""
    output = run_child(core, ["--point", json.dumps(asdict(point)), "--model", str(model_dir)])
    return json.loads(next(line for line in output.splitlines() if line.startswith("RESULT "))[7:])


def spread(numbers: list[float]) -> list[float]:
    """Median, least and most."""
    return [statistics.median(numbers), min(numbers), max(numbers)]


def axis_report(points: list[Point], runs: list[list[dict[str, float]]]) -> dict[str, Any]:
    """Figures of one axis, relative to its first point.

    Memory is held against a straight line through the origin where the work of a step grows (vocabulary, length),
    and against no growth at all along pairs and stages.

    Args:
        points: of the axis, in order.
        runs: of each point, its rounds.
    """
    rows = []
    for point, rounds in zip(points, runs, strict=True):
        relative = [
            (run["seconds"] / point.flops) / (first["seconds"] / points[0].flops)
            for run, first in zip(rounds, runs[0], strict=True)
        ]
        line = point.value / points[0].value if not point.trainer else 1.0
        memory = [run["peak_mb"] / first["peak_mb"] / line for run, first in zip(rounds, runs[0], strict=True)]
        row = {"value": point.value, "gflop": point.flops / 1e9, "seconds": spread([r["seconds"] for r in rounds])}
        row |= {"peak_mb": spread([r["peak_mb"] for r in rounds])}
        rows.append(row | {"time_per_flop": spread(relative), "memory_per_line": spread(memory)})
    worst = max(row["time_per_flop"][0] for row in rows)
    return {
        "worst_time_per_flop": worst,
        "within_10_percent": worst <= ALLOWED,
        "worst_memory_per_line": max(row["memory_per_line"][0] for row in rows),
        "memory_line": "no growth" if points[0].trainer else "in proportion to the axis",
        "peak_mb_last_to_first": rows[-1]["peak_mb"][0] / rows[0]["peak_mb"][0],
        "points": rows,
    }


def report_of(points: list[Point], runs: dict[Point, list[dict[str, float]]], rounds: int) -> dict[str, Any]:
    """All axes and what they were measured on."""
    from importlib.metadata import version

    axes = {p.axis: [q for q in points if q.axis == p.axis] for p in points}
    names = ("torch", "lightning", "transformers", "sdpo-lightning")
    return {
        "axes": {axis: axis_report(own, [runs[point.work] for point in own]) for axis, own in axes.items()},
        "method": "CPU time of one pinned core; median, least and most of the rounds, in which the points take turns",
        "model": asdict(SHAPE),
        "rounds": rounds,
        "machine": platform.processor() or platform.machine(),
        "bf16": has_bf16(),
        "versions": {name: version(name) for name in names},
    }


def measure_all(points: list[Point], rounds: int, core: int) -> dict[Point, list[dict[str, float]]]:
    """All kinds of work, once a round."""
    work = {point.work: point for point in reversed(points)}
    runs: dict[Point, list[dict[str, float]]] = {point: [] for point in reversed(work)}
    with tempfile.TemporaryDirectory() as scratch:
        run_child(core, ["--make", scratch])
        for number in range(rounds):
            for key, taken in runs.items():
                taken.append(measure(key, Path(scratch), core))
                print(number, work[key].axis, work[key].value, taken[-1], flush=True)
    return runs


def main() -> None:
    """Measure, then print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--core", type=int, default=0, help="the core that every point is pinned to")
    parser.add_argument("--axis", nargs="+", choices=list(dict.fromkeys(p.axis for p in POINTS)), help="only these")
    parser.add_argument("--json", help="file to write the figures to")
    parser.add_argument("--table", help="Markdown file to write")
    parser.add_argument("--plot", help="picture to write")
    for name in ("--point", "--model", "--make"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make:
        return make_model(Path(options.make))
    if options.point:
        return child(Point(**json.loads(options.point)), Path(options.model))
    points = [point for point in POINTS if not options.axis or point.axis in options.axis]
    report = report_of(points, measure_all(points, options.rounds, options.core), options.rounds)
    print(table := markdown(report))
    if options.json:
        Path(options.json).write_text(json.dumps(report, indent=2) + "\n")
    if options.table:
        Path(options.table).write_text(table)
    if options.plot:
        plot(report, Path(options.plot))


if __name__ == "__main__":
    main()
