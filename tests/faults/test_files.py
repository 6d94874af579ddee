"""Cases 8 to 11: damaged checkpoints and models, a full disk, a folder that can't be written."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import REFERENCES
from harness import Job, compare, killed_within, saves


def checkpoints(job: Job) -> list[Path]:
    """Newest first."""

    def number(path: Path) -> int:
        return json.loads(path.with_name(f"{path.name}.json").read_text())["number"]

    return sorted((job.run_dir / "checkpoints").glob("*.ckpt"), key=number, reverse=True)


def cut_in_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def killed(job: Job, point: str) -> Job:
    ended = job.start({"SDPO_FAILPOINT": point})
    assert ended.code == 137, ended.text
    return job


# ---- case 8


@pytest.mark.parametrize("damage", [cut_in_half, flip_a_byte])
def test_the_newest_valid_checkpoint_is_used(job, whole, damage):
    # Two checkpoints stand beside each other between a save and the deletion of the one before.
    killed(job, "after_checkpoint:4")
    newest, older = checkpoints(job)[:2]
    damage(newest)
    ended = job.start()
    assert ended.code == 0, ended.text
    [line] = [line for line in ended.text.splitlines() if line.startswith("damaged:")]
    assert newest.name in line and older.name in line
    compare(whole()[0].run_dir, job.run_dir)


@pytest.mark.parametrize("damage", [cut_in_half, flip_a_byte, Path.unlink])
def test_without_a_valid_checkpoint_nothing_starts_from_s(job, damage):
    killed(job, "after_open:2")
    for path in checkpoints(job):
        damage(path)
    before = sorted(job.run_dir.rglob("*"))
    ended = job.start()
    assert ended.code == 3, ended.text
    assert "no checkpoint of it is valid" in ended.text and "Traceback" not in ended.text
    assert sorted(job.run_dir.rglob("*")) == before


def test_resume_never(job):
    killed(job, "after_checkpoint:1")
    ended = replace(job, more=("--resume=never",)).start()
    assert ended.code == 2 and str(job.run_dir) in ended.text
    shutil.rmtree(job.run_dir)
    assert replace(job, more=("--resume=never",)).start().code == 0


def test_an_explicit_checkpoint_wins_and_later_folders_are_set_aside(job, whole):
    keep = {"class_path": "sdpo_lightning.StageCheckpoint", "init_args": {"every_n_train_steps": 1, "save_top_k": -1}}
    all_kept = f"--trainer.callbacks={json.dumps([{'class_path': 'child.RowsSeen'}, keep])}"
    ended = replace(job, more=(all_kept,)).start()
    assert ended.code == 0, ended.text
    chosen = checkpoints(job)[-2]
    ended = replace(job, more=(all_kept, f"--ckpt_path={chosen}")).start()
    assert ended.code == 0, ended.text
    assert "moved to" in ended.text
    assert sorted(p.name[:2] for p in (job.run_dir / "stale").iterdir()) == ["01", "02", "03"]
    compare(whole()[0].run_dir, job.run_dir)
    flip_a_byte(chosen)
    ended = replace(job, more=(f"--ckpt_path={chosen}",)).start()
    assert ended.code == 3 and "is damaged" in ended.text


# ---- case 9


@pytest.mark.parametrize("reference", REFERENCES)
@pytest.mark.parametrize("damage", [flip_a_byte, Path.unlink, cut_in_half])
def test_an_altered_reference_is_never_replaced_by_s(job, whole, reference, damage):
    job = killed_within(replace(job, reference=reference), whole(reference)[0].run_dir, 2)
    [folder] = (job.run_dir / "stages").glob("01-*")
    damage(folder / "model.safetensors")
    ended = job.start()
    assert "Traceback" not in ended.text
    assert f"{folder.name} isn't as the run left it" in ended.text
    if reference == "ResidentReference":
        assert ended.code == 3 and "reference M_1 sha mismatch" in ended.text, ended.text
    else:
        # Its logps are in a file of their own.
        assert ended.code == 0, ended.text
        shutil.rmtree(folder)
        shutil.copytree(whole(reference)[0].run_dir / "stages" / folder.name, folder)
        compare(whole(reference)[0].run_dir, job.run_dir)


def test_a_reference_folder_that_is_gone(job, whole):
    killed_within(job, whole()[0].run_dir, 2)
    [folder] = (job.run_dir / "stages").glob("01-*")
    shutil.rmtree(folder)
    ended = job.start()
    assert ended.code == 3 and "reference M_1 sha mismatch" in ended.text, ended.text


# ---- cases 10 and 11


@pytest.mark.parametrize("place", ["checkpoint", "export"])
def test_a_full_disk(job, whole, place):
    if place == "export":
        killed(job, "before_export:1")
    before = checkpoints(job)
    # A checkpoint of this model has about 500 kB, its weights 90 kB.
    ended = job.start({"SDPO_FILE_LIMIT": "40000" if place == "export" else "100000"})
    assert ended.code == 1 and "Traceback" not in ended.text, ended.text
    [line] = [line for line in ended.text.splitlines() if line.startswith("error:")]
    assert str(job.run_dir) in line
    if place == "checkpoint":
        assert "bytes" in line and ".ckpt" in line
        # Its temporary file is gone.
        assert list((job.run_dir / "checkpoints").iterdir()) == []
    assert checkpoints(job) == before
    ended = job.start()
    assert ended.code == 0, ended.text
    compare(whole()[0].run_dir, job.run_dir)


@pytest.fixture
def small_disk(job):
    """A file system of its own in the place of the run directory: 800 kB, room for one checkpoint but not for two."""
    job.run_dir.mkdir()
    options = ["-t", "tmpfs", "-o", "size=800k", "tmpfs", str(job.run_dir)]
    if shutil.which("mount") is None or subprocess.run(["mount", *options], capture_output=True).returncode:
        pytest.skip("no right to mount a tmpfs here")
    yield job
    subprocess.run(["umount", str(job.run_dir)], check=True)


def test_a_file_system_that_is_full(small_disk, whole):
    job = small_disk
    ended = job.start()
    assert ended.code == 1 and "Traceback" not in ended.text, ended.text
    [line] = [line for line in ended.text.splitlines() if line.startswith("error:")]
    assert "No space left on device" in line and ".ckpt can't be written" in line and "bytes free" in line
    # The first one, whole; of the second nothing is left.
    [kept] = checkpoints(job)
    assert torch.load(kept, weights_only=True)["global_step"] > 0
    assert list(job.run_dir.rglob(".*.tmp")) == []
    subprocess.run(["mount", "-o", "remount,size=64m", str(job.run_dir)], check=True)
    ended = job.start()
    assert ended.code == 0 and f"going on from {kept}" in ended.text, ended.text
    compare(whole()[0].run_dir, job.run_dir)


def test_a_folder_that_cannot_be_written(job):
    ended = job.start({"SDPO_DENY": "1"})
    assert ended.code == 1, ended.text
    assert "Permission denied" in ended.text and "Traceback" not in ended.text
    assert not list(job.run_dir.rglob("*.ckpt"))


# ---- which checkpoints stay


def test_a_folder_of_checkpoints_elsewhere_is_swept(job, tmp_path):
    """Only of what bears our names: others may keep files there too."""
    job = replace(job, more=("--trainer.callbacks+=child.Elsewhere",))
    elsewhere = tmp_path / "elsewhere"
    env = {"SDPO_ELSEWHERE": str(elsewhere)}
    ended = job.start(env | {"SDPO_FAILPOINT": "mid_checkpoint:2"})
    assert ended.code == 137, ended.text
    # Two callbacks save, each second step; the second save is the one elsewhere or the run's own.
    half = [*elsewhere.glob(".*.tmp"), *(job.run_dir / "checkpoints").glob(".*.tmp")]
    assert len(half) == 1
    for name in (".x.ckpt.tmp", ".x.ckpt.json.tmp", ".notes.tmp"):
        (elsewhere / name).parent.mkdir(exist_ok=True)
        (elsewhere / name).write_text("half")
    (elsewhere / ".y.ckpt.tmp").mkdir()
    ended = job.start(env)
    assert ended.code == 0, ended.text
    assert [path.name for path in elsewhere.glob(".*")] == [".notes.tmp"]
    assert list(job.run_dir.rglob(".*.tmp")) == []


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_keep_last(job, keep):
    callback = {"class_path": "sdpo_lightning.StageCheckpoint"}
    callback["init_args"] = {"every_n_train_steps": 1, "keep_last": keep}
    ended = replace(job, more=(f"--trainer.callbacks={json.dumps([callback])}",)).start()
    assert ended.code == 0, ended.text
    steps = [int(path.stem.rpartition("=")[2]) for path in checkpoints(job)]
    assert steps == list(range(max(steps), max(steps) - keep, -1))
    # Nothing but they and their digests.
    assert len(list((job.run_dir / "checkpoints").iterdir())) == 2 * keep


def test_by_the_clock_each_stage_still_ends_with_a_checkpoint(job, whole):
    callback = {"class_path": "sdpo_lightning.StageCheckpoint", "init_args": {"every_minutes": 60, "keep_last": 9}}
    ended = replace(job, more=(f"--trainer.callbacks={json.dumps([callback])}",)).start()
    assert ended.code == 0, ended.text
    stages = [stage for stage, ends in saves(whole()[0].run_dir) if ends]
    assert len(checkpoints(job)) == len(stages) == 3


def test_debug_shows_the_traceback(job):
    wrong = replace(job, more=("--model.beta=0",))
    assert "Traceback" not in wrong.start().text
    ended = replace(wrong, more=("--model.beta=0", "--debug")).start()
    assert ended.code == 2 and "Traceback" in ended.text and "error: `model.beta` is 0" in ended.text


def test_a_pickle_is_not_opened(job, tmp_path):
    path, sentinel = tmp_path / "evil.ckpt", tmp_path / "sentinel"
    torch.save({"state_dict": Evil(str(sentinel))}, path)
    ended = replace(job, more=(f"--ckpt_path={path}",)).start()
    assert ended.code == 3 and "Traceback" not in ended.text, ended.text
    assert not sentinel.exists()


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))
