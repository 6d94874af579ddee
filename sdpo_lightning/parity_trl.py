"""Rank 2: TRL's side of `parity`, a program of its own: `python -m sdpo_lightning.parity_trl JOB`.

T runs of `DPOTrainer`, each from the model that the one before has left, read twice: as policy and as reference.
"""

from __future__ import annotations

import gc
import json
import logging
import shutil
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sdpo_lightning.memory import peak_resident
from sdpo_lightning.schedules import warmup_steps


def main(path: str) -> None:
    """Train, and write what was measured beside the job.

    Args:
        path: of the job: `settings` of `parity.trl_settings`, `stages` with the ids of their pairs, `scratch`, `out`.
    """
    import trl  # noqa: F401

    job = json.loads(Path(path).read_text())
    logging.getLogger("transformers").setLevel(logging.ERROR)
    scratch, settings = Path(job["scratch"]), job["settings"]
    imported, start = peak_resident(), settings["model"]
    found: dict[str, Any] = {"losses": {}, "grad_norms": {}, "seconds": 0.0, "pairs": 0}
    for number, stage in enumerate(job["stages"], 1):
        target = scratch / f"m{number}" if number < len(job["stages"]) else None
        losses, norms, seconds = train(settings, stage["pairs"], start, scratch / f"run{number}", target)
        found["losses"][stage["name"]], found["grad_norms"][stage["name"]] = losses, norms
        found["seconds"] += seconds
        found["pairs"] += len(stage["pairs"])
        if number > 1:
            # Nobody needs M_{t-1} once M_t is there.
            shutil.rmtree(start)
        start = str(target)
        gc.collect()
    cuda = settings["cuda"]
    found["peak"] = torch.cuda.max_memory_allocated() if cuda else peak_resident() - imported
    Path(job["out"]).write_text(json.dumps(found))


def train(
    settings: dict[str, Any], pairs: list[dict[str, list[int]]], start: str, out: Path, target: Path | None
) -> tuple[list[float], list[float], float]:
    """One run of TRL.

    Args:
        settings: see `parity.trl_settings`.
        pairs: ids of prompt, chosen and rejected of each pair, in the order of training.
        start: M_{t-1}, policy and reference.
        out: TRL's own folder.
        target: where M_t goes; None leaves it unwritten.

    Returns:
        Loss and gradient norm of each step, and the seconds of all steps.
    """
    import trl
    from datasets import Dataset

    made = settings["config"]
    accumulate = made["gradient_accumulation_steps"]
    steps = len(pairs) // (made["per_device_train_batch_size"] * accumulate)
    config = trl.DPOConfig(output_dir=str(out), warmup_steps=warmup_steps(steps, settings["warmup_ratio"]), **made)
    device = "cuda" if settings["cuda"] else "cpu"
    models: list[Any] = [AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32) for _ in range(2)]
    model, reference = (model.to(device) for model in models)
    trainer = _ordered()(
        model,
        reference,
        config,
        train_dataset=Dataset.from_list(pairs),
        processing_class=AutoTokenizer.from_pretrained(settings["tokenizer"]),
        optimizers=(_optimizer(settings["optimizer"], model), None),
    )
    clock = _clock()
    trainer.add_callback(clock)
    trainer.train()
    norms = [row["grad_norm"] for row in trainer.state.log_history if "grad_norm" in row]
    parts = [trainer.micro_losses[i : i + accumulate] for i in range(0, len(trainer.micro_losses), accumulate)]
    if target is not None:
        trainer.model.save_pretrained(target)
    return [sum(part) / len(part) for part in parts], norms, clock.seconds


def _optimizer(given: dict[str, Any], model: torch.nn.Module) -> torch.optim.Optimizer:
    """`model.optimizer` over all weights; TRL's own would exempt biases and norms from weight decay."""
    module, _, name = given["class_path"].rpartition(".")
    return getattr(import_module(module), name)(model.parameters(), **(given.get("init_args") or {}))


def _ordered() -> type:
    """`DPOTrainer` on pairs that are tokenised already, in their order, with the losses unrounded."""
    import trl
    from torch.utils.data import SequentialSampler

    class Ordered(trl.DPOTrainer):
        micro_losses: list[float] = []

        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            """As they are."""
            return dataset

        def _get_train_sampler(self, dataset: Any = None) -> SequentialSampler:
            """In their order."""
            return SequentialSampler(dataset if dataset is not None else self.train_dataset)

        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            """Also note the loss of the micro-batch."""
            found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            self.micro_losses.append((found[0] if return_outputs else found).item())
            return found

    return Ordered


def _clock() -> Any:
    """Measures the steps of a run."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.seconds, self._began = 0.0, 0.0

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            """Look at the clock."""
            self._began = now()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            """Add the step's seconds."""
            self.seconds += now() - self._began

    return Clock()


def now() -> float:
    """Seconds, once the device has done what it was asked to."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main(sys.argv[1])
