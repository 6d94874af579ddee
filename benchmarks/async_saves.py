"""Share of the time that saves block training: `python -m benchmarks.async_saves [--repeats N] [--json OUT]`.

Two gloo ranks of this machine, one thread each, `trainer.strategy: fsdp2`, 42 million weights with AdamW in fp32. Three
modes, one after the other in each repeat: no saves, saves that training waits for, `BackgroundWrites`. Counted from the
end of step 1 to the end of the last step but one, so without the save at the stage's end, for which every run waits:

- blocked: within a save and within the wait for one, on rank 0, from the call to its return;
- slower: the window's wall time beside that of the same steps without saves, so with what the writer's thread takes
  from the cores of the training.
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
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.data_size import VOCAB, write_rows, write_tokenizer

STEPS, EVERY, BATCH = 24, 6, 4
MODES = ("none", "blocking", "background")
SIZES = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "num_attention_heads": 8}


def checkpoint_class() -> type:
    """A `StageCheckpoint` that times what training waits for."""
    from sdpo_lightning import StageCheckpoint

    class Timed(StageCheckpoint):
        blocked = first = seconds = within = 0.0
        depth = 0

        @contextmanager
        def _timing(self) -> Iterator[None]:
            self.depth += 1
            began = time.perf_counter()
            yield
            self.depth -= 1
            if not self.depth and self.first:
                self.blocked += time.perf_counter() - began

        def _save_checkpoint(self, trainer: Any, filepath: str) -> None:
            with self._timing():
                super()._save_checkpoint(trainer, filepath)

        def settle(self, trainer: Any) -> None:
            with self._timing():
                super().settle(trainer)

        def on_train_batch_end(
            self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
            if trainer.global_step == 1:
                self.first = time.perf_counter()
            if trainer.global_step == STEPS - 1:
                self.seconds, self.within = time.perf_counter() - self.first, self.blocked

    return Timed


def run_rank(folder: Path, mode: str) -> None:
    """One rank of one run."""
    import lightning.pytorch as pl
    import torch

    from sdpo_lightning import BackgroundWrites, CurriculumDataModule, DPOLitModule, PreferenceSource

    torch.set_num_threads(1)
    pl.seed_everything(0)
    every = 10**6 if mode == "none" else EVERY
    writes = BackgroundWrites() if mode == "background" else None
    timed = checkpoint_class()(every_n_train_steps=every, writes=writes)
    module = DPOLitModule(str(folder / "model"))
    data = CurriculumDataModule(
        [PreferenceSource("pairs", str(folder / "pairs.jsonl"))], batch_size=BATCH, max_length=128
    )
    trainer = pl.Trainer(
        default_root_dir=folder / f"run-{mode}", callbacks=[timed], strategy="fsdp2", devices=2, accelerator="cpu",
        logger=False, enable_progress_bar=False,
    )  # fmt: skip
    trainer.fit(module, data)
    if trainer.is_global_zero:
        assert trainer.global_step == STEPS, trainer.global_step
        written = next((folder / f"run-{mode}" / "checkpoints").glob("*.ckpt"))
        size = sum(file.stat().st_size for file in written.iterdir())
        figures = {"seconds": timed.seconds, "blocked": timed.within, "checkpoint_bytes": size}
        (folder / "figures.json").write_text(json.dumps(figures))
    torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(0)


def prepare(folder: Path) -> int:
    """Write pairs, tokenizer and model.

    Returns:
        The number of weights.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    write_rows(folder / "pairs.jsonl", STEPS * BATCH * 2)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, pad_token_id=0, eos_token_id=1, **SIZES))
    model.save_pretrained(folder / "model")
    write_tokenizer(folder / "model")
    return sum(weight.numel() for weight in model.parameters())


def measure(folder: Path, mode: str) -> dict[str, float]:
    """One run on two ranks."""
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    root = str(Path(__file__).resolve().parent.parent)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([root, *sys.path]), "OMP_NUM_THREADS": "1"}
    rank = ["-m", "benchmarks.async_saves", "--rank-in", str(folder), "--mode", mode]
    done = subprocess.run([*words, *rank], env=environment, cwd=root, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    subprocess.run(["rm", "-r", str(folder / f"run-{mode}")], check=True)
    return json.loads((folder / "figures.json").read_text())


def main() -> None:
    """Run all modes and print the shares."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--json")
    parser.add_argument("--rank-in", help=argparse.SUPPRESS)
    parser.add_argument("--mode", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank_in:
        run_rank(Path(options.rank_in), options.mode)
        return
    report: dict[str, Any] = {"runs": {mode: [] for mode in MODES}, "steps": STEPS, "save_every": EVERY}
    report["versions"] = {name: version(name) for name in ("torch", "lightning")}
    report["versions"]["python"] = platform.python_version()
    report["load_at_start"] = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        report["weights"] = prepare(Path(folder))
        for _ in range(options.repeats):
            for mode in MODES:
                figures = measure(Path(folder), mode)
                report["runs"][mode].append(figures)
                print(mode, {name: round(value, 2) for name, value in figures.items()}, flush=True)
    plain = statistics.median(run["seconds"] for run in report["runs"]["none"])
    for mode in MODES[1:]:
        shares = [run["blocked"] / run["seconds"] for run in report["runs"][mode]]
        slower = [run["seconds"] / plain - 1 for run in report["runs"][mode]]
        report[mode] = {"blocked_share": shares, "slower": slower}
        print(f"{mode}: blocked {[f'{s:.1%}' for s in shares]}, slower {[f'{s:.1%}' for s in slower]}")
    if options.json:
        Path(options.json).write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
