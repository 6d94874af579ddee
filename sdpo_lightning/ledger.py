"""Rank 2: `ledger.json`, the single commit point of a run: its plan, and what each stage began with and left."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from sdpo_lightning.data.curriculum import compare_plans
from sdpo_lightning.data.endings import StageEnd
from sdpo_lightning.files import file_digest, write_json
from sdpo_lightning.types import ResumeError, StageRecord

log = logging.getLogger(__name__)

LEDGER = "ledger.json"


@dataclass(frozen=True)
class Weights:
    """A model on the disk.

    Attributes:
        folder: relative to the run directory; None for S, which lies elsewhere.
        sha256: over the weights by name, as `weights_digest` gives it.
        files_sha256: over the folder's files; None for S.
        removed: the folder was deleted, because the run keeps only its last models.
    """

    folder: str | None
    sha256: str
    files_sha256: str | None = None
    removed: bool = False


@dataclass(frozen=True)
class Parent:
    """What a fork began from.

    Attributes:
        run: the run directory, or a plain model folder that stands for all of M_1 ... M_{t-1}.
        from_stage: t, the first stage of the fork's own.
        sha256: of the parent's ledger at that time; None for a plain folder.
    """

    run: str
    from_stage: int
    sha256: str | None


@dataclass
class LedgerStage:
    """What the ledger says of one stage.

    Attributes:
        index: from 1.
        name: of the stage.
        pairs: kept rows.
        data: sha256 over its tokenised rows.
        seed: of its shuffles.
        reference: M_{t-1}, or what the reference was held back at.
        output: M_t, once the stage is done.
        status: `open` before that, then `done`.
        steps: optimizer steps of the run up to the stage's end, once it is done.
        end: where a stop rule ended it; None where its plan was finished, or isn't yet.
    """

    index: int
    name: str
    pairs: int
    data: str
    seed: int
    reference: Weights
    output: Weights | None = None
    status: Literal["open", "done"] = "open"
    steps: int = 0
    end: StageEnd | None = None


@dataclass
class Ledger:
    """All of `ledger.json`.

    Attributes:
        plan: setting -> value, what a resumed run must agree on.
        plans: sha256 of each plan that this run had; a plan may grow at its end.
        checkpoints: folders of checkpoints.
        stages: the stages that have begun, in order.
        parent: of a fork; its models lie there.
        accepted: changes of rows that the user let pass, in words.
        s_sha256: of S, which the first stage's reference need not be; None in ledgers of before.
    """

    plan: dict[str, Any]
    plans: list[str]
    checkpoints: list[str]
    stages: list[LedgerStage] = field(default_factory=list)
    parent: Parent | None = None
    accepted: list[str] = field(default_factory=list)
    s_sha256: str | None = None

    @classmethod
    def read(cls, run_dir: Path) -> Ledger | None:
        """The ledger of a run directory; None if there is none.

        Raises:
            ResumeError: it isn't as we wrote it.
        """
        path = run_dir / LEDGER
        if not path.exists():
            return None
        try:
            content = json.loads(path.read_text())
            stages, parent = content.pop("stages"), content.pop("parent", None)
            ledger = cls(**content, parent=None if parent is None else Parent(**parent))
            for row in stages:
                reference, output, end = row.pop("reference"), row.pop("output"), row.pop("end", None)
                made = None if output is None else Weights(**output)
                ended = None if end is None else StageEnd.of_row(end)
                ledger.stages.append(LedgerStage(**row, reference=Weights(**reference), output=made, end=ended))
        except (ValueError, KeyError, TypeError) as error:
            raise ResumeError(f"{path} is damaged ({error}); restore it, or start a run in another folder") from error
        return ledger

    def write(self, run_dir: Path) -> None:
        """Commit."""
        write_json(run_dir / LEDGER, asdict(self))

    def take_plan(self, plan: dict[str, Any]) -> None:
        """Note the plan that the run has from now on."""
        self.plan = plan
        if (digest := plan_digest(plan)) not in self.plans:
            self.plans.append(digest)

    def check(self, record: StageRecord, plan: Mapping[str, Any]) -> None:
        """Compare a checkpoint with the ledger.

        Args:
            record: the checkpoint's.
            plan: the checkpoint's.

        Raises:
            ResumeError: the checkpoint is ahead of the ledger, or of another run.
        """
        if record.entered > len(self.stages):
            raise ResumeError(
                f"`ckpt_path`: the checkpoint is of stage {record.entered}, {LEDGER} knows of {len(self.stages)}; "
                "restore the ledger that belongs to it, or go on from an earlier checkpoint"
            )
        if plan_digest(plan) not in self.plans:
            compare_plans(self.plan, plan)
            raise ResumeError(f"`ckpt_path`: the checkpoint's plan is none that {LEDGER} knows of")
        for stage in self.stages[: record.entered]:
            begun = stage.index == record.entered
            entry, number = (stage.reference, record.reference) if begun else (stage.output, stage.index)
            if entry is not None and entry.sha256 != record.digests[number]:
                raise ResumeError(
                    f"`ckpt_path`: M_{number} has sha {record.digests[number][:12]} in the checkpoint, "
                    f"{entry.sha256[:12]} in {LEDGER}: it is of another run"
                )

    @property
    def own_stages(self) -> list[LedgerStage]:
        """Those that this run trained, not its parent."""
        return self.stages if self.parent is None else self.stages[self.parent.from_stage - 1 :]

    def adopts(self, run_dir: Path, index: int, digest: str) -> str | None:
        """The folder of M_index if it lies on the disk as it was recorded, and is the model of this digest."""
        entry = self.stages[index - 1] if index <= len(self.stages) else None
        output = entry.output if entry is not None else None
        if output is None or output.sha256 != digest or output.folder is None:
            return None
        return output.folder if is_intact(run_dir, output) else None

    def back_to(self, run_dir: Path, entered: int, done: int) -> list[str]:
        """Forget what lies behind a checkpoint, and move its folders to `stale/`.

        Args:
            run_dir: of the run.
            entered: the checkpoint's stage.
            done: stages that are finished at the checkpoint.

        Returns:
            The folders that were moved.
        """
        moved = []
        for stage in self.stages[done:]:
            if stage.output is not None and stage.output.folder is not None:
                folder = run_dir / stage.output.folder
                moved += [path.name for path in (folder, Path(f"{folder}-merged")) if set_aside(run_dir, path)]
            stage.output, stage.status, stage.end = None, "open", None
        del self.stages[entered:]
        return moved


def is_intact(run_dir: Path, weights: Weights) -> bool:
    """Whether a recorded folder holds the files that it was recorded with."""
    assert weights.folder is not None, "S is not the run's"
    folder = run_dir / weights.folder
    return folder.is_dir() and file_digest(folder) == weights.files_sha256


def set_aside(run_dir: Path, path: Path) -> bool:
    """Move a file or folder to `stale/` of the run directory; False if there is none."""
    if not path.exists():
        return False
    (run_dir / "stale").mkdir(exist_ok=True)
    number, target = 1, run_dir / "stale" / path.name
    while target.exists():
        number += 1
        target = target.with_name(f"{path.name}-{number}")
    os.replace(path, target)
    return True


def plan_digest(plan: Mapping[str, Any]) -> str:
    """sha256 of a plan."""
    return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()
