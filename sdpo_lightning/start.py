"""Rank 6: what a `fit` of the command line begins from: S, a checkpoint, or another run's M_{t-1}."""

from __future__ import annotations

from pathlib import Path

from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.utilities.rank_zero import rank_zero_only

from sdpo_lightning.checkpoint_files import find_checkpoint, problem_of
from sdpo_lightning.fork import Fork
from sdpo_lightning.ledger import Ledger
from sdpo_lightning.run_lock import check_free
from sdpo_lightning.types import ConfigurationError, ResumeError


def checkpoint_to_go_on_from(run_dir: Path, given: str | None, resume: str) -> str | None:
    """The checkpoint that a run goes on from; None where it begins.

    Args:
        run_dir: of the run.
        given: `ckpt_path`, which wins.
        resume: `auto` or `never`.

    Raises:
        ConfigurationError: the run is in use, or `never` in a folder that isn't empty.
        ResumeError: the checkpoint, or each one of the run, is damaged.
    """
    if _is_first():
        check_free(run_dir)
    if given is not None:
        if problem := problem_of(Path(given), required=False):
            raise ResumeError(f"`ckpt_path`: {given} is damaged: {problem}; take another one of the run")
        return given
    if SLURMEnvironment.detect() and any(run_dir.glob("hpc_ckpt_*.ckpt")):
        # Lightning's own way, for jobs that requeue themselves.
        return None
    found = find_checkpoint(run_dir, resume)
    if found is not None and _is_first():
        print(f"going on from {found}")
    return None if found is None else str(found)


def _is_first() -> bool:
    """Before there are process groups: by the launcher's variables, as Lightning has read them."""
    return getattr(rank_zero_only, "rank", 0) == 0


def fork_to_begin(run: str | None, from_stage: int | None, run_dir: Path) -> Fork | None:
    """The fork that `--fork` and `--from-stage` ask for.

    Args:
        run: the parent.
        from_stage: t.
        run_dir: of the new run.

    Raises:
        ConfigurationError: one without the other, or a fork that was begun is started without them.
    """
    if (run is None) != (from_stage is None):
        given, missing = ("--fork", "--from-stage") if from_stage is None else ("--from-stage", "--fork")
        raise ConfigurationError(f"`{given}` needs `{missing}`: `--fork RUN --from-stage t`")
    if run is not None and from_stage is not None:
        return Fork(run, from_stage)
    ledger = Ledger.read(run_dir)
    if ledger is not None and ledger.parent is not None:
        parent = ledger.parent
        raise ConfigurationError(
            f"{run_dir} is a fork of {parent.run}; give `--fork {parent.run} --from-stage {parent.from_stage}`, as its "
            "config.yaml does"
        )
    return None
