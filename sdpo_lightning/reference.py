"""Rank 3: where reference logps come from, and how the reference advances at a stage boundary."""

from __future__ import annotations

import hashlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from sdpo_lightning.backbone import CausalBackbone, copy_weights_, weights_digest
from sdpo_lightning.casts import CASTS
from sdpo_lightning.failpoints import failpoint
from sdpo_lightning.files import publish
from sdpo_lightning.ranks import from_first_rank
from sdpo_lightning.stopping import STOP
from sdpo_lightning.types import (
    ConfigurationError,
    LogpTable,
    PairLogps,
    PreferenceBatch,
    ReferenceInputs,
    ResumeError,
    Stage,
)

ComputeLogps = Callable[[CausalBackbone, PreferenceBatch], PairLogps]
_SCHEMA = "2"
log = logging.getLogger(__name__)


class ReferencePolicy(ABC):
    """The frozen side of the loss. One object a run, unregistered: no checkpoint holds its weights.

    Attributes:
        starts_at_policy: True if at the first step of a stage the reference is the policy (stepwise DPO).
            Then the self-check compares their logps; a fixed or external reference says False.
        tolerance: largest |policy - reference| / max(1, |logp|) at that step, in fp32.
        tolerance_bf16: the same under bf16 autocast.
    """

    starts_at_policy = True
    tolerance = 1e-6
    tolerance_bf16 = 1e-6

    def prepare(self, compute_logps: ComputeLogps) -> None:
        """Bind the function that policy, reference and ranking share.

        Args:
            compute_logps: `model, batch -> PairLogps` without gradients, in the run's precision.
        """
        self._compute_logps = compute_logps

    @abstractmethod
    def advance(self, policy: CausalBackbone, stage: Stage, inputs: ReferenceInputs) -> None:
        """Become M_{t-1}, which the policy is at this moment.

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

    @abstractmethod
    def restore(
        self, load_weights: Callable[[], CausalBackbone], stage: Stage, inputs: ReferenceInputs
    ) -> None:
        """Become the reference of a stage that a resumed run is in the middle of.

        Args:
            load_weights: reads M_{t-1} from its folder and verifies its digest.
            stage: the stage to go on with.
            inputs: as for `advance`.

        Raises:
            ResumeError: what is on the disk isn't M_{t-1}.
        """

    def digest(self) -> str | None:
        """Digest of the weights that give the logps, or None where there are no weights."""
        return None


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
            copy_weights_(self._model, policy)
        self._model.eval()

    def restore(
        self, load_weights: Callable[[], CausalBackbone], stage: Stage, inputs: ReferenceInputs
    ) -> None:
        """Reload M_{t-1} from its folder."""
        weights = load_weights().requires_grad_(False)
        self._model = (weights.parked() if self.offload else weights).eval()

    def logps(self, batch: PreferenceBatch) -> PairLogps:
        """One no-grad forward."""
        assert self._model is not None, "the reference is asked before the stage began"
        return self._compute_logps(self._model, batch)

    def digest(self) -> str | None:
        """Digest of the frozen copy."""
        assert self._model is not None
        return weights_digest(self._model)


class CachedReference(ReferencePolicy):
    """Two floats a pair and no second model: one no-grad pass of the policy when a stage begins.

    At that moment the policy is M_{t-1}. Other batch mates shift a logp in its last digits, hence the
    wider tolerance.
    """

    tolerance = 1e-5
    tolerance_bf16 = 1e-2

    def __init__(self) -> None:
        self._table: LogpTable | None = None

    def advance(self, policy: CausalBackbone, stage: Stage, inputs: ReferenceInputs) -> None:
        """Score the chunk and the held-out pairs, and publish them under their key."""
        table = score_pairs(policy, inputs.batches, self._compute_logps, inputs.known)
        from_first_rank(lambda: write_table(_table_path(inputs.folder, stage), table, cache_key(inputs)))
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
        self._table = from_first_rank(lambda: read_table(_table_path(inputs.folder, stage), cache_key(inputs)))
        if self._table is None:
            path = _table_path(inputs.folder, stage)
            log.warning("%s is missing or of other weights or rows: its logps are computed again", path)
            self.advance(load_weights(), stage, inputs)

    def logps(self, batch: PreferenceBatch) -> PairLogps:
        """Look the pairs up."""
        assert self._table is not None, "the reference is asked before the stage began"
        logps, known = self._table.lookup(batch.pair_id)
        assert bool((known | (batch.weights == 0)).all()), "a pair without cached reference logps"
        return logps


def score_pairs(
    model: CausalBackbone,
    batches: Iterable[PreferenceBatch],
    compute_logps: ComputeLogps,
    known: LogpTable | None = None,
) -> LogpTable:
    """Logps of all pairs, in eval mode and without gradients; the ranks' shares are gathered.

    Args:
        model: what scores.
        batches: this rank's share.
        compute_logps: `model, batch -> PairLogps`.
        known: pairs that need no forward.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    rows: list[tuple[Tensor, ...]] = []
    try:
        with torch.no_grad(), CASTS.held():
            for batch in batches:
                STOP.leave_if_asked()
                batch = batch.to(device)
                logps, have = known.lookup(batch.pair_id) if known else (None, None)
                if have is None or _on_any_rank(not bool(have.all()), model, device):
                    logps = compute_logps(model, batch)
                columns = (batch.pair_id, logps.chosen, logps.rejected, logps.chosen_lengths, logps.rejected_lengths)
                real = batch.weights > 0
                rows.append(tuple(column[real].cpu() for column in columns))
                failpoint("mid_precompute")
    finally:
        model.train(was_training)
    ids, *columns = _gather(rows)
    return LogpTable.build(ids, PairLogps(*columns))


def _on_any_rank(wanted: bool, model: torch.nn.Module, device: torch.device) -> bool:
    """A forward of a sharded model is a collective: all ranks run it, or none does."""
    if not any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        return wanted
    flag = torch.tensor(wanted, dtype=torch.int32, device=device)
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


def _gather(rows: list[tuple[Tensor, ...]]) -> list[Tensor]:
    if dist.is_initialized():
        shares: list[list[tuple[Tensor, ...]]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(shares, rows)
        rows = [row for share in shares for row in share]
    return [torch.cat(column) for column in zip(*rows, strict=True)]


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


def cache_key(inputs: ReferenceInputs) -> str:
    """sha256 over all that cached logps depend on: weights, tokenised rows in order, numerics, schema."""
    text = f"{_SCHEMA}:{inputs.policy_digest}:{inputs.rows_digest()}:{inputs.numerics}"
    return hashlib.sha256(text.encode()).hexdigest()


def write_table(path: Path, table: LogpTable, key: str) -> None:
    """Write logps as safetensors that appear whole or not at all, their key in the header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f".{path.name}.tmp")
    tensors = {name: getattr(table, name).contiguous() for name in table.__dataclass_fields__}
    save_file(tensors, staging, metadata={"key": key})
    failpoint("before_publish")
    publish(staging, path)


def read_table(path: Path, key: str | None) -> LogpTable | None:
    """Read logps; None if there is no file or it was written under another key.

    Args:
        path: a file by `write_table`.
        key: the key it must bear; None takes any.

    Raises:
        ResumeError: the file is damaged.
    """
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as handle:
            if key is not None and (handle.metadata() or {}).get("key") != key:
                return None
            return LogpTable(**{name: handle.get_tensor(name) for name in LogpTable.__dataclass_fields__})
    except SafetensorError as error:
        raise ResumeError(f"{path} is damaged ({error}); delete it to have it computed again") from error


def _table_path(folder: Path, stage: Stage) -> Path:
    return folder / f"{stage.index:02d}.safetensors"
