"""Fixtures of the fault tests: the uninterrupted run, and a place for one that is interrupted."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import pytest
from harness import Job

REFERENCES = ("ResidentReference", "CachedReference")


@pytest.fixture(scope="session")
def whole(tiny_model_dir, tmp_path_factory):
    """Reference kind -> the job of a run that nothing interrupted, and how long it took."""
    made: dict[str, tuple[Job, float]] = {}

    def give(reference: str = "ResidentReference") -> tuple[Job, float]:
        if reference not in made:
            job = Job(tmp_path_factory.mktemp("whole"), tiny_model_dir, reference)
            ended = job.start()
            assert ended.code == 0, ended.text
            made[reference] = job, ended.seconds
        return made[reference]

    return give


@pytest.fixture
def job(tmp_path, tiny_model_dir) -> Job:
    """A job with a folder of its own."""
    return Job(tmp_path, tiny_model_dir)
