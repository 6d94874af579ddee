"""Runs of ranks that `torchrun` has started, with stages of made pairs: `made_script.py OUT MODEL SCENARIO...`.

Data and prompts are read from OUT; each scenario leaves its run in OUT/<scenario>, and what each rank met in
OUT/<scenario>-<rank>.txt.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from runs import fit, run_as_rank

from sdpo_lightning import (
    AdapterReference,
    LoraSettings,
    PreferenceSource,
    SampledPairs,
    StageCheckpoint,
    VLLMPairGenerator,
)
from sdpo_lightning.data import datamodule, model_before
from sdpo_lightning.data.pair_generators import PairGenerator
from sdpo_lightning.generation_transformers import FolderGenerator
from sdpo_lightning.stopping import STOP


def by_words(prompt, answers):
    """More words are better."""
    return [float(len(answer.split())) for answer in answers]


def broken(prompt, answers):
    """A scorer of the user's that fails."""
    raise KeyError("no reward")


def sampled(out: Path, **given) -> SampledPairs:
    """The stage of made pairs."""
    default = {"name": "new", "num_pairs": 4, "prompts": str(out / "prompts.jsonl"), "scorer": "made_script.by_words"}
    return SampledPairs(**default | {"answers": 4, "max_new_tokens": 6} | given)


@dataclass(frozen=True)
class FromFolder(PairGenerator):
    """Stands for a program that reads M_{t-1}'s folder: transformers, in this process."""

    def open(self, folder, devices):
        """As `PairGenerator.open`; the weights of the trainer must be away."""
        return FolderGenerator(folder, device="cpu", dtype="float32")


def train(out: Path, model: str, run: Path, strategy: str | None, made: list, **given):
    """One `fit` with a global batch of two."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    trainer = {} if strategy is None else {"devices": ranks, "strategy": strategy}
    data = {"batch_size": 2 // ranks, "pair_sources": made, "answer_tokens": None} | given
    return fit(run, model, [PreferenceSource("a", str(out / "a.jsonl"))], trainer_args=trainer, **data)


def ddp(out, model, run):
    """Rank 0's policy answers."""
    train(out, model, run, "ddp", [sampled(out), sampled(out, name="last", num_pairs=2, seed=1)])


def fsdp2(out, model, run):
    """A folder of the whole model answers; every step is saved."""
    every = StageCheckpoint(every_n_train_steps=1, save_top_k=-1, filename="{step}")
    train(out, model, run, "fsdp2", [sampled(out), sampled(out, name="last", num_pairs=2, seed=1)], callbacks=[every])


def fsdp2_lora(out, model, run):
    """An adapter folder."""
    given = {"module_args": {"lora": LoraSettings(r=4)}, "reference": AdapterReference()}
    train(out, model, run, "fsdp2", [sampled(out)], **given)


def fsdp2_resumed(out, model, run):
    """Goes on from the end of stage 1 of `fsdp2`, with its rows."""
    checkpoint = out / "fsdp2" / "checkpoints" / "step=3.ckpt"
    inner = SampledPairs.pairs

    def asked(source, generator, stage_index):
        raise AssertionError("rows are made again")

    SampledPairs.pairs = asked
    made = [sampled(out), sampled(out, name="last", num_pairs=2, seed=1)]
    try:
        train(out, model, out / "fsdp2", "fsdp2", made, ckpt_path=checkpoint)
    finally:
        SampledPairs.pairs = inner


def ddp_vllm(out, model, run):
    """A process answers for vLLM."""
    train(out, model, run, "ddp", [sampled(out)], pair_generator=VLLMPairGenerator(python=sys.executable))


def fsdp2_vllm(out, model, run):
    """As above, from shards; each rank notes what it holds of them meanwhile."""
    released = model_before.memory_released

    @contextmanager
    def noted(models, optimizers, device):
        local = [p.to_local().untyped_storage() for model in models for p in model.parameters()]
        before = sum(storage.nbytes() for storage in local)
        with released(models, optimizers, device):
            now = sum(storage.nbytes() for storage in local)
            (out / f"held-{os.environ['RANK']}.txt").write_text(f"{before > 0} {now}")
            yield

    model_before.memory_released = noted
    try:
        train(out, model, run, "fsdp2", [sampled(out)], pair_generator=VLLMPairGenerator(python=sys.executable))
    finally:
        model_before.memory_released = released


def too_few(out, model, run):
    """Fewer rows than declared."""
    train(out, model, run, "ddp", [sampled(out, num_pairs=90)])


def scorer_fails(out, model, run):
    """An error that only rank 0 meets, while shards are put aside."""
    train(out, model, run, "fsdp2", [sampled(out, scorer="made_script.broken")])


class HeardInPass(SampledPairs):
    """The second rank has been asked to stop by the time that rank 0 samples; rank 0 only hears of it."""

    def pairs(self, generator, stage_index):
        """Rows without end."""
        while True:
            time.sleep(0.05)
            yield "nothing"


def stopped(out, model, run):
    """A signal that only the second rank hears, while rank 0 samples."""
    made = HeardInPass(**vars(sampled(out)))
    settle = datamodule.settle_all

    def signalled(trainer):
        # The last thing before the others wait for rank 0.
        settle(trainer)
        if os.environ["RANK"] == "1":
            STOP.signal = signal.SIGTERM

    datamodule.settle_all = signalled
    try:
        train(out, model, run, "ddp", [made])
    finally:
        datamodule.settle_all, STOP.signal = settle, None


def main() -> None:
    """Run the scenarios one after the other."""
    out, model = Path(sys.argv[1]), sys.argv[2]
    for name in sys.argv[3:]:
        try:
            globals()[name](out, model, out / name)
            said = "done"
        except BaseException as error:  # noqa: BLE001
            said = f"{type(error).__name__}: {error}"
        (out / f"{name}-{os.environ['RANK']}.txt").write_text(said)


if __name__ == "__main__":
    run_as_rank(main)
