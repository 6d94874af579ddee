"""Cases 1 to 7: a run killed anywhere and started again is bit for bit the uninterrupted run."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from conftest import REFERENCES
from harness import Job, compare, killed_within

# name of the failpoint -> how often a run passes it.
BOUNDARY = {
    "mid_export": 3,
    "before_export": 3,
    "before_rename": 3,
    "after_export": 3,
    "after_ledger": 3,
    "after_advance": 3,
    "after_open": 3,
    "after_swap": 3,
}
CHECKPOINT = {"mid_checkpoint": 6, "before_checkpoint": 6, "after_checkpoint": 6}
CACHED = {"mid_precompute": 3, "before_publish": 3}


def dies_and_goes_on(job: Job, whole: Job, point: str, number: int) -> None:
    ended = job.start({"SDPO_FAILPOINT": f"{point}:{number}"})
    assert ended.code == 137, ended.text
    ended = job.start()
    assert ended.code == 0, ended.text
    compare(whole.run_dir, job.run_dir)


@pytest.mark.parametrize("point", [*BOUNDARY, *CHECKPOINT])
def test_the_second_passing(job, whole, point):
    dies_and_goes_on(job, whole()[0], point, 2)


@pytest.mark.parametrize("point", CACHED)
def test_the_second_passing_with_a_cache(job, whole, point):
    # Two sources are ranked first: passing 1 is the ranking's.
    dies_and_goes_on(replace(job, reference="CachedReference"), whole("CachedReference")[0], point, 2)


@pytest.mark.slow
@pytest.mark.parametrize("reference", REFERENCES)
@pytest.mark.parametrize(
    "point, number", [(p, n) for p, most in (BOUNDARY | CHECKPOINT | CACHED).items() for n in range(1, most + 1)]
)
def test_every_failpoint(job, whole, reference, point, number):
    if point in CACHED and reference != "CachedReference":
        pytest.skip("a resident reference computes nothing beforehand")
    dies_and_goes_on(replace(job, reference=reference), whole(reference)[0], point, number)


def kill_after(seconds: float):
    def meanwhile(pid: int, began: float) -> None:
        time.sleep(max(0.0, began + seconds - time.monotonic()))
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass

    return meanwhile


def kill_at_random(job: Job, whole: Job, longest: float, seed: int) -> None:
    """Kill up to three times, each time the same command."""
    moments = random.Random(seed)
    for _ in range(3):
        ended = job.start(meanwhile=kill_after(moments.uniform(0.3, longest)))
        assert ended.code in (-signal.SIGKILL, 0), ended.text
    ended = job.start()
    assert ended.code == 0, ended.text
    compare(whole.run_dir, job.run_dir)


def test_random_kills(job, whole):
    reference, seconds = whole()
    kill_at_random(job, reference, seconds, 0)


@pytest.mark.slow
@pytest.mark.parametrize("reference", REFERENCES)
@pytest.mark.parametrize("seed", range(1, 11))
def test_many_random_kills(job, whole, reference, seed):
    ours, seconds = whole(reference)
    kill_at_random(replace(job, reference=reference), ours, seconds, seed)


# ---- the harness itself must be able to fail


def test_control_a_resume_with_the_wrong_reference_is_noticed(job, whole):
    # Within stage 2: its first step was checked, and a resume doesn't check again.
    killed_within(job, whole()[0].run_dir, 2)
    ended = job.start(defect="reference_is_s")
    assert ended.code == 0, ended.text
    with pytest.raises(AssertionError):
        compare(whole()[0].run_dir, job.run_dir)


def test_control_a_reference_that_stays_is_noticed(job, whole):
    ended = job.start(defect="reference_stays")
    assert ended.code == 0, ended.text
    with pytest.raises(AssertionError):
        compare(whole()[0].run_dir, job.run_dir)


@pytest.mark.slow
def test_a_process_that_nothing_was_forked_for(job, whole):
    """As a user starts it: a new interpreter, SIGKILL in the middle, the same command again."""
    command = [sys.executable, "-m", "sdpo_lightning", *job.words()]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    metrics = job.run_dir / "metrics.csv"
    until = time.monotonic() + 100
    while not (metrics.exists() and len(metrics.read_text().splitlines()) > 5) and time.monotonic() < until:
        time.sleep(0.01)
    first.kill()
    first.wait()
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert "going on from" in done.stdout
    compare(whole()[0].run_dir, job.run_dir)
