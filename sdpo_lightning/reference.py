"""Rank 3: where reference logps come from, and how the reference advances at a stage boundary."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sdpo_lightning.backbone import CausalBackbone, copy_weights_, weights_digest
from sdpo_lightning.logp_tables import ComputeLogps, cache_key, known_logps, read_table, score_pairs, write_table
from sdpo_lightning.ranks import from_first_rank
from sdpo_lightning.sharding import reshard_
from sdpo_lightning.types import (
    ConfigurationError,
    ExternalInputs,
    ExternalModel,
    LogpTable,
    PairLogps,
    PreferenceBatch,
    ReferenceInputs,
    ResumeError,
    RunFacts,
    Stage,
)

log = logging.getLogger(__name__)


class ReferencePolicy(ABC):
    """The frozen side of the loss. One object a run, unregistered: no checkpoint holds its weights.

    Attributes:
        starts_at_policy: True if at the first step of a stage the reference is the policy (stepwise DPO).
            Then the self-check compares their logps wherever it is the M_t that the policy starts from.
        tolerance: largest |policy - reference| / max(1, |logp|) at that step, in fp32.
        tolerance_bf16: the same under bf16 autocast.
        scores_any_pair: whether `logps` takes pairs that no stage was given, as drawn answers are; it needs weights.
    """

    starts_at_policy = True
    scores_any_pair = True
    tolerance = 1e-6
    tolerance_bf16 = 1e-6

    def prepare(self, compute_logps: ComputeLogps) -> None:
        """Bind the function that policy, reference and ranking share.

        Args:
            compute_logps: `model, batch -> PairLogps` without gradients, in the run's precision.
        """
        self._compute_logps = compute_logps

    # ---- what it is

    def model_index(self, stage: Stage) -> int:
        """Index t of the M_t that it is when a stage begins; -1: a model that is no M_t. Default: M_{t-1}."""
        return stage.index - 1

    def covered(self, stage: Stage, stages: Sequence[Stage]) -> Sequence[Stage]:
        """The stages whose pairs it is given when `stage` begins. Default: that one.

        Args:
            stage: about to begin, or under way.
            stages: the whole plan.
        """
        return [stage]

    def settings(self) -> dict[str, Any]:
        """Plain values that a resumed run must agree on; other kinds of the same model agree."""
        return {"model.reference": "M_{t-1}"}

    def check(self, run: RunFacts) -> None:  # noqa: B027
        """Look at the run before any weights are loaded. Default: nothing.

        Raises:
            ConfigurationError: it can't do that.
        """

    # ---- the stages

    def before_policy(self, inputs: ExternalInputs) -> ExternalModel | None:
        """Called before the policy is loaded, on every start: the moment for another model. Default: nothing.

        Returns:
            What the run records of a model that is no M_t.
        """
        return None

    @abstractmethod
    def advance(self, policy: CausalBackbone, stage: Stage, inputs: ReferenceInputs) -> None:
        """Become the model of `model_index`, as a rule M_{t-1}, which the policy is at this moment.

        Args:
            policy: M_{t-1}.
            stage: stage t, about to begin; also called for t = 1.
            inputs: the pairs whose logps will be asked for.
        """

    def stay(self, stage: Stage, inputs: ReferenceInputs) -> None:  # noqa: B027
        """Don't become M_{t-1}: `StageTransition.should_advance` said no.

        Args:
            stage: stage t, about to begin.
            inputs: the pairs whose logps will be asked for.

        Raises:
            ConfigurationError: a reference that can't.
        """

    @abstractmethod
    def logps(self, batch: PreferenceBatch) -> PairLogps:
        """Summed logps `[B]` of a batch, without gradients."""

    def observe(self, batch: PreferenceBatch, policy: PairLogps, reference: PairLogps) -> None:  # noqa: B027
        """Told of each micro-batch that was trained on. Default: nothing.

        Args:
            batch: of B pairs.
            policy: its logps `[B]` in that step's forward pass.
            reference: logps `[B]`.
        """

    def after_step(self, policy: CausalBackbone) -> None:  # noqa: B027
        """Told of each optimizer step, before any checkpoint of it. Default: nothing.

        Args:
            policy: as the step left it.
        """

    # ---- going on

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint must hold, tensors only. Default: nothing; an M_t lies in its folder."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:  # noqa: B027
        """Take over what a checkpoint held; called before `restore`."""

    @abstractmethod
    def restore(
        self, load_weights: Callable[[], CausalBackbone], stage: Stage, inputs: ReferenceInputs
    ) -> None:
        """Become the reference of a stage that a resumed run is in the middle of.

        Args:
            load_weights: reads the M_t that the record names from its folder, and verifies its digest.
            stage: the stage to go on with.
            inputs: as for `advance`.

        Raises:
            ResumeError: what is on the disk isn't M_{t-1}.
        """

    def digest(self) -> str | None:
        """Digest of the weights that give the logps, or None where there are no weights."""
        return None

    def models(self) -> Sequence[nn.Module]:
        """What it holds beside the policy: set aside while another process needs the memory. Default: nothing."""
        return []


class ResidentReference(ReferencePolicy):
    """A second, frozen copy of the model in memory: one forward a pair an epoch.

    Where the policy is sharded the copy is cut just as it is, and becomes M_{t-1} without communication.

    Args:
        offload: keep its weights in the memory of the CPU between forward passes.
    """

    def __init__(self, offload: bool = False) -> None:
        self.offload = offload
        self._model: CausalBackbone | None = None

    def advance(self, policy: CausalBackbone, stage: Stage, inputs: ReferenceInputs) -> None:
        """Copy the policy's weights; the first call makes the copy of the model."""
        if self._model is None:
            self._model = policy.frozen_copy(self.offload)
        else:
            self.become_(policy)
        self._model.eval()

    def restore(
        self, load_weights: Callable[[], CausalBackbone], stage: Stage, inputs: ReferenceInputs
    ) -> None:
        """Reload M_{t-1} from its folder."""
        weights = load_weights().requires_grad_(False)
        self._model = (weights.parked() if self.offload else weights).eval()

    @property
    def model(self) -> CausalBackbone:
        """The frozen copy."""
        assert self._model is not None, "the reference is asked before the stage began"
        return self._model

    def weights(self) -> dict[str, Tensor]:
        """Its weights by name, whole or this rank's shards; they share the copy's memory."""
        reshard_(self.model)
        return {name: parameter.detach() for name, parameter in self.model.named_parameters()}

    def become_(self, policy: CausalBackbone) -> None:
        """Take the policy's weights over, in place, once there is a copy."""
        copy_weights_(self.model, policy)

    def logps(self, batch: PreferenceBatch) -> PairLogps:
        """One no-grad forward."""
        return self._compute_logps(self.model, batch)

    def digest(self) -> str | None:
        """Digest of the frozen copy."""
        return weights_digest(self.model)

    def models(self) -> Sequence[nn.Module]:
        """The frozen copy, once it is there."""
        return [] if self._model is None else [self._model]


class CachedReference(ReferencePolicy):
    """Two floats a pair and no second model: one no-grad pass of the policy when a stage begins.

    At that moment the policy is M_{t-1}. Other batch mates shift a logp in its last digits, hence the
    wider tolerance.
    """

    tolerance = 1e-5
    tolerance_bf16 = 1e-2
    scores_any_pair = False

    def __init__(self) -> None:
        self._table: LogpTable | None = None

    def advance(self, policy: CausalBackbone, stage: Stage, inputs: ReferenceInputs) -> None:
        """Score the chunk and the held-out pairs, and publish them under their key."""
        self._score(policy, stage, inputs)

    def table_path(self, folder: Path, stage: Stage) -> Path:
        """Where the logps of a stage are kept.

        Args:
            folder: of all tables.
            stage: whose pairs are asked for.
        """
        return folder / f"{stage.index:02d}.safetensors"

    def _score(self, model: CausalBackbone, stage: Stage, inputs: ReferenceInputs) -> None:
        title, path = f"logps of stage {stage.index}'s reference", self.table_path
        table = score_pairs(model, inputs.batches, self._compute_logps, inputs.known, title)
        from_first_rank(lambda: write_table(path(inputs.folder, stage), table, cache_key(inputs)))
        self._table = table

    def stay(self, stage: Stage, inputs: ReferenceInputs) -> None:
        """Refuse: without weights, nothing can score the new pairs."""
        raise ConfigurationError(
            f"a CachedReference can't stay behind at stage {stage.index}: it has no weights to score the new pairs; "
            "use `model.reference: ResidentReference`"
        )

    def restore(
        self, load_weights: Callable[[], CausalBackbone], stage: Stage, inputs: ReferenceInputs
    ) -> None:
        """Read the stage's file if its key fits; else compute it again from M_{t-1}."""
        path = self.table_path(inputs.folder, stage)
        self._table = from_first_rank(lambda: read_table(path, cache_key(inputs)))
        if self._table is None:
            log.warning("%s is missing or of other weights or rows: its logps are computed again", path)
            self._score(load_weights(), stage, inputs)

    def logps(self, batch: PreferenceBatch) -> PairLogps:
        """Look the pairs up."""
        assert self._table is not None, "the reference is asked before the stage began"
        return known_logps(self._table, batch)


def is_sft(reference: ReferencePolicy, index: int) -> bool:
    """Whether a reference is S throughout the stage under way, so that its logps are S's.

    Args:
        reference: not one that follows the policy within a stage, or that doesn't say what it is.
        index: of the M_t that it was when the stage began.
    """
    stays = type(reference).after_step is ReferencePolicy.after_step
    return index == 0 and stays and reference.starts_at_policy


def check_reference_digest(index: int, path: str, found: str, expected: str) -> None:
    """Compare what was read for M_index with what the run recorded.

    Args:
        index: of the model.
        path: where it was read.
        found: its digest.
        expected: the recorded digest.

    Raises:
        ResumeError: they differ.
    """
    if found != expected:
        raise ResumeError(
            f"reference M_{index} sha mismatch: {path} has {found[:12]}, the run recorded {expected[:12]}; "
            "restore that folder or start a new run"
        )
