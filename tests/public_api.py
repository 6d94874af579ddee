"""What another project writes, for the type checker alone (`make types`); nothing runs it."""

from __future__ import annotations

import lightning.pytorch as pl
from torch import Tensor, nn

from sdpo_lightning import (
    AdapterReference,
    BackgroundWrites,
    CachedReference,
    Chunk,
    CurriculumDataModule,
    DPOLitModule,
    ExternalReference,
    FixedReference,
    Fork,
    FSDP2Strategy,
    LoraSettings,
    PairLogps,
    Partition,
    PreferenceBatch,
    PreferenceSource,
    ReferencePolicy,
    ResidentReference,
    Stage,
    StageCheckpoint,
    StageEvaluation,
    StageExport,
    StageSamples,
    StageSettings,
    StageTransition,
    UpdatingReference,
)


class OwnModule(DPOLitModule):
    """A loss and logps of one's own."""

    def preference_loss(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        return (policy.gamma - reference.gamma).neg().exp()

    def compute_logps(self, model: nn.Module, batch: PreferenceBatch) -> PairLogps:
        return super().compute_logps(model, batch)


class OwnTransition(StageTransition):
    """When the reference moves."""

    def should_advance(self, trainer: pl.Trainer, stage: Stage) -> bool:
        return stage.index > 1 and stage.num_steps > 0


def train() -> None:
    """The README's example, with most of what can be passed."""
    data = CurriculumDataModule(
        sources=[PreferenceSource("easy", "easy.jsonl"), PreferenceSource("hard", "hard.jsonl", limit=100)],
        batch_size=2,
        stage_settings={"hard": StageSettings(lr=1e-6, beta=0.2)},
    )
    model = OwnModule("path/to/sft-model", beta=0.1, reference=CachedReference(), lora=LoraSettings(r=8))
    model.fork = Fork("runs/a", 2)
    callbacks: list[pl.Callback] = [
        OwnTransition(),
        StageExport(keep_last=2),
        StageCheckpoint(writes=BackgroundWrites()),
        StageEvaluation(),
        StageSamples(max_new_tokens=8),
    ]
    trainer = pl.Trainer(default_root_dir="runs/mine", callbacks=callbacks, strategy=FSDP2Strategy())
    trainer.fit(model, data)


def names(chunk: Chunk, partition: Partition) -> tuple[str, int, type[Partition]]:
    """Records have types too."""
    return chunk.name, len(chunk.pair_ids), type(partition)


REFERENCES: list[type[ReferencePolicy]] = [
    ResidentReference,
    AdapterReference,
    FixedReference,
    ExternalReference,
    UpdatingReference,
]
