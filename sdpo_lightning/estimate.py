"""Rank 4: the memory and the disk that a run will take, by arithmetic from sizes and settings. Bytes throughout.

A peak is the largest of several moments: what exists then is summed. All that is said of a GPU is unmeasured; on a CPU
`benchmarks/estimate.py` compares with measured peaks. Freed blocks that glibc keeps come on top there.
"""

from __future__ import annotations

from dataclasses import dataclass

from sdpo_lightning.estimate_run import Load, Run, StageLoad
from sdpo_lightning.logprobs import tile_width

GIB = 2**30
# Measured, 58 to 69 MiB: the peak above the imports of a `fit` of a model of 2 MiB.
CPU_OVERHEAD = 64 * 2**20
# Not measured: context, cuBLAS workspaces, NCCL buffers.
CUDA_OVERHEAD = 3 * GIB // 2


@dataclass(frozen=True)
class Moment:
    """What exists on one rank at one moment.

    Attributes:
        name: of the moment.
        rows: bytes by what they are for.
    """

    name: str
    rows: dict[str, float]

    @property
    def total(self) -> float:
        """All of it."""
        return sum(self.rows.values())


def peak(run: Run, stage: StageLoad) -> Moment:
    """The moment of a stage at which a rank takes most.

    Args:
        run: settings.
        stage: what it asks of a rank.
    """
    return max(moments(run, stage), key=lambda moment: moment.total)


def moments(run: Run, stage: StageLoad) -> list[Moment]:
    """The moments of a step that may be the peak, and of the reference pass.

    Args:
        run: settings.
        stage: what it asks of a rank.
    """
    load, longest = stage.load, stage.longest
    shape, trainable = run.shape, run.trainable
    gradients = 4 * trainable / run.shards
    # DDP copies the gradients into buckets of its own, which stay.
    buckets = 4.0 * trainable if run.ranks > 1 and run.shards == 1 else 0.0
    before = gradients if run.accumulate > 1 else 0.0
    head_gradient = 0.0 if run.lora else 4 * shape.head_parameters / run.shards
    keeps = _kept_layers(run, load)
    rest = load.tokens * shape.kept_rest
    layer, working = _layer(run, load), _working(run, load)
    forward, backward = _head(run, load)
    # Added up with the gradient that is there already, of an earlier micro-batch or of the other use of a tied weight.
    twice = head_gradient if run.accumulate > 1 or shape.tied else 0.0
    resting = _resting(run) | {"casts or gathered layers": _copies(run)}
    at_the_end = gradients + twice + _waiting_gradients(run)
    rows = [
        ("end of the forward pass", before, keeps + rest, forward),
        ("backward of the head", before, keeps + rest, backward + head_gradient),
        ("backward of the last layer", max(before, head_gradient), keeps + rest + working, 0.0),
        ("end of the backward pass", at_the_end, rest + (0 if run.recompute else layer) + working, 0.0),
    ]
    found = [
        Moment(name, resting | {"gradients": grads + buckets, "activations": kept, "logits and head": head})
        for name, grads, kept, head in rows
    ]
    step = gradients + buckets + run.optimizer.temporary * trainable / run.shards
    found.append(Moment("optimizer step", _resting(run) | {"gradients": step}))
    passing = {"activations": longest.tokens * (shape.kept_layer + shape.kept_rest), "gradients": buckets}
    found.append(Moment("reference pass", resting | passing | {"logits and head": _head(run, longest, False)[0]}))
    if not run.cuda:
        found.append(Moment("loading", {"weights": 2 * run.weights, "overhead": float(CPU_OVERHEAD)}))
    return found


def checkpoint_bytes(run: Run) -> float:
    """Size of a checkpoint: trained weights and optimizer states. It is written tensor by tensor, without a copy."""
    return (4.0 + run.optimizer.state) * run.trainable


def export_bytes(run: Run) -> float:
    """Size of one M_t."""
    return 4.0 * run.trainable


def offloaded_bytes(run: Run, load: Load) -> float:
    """Inputs of recomputed layers that wait in the memory of the CPU, of one rank."""
    return _inputs(run, load) * run.shape.layers if run.offload else 0.0


def _resting(run: Run) -> dict[str, float]:
    """Bytes a rank between two steps."""
    states = 0.0 if run.optimizer.on_host and run.cuda else run.optimizer.state * run.trainable / run.shards
    reference = {"resident": run.base, "cached": 0.0, "adapter": 4.0 * run.trainable}[run.reference]
    copies = checkpoint_bytes(run) / run.shards if run.background_saves and not run.cuda else 0.0
    return {
        "weights": run.weights / run.shards,
        "reference": reference / run.shards,
        "optimizer": states,
        "checkpoint in writing": copies,
        "overhead": float(CUDA_OVERHEAD if run.cuda else CPU_OVERHEAD),
    }


def _copies(run: Run) -> float:
    """Bytes of copies of weights in the numbers that are computed with."""
    shape = run.shape
    if run.shards == 1:
        cast = shape.head_parameters + (0 if run.quantization else _cast_at_once(run) * shape.linear_parameters)
        if run.stores_bf16:
            cast = shape.head_parameters if shape.tied else 0
        return 2.0 * (cast + (run.trainable if run.lora else 0)) if run.bf16 else 0.0
    # Two layers in flight and the root, gathered; a layer's gradient and the root's before they are scattered.
    root = shape.parameters - shape.layers * shape.layer_parameters
    small = run.base / (4 * shape.parameters) * 4 if run.quantization else run.number
    gathered = 2 * shape.layer_parameters * small + root * run.number
    scattered = 0 if run.lora else (shape.layer_parameters + root) * (run.number + 4)
    return float(gathered + scattered)


def _cast_at_once(run: Run) -> float:
    """Share of the layers whose weights have a copy at the same time: recomputed layers make theirs for a moment."""
    layers = run.shape.layers
    recomputed = -(-layers // run.recompute) if run.recompute else 0
    return min(layers, layers - recomputed + 1) / layers


def _waiting_gradients(run: Run) -> float:
    """Bytes of gradients of copies that are kept for a step: from its second micro-batch on the copies are the oldest
    nodes of the graph, so the backward pass comes to them last.
    """
    kept = run.bf16 and run.accumulate > 1 and run.shards == 1 and not run.recompute
    return 2.0 * (run.trainable if run.lora else run.shape.linear_parameters) if kept else 0.0


def _layer(run: Run, load: Load) -> float:
    """Bytes that one layer keeps for the backward pass."""
    probabilities = 0 if run.cuda else run.shape.heads * load.scores
    return load.tokens * run.shape.kept_layer + (probabilities + load.mask) * run.number


def _kept_layers(run: Run, load: Load) -> float:
    """Bytes that all layers keep on the device: recomputed ones their input only."""
    layers = run.shape.layers
    recomputed = -(-layers // run.recompute) if run.recompute else 0
    inputs = 0 if run.offload and run.cuda else _inputs(run, load) * recomputed
    return inputs + (layers - recomputed) * _layer(run, load)


def _inputs(run: Run, load: Load) -> float:
    # The residual stream is fp32 under autocast too.
    return 4.0 * load.tokens * run.shape.hidden


def _working(run: Run, load: Load) -> float:
    """Bytes of a layer's backward pass: what is recomputed, gradients of its widest activations and of its input."""
    gradients = load.tokens * (2 * run.shape.widest * run.number + 2 * run.shape.hidden * 4)
    return gradients + (_layer(run, load) if run.recompute else 0)


def _head(run: Run, load: Load, trains: bool = True) -> tuple[float, float]:
    """Bytes of logits and head at the end of the forward pass and at the height of its backward pass."""
    shape, budget = run.shape, run.logits_budget_mb * 2**20
    logits = load.targets * shape.vocab * run.number
    width = tile_width(load.targets, shape.vocab, run.logits_budget_mb, not run.cuda)
    # A tile in fp32 with its softmax, and in bf16 the product that it is made of.
    tile = load.targets * width * (8 + (2 if run.bf16 else 0))
    selected = load.targets * shape.hidden * run.number
    kept = logits if trains and logits <= budget else 0
    # The gradient of the selected states is summed in fp32.
    summed = 4 * load.targets * shape.hidden
    return float(selected + kept + tile), float(2 * selected + summed + kept + tile)
