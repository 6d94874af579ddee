"""Scenarios for ranks that `torchrun` has started: `sharded_script.py OUT MODEL SCENARIO...`.

Each leaves its run in OUT/<scenario>, and `facts.json` there with what only a rank inside can see. Data is read from
OUT/a.jsonl and OUT/b.jsonl.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import traceback
from pathlib import Path

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from runs import fit, run_as_rank
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

from sdpo_lightning import (
    AdapterReference,
    CachedReference,
    DPOLitModule,
    Fork,
    FSDP2Strategy,
    LoraSettings,
    PreferenceSource,
    ResidentReference,
    StageCheckpoint,
)

DATA = {"batch_size": 1, "order": "easy_to_hard", "val_fraction": 0.2}
CLIPPED = {"gradient_clip_val": 0.5}
PLAIN = {"order": "given", "batch_size": 1}


class CountingReference(ResidentReference):
    """Counts the collectives of each swap, and compares what the ranks hold after it."""

    def __init__(self, offload: bool = False) -> None:
        super().__init__(offload)
        self.counts: list[int] = []
        self.sharded: list[bool] = []
        self.equal: list[bool] = []

    def advance(self, policy, stage, inputs):
        with CommDebugMode() as comms:
            super().advance(policy, stage, inputs)
        self.counts.append(comms.get_total_counts())
        pairs = list(zip(self._model.parameters(), policy.parameters(), strict=True))
        self.sharded.append(all(isinstance(p, DTensor) for pair in pairs for p in pair))
        self.equal.append(all(torch.equal(ours.full_tensor(), theirs.full_tensor()) for ours, theirs in pairs))

    def facts(self):
        return {"collectives": self.counts, "sharded": self.sharded, "equal": self.equal}


class ValidatesBeforeTheSwap(pl.Callback):
    """The last thing before a boundary is a forward pass without gradients."""

    validated = 0

    def on_validation_end(self, *_):
        self.validated += 1


class PairsSeen(pl.Callback):
    """Ids of the real pairs of this rank."""

    def __init__(self) -> None:
        self.ids: list[tuple[int, int]] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.ids += [(trainer.global_step, i) for i in batch.pair_id[batch.weights > 0].tolist()]


def sources(out: Path, names: str = "ab") -> list[PreferenceSource]:
    return [PreferenceSource(name, str(out / f"{name}.jsonl")) for name in names]


def _trainer(strategy="fsdp2", **arguments):
    return {"devices": int(os.environ["WORLD_SIZE"]), "strategy": strategy} | arguments


def resident(out, model, run):
    """The swap, counted, behind a validation."""
    reference, validates = CountingReference(), ValidatesBeforeTheSwap()
    fit(run, model, sources(out), reference=reference, callbacks=[validates], trainer_args=_trainer(**CLIPPED), **DATA)
    return reference.facts() | {"validated": validates.validated}


def tied(out, model, run):
    """As above with tied weights."""
    reference = CountingReference()
    fit(run, f"{model}-tied", sources(out), reference=reference, trainer_args=_trainer(**CLIPPED), **DATA)
    return reference.facts()


def cached(out, model, run):
    """Two floats a pair."""
    fit(run, model, sources(out), reference=CachedReference(), trainer_args=_trainer(**CLIPPED), **DATA)
    return {}


def offloaded(out, model, run):
    """The reference's shards wait on the CPU."""
    reference = ResidentReference(offload=True)
    fit(run, model, sources(out), reference=reference, trainer_args=_trainer(**CLIPPED), **DATA)
    return {}


def forked(out, model, run):
    """Goes on from the first stage of `resident`."""

    def make(*args, **kwargs):
        module = DPOLitModule(*args, **kwargs)
        module.fork = Fork(str(out / "resident"), 2)
        return module

    trainer_args = _trainer(**CLIPPED)
    fit(run, model, sources(out), module_class=make, trainer_args=trainer_args, **DATA)
    return {}


def experts(out, model, run):
    """Several of the model's weights are one of the file's."""
    fit(run, f"{model}-experts", sources(out), trainer_args=_trainer(), **DATA)
    return {}


def lora(out, model, run):
    """Adapters are cut like any weight."""
    reference = AdapterReference()
    settings = {"lora": LoraSettings(r=4)}
    fit(
        run, model, sources(out), reference=reference, module_args=settings, trainer_args=_trainer(**CLIPPED), **DATA
    )  # fmt: skip
    return {"sharded": all(isinstance(p, DTensor) for p in reference._model.weights)}


def lora_bf16(out, model, run):
    """Frozen weights are stored in bf16, adapters in fp32."""
    _, module = fit(
        run, model, sources(out), reference=AdapterReference(), module_args={"lora": LoraSettings(r=4)},
        trainer_args=_trainer(precision="bf16-mixed"), **DATA,
    )  # fmt: skip
    kinds = {(p.requires_grad, str(p.dtype)) for n, p in module.policy.named_parameters() if "proj" in n}
    return {"kinds": sorted(kinds)}


def lora_whole(out, model, run):
    """The uninterrupted run with adapters."""
    return _resumable(out, model, run, lora=LoraSettings(r=4))


def lora_resumed(out, model, run):
    """Goes on from the middle of stage 2 with adapters."""
    return _resumable(out, model, run, "lora_whole", lora=LoraSettings(r=4))


def dora(out, model, run):
    """Adapters that take the norm of weights."""
    settings = {"lora": LoraSettings(r=4, dora=True)}
    fit(run, model, sources(out), reference=AdapterReference(), module_args=settings, trainer_args=_trainer(), **DATA)
    return {}


def dora_ddp(out, model, run):
    """As above, whole on each rank."""
    settings = {"lora": LoraSettings(r=4, dora=True)}
    trainer = _trainer("ddp")
    fit(run, model, sources(out), reference=AdapterReference(), module_args=settings, trainer_args=trainer, **DATA)
    return {}


def rank_limited(out, model, run):
    """M_0's logps are known of some pairs only, and not of the same ones on each rank."""
    fit(run, model, sources(out), reference=CachedReference(), trainer_args=_trainer(), rank_sample=4, **DATA)
    return {}


class FreezesOnFirstRankOnly(DPOLitModule):
    """Overrides one of two."""

    def load_weights(self, model_name_or_path):
        weights = super().load_weights(model_name_or_path)
        weights.model.get_input_embeddings().requires_grad_(False)
        return weights


def frozen_on_one(out, model, run):
    """Ranks that would reduce other gradients."""
    fit(run, model, sources(out), module_class=FreezesOnFirstRankOnly, trainer_args=_trainer(), **DATA)
    return {}


def other_adapters(out, model, run):
    """A checkpoint of adapters of another rank."""
    return _resumable(out, model, run, "lora_whole", lora=LoraSettings(r=8))


def checkpointed(out, model, run):
    """Layers are computed again, and logits too."""
    settings = {"gradient_checkpointing": True, "logits_budget_mb": 0.01}
    fit(run, model, sources(out), module_args=settings, trainer_args=_trainer(**CLIPPED), **DATA)
    return {}


def bf16(out, model, run):
    """Compute in bf16, master weights in fp32."""
    seen = []

    class Looks(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, *_):
            hook = pl_module.policy.model.model.layers[0].mlp.register_forward_pre_hook(
                lambda module, args: seen.append(str(module.gate_proj.weight.dtype))
            )
            self.hook = hook

        def on_train_batch_end(self, trainer, pl_module, *_):
            self.hook.remove()

    arguments = _trainer(precision="bf16-mixed")
    _, module = fit(run, model, sources(out), callbacks=[Looks()], trainer_args=arguments, **DATA)
    master = sorted({str(p.dtype) for p in module.policy.parameters()})
    return {"computed": sorted(set(seen)), "master": master}


def hybrid(out, model, run):
    """Replicas of shards: four ranks as 2 x 2."""
    reference = CountingReference()
    fit(
        run, model, sources(out), reference=reference, trainer_args=_trainer(FSDP2Strategy(replicas=2), **CLIPPED),
        **DATA,
    )  # fmt: skip
    mesh = next(reference._model.parameters()).device_mesh
    return reference.facts() | {"mesh": list(mesh.shape)}


def _resumable(out, model, run, origin=None, lora=None, **data):
    seen = PairsSeen()
    callbacks = [seen, StageCheckpoint(every_n_train_steps=1, save_top_k=-1)]
    ckpt_path = None if origin is None else out / origin / "checkpoints" / "epoch=1-step=7.ckpt"
    if origin is not None and int(os.environ["RANK"]) == 0:
        # As the interrupted run had left it.
        shutil.copytree(out / origin / "stages" / "01-a", run / "stages" / "01-a")
    fit(
        run, model, sources(out), ckpt_path, reference=AdapterReference() if lora else None, callbacks=callbacks,
        module_args={"lora": lora}, trainer_args=_trainer(), **(PLAIN | data),
    )  # fmt: skip
    ids = [None] * dist.get_world_size()
    dist.all_gather_object(ids, seen.ids)
    return {"pairs": sorted(pair for share in ids for pair in share)}


def whole(out, model, run):
    """The uninterrupted run, with a checkpoint at each step."""
    return _resumable(out, model, run)


def resumed(out, model, run):
    """Goes on from the middle of stage 2."""
    return _resumable(out, model, run, "whole")


def whole_alone(out, model, run):
    """One rank with the global batch of two."""
    return _resumable(out, model, run, batch_size=2)


def resumed_alone(out, model, run):
    """One rank goes on with what two have left."""
    return _resumable(out, model, run, "whole", batch_size=2)


def resumed_from_alone(out, model, run):
    """Two ranks go on with what one has left."""
    return _resumable(out, model, run, "whole_alone")


def resumed_otherwise(out, model, run):
    """Another global batch: refused with the numbers."""
    return _resumable(out, model, run, "whole", batch_size=4)


def main() -> None:
    """Run the scenarios one after the other; a failed one doesn't end the others."""
    out, model = Path(sys.argv[1]), sys.argv[2]
    for name in sys.argv[3:]:
        run = out / name
        try:
            facts = globals()[name](out, model, run)
        except BaseException as error:  # noqa: BLE001
            facts = {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()[-3000:]}
        if int(os.environ["RANK"]) == 0:
            run.mkdir(parents=True, exist_ok=True)
            (run / "facts.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    run_as_rank(main)
