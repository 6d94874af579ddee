"""Rank 2: logps of many pairs: scored in one pass, kept in a file under the key of all that they depend on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sdpo_lightning.bars import BARS
from sdpo_lightning.casts import CASTS
from sdpo_lightning.failpoints import failpoint
from sdpo_lightning.publishing import publish
from sdpo_lightning.ranks import from_every_rank
from sdpo_lightning.stopping import STOP
from sdpo_lightning.types import LogpTable, PairLogps, PreferenceBatch, ReferenceInputs, ResumeError

ComputeLogps = Callable[[nn.Module, PreferenceBatch], PairLogps]
_SCHEMA = "2"
_FIRST_ROWS = 4096


def score_pairs(
    model: nn.Module,
    batches: Iterable[PreferenceBatch],
    compute_logps: ComputeLogps,
    known: LogpTable | None = None,
    title: str = "scoring",
) -> LogpTable:
    """Logps of all pairs, in eval mode and without gradients; the ranks' shares are gathered.

    Args:
        model: what scores.
        batches: this rank's share.
        compute_logps: `model, batch -> PairLogps`.
        known: pairs that need no forward.
        title: of the progress bar, where one is shown.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    rows = _Rows()
    try:
        # Closed at once, else a bar would outlive an error here.
        with torch.no_grad(), CASTS.held(), closing(BARS.track(batches, title)) as tracked:
            for batch in tracked:
                _leave_if_asked(device)
                batch = batch.to(device)
                found = None if known is None else known.lookup(batch.pair_id)
                if found is None or _on_any_rank(not bool(found[1].all()), model, device):
                    logps = compute_logps(model, batch)
                else:
                    logps = found[0]
                columns = (batch.pair_id, logps.chosen, logps.rejected, logps.chosen_lengths, logps.rejected_lengths)
                real = batch.weights > 0
                rows.add([column[real] for column in columns])
                failpoint("mid_precompute")
    finally:
        model.train(was_training)
    ids, *gathered = (torch.cat(parts) for parts in zip(*from_every_rank(rows.columns()), strict=True))
    return LogpTable.build(ids, PairLogps(*gathered))


class _Rows:
    """Columns in host memory that grow by doubling.

    A small tensor kept a batch, between the large ones that a forward frees, would pin the heap: see
    `benchmarks/results/data_size.md`.
    """

    def __init__(self) -> None:
        self._room: list[Tensor] = []
        self._count = 0

    def add(self, columns: Sequence[Tensor]) -> None:
        """Copy `[n]` of each column."""
        end = self._count + len(columns[0])
        if not self._room:
            self._room = [torch.empty(_FIRST_ROWS, dtype=column.dtype) for column in columns]
        while end > len(self._room[0]):
            self._room = [torch.cat([room, torch.empty_like(room)]) for room in self._room]
        for room, column in zip(self._room, columns, strict=True):
            room[self._count : end] = column
        self._count = end

    def columns(self) -> list[Tensor]:
        """What was added."""
        return [room[: self._count].clone() for room in self._room]


def _leave_if_asked(device: torch.device) -> None:
    """Stop between two batches: all ranks, or the others would wait for one; each has the same number of batches."""
    if not dist.is_initialized():
        return STOP.leave_if_asked()
    asked = torch.tensor(STOP.signal is not None, dtype=torch.int32, device=device)
    dist.all_reduce(asked, dist.ReduceOp.MAX)
    if asked:
        STOP.leave_a_pass()


def _on_any_rank(wanted: bool, model: nn.Module, device: torch.device) -> bool:
    """A forward of a sharded model is a collective: all ranks run it, or none does."""
    if not any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        return wanted
    flag = torch.tensor(wanted, dtype=torch.int32, device=device)
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


def cache_key(inputs: ReferenceInputs) -> str:
    """sha256 over all that cached logps depend on: weights, tokenised rows in order, numerics, schema."""
    text = f"{_SCHEMA}:{inputs.policy_digest}:{inputs.rows_digest()}:{inputs.numerics}"
    return hashlib.sha256(text.encode()).hexdigest()


def known_logps(table: LogpTable, batch: PreferenceBatch) -> PairLogps:
    """Look up a batch, whose real pairs must all be there.

    Args:
        table: of logps.
        batch: of B pairs.

    Returns:
        `PairLogps` of `[B]`.
    """
    logps, known = table.lookup(batch.pair_id)
    assert bool((known | (batch.weights == 0)).all()), "a pair without cached reference logps"
    return logps


def write_table(path: Path, table: LogpTable, key: str, model: str = "") -> None:
    """Write logps as safetensors that appear whole or not at all, their key in the header.

    Args:
        path: of the file.
        table: the logps.
        key: of all that they depend on.
        model: digest of the weights, where the key was made without them.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f".{path.name}.tmp")
    tensors = {name: getattr(table, name).contiguous() for name in table.__dataclass_fields__}
    save_file(tensors, staging, metadata={"key": key, "model": model})
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


def table_model(path: Path) -> str:
    """Digest of the weights that gave a file's logps, as `write_table` was told it."""
    with safe_open(path, framework="pt") as handle:
        return (handle.metadata() or {}).get("model", "")
