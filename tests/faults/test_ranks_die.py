"""Cases 18 and 19: two processes (gloo), one of which dies; and a run that goes on with another number of them."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from harness import Job, compare
from runs import losses, metrics

TWO = ("--trainer.devices=2", "--trainer.strategy=ddp")


@pytest.fixture(scope="module")
def two_ranks(tiny_model_dir, tmp_path_factory) -> Job:
    job = Job(tmp_path_factory.mktemp("two"), tiny_model_dir, more=TWO)
    assert job.start_ranks(2) == [0, 0], (job.folder / "output-0.txt").read_text()
    return job


def test_a_rank_that_dies_ends_the_other_and_the_rerun_is_exact(job, two_ranks):
    job = replace(job, more=TWO)
    codes = job.start_ranks(2, {1: {"SDPO_SIGNAL": "step:9"}})
    assert codes[1] == -9 and codes[0] > 0, (job.folder / "output-0.txt").read_text()
    assert job.start_ranks(2) == [0, 0], (job.folder / "output-0.txt").read_text()
    compare(two_ranks.run_dir, job.run_dir)
    assert (two_ranks.run_dir / "rows-1.txt").read_text() == (job.run_dir / "rows-1.txt").read_text()


def test_a_rank_that_dies_while_logps_are_computed(job):
    job = replace(job, more=TWO, reference="CachedReference")
    codes = job.start_ranks(2, {1: {"SDPO_SIGNAL": "reference:9"}})
    assert codes[1] == -9 and codes[0] > 0, (job.folder / "output-0.txt").read_text()
    # Nothing of stage 2 is published.
    tables = sorted(path.name for path in (job.run_dir / "references").glob("[0m]*"))
    assert tables == ["01.safetensors", "m0.safetensors"]
    assert job.start_ranks(2) == [0, 0], (job.folder / "output-0.txt").read_text()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_rank_stops_all(job, two_ranks, rank):
    job = replace(job, more=TWO)
    codes = job.start_ranks(2, {rank: {"SDPO_SIGNAL": "step:15"}})
    assert codes == [143, 143], (job.folder / "output-0.txt").read_text()
    assert job.start_ranks(2) == [0, 0], (job.folder / "output-0.txt").read_text()
    compare(two_ranks.run_dir, job.run_dir)


def pairs(job: Job) -> list[list[int]]:
    """Pair ids of each step, over all ranks, in ascending order."""
    steps: dict[int, list[int]] = {}
    for path in sorted(job.run_dir.glob("rows*.txt")):
        for line in path.read_text().splitlines():
            step, _, ids = line.partition(":")
            steps.setdefault(int(step), []).extend(json.loads(ids))
    return [sorted(steps[step]) for step in sorted(steps)]


@pytest.mark.parametrize("first", [1, 2])
def test_the_same_global_batch_on_another_number_of_ranks(job, two_ranks, first):
    one = replace(job, more=("--data.batch_size=4",))
    two = replace(job, more=TWO)
    stops = "--trainer.max_steps=3"
    if first == 2:
        assert replace(two, more=(*two.more, stops)).start_ranks(2) == [0, 0]
        before = pairs(job)
        (job.run_dir / "rows-1.txt").unlink()
        assert one.start().code == 0
        assert before + pairs(job)[3:] == pairs(two_ranks)
    else:
        assert replace(one, more=(*one.more, stops)).start().code == 0
        assert two.start_ranks(2) == [0, 0], (job.folder / "output-0.txt").read_text()
        assert pairs(job) == pairs(two_ranks)
    assert losses(job.run_dir) == pytest.approx(losses(two_ranks.run_dir), abs=1e-5)
    assert abs(losses(job.run_dir)[-1] - math.log(2)) > 1e-3


def spread(job: Job, ranks: int, batch_size: int, accumulate: int, *more: str) -> None:
    """Run a job in which a step's pairs are spread so, to its end."""
    batches = (f"--data.batch_size={batch_size}", f"--trainer.accumulate_grad_batches={accumulate}")
    job = replace(job, more=(*(TWO if ranks == 2 else ()), *batches, *more))
    codes = job.start_ranks(2) if ranks == 2 else [job.start().code]
    assert codes == [0] * ranks, (job.folder / ("output-0.txt" if ranks == 2 else "output.txt")).read_text()


# Each makes steps of 4 pairs, as two ranks with micro-batches of 2 do: ranks, batch_size, accumulation.
@pytest.mark.parametrize("place", ["within a stage", "a stage's end"])
@pytest.mark.parametrize(
    "first, then",
    [((1, 1, 4), (2, 1, 2)), ((2, 1, 2), (1, 1, 4)), ((1, 2, 2), (2, 2, 1)), ((1, 4, 1), (1, 1, 4))],
    ids=lambda spread: "x".join(map(str, spread)),
)
def test_ranks_batch_and_accumulation_are_traded(job, two_ranks, first, then, place):
    stages = [row["stage/index"] for row in metrics(two_ranks.run_dir)]
    assert stages.count("2") > 1
    stop = stages.count("1") + (place == "within a stage")
    spread(job, *first, f"--trainer.max_steps={stop}")
    before = pairs(job)
    assert len(before) == stop
    for path in job.run_dir.glob("rows*.txt"):
        path.unlink()
    spread(job, *then)
    # Each pair once, in the same step; the schedule goes on where it stood.
    assert before + pairs(job) == pairs(two_ranks)
    for name in ("step", "stage/index", "train/lr", "train/pairs_seen"):
        rows, expected = metrics(job.run_dir), metrics(two_ranks.run_dir)
        assert [row[name] for row in rows] == [row[name] for row in expected]
    assert losses(job.run_dir) == pytest.approx(losses(two_ranks.run_dir), abs=1e-5)
    # What follows the switch has learnt: it isn't a stage's first loss everywhere.
    assert max(abs(loss - math.log(2)) for loss in losses(job.run_dir)[stop:]) > 1e-3


def test_another_global_batch_is_refused(job):
    assert replace(job, more=("--trainer.max_steps=3",)).start().code == 0
    job = replace(job, more=TWO)
    assert job.start_ranks(2) == [3, 3]
    text = (job.folder / "output-0.txt").read_text()
    assert "data.batch_size x processes: 2 -> 4" in text
    # 2 pairs x 1 rank x 1 before, 2 x 2 x 1 now.
    assert "pairs a step (data.batch_size x processes x trainer.accumulate_grad_batches): 2 -> 4" in text


@pytest.mark.parametrize(
    "words",
    [("--data.batch_tokens=64",), ("--data.bucket_window=2",), ("--trainer.limit_train_batches=4",)],
    ids=["tokens", "buckets", "limit"],
)
def test_what_counts_in_micro_batches_is_not_traded(job, words):
    """A pair a micro-batch and 2 a step, then 2 and 1: the same product, and yet other pairs in a step."""
    before = ("--data.batch_size=1", "--trainer.accumulate_grad_batches=2")
    ended = replace(job, more=(*words, *before, "--trainer.max_steps=2")).start()
    assert ended.code == 0, ended.text
    ended = replace(job, more=(*words, "--data.batch_size=2", "--trainer.accumulate_grad_batches=1")).start()
    assert ended.code == 3 and "Traceback" not in ended.text, ended.text
    assert "trainer.accumulate_grad_batches: 2 -> 1" in ended.text
