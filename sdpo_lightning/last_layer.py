"""Rank 0: the last decoder layer computes what is read of it, and nothing for the other positions of a row.

Behind the last attention each token stands by itself, and hidden states are read only where they predict a completion
token. So queries, the output projection and the MLP of the last layer leave prompts out; keys and values are of all.
"""

from __future__ import annotations

import threading
from collections import Counter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

# Names by which transformers calls the parts of a decoder layer; queries fused with keys and values stay whole.
ATTENTIONS = ("self_attn", "attention", "attn")
MLPS = ("mlp", "feed_forward")
PROJECTIONS = ("q_proj", "o_proj", "out_proj", "dense")
# The number of positions is a multiple of this: a CPU keeps kernels for each number.
ROWS = 64


class ReadPositions(NamedTuple):
    """Of a row of L tokens: the M positions that are read, and where each position stands among them.

    Attributes:
        positions: `[M]` int64, ascending.
        places: `[L]` int64, M for positions that aren't read.
    """

    positions: Tensor
    places: Tensor


class _Row(threading.local):
    """What is read of the row that a thread is at; None is all."""

    read: ReadPositions | None = None


_ROW = _Row()


def read_positions(source_index: Tensor, length: int) -> ReadPositions | None:
    """The positions whose hidden states are read, and some others up to a round number.

    Args:
        source_index: `[N]` int64, positions that predict completion tokens, some of them twice.
        length: L, tokens of the row.

    Returns:
        None if nothing would be left out. Nothing waits for the device.
    """
    count = read_count(len(source_index))
    if count >= length:
        return None
    unread = torch.ones(length, dtype=torch.int8, device=source_index.device)
    unread[source_index] = 0
    positions = unread.argsort(stable=True)[:count].sort().values
    places = torch.full_like(unread, count, dtype=torch.int64)
    places[positions] = torch.arange(count, device=positions.device)
    return ReadPositions(positions, places)


def read_count(sources: int) -> int:
    """M of so many sources, in a row that has more tokens."""
    # A few come as they are: so does the row of the start-up check.
    return sources + (-sources % ROWS if sources > ROWS else 0)


def narrow_last_layer(model: nn.Module) -> bool:
    """Have the last decoder layer of a model, in the order of its modules, leave out what isn't read.

    Its attention learns from the `read` of a keyword argument `segments` what that is; without one all is computed.

    Args:
        model: of transformers; its weights and their names stay.

    Returns:
        Whether its attention and a plain MLP are known and used once; else nothing is left out. A mixture of experts
        isn't plain: its router is measured on all tokens.
    """
    uses = Counter(module for _, module in model.named_modules(remove_duplicate=False))
    layers = [module for module in uses if isinstance(module, GradientCheckpointingLayer)]
    parts = dict(layers[-1].named_children()) if layers else {}
    attention = next((parts[name] for name in ATTENTIONS if name in parts), None)
    mlp = next((parts[name] for name in MLPS if name in parts), None)
    if attention is None or mlp is None or not _is_plain(mlp):
        return False
    if _tell in attention._forward_pre_hooks.values():
        return True
    narrowed = [mlp, *(part for name, part in attention.named_children() if name in PROJECTIONS)]
    if any(uses[module] > 1 for module in (attention, *narrowed)):
        return False
    attention.register_forward_pre_hook(_tell, with_kwargs=True)
    for module in narrowed:
        module.register_forward_pre_hook(_leave_out)
        module.register_forward_hook(_fill_up)
    mlp.register_forward_hook(_forget)
    return True


def _is_plain(mlp: nn.Module) -> bool:
    """Linear layers and what has no weights: nothing looks at other tokens, or counts them."""
    owners = [module for module in mlp.modules() if any(True for _ in module.parameters(recurse=False))]
    return all(isinstance(module, nn.Linear | Conv1D) for module in owners)


def _tell(module: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
    # Not on the layer, whose hooks don't run again when it is recomputed. A compiled layer computes all positions.
    if not torch.compiler.is_compiling():
        segments = keywords.get("segments")
        _ROW.read = None if segments is None else segments.read


def _leave_out(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
    if torch.compiler.is_compiling() or _ROW.read is None or len(inputs) != 1:
        return None
    [row] = inputs
    return (_Gather.apply(row, _ROW.read),) if row.shape[:2] == (1, len(_ROW.read.places)) else None


def _fill_up(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
    if torch.compiler.is_compiling() or _ROW.read is None or len(inputs) != 1:
        return None
    # The hook sees what the module was given: a whole row if nothing was left out.
    return _Scatter.apply(output, _ROW.read) if inputs[0].shape[:2] == (1, len(_ROW.read.positions)) else None


def _forget(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
    # The MLP comes last; the next row has other positions.
    if not torch.compiler.is_compiling():
        _ROW.read = None


class _Gather(torch.autograd.Function):
    """What is read of a row: `[1, L, D]` to `[1, M, D]`."""

    @staticmethod
    def forward(ctx: Any, row: Tensor, read: ReadPositions) -> Tensor:
        """The positions that are read."""
        ctx.save_for_backward(read.places)
        return row[:, read.positions]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Zeros at the others: each position is read once."""
        return _scattered(gradient, *ctx.saved_tensors), None


class _Scatter(torch.autograd.Function):
    """A row of what was read, and zeros: `[1, M, D]` to `[1, L, D]`."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, read: ReadPositions) -> Tensor:
        """Zeros at the other positions."""
        ctx.save_for_backward(read.positions)
        return _scattered(part, read.places)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Of the positions that are read."""
        [positions] = ctx.saved_tensors
        return gradient[:, positions], None


def _scattered(part: Tensor, places: Tensor) -> Tensor:
    # Half the time of putting rows into zeros on a CPU.
    return torch.cat([part, part.new_zeros(1, 1, part.shape[2])], 1).index_select(1, places)
