"""Starts the real command line in a process of its own, ends it at a chosen moment, and compares what runs left.

The processes are forked from one that has imported everything: a run takes a second or two instead of ten.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from child import run_cli
from helpers import make_rows, write_jsonl
from runs import assert_same_weights, reproducible

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["child"])
# The preloading process knows only what stands in the environment.
HERE = Path(__file__).resolve().parent
os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE.parent.parent), str(HERE.parent), str(HERE)])

COUNTS = {"a": 8, "b": 11, "c": 7}
LIMIT = 120.0


@dataclass
class Ended:
    """How a process ended: exit code (negative: the signal that killed it), what it printed, seconds it took."""

    code: int
    text: str
    seconds: float


@dataclass
class Job:
    """One command and its run directory.

    Attributes:
        folder: holds the data; `run` in it is the run directory.
        model_dir: S.
        reference: name of its class.
        more: further words.
        added: a fourth source, `d`.
        checkpoints: name of the callback in `child`.
    """

    folder: Path
    model_dir: Path
    reference: str = "ResidentReference"
    more: tuple[str, ...] = ()
    added: bool = False
    checkpoints: str = "Checkpoints"

    @property
    def run_dir(self) -> Path:
        """What `trainer.default_root_dir` is."""
        return self.folder / "run"

    def words(self) -> list[str]:
        """The command after the program's name."""
        sources = []
        for seed, (name, count) in enumerate((COUNTS | ({"d": 6} if self.added else {})).items()):
            path = self.folder / f"{name}.jsonl"
            if not path.exists():
                write_jsonl(path, make_rows(count, seed, name))
            sources.append({"name": name, "path": str(path)})
        callbacks = [{"class_path": f"child.{name}"} for name in ("RowsSeen", "Signals", self.checkpoints)]
        # The default's 64 tokens would take longer than the training.
        callbacks.append({"class_path": "sdpo_lightning.StageSamples", "init_args": {"max_new_tokens": 2}})
        return [
            "fit",
            f"--trainer.default_root_dir={self.run_dir}",
            "--trainer.accelerator=cpu",
            "--trainer.enable_progress_bar=false",
            f"--trainer.callbacks={json.dumps(callbacks)}",
            f"--model.model_name_or_path={self.model_dir}",
            f"--model.reference={self.reference}",
            "--model.optimizer.init_args.lr=1e-2",
            f"--data.sources={json.dumps(sources)}",
            "--data.max_length=64",
            "--data.batch_size=2",
            "--data.val_fraction=0.15",
            *self.more,
        ]

    def launch(self, env: dict[str, str], output: Path, defect: str | None = None) -> multiprocessing.Process:
        """Start a process and return."""
        process = CONTEXT.Process(target=run_cli, args=(self.words(), env, str(output), defect))
        process.start()
        return process

    def launch_ranks(
        self, count: int, only: dict[int, dict[str, str]] | None = None
    ) -> list[multiprocessing.Process]:
        """Start the command on several ranks and return; the arguments are `start_ranks`'s."""
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        ranks = {"NODE_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
        processes = []
        for rank in range(count):
            mine = ranks | {"LOCAL_RANK": str(rank)} | (only or {}).get(rank, {})
            processes.append(self.launch(mine, self.folder / f"output-{rank}.txt"))
        return processes

    def start_ranks(self, count: int, only: dict[int, dict[str, str]] | None = None) -> list[int]:
        """Run the command on several ranks.

        Args:
            count: of ranks.
            only: rank -> what is added to its environment.

        Returns:
            Their exit codes; -9 for those that didn't end by themselves within `LIMIT`.
        """
        processes = self.launch_ranks(count, only)
        until = time.monotonic() + LIMIT
        for process in processes:
            process.join(max(0.1, until - time.monotonic()))
            if process.exitcode is None:
                process.kill()
                process.join()
        return [process.exitcode for process in processes]

    def start(
        self,
        env: dict[str, str] | None = None,
        defect: str | None = None,
        meanwhile: Callable[[int, float], None] | None = None,
    ) -> Ended:
        """Run the command to its end.

        Args:
            env: added to the environment.
            defect: of `child.DEFECTS`.
            meanwhile: called with pid and start time once the process runs.
        """
        output = self.folder / "output.txt"
        began = time.monotonic()
        process = self.launch(env or {}, output, defect)
        if meanwhile is not None:
            meanwhile(process.pid, began)
        process.join(LIMIT)
        if process.exitcode is None:
            process.kill()
            raise TimeoutError(output.read_text())
        return Ended(process.exitcode, output.read_text(), time.monotonic() - began)


def compare(whole: Path, other: Path, validated: int | None = None) -> None:
    """Bitwise: the weights of every stage, each step's losses and metrics, and the rows seen.

    Args:
        whole: run directory of a whole run.
        other: of the other one.
        validated: a step after which only the other one validated.

    Raises:
        AssertionError: they differ.
    """
    ours, theirs = reproducible(whole), reproducible(other)
    if validated is not None:
        row = theirs[validated - 1]
        measured = [name for name in row if name.startswith("val/")]
        assert any(row[name] for name in measured)
        row |= dict.fromkeys(measured, "")
    assert ours == theirs
    assert (whole / "rows.txt").read_text() == (other / "rows.txt").read_text()
    folders = sorted(path.name for path in (whole / "stages").iterdir())
    assert len(folders) == len(COUNTS) and folders == sorted(path.name for path in (other / "stages").iterdir())
    for folder in folders:
        assert_same_weights(whole / "stages" / folder, other / "stages" / folder)
    ours, theirs = (json.loads((path / "ledger.json").read_text()) for path in (whole, other))
    assert ours == theirs
    assert {stage["status"] for stage in ours["stages"]} == {"done"}
    # No process leaves half a file.
    assert list(other.rglob(".*.tmp")) == []


def saves(run_dir: Path) -> list[tuple[int, bool]]:
    """(stage, whether it ends there) of each checkpoint that a whole run makes: every second step, and stage ends."""
    stages = [int(row["stage/index"]) for row in reproducible(run_dir)]
    found = []
    for step, stage in enumerate(stages, 1):
        ends = step == len(stages) or stages[step] != stage
        if ends or step % 2 == 0:
            found.append((stage, ends))
    return found


def killed_within(job: Job, whole: Path, stage: int, last: int = 1) -> Job:
    """Kill right after a checkpoint in the middle of a stage.

    Args:
        job: to start.
        whole: run directory of a whole run.
        stage: of the checkpoint.
        last: number of that checkpoint within the stage.
    """
    within = [number for number, save in enumerate(saves(whole), 1) if save == (stage, False)]
    ended = job.start({"SDPO_FAILPOINT": f"after_checkpoint:{within[last - 1]}"})
    assert ended.code == 137, ended.text
    return job
