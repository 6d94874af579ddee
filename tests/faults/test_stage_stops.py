"""A stage that a stop rule ends, and one that keeps its best weights: ended anywhere, the rerun is exact."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from harness import Job, compare
from runs import reproducible

# After the first validation of a stage none is an improvement; each step has one, so each stage has two steps.
RULE = {"stop": {"patience": 1, "min_delta": 100.0}, "stage_weights": {"class_path": "sdpo_lightning.BestOfStage"}}
MORE = (
    "--trainer.val_check_interval=1",
    f"--trainer.callbacks+={json.dumps({'class_path': 'sdpo_lightning.StageTransition', 'init_args': RULE})}",
)


@pytest.fixture(scope="module")
def stopped(tiny_model_dir, tmp_path_factory) -> Job:
    job = Job(tmp_path_factory.mktemp("stopped"), tiny_model_dir, more=MORE)
    ended = job.start()
    assert ended.code == 0, ended.text
    assert [row["stage/index"] for row in reproducible(job.run_dir)] == ["1", "1", "2", "2", "3", "3"]
    return job


def statuses(job: Job) -> list[str]:
    return [stage["status"] for stage in json.loads((job.run_dir / "ledger.json").read_text())["stages"]]


def test_a_signal_is_heeded_after_the_validation_of_its_step(job, stopped):
    """It arrives within the first validation of stage 2, after step 3: that stage isn't over, and M_2 isn't there."""
    job = replace(job, more=MORE)
    ended = job.start({"SDPO_SIGNAL": "validation:15"})
    assert ended.code == 143 and "stopped by a signal at step 3" in ended.text, ended.text
    assert statuses(job) == ["done", "open"] and len(list((job.run_dir / "stages").iterdir())) == 1
    assert [path.name for path in (job.run_dir / "checkpoints").glob("*.ckpt")] == ["stopped-step=3.ckpt"]
    rows = reproducible(job.run_dir)
    assert len(rows) == 3 and rows[-1]["val/a/loss"]
    assert job.start().code == 0
    compare(stopped.run_dir, job.run_dir)


@pytest.mark.slow
@pytest.mark.parametrize(
    "place",
    ["after_checkpoint:1", "after_checkpoint:2", "before_export:1", "after_export:2", "after_ledger:1",
     "after_advance:2", "after_open:3", "after_swap:2"],
)
def test_killed_anywhere_around_a_stop(job, stopped, place):
    job = replace(job, more=MORE)
    assert job.start({"SDPO_FAILPOINT": place}).code == 137
    ended = job.start()
    assert ended.code == 0, ended.text
    compare(stopped.run_dir, job.run_dir)
