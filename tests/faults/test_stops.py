"""Cases 12, 13, 31, 32 and early ends: signals, non-finite steps, two processes, a finished run."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from dataclasses import replace

import pytest
import torch
from harness import CONTEXT, Job, compare, run_cli, saves
from runs import reproducible, weights

CODES = {signal.SIGTERM: 143, signal.SIGINT: 130}


# ---- case 12


@pytest.mark.parametrize("number", CODES)
@pytest.mark.parametrize("place", ["ranking", "step", "validation", "export", "reference"])
def test_a_signal_ends_at_a_step_and_the_rerun_is_exact(job, whole, place, number):
    if place == "reference":
        job = replace(job, reference="CachedReference")
    ended = job.start({"SDPO_SIGNAL": f"{place}:{int(number)}"})
    assert ended.code == CODES[number], ended.text
    assert "Traceback" not in ended.text
    if place in ("step", "validation", "export"):
        assert "start the same command to go on" in ended.text
    if place == "step":
        # It arrives within step 5, and that step is kept.
        assert len(reproducible(job.run_dir)) == 5
        assert [path.name for path in (job.run_dir / "checkpoints").glob("*.ckpt")] == ["stopped-step=5.ckpt"]
    ended = job.start()
    assert ended.code == 0, ended.text
    compare(whole(job.reference)[0].run_dir, job.run_dir)


def test_a_second_signal_ends_at_once(job, whole):
    ended = job.start({"SDPO_SIGNAL": "twice:15"})
    assert ended.code == 143, ended.text
    # Within step 5: it isn't kept.
    assert len(reproducible(job.run_dir)) == 4
    ended = job.start()
    assert ended.code == 0, ended.text
    compare(whole()[0].run_dir, job.run_dir)


# ---- ends that are no faults


def test_max_steps_leaves_the_stage_open_and_the_rerun_goes_on(job, whole):
    ended = replace(job, more=("--trainer.max_steps=5",)).start()
    assert ended.code == 0 and "stopped inside stage 2" in ended.text, ended.text
    status = [stage["status"] for stage in json.loads((job.run_dir / "ledger.json").read_text())["stages"]]
    assert status == ["done", "open"]
    ended = job.start()
    assert ended.code == 0, ended.text
    compare(whole()[0].run_dir, job.run_dir)


# ---- case 13


@pytest.mark.parametrize("defect", ["nan_weight", "minus_inf_logps"])
def test_a_non_finite_step_is_not_taken(job, whole, defect):
    ended = job.start(defect=defect)
    assert ended.code == 1, ended.text
    [line] = [line for line in ended.text.splitlines() if line.startswith("error:")]
    assert "before optimizer step 6" in line and "Traceback" not in ended.text
    row = (whole()[0].run_dir / "rows.txt").read_text().splitlines()[5].partition(":")[2]
    first = json.loads(row)[0]
    assert str(first) in line
    [checkpoint] = (job.run_dir / "checkpoints").glob("*.ckpt")
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert all(bool(tensor.isfinite().all()) for tensor in state.values())
    for folder in (job.run_dir / "stages").iterdir():
        assert all(bool(tensor.isfinite().all()) for tensor in weights(folder).values())
    ended = job.start()
    assert ended.code == 0, ended.text
    compare(whole()[0].run_dir, job.run_dir)


# ---- cases 31 and 32


def test_a_second_process_is_refused(job):
    first = CONTEXT.Process(
        target=run_cli, args=(job.words(), {"SDPO_SIGNAL": "wait:0"}, str(job.folder / "first.txt"), None)
    )
    first.start()
    lock = job.run_dir / ".lock"
    until = time.monotonic() + 60
    while not (lock.exists() and lock.read_text()) and time.monotonic() < until:
        time.sleep(0.02)
    ended = job.start()
    first.kill()
    first.join()
    assert ended.code == 2 and f'"pid": {first.pid}' in ended.text, ended.text
    # What it left is taken over.
    ended = job.start()
    assert ended.code == 0 and f'"pid": {first.pid}' in ended.text, ended.text


def _snapshot(job: Job) -> dict[str, tuple[int, int]]:
    files = (path for path in job.run_dir.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in files}


@pytest.mark.parametrize("more", [(), ("--model.reference=CachedReference", "--data.merge_ties=true")])
def test_a_finished_run_is_left_alone(job, more):
    job = replace(job, more=more)
    assert job.start().code == 0
    before = _snapshot(job)
    ended = job.start()
    assert ended.code == 0 and "already complete" in ended.text, ended.text
    assert _snapshot(job) == before


def test_a_stage_can_be_added_at_the_end(job, tiny_model_dir):
    """Stages 1 to 3 and then 4 in a second command are the four stages in one."""
    assert job.start().code == 0
    longer = replace(job, added=True)
    ended = longer.start()
    assert ended.code == 0 and "new stages at the end of the plan: d" in ended.text, ended.text
    ledger = json.loads((job.run_dir / "ledger.json").read_text())["stages"]
    assert [stage["name"] for stage in ledger][3:] == ["d"]
    assert [ledger[3]["reference"][k] == ledger[2]["output"][k] for k in ("folder", "sha256")] == [True, True]
    rows = reproducible(job.run_dir)
    first = next(row for row in rows if row["stage/index"] == "4")
    assert float(first["train/loss"]) == pytest.approx(math.log(2), abs=1e-6)
    # From here on the shorter command is another plan.
    ended = job.start()
    assert ended.code == 3 and "data.stages" in ended.text, ended.text


def test_saves_are_where_the_tests_think_they_are(whole):
    job, _ = whole()
    assert {stage for stage, ends in saves(job.run_dir) if not ends} == {1, 2, 3}
    assert os.listdir(job.run_dir / "checkpoints") != []
