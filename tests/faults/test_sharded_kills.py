"""Cases 1 to 8, 10 and 12 with two ranks (gloo) whose weights and checkpoints are cut by `fsdp2`."""

from __future__ import annotations

import random
import signal
import time
from dataclasses import replace

import pytest
from harness import LIMIT, Job, compare
from test_files import checkpoints, cut_in_half, flip_a_byte

TWO = ("--trainer.devices=2", "--trainer.strategy=fsdp2")
BLOCKING, BACKGROUND = "Checkpoints", "BackgroundCheckpoints"
KILLED = -signal.SIGKILL
# Second passings: the checkpoint at step 3 or 4, the boundary before stage 3.
CHECKPOINT = ("mid_checkpoint", "before_checkpoint", "after_checkpoint")
BOUNDARY = ("before_export", "mid_export", "before_rename", "after_export", "after_ledger")
BOUNDARY += ("after_advance", "after_open", "after_swap")
FAST = {("mid_checkpoint", "both", BACKGROUND), ("before_checkpoint", "rank 1", BACKGROUND)}
FAST |= {("after_ledger", "both", BLOCKING)}
CASES = [
    pytest.param(point, who, kind, marks=() if (point, who, kind) in FAST else pytest.mark.slow)
    for kind, points in ((BLOCKING, CHECKPOINT + BOUNDARY), (BACKGROUND, CHECKPOINT))
    for point in points
    for who in ("both", "rank 1")
]


def said(job: Job) -> str:
    return "".join((job.folder / f"output-{rank}.txt").read_text() for rank in (0, 1))


@pytest.fixture(scope="module")
def sharded(tiny_model_dir, tmp_path_factory) -> Job:
    """The uninterrupted run of two ranks."""
    job = Job(tmp_path_factory.mktemp("sharded"), tiny_model_dir, more=TWO)
    assert job.start_ranks(2) == [0, 0], said(job)
    # Folders of shards, one file a rank.
    assert {len(list(path.glob("*.distcp"))) for path in checkpoints(job)} == {2}
    return job


def dies(job: Job, point: str, number: int, who: str) -> None:
    """Kill both ranks, or rank 1 alone, where rank 0 reaches a failpoint."""
    where = {"SDPO_FAILPOINT": f"{point}:{number}", "SDPO_DIES": who}
    first, second = job.start_ranks(2, {0: where, 1: {"SDPO_DIES": who}})
    # Rank 0 notices by itself that it is alone.
    assert second == KILLED and (first == KILLED if who == "both" else first > 0), (first, second, said(job))


def goes_on(job: Job, whole: Job) -> None:
    """The same command again ends as if nothing had happened."""
    assert job.start_ranks(2) == [0, 0], said(job)
    compare(whole.run_dir, job.run_dir)
    assert (whole.run_dir / "rows-1.txt").read_text() == (job.run_dir / "rows-1.txt").read_text()


@pytest.mark.parametrize("point, who, kind", CASES)
def test_killed_at_a_failpoint(job, sharded, point, who, kind):
    job = replace(job, more=TWO, checkpoints=kind)
    dies(job, point, 2, who)
    goes_on(job, sharded)


def test_background_writes_change_nothing(job, sharded):
    goes_on(replace(job, more=TWO, checkpoints=BACKGROUND), sharded)
    # What was written last, and nothing else.
    assert [path.name for path in checkpoints(job)] == [path.name for path in checkpoints(sharded)]


@pytest.mark.parametrize(
    "kind, damage",
    [pytest.param(BLOCKING, cut_in_half, marks=pytest.mark.slow), (BACKGROUND, flip_a_byte)],
)
def test_a_damaged_shard(job, sharded, kind, damage):
    job = replace(job, more=TWO, checkpoints=kind)
    # At the boundary of stage 2 no save is under way; the next one stands beside the one that it replaces.
    dies(job, "after_checkpoint", 3, "both")
    newest, older = checkpoints(job)[:2]
    damage(next(newest.glob("__1_*.distcp")))
    goes_on(job, sharded)
    lines = [line for line in said(job).splitlines() if line.startswith("damaged:")]
    assert lines and all(newest.name in line and older.name in line for line in lines)


@pytest.mark.parametrize(
    "kind, rank", [pytest.param(BLOCKING, 0, marks=pytest.mark.slow), (BACKGROUND, 1)]
)
def test_sigterm_to_one_rank(job, sharded, kind, rank):
    job = replace(job, more=TWO, checkpoints=kind)
    # On the first batch of stage 3: within its step, or in the pass over held-out pairs that comes before.
    codes = job.start_ranks(2, {rank: {"SDPO_SIGNAL": f"step:{int(signal.SIGTERM)}"}})
    assert codes == [143, 143], said(job)
    [stopped] = checkpoints(job)
    assert stopped.name in ("epoch=1-step=4.ckpt", "stopped-step=5.ckpt") and stopped.is_dir()
    goes_on(job, sharded)


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
@pytest.mark.parametrize("kind", [pytest.param(BLOCKING, marks=pytest.mark.slow), BACKGROUND])
def test_a_full_disk_of_one_rank_ends_both(job, sharded, kind, rank):
    job = replace(job, more=TWO, checkpoints=kind)
    # A rank's shards have more than 100 kB.
    codes = job.start_ranks(2, {rank: {"SDPO_FILE_LIMIT": "100000"}})
    assert codes == [1, 1], said(job)
    assert "Traceback" not in said(job)
    errors = [line for line in said(job).splitlines() if line.startswith("error:")]
    assert len(errors) == 2 and all(".ckpt" in line and str(job.run_dir) in line for line in errors), errors
    assert list((job.run_dir / "checkpoints").iterdir()) == []
    goes_on(job, sharded)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_random_kills_of_both(job, sharded, seed):
    moments = random.Random(seed)
    job = replace(job, more=TWO, checkpoints=BACKGROUND)
    for _ in range(2):
        processes = job.launch_ranks(2)
        time.sleep(moments.uniform(2.0, 8.0))
        for process in processes:
            process.kill()
        for process in processes:
            process.join(LIMIT)
    goes_on(job, sharded)


# ---- one process


@pytest.mark.parametrize("point", [*CHECKPOINT, pytest.param("after_swap", marks=pytest.mark.slow)])
def test_one_process_in_the_background(job, whole, point):
    job = replace(job, checkpoints=BACKGROUND)
    ended = job.start({"SDPO_FAILPOINT": f"{point}:2"})
    assert ended.code == 137, ended.text
    ended = job.start()
    assert ended.code == 0, ended.text
    compare(whole()[0].run_dir, job.run_dir)


def test_one_process_with_a_full_disk(job, whole):
    job = replace(job, checkpoints=BACKGROUND)
    ended = job.start({"SDPO_FILE_LIMIT": "100000"})
    assert ended.code == 1 and "Traceback" not in ended.text, ended.text
    [line] = [line for line in ended.text.splitlines() if line.startswith("error:")]
    assert str(job.run_dir) in line and "bytes" in line and ".ckpt" in line
    assert list((job.run_dir / "checkpoints").iterdir()) == []
    ended = job.start()
    assert ended.code == 0, ended.text
    compare(whole()[0].run_dir, job.run_dir)
