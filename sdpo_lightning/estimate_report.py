"""Rank 5: what is said of an estimate: a table, whether it fits, what would make it fit, host memory and disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from sdpo_lightning.estimate import GIB, Moment, checkpoint_bytes, export_bytes, offloaded_bytes, peak
from sdpo_lightning.estimate_run import Load, Lora, Optimizer, Run, StageLoad

# Not measured: imports and tokenised rows of a process on a GPU.
_PROCESS = 3 * GIB
# Bytes of a row: pair id, two logps, two lengths.
_TABLE_ROW = 8 + 2 * 4 + 2 * 8
EIGHT_BIT = Optimizer("AdamW8bit", 2 * (1 + 4 / 256))


@dataclass(frozen=True)
class Advice:
    """A setting to change.

    Attributes:
        words: the setting, as the user would write it.
        peak: bytes a rank afterwards.
        saves: bytes a rank.
    """

    words: str
    peak: float
    saves: float


def advise(run: Run, stage: StageLoad) -> list[Advice]:
    """What could be changed, what saves most first; each alone, by the same arithmetic.

    Args:
        run: settings.
        stage: what it asks of a rank.
    """
    before = peak(run, stage).total
    found = []
    for words, changed in _changes(run):
        after = peak(changed, stage).total
        found.append(Advice(words, after, before - after))
    load = stage.load
    half = Load(load.tokens // 2, load.targets // 2, load.scores // 2, load.mask // 2)
    after = peak(run, replace(stage, load=half, longest=half)).total
    found.append(Advice("half of `data.batch_size` (or `data.batch_tokens`)", after, before - after))
    return sorted((a for a in found if a.saves > 0.01 * before), key=lambda a: -a.saves)


def _changes(run: Run) -> list[tuple[str, Run]]:
    changes = []
    if run.reference == "resident":
        changes.append(("`model.reference: CachedReference`", replace(run, reference="cached")))
    if run.optimizer.state > EIGHT_BIT.state and run.lora is None:
        words = "8-bit states, `model.optimizer.class_path: bitsandbytes.optim.AdamW8bit`"
        changes.append((words, replace(run, optimizer=EIGHT_BIT)))
    if run.recompute != 1:
        changes.append(("`model.gradient_checkpointing: true`", replace(run, recompute=1)))
    elif run.cuda and not run.offload:
        changes.append(("`model.offload_activations: true`", replace(run, offload=True)))
    if run.lora is None:
        reference = "adapter" if run.reference == "resident" else run.reference
        changes.append(("LoRA, `model.lora: {r: 64}`", replace(run, lora=Lora(64), reference=reference)))
    elif run.quantization is None:
        changes.append(("a 4-bit base, `model.quantization: nf4`", replace(run, quantization="nf4")))
    if run.logits_budget_mb > 64:
        changes.append(("`model.logits_budget_mb: 64`", replace(run, logits_budget_mb=64.0)))
    if run.cuda:
        ranks = max(8, run.ranks if run.shards == 1 else 2 * run.ranks)
        words = f"{ranks} ranks with `trainer.strategy: fsdp2`"
        changes.append((words, replace(run, ranks=ranks, ranks_a_node=min(8, ranks), shards=ranks)))
    return changes


def host_bytes(run: Run, stage: StageLoad) -> dict[str, float]:
    """Memory of the CPU on the first node, at its height, by what it is for.

    Args:
        run: settings.
        stage: what it asks of a rank.
    """
    if not run.cuda:
        return {"ranks": run.ranks_a_node * peak(run, stage).total}
    rows = {
        "processes": float(run.ranks_a_node * _PROCESS),
        "offloaded activations": run.ranks_a_node * offloaded_bytes(run, stage.load),
        "paged optimizer states": run.optimizer.state * run.trainable if run.optimizer.on_host else 0.0,
    }
    # Shards are copied from their devices before they are written; whole weights only for a save in the background.
    copied = run.ranks_a_node / run.shards if run.shards > 1 else float(run.background_saves)
    saving = checkpoint_bytes(run) * copied if run.checkpoints else 0.0
    loading = (1 if run.shards > 1 else run.ranks_a_node) * run.weights
    most = max((("loading", loading), ("a checkpoint", saving), ("an export", export_bytes(run))), key=lambda x: x[1])
    return rows | dict([most])


def disk_bytes(run: Run) -> dict[str, float]:
    """What the run directory holds at its height, by what it is for.

    Args:
        run: settings.
    """
    return {
        f"{run.checkpoints} checkpoints": checkpoint_bytes(run) * run.checkpoints,
        f"{run.stages} exports": export_bytes(run) * run.stages,
        "reference tables": float(_TABLE_ROW * (run.pairs or 0)),
    }


def report(
    run: Run, stages: Sequence[StageLoad], source: str, device_bytes: float | None
) -> str:
    """All of it as text.

    Args:
        run: settings.
        stages: what each asks of a rank.
        source: where the lengths come from.
        device_bytes: of a card; None says nothing of fitting.
    """
    peaks = [peak(run, stage) for stage in stages]
    worst, total = max(zip(stages, (p.total for p in peaks), strict=True), key=lambda pair: pair[1])
    lines = [*_settings(run), f"data: {source}", "", *_table(stages, peaks), ""]
    lines.append(_listed("memory of the CPU, first node", host_bytes(run, worst)))
    lines.append(_listed("disk", disk_bytes(run)))
    if device_bytes is None:
        return "\n".join(lines)
    fits = "fits" if total <= device_bytes else "does not fit"
    lines += ["", f"{fits} {_gib(device_bytes)} GiB: a rank takes {_gib(total)} GiB"]
    for advice in advise(run, worst) if total > device_bytes else ():
        enough = "; fits" if advice.peak <= device_bytes else ""
        lines.append(f"  {_gib(advice.saves):>8} GiB less by {advice.words}{enough}")
    return "\n".join(lines)


def _settings(run: Run) -> list[str]:
    shape = run.shape
    trained = "all" if run.lora is None else f"{run.trainable / 1e6:.1f} million"
    split = f"weights and states over {run.shards}" if run.shards > 1 else "full copies"
    kind = "GPU" if run.cuda else "CPU process"
    return [
        f"model: {shape.parameters / 1e9:.3f} billion parameters, {trained} trained, {shape.layers} layers",
        f"ranks: {run.ranks} x {kind}, {split}, {'bf16-mixed' if run.bf16 else '32-true'}, {run.optimizer.name}, "
        f"{run.reference} reference",
    ]


def _table(stages: Sequence[StageLoad], peaks: Sequence[Moment]) -> list[str]:
    """A column a stage, GiB a rank; one column where they are alike."""
    names = [stage.name for stage in stages]
    if len({moment.total for moment in peaks}) == 1:
        names, peaks, stages = ["all stages alike" if len(names) > 1 else names[0]], peaks[:1], stages[:1]
    keys = list(dict.fromkeys(key for moment in peaks for key, value in moment.rows.items() if value))
    width = [max(12, len(name) + 2) for name in names]
    rows = [("GiB a rank", names), *((key, [_gib(m.rows.get(key, 0.0)) for m in peaks]) for key in keys)]
    rows.append(("peak", [_gib(moment.total) for moment in peaks]))
    rows.append(("pairs", ["?" if stage.pairs is None else str(stage.pairs) for stage in stages]))
    lines = [f"{key:26}" + "".join(f"{cell:>{w}}" for cell, w in zip(cells, width, strict=True)) for key, cells in rows]
    at = dict.fromkeys(moment.name for moment in peaks)
    return [*lines, f"the peak is at the {' or the '.join(at)}"]


def _listed(what: str, rows: dict[str, float]) -> str:
    parts = ", ".join(f"{key} {_gib(value)}" for key, value in rows.items() if value)
    return f"{what}: {_gib(sum(rows.values()))} GiB ({parts})"


def _gib(count: float) -> str:
    size = count / GIB
    return f"{size:.1f}" if size >= 10 else f"{size:.2f}" if size >= 0.1 else f"{size:.3f}"
