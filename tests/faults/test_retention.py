"""`StageExport(keep_last=N)`: models of past stages are deleted, and every resume still finds what it needs."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from harness import Job
from runs import assert_same_weights, reproducible

from sdpo_lightning import StageExport
from sdpo_lightning.types import ConfigurationError

KEEPS = '--trainer.callbacks+={"class_path":"sdpo_lightning.StageExport","init_args":{"keep_last":1}}'
# Four stages: M_1 and M_2 are deleted; the last checkpoint, of stage 4, has the reference M_3.
GONE, LEFT = (1, 2), (3, 4)


@pytest.fixture
def keeping(job) -> Job:
    return replace(job, added=True, more=(KEEPS,))


@pytest.fixture(scope="module")
def whole_four(tiny_model_dir, tmp_path_factory) -> Job:
    """All four models, none deleted."""
    job = Job(tmp_path_factory.mktemp("four"), tiny_model_dir, added=True)
    assert job.start().code == 0
    return job


def check_ends_as(job: Job, whole: Job) -> None:
    assert reproducible(job.run_dir) == reproducible(whole.run_dir)
    ours, theirs = (json.loads((j.run_dir / "ledger.json").read_text())["stages"] for j in (job, whole))
    assert [stage["output"]["removed"] for stage in ours] == [True, True, False, False]
    assert [stage["status"] for stage in ours] == ["done"] * 4
    # But for the note the ledger says what it says of a run that keeps all.
    assert [stage | {"output": stage["output"] | {"removed": False}} for stage in ours] == theirs
    folders = [stage["output"]["folder"] for stage in ours]
    assert [(job.run_dir / folder).is_dir() for folder in folders] == [False, False, True, True]
    for index in LEFT:
        assert_same_weights(job.run_dir / folders[index - 1], whole.run_dir / folders[index - 1])


def test_past_models_are_deleted_and_the_rest_is_the_same(keeping, whole_four):
    ended = keeping.start()
    assert ended.code == 0 and "deleted, because `keep_last` of StageExport is 1: 01-" in ended.text, ended.text
    check_ends_as(keeping, whole_four)
    before = {str(path): path.stat().st_mtime_ns for path in keeping.run_dir.rglob("*") if path.name != ".lock"}
    ended = keeping.start()
    assert ended.code == 0 and "already complete" in ended.text, ended.text
    assert {str(path): path.stat().st_mtime_ns for path in keeping.run_dir.rglob("*") if path.name != ".lock"} == before


@pytest.mark.parametrize("number", [1, 2, 3, 4])
@pytest.mark.parametrize("place", ["after_export", "after_open", "after_checkpoint"])
def test_killed_anywhere_it_ends_the_same(keeping, whole_four, place, number):
    """`after_checkpoint` passes about twice a stage: 3 to 9 lie in stages 2 to 4."""
    number = 2 * number + 1 if place == "after_checkpoint" else number
    ended = keeping.start({"SDPO_FAILPOINT": f"{place}:{number}"})
    assert ended.code == 137, ended.text
    ended = keeping.start()
    assert ended.code == 0, ended.text
    check_ends_as(keeping, whole_four)


def test_the_model_of_an_older_checkpoint_stays(keeping):
    """Every checkpoint is kept: each one's reference stays, so nothing is deleted but what none has."""
    job = replace(keeping, more=(*keeping.more, "--trainer.callbacks+=child.AllCheckpoints"))
    ended = job.start()
    assert ended.code == 0, ended.text
    stages = json.loads((job.run_dir / "ledger.json").read_text())["stages"]
    # Those of stages 2, 3 and 4 need M_1, M_2 and M_3.
    assert [stage["output"]["removed"] for stage in stages] == [False] * 4


def test_at_least_one_stays():
    with pytest.raises(ConfigurationError, match="expected at least 1"):
        StageExport(keep_last=0)
