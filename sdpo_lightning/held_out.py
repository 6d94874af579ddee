"""Rank 6: the half of the module that measures: held-out pairs for `validate`, `test`, `predict`, and step metrics."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn

from sdpo_lightning.data.pair_lists import data_of
from sdpo_lightning.metrics import PreferenceMetrics, prediction_rows
from sdpo_lightning.optimization import StageOptimization
from sdpo_lightning.types import LogpTable, PairLogps, PreferenceBatch, ScheduleName


class HeldOutPairs(StageOptimization):
    """Metrics of pairs. What gives their logps and losses is the subclass's.

    Args:
        optimizer: see `StageOptimization`.
        lr_scheduler: see `StageOptimization`.
        warmup_ratio: see `StageOptimization`.
    """

    def __init__(self, optimizer: OptimizerCallable, lr_scheduler: ScheduleName, warmup_ratio: float) -> None:
        super().__init__(optimizer, lr_scheduler, warmup_ratio)
        self.m0_logps: LogpTable | None = None
        self.last_logps: tuple[PairLogps, PairLogps] | None = None
        self.step_metrics = PreferenceMetrics()
        self.val_metrics = nn.ModuleList()

    def measure(
        self,
        metrics: PreferenceMetrics,
        losses: Tensor,
        policy: PairLogps,
        reference: PairLogps,
        batch: PreferenceBatch,
    ) -> None:
        """Add a micro-batch of B pairs to some metrics, with rewards against M_0 where its logps are known."""
        m0, known = (None, None) if self.m0_logps is None else self.m0_logps.lookup(batch.pair_id)
        metrics.update(losses, policy, reference, batch.weights, self.beta, m0, known)

    def _held_out_step(self, batch: PreferenceBatch, dataloader_idx: int) -> None:
        while len(self.val_metrics) <= dataloader_idx:
            self.val_metrics.append(PreferenceMetrics().to(self.device))
        policy = self.compute_logps(self.trained, batch)
        reference = self.reference.logps(batch)
        self.last_logps = (policy, reference)
        losses = self.preference_loss(policy, reference)
        self.measure(self._metrics_of(dataloader_idx), losses, policy, reference, batch)

    def _metrics_of(self, dataloader_idx: int) -> PreferenceMetrics:
        metrics = self.val_metrics[dataloader_idx]
        assert isinstance(metrics, PreferenceMetrics)
        return metrics

    def _log_held_out(self, prefix: str) -> None:
        for index, name in enumerate(data_of(self.trainer).val_names[: len(self.val_metrics)]):
            metrics = self._metrics_of(index)
            for key, value in metrics.compute().items():
                # Equal on all ranks already; Lightning wants to hear it.
                self.log(f"{prefix}/{name}/{key}", value.float(), rank_zero_only=False, sync_dist=True)
            metrics.reset()

    def validation_step(self, batch: PreferenceBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Metrics of held-out pairs of one source."""
        self._held_out_step(batch, dataloader_idx)

    def on_validation_epoch_end(self) -> None:
        """Log `val/<source>/...`."""
        self._log_held_out("val")

    def test_step(self, batch: PreferenceBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Metrics of held-out pairs of one source."""
        self._held_out_step(batch, dataloader_idx)

    def on_test_epoch_end(self) -> None:
        """Log `test/<source>/...`."""
        self._log_held_out("test")

    def predict_step(self, batch: PreferenceBatch, batch_idx: int) -> list[dict[str, Any]]:
        """Rows of `pair_id`, `source`, policy and reference logps (nats, summed over tokens)."""
        source_of = data_of(self.trainer).source_of
        return prediction_rows(self.score(self.trained, batch), self.reference.logps(batch), batch, source_of)
