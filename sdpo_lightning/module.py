"""Rank 7: policy + reference + one training step."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from sdpo_lightning.adapter_reference import AdapterReference, FirstAdapter, check_adapters, frozen_adapter
from sdpo_lightning.adapters import LoraSettings, check_checkpoint, into_checkpoint_
from sdpo_lightning.backbone import (
    CausalBackbone,
    attach_adapters,
    load_policy,
    load_skeleton,
    weights_digest,
)
from sdpo_lightning.batch_objectives import check_loss, check_stage_losses
from sdpo_lightning.callbacks import StageTransition
from sdpo_lightning.casts import CASTS
from sdpo_lightning.checkpoint import StageCheckpoint, keep_patience_, refuse_plain_checkpoints
from sdpo_lightning.completion_logps import CompletionLogps, SummedLogps
from sdpo_lightning.contamination import ContaminationGuard
from sdpo_lightning.data.curriculum import compare_plans
from sdpo_lightning.data.pair_lists import data_of
from sdpo_lightning.exactness import LayoutName, exact_layout
from sdpo_lightning.execution import Execution
from sdpo_lightning.export import StageExport
from sdpo_lightning.external_inputs import load_external
from sdpo_lightning.fork import Fork
from sdpo_lightning.held_out import HeldOutPairs
from sdpo_lightning.likelihood import LikelihoodGuard
from sdpo_lightning.loading import load_on_ranks, store_frozen_
from sdpo_lightning.logs import MetricsLog, StageProgress
from sdpo_lightning.loop_progress import ACCUMULATE, rescale_
from sdpo_lightning.objectives import PreferenceLoss, SigmoidLoss
from sdpo_lightning.policy_start import PolicyStart, check_start_name
from sdpo_lightning.random_states import collect_random_states
from sdpo_lightning.ranks import from_first_rank
from sdpo_lightning.reference import ReferencePolicy, ResidentReference
from sdpo_lightning.reference_weights import check_beginning, recorded_weights
from sdpo_lightning.report_callback import RunReport
from sdpo_lightning.run_parts import callbacks_of
from sdpo_lightning.run_state import run_plan
from sdpo_lightning.stage_judge import judge_settings
from sdpo_lightning.stage_models import StageEvaluation, StageSamples, StageTable
from sdpo_lightning.strategy import sharding_of
from sdpo_lightning.types import (
    ConfigurationError,
    PairLogps,
    PreferenceBatch,
    QuantizationName,
    ResumeError,
    ScheduleName,
    StageRecord,
)


class DPOLitModule(HeldOutPairs):
    """Stepwise DPO (arXiv 2403.19270): a trainable policy and a frozen reference that follows it.

    Nothing is loaded here; weights come in `configure_model`, after all data is checked.

    Args:
        model_name_or_path: S, the SFT model: a Hugging Face folder or hub name.
        beta: inverse temperature of the implied reward.
        label_smoothing: probability that a label is wrong (cDPO), in [0, 0.5).
        reference: where reference logps come from; None is `ResidentReference`, with `lora` `AdapterReference`.
        optimizer: made afresh at the start of every stage.
        lr_scheduler: shape of the learning rate within a stage.
        warmup_ratio: share of a stage's optimizer steps in linear warm-up.
        disable_dropout: set every dropout probability of the model to 0.
        logits_budget_mb: most MiB of logits that are kept for the backward pass.
        gradient_checkpointing: recompute activations in the backward pass: of every layer (true), or every n-th (n).
        offload_activations: hold what is kept between recomputed layers in the memory of the CPU.
        compile_layers: `torch.compile` each decoder layer.
        liger: Liger's kernels for norms, MLP and rotary embedding (CUDA only; the `[liger]` extra).
        lora: train adapters instead of the weights (the `[peft]` extra).
        quantization: of the frozen weights below the adapters.
        allow_bin_weights: take S from `pytorch_model.bin` where it has no safetensors; no code in it runs.
        loss: `objectives.py`, `batch_objectives.py`; None is DPO's sigmoid loss with `label_smoothing`.
        logps: `completion_logps.py`; None is the sum over the tokens.
        router_aux_loss: weight of a mixture's load-balancing loss; None is the model's own, 0 leaves it out.
        policy_starts_at: what each later stage trains on from: `previous`, M_{t-1}, or `sft`, S again (section 4.5).

    Raises:
        ConfigurationError: a number outside its range, or settings that don't go together.
    """

    def __init__(
        self,
        model_name_or_path: str,
        beta: float = 0.1,
        label_smoothing: float = 0.0,
        reference: ReferencePolicy | None = None,
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=5e-7, weight_decay=0.0, fused=True),
        lr_scheduler: ScheduleName = "linear",
        warmup_ratio: float = 0.1,
        disable_dropout: bool = True,
        logits_budget_mb: float = 256.0,
        gradient_checkpointing: bool | int = False,
        offload_activations: bool = False,
        compile_layers: bool = False,
        liger: bool = False,
        lora: LoraSettings | None = None,
        quantization: QuantizationName | None = None,
        allow_bin_weights: bool = False,
        loss: PreferenceLoss | None = None,
        logps: CompletionLogps | None = None,
        router_aux_loss: float | None = None,
        policy_starts_at: PolicyStart = "previous",
    ) -> None:
        super().__init__(optimizer, lr_scheduler, warmup_ratio)
        if beta <= 0:
            raise ConfigurationError(f"`model.beta` is {beta}, expected above 0")
        self.model_name_or_path = model_name_or_path
        self.beta = beta
        self.label_smoothing = label_smoothing
        self.logps = logps if logps is not None else SummedLogps()
        check_loss(loss, label_smoothing, self.logps)
        self.loss = loss
        self.router_aux_loss = router_aux_loss
        default = ResidentReference if lora is None else AdapterReference
        self.reference = reference if reference is not None else default()
        check_adapters(lora, quantization, self.reference)
        check_start_name(policy_starts_at)
        self.policy_starts_at: PolicyStart = policy_starts_at
        self.lora = lora
        self.allow_bin_weights = allow_bin_weights
        self.quantization: QuantizationName | None = quantization
        # Adapters are saved without their base; `on_load_checkpoint` is strict about them.
        self.strict_loading = lora is None
        self.disable_dropout = disable_dropout
        self.logits_budget_mb = logits_budget_mb
        self.execution = Execution(gradient_checkpointing, offload_activations, compile_layers, liger)
        self.policy: CausalBackbone | None = None
        self.exact_layout: LayoutName | None = None
        # A run that goes on from another one's M_{t-1}; set it before `fit`.
        self.fork: Fork | None = None
        # The checkpoint that the command line found on this rank's disk.
        self.goes_on_from: str | None = None
        self.record = StageRecord()
        self.first_adapter: FirstAdapter | None = None
        self.random_states: list[dict[str, Any]] | None = None
        self.resumed_plan: dict[str, Any] = {}

    # ---- weights

    def configure_model(self) -> None:
        """Load S, once. Also called by `validate` and the others on a module that has trained."""
        if self.policy is None:
            check_stage_losses(self.loss, data_of(self.trainer).staging)
            load_external(self)
            self.policy = self.load_model(self.model_name_or_path).train()
            self.exact_layout = from_first_rank(lambda: self.exact_layout)
            self.record.digests.setdefault(0, weights_digest(self.policy))
            self.first_adapter = None if self.lora is None else FirstAdapter(self.policy.model)
            self.reference.prepare(self.score)

    def load_weights(self, model_name_or_path: str) -> CausalBackbone:
        """Read a causal LM with fp32 master weights; only rank 0 calls it. Override to bring an own model."""
        numbers = (self.disable_dropout, self.logits_budget_mb, self.quantization, self.allow_bin_weights)
        return load_policy(model_name_or_path, *numbers)

    def load_skeleton(self, model_name_or_path: str) -> CausalBackbone:
        """The same model with weights on the meta device; every rank calls it. Override with `load_weights`."""
        return load_skeleton(model_name_or_path, self.disable_dropout, self.logits_budget_mb)

    def load_model(self, path: str) -> CausalBackbone:
        """A model as this run computes with it: cut, frozen, with its kernels. A collective."""
        strategy, data = self.trainer.strategy, data_of(self.trainer)
        cut, frozen = sharding_of(strategy), self._frozen_dtype()

        def load() -> CausalBackbone:
            whole = self.load_weights(path)
            # Once it is cut, stored in bf16 or given CUDA's kernels there is no plain forward left to compare with.
            if self.exact_layout is None and (cut is not None or frozen is not None):
                self.exact_layout = exact_layout(whole, data.layout, data.batching.pad_to_multiple_of)
            return store_frozen_(self._set_up(whole), frozen)

        if self.quantization is not None:
            return load()
        return load_on_ranks(
            load, lambda: store_frozen_(self._set_up(self.load_skeleton(path)), frozen), strategy.root_device, cut
        )

    def _set_up(self, weights: CausalBackbone) -> CausalBackbone:
        weights.router.set_coefficient(self.router_aux_loss)
        if self.lora is not None:
            attach_adapters(weights, self.lora, self.model_name_or_path)
        return self.execution.apply(weights)

    def _frozen_dtype(self) -> torch.dtype | None:
        mixed = str(self.trainer.precision) == "bf16-mixed"
        # Merging adds to the weights as they were read, and DoRA takes their norm.
        kept = self.lora is None or self.lora.export_merged or self.lora.dora
        if kept or self.quantization is not None or not mixed:
            return None
        return torch.bfloat16

    def load_reference_weights(self, run_dir: Path) -> nn.Module:
        """Read the M_t that the reference is restored from, and verify it; see `recorded_weights`."""
        return recorded_weights(self, run_dir)

    def read_model(self, folder: Path | None) -> nn.Module:
        """Read an exported M_t, or S where there is no folder: a model of its own, or its frozen adapter."""
        if self.lora is not None:
            assert self.first_adapter is not None
            return frozen_adapter(self.trained, folder, self.first_adapter)
        return self.load_model(self.model_name_or_path if folder is None else str(folder)).to(self.device)

    def settings(self) -> dict[str, Any]:
        """Plain values that a resumed run must agree on. Override to add those of an own loss."""
        return super().settings() | self.reference.settings() | judge_settings(self.trainer) | {
            "model.loss": None if self.loss is None else self.loss.settings(),
            "model.logps": self.logps.settings(),
            "model.router_aux_loss": self.router_aux_loss,
            "model.disable_dropout": self.disable_dropout,
            "model.policy_starts_at": self.policy_starts_at,
            "trainer.precision": str(self.trainer.precision),
            "trainer.gradient_clip_val": self.trainer.gradient_clip_val,
            "trainer.gradient_clip_algorithm": str(self.trainer.gradient_clip_algorithm),
        }

    # ---- the loss

    def compute_logps(self, model: nn.Module, batch: PreferenceBatch) -> PairLogps:
        """Summed logps `[B]` of a model; policy, reference and ranking all go through here. Override freely."""
        return self.logps(model, batch)

    def preference_loss(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        """Losses `[B]`, unreduced. Override to change the loss."""
        # A stage may have a label smoothing of its own.
        loss = SigmoidLoss(self.label_smoothing) if self.loss is None else self.loss.of_stage(*self.stage_place())
        return loss(policy, reference, self.beta)

    @torch.no_grad()
    def score(self, model: nn.Module, batch: PreferenceBatch) -> PairLogps:
        """`compute_logps` without gradients, in the precision of training."""
        with self.trainer.precision_plugin.forward_context():
            return self.compute_logps(model, batch)

    def training_step(self, batch: PreferenceBatch, batch_idx: int) -> Tensor:
        """One micro-batch: its share of the mean loss over the pairs of the optimizer step."""
        reference = self.reference.logps(batch)
        # Until the optimizer step: every micro-batch of it sees the same weights. Where memory is dearer than time
        # they are cast for a moment: kept copies and, until a backward pass ends, their gradients are 4 bytes a weight.
        if not self.execution.gradient_checkpointing:
            CASTS.hold()
        policy = self.compute_logps(self.trained, batch)
        self.last_logps = (policy.detach(), reference)
        losses = self.preference_loss(policy, reference) + self.trained.router.take()
        self.watch(batch, losses, policy, reference)
        self.measure(self.step_metrics, losses, policy, reference, batch)
        total = torch.where(batch.weights > 0, losses * batch.weights, 0.0).sum()
        # Lightning divides by the accumulation and DDP by the ranks; the mean is over the real pairs.
        return total * (self.trainer.world_size * self.trainer.accumulate_grad_batches / batch.step_pairs)

    # ---- stage callbacks and state

    def configure_callbacks(self) -> list[pl.Callback]:
        """The stage callbacks, leaving out each of which the Trainer already has one (subclasses included)."""
        present = callbacks_of(self.trainer)
        makers: list[type[pl.Callback]] = [StageTransition, StageExport, MetricsLog, StageProgress, ContaminationGuard]
        makers += [StageEvaluation, StageSamples, StageTable, LikelihoodGuard, RunReport]
        if self.trainer.checkpoint_callbacks:
            # None at all: `enable_checkpointing=False` is the user's word.
            makers.append(StageCheckpoint)
            refuse_plain_checkpoints(self.trainer)
        return [make() for make in makers if not any(isinstance(c, make) for c in present)]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep which stage was entered and the digests of M_0 ... M_{t-1}."""
        checkpoint["stage_record"] = asdict(self.record)
        checkpoint["loss_state"] = {} if self.loss is None else self.loss.state_dict()
        checkpoint["random_states"] = collect_random_states()
        checkpoint["run_plan"] = run_plan(self.trainer, self)
        checkpoint["reference"] = self.reference.state_dict()
        into_checkpoint_(checkpoint, self.trained, self.lora, self.quantization)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the stage record over, and refuse another S, and in `fit` other settings.

        Raises:
            ResumeError: the checkpoint is of another S, or was trained under other settings.
        """
        if "stage_record" not in checkpoint:
            raise ResumeError("`ckpt_path` is no checkpoint of this package: it has no stage record")
        check_checkpoint(checkpoint, self.trained, self.lora, self.quantization)
        record = StageRecord(**checkpoint["stage_record"])
        check_beginning(self.record, record)
        self.resumed_plan = checkpoint["run_plan"]
        if self.trainer.state.fn == TrainerFn.FITTING:
            compare_plans(self.resumed_plan, self.settings())
            keep_patience_(checkpoint, self.trainer)
            now = self.trainer.accumulate_grad_batches
            rescale_(checkpoint["loops"]["fit_loop"], self.resumed_plan[ACCUMULATE], now)
        self.record = record
        # `validate` may look at the model by another loss.
        if self.loss is not None and self.resumed_plan.get("model.loss") == self.loss.settings():
            self.loss.load_state_dict(checkpoint["loss_state"])
        self.random_states = checkpoint["random_states"]
        self.reference.load_state_dict(checkpoint.get("reference", {}))
