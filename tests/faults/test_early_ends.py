"""Ends that are no faults: `max_steps`, `max_time`, EarlyStopping. The stage stays open, and a rerun goes on."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from harness import Job, compare
from helpers import make_rows, write_jsonl
from runs import fit, metrics, reproducible

from sdpo_lightning import PreferenceSource, StageCheckpoint

# Stages of 3, 3 and 5 steps.
LAST = [3, 6, 11]


def statuses(job: Job) -> list[str]:
    return [stage["status"] for stage in json.loads((job.run_dir / "ledger.json").read_text())["stages"]]


def stops_at(job: Job, step: int, *words: str) -> str:
    """Run a job that ends by itself after a step, which leaves a checkpoint; what it printed."""
    ended = replace(job, more=(*job.more, *words)).start()
    assert ended.code == 0 and "Traceback" not in ended.text, ended.text
    stage = next(number for number, last in enumerate(LAST, 1) if step <= last)
    assert f"stopped inside stage {stage} " in ended.text and f"M_{stage} is not exported" in ended.text
    assert statuses(job) == ["done"] * (stage - 1) + ["open"]
    assert len(list((job.run_dir / "stages").iterdir())) == stage - 1
    assert [int(row["step"]) for row in reproducible(job.run_dir)] == list(range(1, step + 1))
    [checkpoint] = (job.run_dir / "checkpoints").glob("*.ckpt")
    assert f"step={step}" in checkpoint.name
    return ended.text


def finishes(job: Job, whole: Job, validated: int | None = None) -> None:
    ended = job.start()
    assert ended.code == 0, ended.text
    compare(whole.run_dir, job.run_dir, validated)


def early_stopping(patience: int) -> str:
    """Of a held-out loss that would have to fall by 100 nats: after the first validation none is an improvement."""
    arguments = {"monitor": "val/a/loss", "min_delta": 100.0, "patience": patience}
    given = {"class_path": "lightning.pytorch.callbacks.EarlyStopping", "init_args": arguments}
    return f"--trainer.callbacks+={json.dumps(given)}"


def test_the_stages_end_where_these_tests_think(whole):
    stages = [row["stage/index"] for row in reproducible(whole()[0].run_dir)]
    assert [len(stages) - stages[::-1].index(stage) for stage in "123"] == LAST


def test_max_steps_raised_again_and_again(job, whole):
    """Within stage 2, at its end, and within stage 3: the next stage is trained, not passed over."""
    for step in (4, 6, 9):
        stops_at(job, step, f"--trainer.max_steps={step}")
    finishes(job, whole()[0])


@pytest.mark.parametrize("step", [4, 6])
def test_max_steps_that_is_used_up_is_named(job, step):
    stops_at(job, step, f"--trainer.max_steps={step}")
    before = metrics(job.run_dir)
    ended = replace(job, more=(f"--trainer.max_steps={step}",)).start()
    assert ended.code == 0 and "no step was taken: `trainer.max_steps`" in ended.text, ended.text
    assert metrics(job.run_dir) == before


def test_max_time(job, whole):
    """50 minutes, of which an hour passes in step 5. It counts over all starts of a run."""
    limit = "--trainer.max_time=00:00:50:00"
    stops_at(job, 5, limit, "--trainer.callbacks+=child.Hour")
    ended = replace(job, more=(limit,)).start()
    assert ended.code == 0 and "or `trainer.max_time` is used up; raise it to go on" in ended.text, ended.text
    # Lightning validates where it stops early.
    finishes(replace(job, more=("--trainer.max_time=00:02:00:00",)), whole()[0], validated=5)


def test_early_stopping_at_a_stages_end(job, whole):
    """A validation at the end of each stage; the second one is no better than the first."""
    stops_at(job, 6, early_stopping(patience=1))
    finishes(job, whole()[0])


@pytest.mark.parametrize("more", [(), (early_stopping(patience=20),)], ids=["without", "more patience"])
def test_early_stopping_within_a_stage(job, more):
    """Validations after steps 1, 2, 3 (stage 1), 4, 5: the four after the first one are no better."""
    job = replace(job, more=("--trainer.val_check_interval=0.5",))
    whole = replace(job, folder=job.folder / "whole")
    whole.folder.mkdir()
    assert whole.start().code == 0
    stops_at(job, 5, early_stopping(patience=4))
    finishes(replace(job, more=(*job.more, *more)), whole)


def test_the_first_micro_batch_after_a_resume_ends_no_step(tmp_path, tiny_model_dir, monkeypatch):
    """Saved after step 2, gone on with micro-batches 5, 6 (step 3), ...: none is saved within an accumulation."""
    sources = [PreferenceSource("a", str(write_jsonl(tmp_path / "a.jsonl", make_rows(11, 0, "a"))))]
    places = []
    save = StageCheckpoint._save_checkpoint

    def saves(self, trainer, path):
        progress = trainer.fit_loop.epoch_loop.batch_progress
        places.append((trainer.global_step, progress.current.ready % 2, trainer.is_last_batch))
        save(self, trainer, path)

    monkeypatch.setattr(StageCheckpoint, "_save_checkpoint", saves)
    args = {"trainer_args": {"accumulate_grad_batches": 2}, "batch_size": 1}
    stop = {"trainer_args": args["trainer_args"] | {"max_steps": 2}, "batch_size": 1}
    fit(tmp_path / "run", tiny_model_dir, sources, callbacks=[StageCheckpoint(every_n_train_steps=2)], **stop)
    [path] = (tmp_path / "run" / "checkpoints").glob("*.ckpt")
    before = len(places)
    fit(tmp_path / "run", tiny_model_dir, sources, path, callbacks=[StageCheckpoint(every_n_train_steps=2)], **args)
    assert [step for step, _, _ in places[before:]][0] > 2
    assert all(within == 0 or last for _, within, last in places)
