"""Rank 5: a fork: a new run that goes on from M_{t-1} of another one, whose models it adopts without a copy.

The ranking is adopted too: M_0's logps of the parent are taken where weights, rows and numerics are the same, and
then the plan that follows from them is compared, stage by stage, with what the parent trained.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loops.progress import _ProcessedTracker

from sdpo_lightning.adapter_reference import FrozenAdapter, model_digest
from sdpo_lightning.adapters import adopt_reference_adapter_, check_adapter
from sdpo_lightning.backbone import copy_weights_
from sdpo_lightning.data.pair_lists import data_of
from sdpo_lightning.files import file_digest
from sdpo_lightning.ledger import LEDGER, Ledger, LedgerStage, Parent, Weights, is_intact
from sdpo_lightning.random_states import read_random_states, states_path
from sdpo_lightning.ranks import from_first_rank
from sdpo_lightning.run_parts import StageModule, run_dir
from sdpo_lightning.types import ConfigurationError, ResumeError, Stage

log = logging.getLogger(__name__)

_MODEL_FILES = ("config.json", "adapter_config.json")


@dataclass(frozen=True)
class Fork:
    """Where a new run begins.

    Attributes:
        run: another run's directory, or a plain model folder that is taken for M_{t-1}.
        from_stage: t, the first stage that is trained here; at least 2.
    """

    run: str
    from_stage: int

    def parent(self) -> Ledger | None:
        """The parent's ledger; None of a plain model folder.

        Raises:
            ConfigurationError: there is neither a run nor a model, or the stages before t aren't done.
            ResumeError: a model of theirs isn't as the parent left it.
        """
        root = Path(self.run)
        if self.from_stage < 2:
            raise ConfigurationError(
                f"`--from-stage` is {self.from_stage}, expected 2 or more: before stage 1 there is nothing to adopt"
            )
        ledger = Ledger.read(root)
        if ledger is None:
            if not any((root / name).exists() for name in _MODEL_FILES):
                raise ConfigurationError(
                    f"`--fork`: {root} is neither a run ({LEDGER}) nor a model ({', '.join(_MODEL_FILES)})"
                )
            return None
        done = [stage for stage in ledger.stages if stage.status == "done"]
        if len(done) < self.from_stage - 1:
            raise ConfigurationError(
                f"`--from-stage` is {self.from_stage}, but {root} has finished {len(done)} stages; give at most "
                f"{len(done) + 1}, or let that run go on"
            )
        for stage in done[: self.from_stage - 1]:
            assert stage.output is not None, "a stage is done without its model"
            if stage.output.removed and stage.index < self.from_stage - 1:
                continue
            if not is_intact(root, stage.output):
                raise ResumeError(
                    f"`--fork`: M_{stage.index} in {root / str(stage.output.folder)} isn't as that run left it"
                    f"{', which kept its last models only' if stage.output.removed else ''}; restore the folder, or "
                    "fork from another stage"
                )
        return ledger

    def check(self, own_dir: Path) -> None:
        """Look at the parent, and at what an earlier start of this fork left.

        Args:
            own_dir: the fork's run directory.

        Raises:
            ConfigurationError: the parent can't be forked there, or `own_dir` is another run's.
            ResumeError: a model of the parent is damaged.
        """
        if own_dir.resolve() == Path(self.run).resolve():
            raise ConfigurationError(f"`--fork` is {self.run}, the run itself; set another `trainer.default_root_dir`")
        begun = Ledger.read(own_dir)
        if begun is not None:
            parent = begun.parent
            if parent is None or (parent.run, parent.from_stage) != (str(Path(self.run).absolute()), self.from_stage):
                other = "no fork" if parent is None else f"a fork of {parent.run} from stage {parent.from_stage}"
                raise ConfigurationError(f"`--fork`: {own_dir} is {other}; set another `trainer.default_root_dir`")
        self.parent()


def adopt(trainer: pl.Trainer, pl_module: StageModule, fork: Fork) -> None:
    """Stand at the end of stage t-1: M_{t-1} as policy, the plan's position, the ledger. A collective.

    Args:
        trainer: its plan is decided.
        pl_module: holds S.
        fork: where to begin.

    Raises:
        ConfigurationError: the plan has fewer stages.
        ResumeError: S or a stage before t isn't the parent's.
    """
    stages: list[Stage] = data_of(trainer).stages()
    if data_of(trainer).staging.ranked_by == "previous" and fork.from_stage > 2:
        raise ConfigurationError(
            f"`--from-stage` is {fork.from_stage} with `data.ranked_by: previous`, expected 2: the pairs of the stages "
            "between were decided by models of the parent, and no file of its lists them"
        )
    if fork.from_stage > len(stages):
        raise ConfigurationError(f"`--from-stage` is {fork.from_stage}, but the plan has {len(stages)} stages")
    finished = stages[: fork.from_stage - 1]
    ledger, states = from_first_rank(lambda: _adopted_ledger(trainer, pl_module, fork, finished))
    data_of(trainer).take_ends({entry.index: entry.end for entry in ledger.stages if entry.end is not None})
    finished = data_of(trainer).stages()[: fork.from_stage - 1]
    record, last = pl_module.record, _output(ledger.stages[-1])
    folder = Path(str(last.folder))
    if pl_module.lora is not None:
        from_first_rank(lambda: check_adapter(pl_module.trained.model, folder))
    weights = pl_module.read_model(folder)
    found = model_digest(weights)
    if not last.sha256:
        # A plain folder: nobody has recorded what it holds.
        for entry in ledger.stages:
            entry.output = replace(last, sha256=found)
    elif found != last.sha256:
        raise ResumeError(f"`--fork`: M_{len(finished)} has sha {found[:12]}, {fork.run} recorded {last.sha256[:12]}")
    if isinstance(weights, FrozenAdapter):
        adopt_reference_adapter_(pl_module.trained.model)
    else:
        copy_weights_(pl_module.trained, weights)
    record.entered = len(finished)
    record.digests |= {entry.index: _output(entry).sha256 for entry in ledger.stages}
    record.folders |= {entry.index: str(_output(entry).folder) for entry in ledger.stages}
    held = ledger.stages[-1].reference.sha256
    record.reference = next((i for i in range(len(finished)) if record.digests[i] == held), len(finished))
    pl_module.random_states = states
    _stand_at(trainer, finished, ledger.stages[-1].steps)
    from_first_rank(lambda: ledger.write(run_dir(trainer)))
    log.info("fork of %s: M_%d is adopted from %s", fork.run, len(finished), folder)


def _adopted_ledger(
    trainer: pl.Trainer, pl_module: StageModule, fork: Fork, finished: list[Stage]
) -> tuple[Ledger, list[dict[str, Any]] | None]:
    """The fork's first ledger, and the parent's random states at the end of stage t-1."""
    root, parent = Path(fork.run).absolute(), fork.parent()
    origin = Parent(str(root), fork.from_stage, None)
    own = Ledger({}, [], [], parent=origin)
    if parent is None:
        return _stand_in(trainer, pl_module, own, finished, origin.run), None
    began, s_digest = parent.s_sha256 or parent.stages[0].reference.sha256, pl_module.record.digests[0]
    if began != s_digest:
        raise ResumeError(f"`model.model_name_or_path`: S has sha {s_digest[:12]}, {root} began with {began[:12]}")
    for entry, stage in zip(parent.stages, finished, strict=False):
        given = (stage.name, data_of(trainer).store.digest(list(stage.pair_ids)))
        if (entry.name, entry.data) != given:
            raise ResumeError(
                f"`--fork`: stage {stage.index} is {stage.name!r} with {len(stage.pair_ids)} pairs, in {root} it was "
                f"{entry.name!r} with {entry.pairs}; keep the sources of the stages before {fork.from_stage}, their "
                "rows, order and places in `data.sources` as they were"
            )
        reference, output = (_absolute(weights, root) for weights in (entry.reference, _output(entry)))
        own.stages.append(replace(entry, reference=reference, output=output))
    own.parent = replace(origin, sha256=file_digest(root / LEDGER))
    return own, read_random_states(states_path(root, len(finished)))


def _output(entry: LedgerStage) -> Weights:
    assert entry.output is not None, "a stage is done without its model"
    return entry.output


def _absolute(weights: Weights, root: Path) -> Weights:
    # An external reference may have a hub name.
    if weights.folder is None or not (root / weights.folder).exists():
        return weights
    return replace(weights, folder=str(root / weights.folder))


def _stand_in(
    trainer: pl.Trainer, pl_module: StageModule, own: Ledger, finished: list[Stage], folder: str
) -> Ledger:
    """With a plain folder as M_1 ... M_{t-1}; its weights' digest isn't known yet."""
    data, steps = data_of(trainer), 0
    output = Weights(folder, "", file_digest(Path(folder)))
    for stage in finished:
        steps += stage.num_steps
        digest, s_weights = data.store.digest(list(stage.pair_ids)), Weights(None, pl_module.record.digests[0])
        row = (stage.index, stage.name, len(stage.pair_ids), digest, data.seed, s_weights, output)
        own.stages.append(LedgerStage(*row, status="done", steps=steps))
    return own


def _stand_at(trainer: pl.Trainer, finished: list[Stage], steps: int) -> None:
    """Have the Trainer count on from the end of stage t-1, as the run from the start would."""
    loop, epochs = trainer.fit_loop, finished[-1].first_epoch + finished[-1].epochs
    for progress in (loop.epoch_progress.total, loop.epoch_progress.current):
        assert isinstance(progress, _ProcessedTracker)
        progress.ready = progress.started = progress.processed = progress.completed = epochs
    taken = loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total
    taken.ready = taken.completed = steps
    loop.epoch_loop._batches_that_stepped = steps
