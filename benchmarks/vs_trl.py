"""Time and memory a pair against TRL's `DPOTrainer`: `python -m benchmarks.vs_trl --json OUT [--rounds 3]`.

With `--memory` only the peaks of a2, fast and lean are measured and printed, with `--stages` the times of one and
eight stages.

TRL draws no answers from its models and no charts, so ours doesn't in these runs either, as if installed without the
`[report]` extra; `fast_extras` shows what that costs.

Each variant trains the same seeded pairs in a process of its own, pinned to one core; the variants alternate, and
ratios are medians over the rounds. CPU time, not wall time. Memory is the peak above what the imports take.

| variant | what it is |
|---|---|
| a0 | TRL as it comes on a CPU: fp32, the head over prompts and padding too |
| a2 | TRL with the tiled, completion-only head that it uses on CUDA |
| a6 | a2 without gradient checkpointing, reference logps computed beforehand, pairs sorted by length |
| fast | ours: shared prompts, cached reference, bf16-mixed where the processor has it |
| fast_extras | fast with what a `fit` does beside training: S and M_1 answer three prompts, charts become PNGs |
| lean | as fast, one pair a micro-batch, layers recomputed, a small logits budget |
| naive | ours, padded rows, resident reference, fp32 |
| bare | the model, batches and numbers of fast in a plain loop, without Lightning and without files |
| one, eight | fast, four times the pairs as 1 and as 8 stages |
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.workloads import peak_resident

VOCAB, HIDDEN, LAYERS = 16_000, 512, 8
VARIANTS = ("a0", "a2", "a6", "fast", "fast_extras", "lean", "naive", "bare", "one", "eight")


def workload(pairs: int, seed: int = 0) -> list[dict[str, str]]:
    """UltraFeedback-like token counts, halved: log-normal, prompt median 60, answers median 130, cut at 512."""
    generator = random.Random(seed)

    def words(median: float, sigma: float, most: int) -> str:
        count = min(most, max(4, round(generator.lognormvariate(0, sigma) * median)))
        return " ".join(f"t{generator.randrange(VOCAB - 10)}" for _ in range(count))

    return [
        {"prompt": words(60, 0.9, 250), "chosen": " " + words(130, 0.6, 260), "rejected": " " + words(115, 0.65, 260)}
        for _ in range(pairs)
    ]


def make_model(folder: Path) -> None:
    """The random Llama of the workload (W2), fp32, and a word-level tokenizer."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", "<unk>", *(f"t{i}" for i in range(VOCAB - 3))]
    core = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=4 * HIDDEN * 2 // 3 // 64 * 64,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        pad_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def run_trl(variant: str, model_dir: Path, rows: list[dict[str, str]], epochs: int, out: Path) -> list[float]:
    """Train by TRL; the loss of every step."""
    import torch
    import trl
    import trl.trainer.utils
    from datasets import Dataset
    from torch.utils.data import SequentialSampler
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if variant == "a6":
        rows = sorted(rows, key=lambda row: sum(len(text.split()) for text in row.values()))
    if variant != "a0":
        trl.trainer.utils._use_triton = lambda device: True
    measured_from()

    losses: list[float] = []

    class InOrder(trl.DPOTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            # What TRL logs is rounded.
            loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            losses.append((loss[0] if return_outputs else loss).item())
            return loss

        def _get_train_sampler(self, dataset=None):
            return SequentialSampler(dataset if dataset is not None else self.train_dataset)

    config = trl.DPOConfig(
        output_dir=str(out),
        per_device_train_batch_size=4,
        learning_rate=1e-5,
        lr_scheduler_type="constant",
        num_train_epochs=epochs,
        max_length=512,
        max_grad_norm=0.0,
        weight_decay=0.0,
        bf16=variant != "a0" and has_bf16(),
        optim="adamw_torch_fused",
        gradient_checkpointing=variant != "a6",
        precompute_ref_log_probs=variant == "a6",
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    model, reference = (AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32) for _ in range(2))
    trainer = InOrder(
        model,
        reference,
        config,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(model_dir),
    )
    trainer.train()
    return losses


def run_ours(variant: str, model_dir: Path, rows: list[dict[str, str]], epochs: int, out: Path) -> list[float]:
    """Train by this package; the loss of every step."""
    import csv

    import lightning.pytorch as pl
    import torch

    from sdpo_lightning import CachedReference, CurriculumDataModule, DPOLitModule, PreferenceSource, ResidentReference
    from sdpo_lightning.stage_models import StageSamples

    measured_from()
    stages = 8 if variant == "eight" else 1
    sources, size = [], len(rows) // stages
    for index in range(stages):
        path = out / f"s{index}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows[index * size : (index + 1) * size]))
        sources.append(PreferenceSource(f"s{index}", str(path)))
    lean, naive = variant == "lean", variant == "naive"
    batch_size = 1 if lean else 4
    data = CurriculumDataModule(
        sources,
        order="given",
        layout="padded" if naive else "shared_prefix",
        shuffle=False,
        batch_size=batch_size,
        max_length=512,
        epochs_per_stage=epochs,
    )
    model = DPOLitModule(
        str(model_dir),
        reference=ResidentReference() if naive else CachedReference(),
        optimizer=lambda params: torch.optim.AdamW(params, lr=1e-5, weight_decay=0.0, fused=True),
        lr_scheduler="constant",
        warmup_ratio=0.0,
        logits_budget_mb=8 if lean else 256,
        gradient_checkpointing=lean,
    )
    trainer = pl.Trainer(
        default_root_dir=out,
        accelerator="cpu",
        precision="bf16-mixed" if has_bf16() and not naive else "32-true",
        accumulate_grad_batches=4 // batch_size,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        callbacks=[] if variant == "fast_extras" else [StageSamples(prompts=[])],
    )
    trainer.fit(model, data)
    with (out / "metrics.csv").open(newline="") as handle:
        return [float(row["train/loss"]) for row in csv.DictReader(handle)]


def run_bare(model_dir: Path, rows: list[dict[str, str]], epochs: int) -> list[float]:
    """The work of `fast` and nothing else: load, reference pass, steps; the loss of every step."""
    import torch
    from transformers import AutoTokenizer

    from sdpo_lightning.backbone import load_policy
    from sdpo_lightning.casts import CASTS
    from sdpo_lightning.data.collate import PairTokenizer, SharedPrefixCollator
    from sdpo_lightning.logprobs import pair_logps
    from sdpo_lightning.losses import dpo_loss
    from sdpo_lightning.memory import keep_freed_memory
    from sdpo_lightning.types import PairLogps

    measured_from()
    keep_freed_memory()
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    tokenize = PairTokenizer(tokenizer, 512)
    pairs = [tokenize(row["prompt"], row["chosen"], row["rejected"]) for row in rows]
    policy = load_policy(str(model_dir)).train()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-5, weight_decay=0.0, fused=True)
    collate = SharedPrefixCollator(tokenizer.pad_token_id, pad_to_multiple_of=64)
    starts = range(0, len(pairs), 4)
    batches = [collate(list(range(i, i + 4)), pairs[i : i + 4], [1.0] * 4, 4) for i in starts]

    def forward(batch) -> PairLogps:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=has_bf16(), cache_enabled=False):
            return pair_logps(policy(batch), batch)

    with torch.no_grad(), CASTS.held():
        references = [forward(batch) for batch in batches]
    losses = []
    for _ in range(epochs):
        for batch, reference in zip(batches, references, strict=True):
            loss = dpo_loss(forward(batch), reference, 0.1).mean()
            loss.backward()
            torch.nn.utils.get_total_norm([p.grad for p in policy.parameters()])
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return losses


def has_bf16() -> bool:
    """Whether the processor computes in bf16."""
    return "avx512_bf16" in Path("/proc/cpuinfo").read_text()


_MEASURE: dict[str, float] = {}


def measured_from() -> None:
    """Start of the measured part: loading, tokenising and training, after the imports."""
    _MEASURE["cpu"] = time.process_time()


def child(options: argparse.Namespace) -> None:
    """One variant, in this process; prints its figures as JSON."""
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401

    torch.set_num_threads(1)
    rows = json.loads(Path(options.rows).read_text())
    ours = options.variant in VARIANTS[3:]
    if ours:
        import lightning.pytorch  # noqa: F401

        import sdpo_lightning.module  # noqa: F401
    else:
        import trl  # noqa: F401
    if options.variant != "fast_extras":
        # As if the `[report]` extra weren't installed: charts stay undrawn.
        sys.modules["matplotlib"] = None  # type: ignore[assignment]
    imported = peak_resident()
    with tempfile.TemporaryDirectory() as out:
        if options.variant == "bare":
            losses = run_bare(Path(options.model), rows, options.epochs)
        else:
            run = run_ours if ours else run_trl
            losses = run(options.variant, Path(options.model), rows, options.epochs, Path(out))
    seconds = time.process_time() - _MEASURE["cpu"]
    peak = peak_resident() - imported
    print("RESULT " + json.dumps({"seconds": seconds / len(rows), "peak_mb": peak / 1024, "losses": losses}))


def measure(variant: str, model: Path, rows: Path, epochs: int) -> dict:
    """Run a variant in a process pinned to one core."""
    words = [sys.executable, "-m", "benchmarks.vs_trl", "--variant", variant, "--model", str(model)]
    words += ["--rows", str(rows), "--epochs", str(epochs)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment |= {"MALLOC_ARENA_MAX": "1"}
    with tempfile.TemporaryDirectory() as cache:
        # Each run tokenises: none finds what an earlier one has left.
        environment["HF_DATASETS_CACHE"] = cache
        done = subprocess.run(["taskset", "-c", "0", *words], capture_output=True, text=True, env=environment)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        raise SystemExit(f"{variant} failed:\n{done.stderr[-2000:]}")
    return json.loads(lines[-1].removeprefix("RESULT "))


def ratio(runs: dict[str, list[dict]], above: str, below: str, key: str) -> list[float]:
    """Median, least and most of the ratio over the rounds."""
    ratios = [a[key] / b[key] for a, b in zip(runs[above], runs[below], strict=False)]
    return [round(f(ratios), 3) for f in (statistics.median, min, max)]


def main() -> None:
    """Alternate the variants and write the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=48)
    parser.add_argument("--memory", action="store_true", help="only the peaks of a2, fast and lean")
    parser.add_argument("--stages", action="store_true", help="only the times of one and eight stages")
    for name in ("--variant", "--model", "--rows"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    parser.add_argument("--epochs", type=int, default=1, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.variant:
        child(options)
        return
    if options.memory:
        print(json.dumps(memory(options.pairs, options.rounds), indent=2))
        return
    if options.stages:
        print(json.dumps(stages(options.pairs, options.rounds), indent=2))
        return
    with tempfile.TemporaryDirectory() as scratch:
        runs = alternate(Path(scratch), options.pairs, options.rounds)
    # The first loss and the two behind an optimizer step: later ones drift by rounding, which Adam makes steps of.
    differences = [abs(a - b) for a, b in zip(runs["naive"][0]["losses"], runs["a0"][0]["losses"], strict=True)]
    difference = max(differences[:3])
    if difference > 2e-5:
        raise SystemExit(f"losses differ by {difference:.1e} in fp32: no time is worth printing")
    report = {
        "time_1epoch_vs_A2": ratio(runs, "fast", "a2", "seconds"),
        "time_3epochs_vs_A2": ratio(runs, "fast_3", "a2_3", "seconds"),
        "time_1epoch_with_extras_vs_A2": ratio(runs, "fast_extras", "a2", "seconds"),
        "time_1epoch_vs_A6": ratio(runs, "fast", "a6", "seconds"),
        "time_1epoch_vs_A0": ratio(runs, "fast", "a0", "seconds"),
        "peak_fast_vs_A2": ratio(runs, "fast", "a2", "peak_mb"),
        "peak_lean_vs_A2": ratio(runs, "lean", "a2", "peak_mb"),
        "time_lean_vs_A2": ratio(runs, "lean", "a2", "seconds"),
        "stages_1_to_8_time": ratio(runs, "eight", "one", "seconds"),
        "lightning_overhead": ratio(runs, "fast", "bare", "seconds"),
        "max_abs_loss_diff": difference,
        "max_abs_loss_diff_all_steps": max(differences),
        "method": "CPU time of one pinned core, [median, least, most] of the ratios of alternating runs",
        "pairs": options.pairs,
        "rounds": options.rounds,
        "machine": platform.processor() or platform.machine(),
        "bf16": has_bf16(),
        "versions": versions(),
        "runs": {k: [{"seconds": r["seconds"], "peak_mb": r["peak_mb"]} for r in v] for k, v in runs.items()},
    }
    text = json.dumps(report, indent=2)
    print(text)
    if options.json:
        Path(options.json).write_text(text + "\n")


def alternate(scratch: Path, pairs: int, rounds: int) -> dict[str, list[dict]]:
    """Every variant in turn, round after round."""
    model, few, many = scratch / "model", scratch / "few.json", scratch / "many.json"
    make_model(model)
    few.write_text(json.dumps(workload(pairs)))
    many.write_text(json.dumps(workload(4 * pairs)))
    runs: dict[str, list[dict]] = {}
    for number in range(rounds):
        # a0 and naive are slow, and serve the comparison of losses: once is enough.
        for variant in VARIANTS if number == 0 else [v for v in VARIANTS if v not in ("a0", "naive")]:
            rows = many if variant in ("one", "eight") else few
            runs.setdefault(variant, []).append(measure(variant, model, rows, 1))
            print(number, variant, {k: v for k, v in runs[variant][-1].items() if k != "losses"}, flush=True)
        for variant in ("a2", "fast"):
            runs.setdefault(f"{variant}_3", []).append(measure(variant, model, few, 3))
            print(number, variant, 3, runs[f"{variant}_3"][-1]["seconds"], flush=True)
    return runs


def memory(pairs: int, rounds: int) -> dict[str, list[float]]:
    """Peaks of a2, fast and lean in turn: their ratios, median, least and most, and the readings in MiB."""
    runs = in_turn(("a2", "fast", "lean"), pairs, rounds)
    ratios = {f"peak_{name}_vs_A2": ratio(runs, name, "a2", "peak_mb") for name in ("fast", "lean")}
    return ratios | {name: [round(run["peak_mb"], 1) for run in found] for name, found in runs.items()}


def stages(pairs: int, rounds: int) -> dict[str, list[float]]:
    """CPU seconds a pair of one and of eight stages in turn, on four times the pairs: ratios and readings."""
    runs = in_turn(("one", "eight"), 4 * pairs, rounds)
    seconds = {name: [round(run["seconds"], 4) for run in found] for name, found in runs.items()}
    return {"stages_1_to_8_time": ratio(runs, "eight", "one", "seconds"), **seconds}


def in_turn(variants: tuple[str, ...], pairs: int, rounds: int) -> dict[str, list[dict]]:
    """Variants on the same pairs, round after round."""
    with tempfile.TemporaryDirectory() as folder:
        model, rows = Path(folder) / "model", Path(folder) / "rows.json"
        make_model(model)
        rows.write_text(json.dumps(workload(pairs)))
        runs: dict[str, list[dict]] = {variant: [] for variant in variants}
        for _ in range(rounds):
            for variant, found in runs.items():
                found.append(measure(variant, model, rows, 1))
    return runs


def versions() -> dict[str, str]:
    """Of what was measured."""
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "lightning", "transformers", "trl", "sdpo-lightning")}


if __name__ == "__main__":
    main()
