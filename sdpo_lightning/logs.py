"""Rank 5: the log that survives a resume, the summary, and what the progress bar says."""

from __future__ import annotations

import logging
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar

from sdpo_lightning.bars import BARS
from sdpo_lightning.check_report import source_lines
from sdpo_lightning.data.endings import pairs_trained
from sdpo_lightning.data.pair_lists import data_of
from sdpo_lightning.files import MetricsFile, write_json
from sdpo_lightning.memory import peak_bytes
from sdpo_lightning.metrics import PreferenceMetrics
from sdpo_lightning.run_parts import StageModule, is_try, log_interval, stage_module
from sdpo_lightning.stage_lines import clock
from sdpo_lightning.terminal import bar_opener, is_terminal
from sdpo_lightning.types import PreferenceBatch, Stage, StageRecord

log = logging.getLogger(__name__)

_STEP_COLUMNS = ("lr", "grad_norm", "pairs_seen", "tokens_per_second", "peak_memory")


@dataclass
class StageSummary:
    """What one stage did; a row of `summary.json`. Losses and gamma in nats, memory in bytes."""

    index: int
    name: str
    pairs: int
    steps: int = 0
    gamma_ref: float = 0.0
    gamma_ref_pairs: float = 0.0
    loss_first: float | None = None
    loss_last: float | None = None
    accuracy_last: float | None = None
    seconds: float = 0.0
    peak_memory: int = 0


class MetricsLog(pl.Callback):
    """`metrics.csv` (one row a logged step, kept across resumes) and `summary.json`."""

    def __init__(self) -> None:
        self.summaries: dict[int, StageSummary] = {}
        self.pairs_seen = 0.0
        self._step = 0
        self._tokens = 0
        self._file: MetricsFile | None = None
        self._started = 0.0

    def state_dict(self) -> dict[str, Any]:
        """Counters and summaries so far."""
        return {"pairs_seen": self.pairs_seen, "summaries": [asdict(s) for s in self.summaries.values()]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self.pairs_seen = state_dict["pairs_seen"]
        self.summaries = {row["index"]: StageSummary(**row) for row in state_dict["summaries"]}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open the file; a resumed run drops the rows beyond its checkpoint."""
        pl_module = stage_module(pl_module)
        self._step = trainer.global_step
        if trainer.ckpt_path is None:
            # Of a fork its parent's.
            adopted = data_of(trainer).stages()[: pl_module.record.entered]
            self.pairs_seen = float(pairs_trained(adopted, data_of(trainer).ends))
        self._started = time.perf_counter()
        pl_module.step_metrics.reset()
        if trainer.is_global_zero and not is_try(trainer):
            path = Path(trainer.default_root_dir) / "metrics.csv"
            self._file = MetricsFile(path, _columns(data_of(trainer).val_names), trainer.global_step)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: PreferenceBatch,
        batch_idx: int,
    ) -> None:
        """After an optimizer step: log the means over its pairs."""
        pl_module = stage_module(pl_module)
        self._tokens += batch.num_tokens
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        values = {key: value.item() for key, value in pl_module.step_metrics.compute().items()}
        pl_module.step_metrics.reset()
        stage = pl_module.stage_under_way
        pairs = values.pop("pairs")
        self.pairs_seen += pairs
        row = self._row(trainer, pl_module, stage, values)
        first = self._summarise(stage, pairs, values, row["train/peak_memory"])
        logged = {key: value for key, value in row.items() if key not in ("step", "train/loss")}
        if trainer.loggers:
            pl_module.log_dict(logged, rank_zero_only=False)
        else:
            # Only callbacks read them, as `monitor`: `log_dict` takes longer than a step of a small model.
            trainer.callback_metrics.update({key: torch.tensor(float(value)) for key, value in logged.items()})
        pl_module.log("train/loss", row["train/loss"], prog_bar=True)
        if self._file is not None and (first or trainer.global_step % log_interval(trainer) == 0):
            self._file.append(row)

    def _row(
        self, trainer: pl.Trainer, pl_module: StageModule, stage: Stage, values: dict[str, float]
    ) -> dict[str, float]:
        now = time.perf_counter()
        speed = self._tokens * trainer.world_size / (now - self._started)
        self._tokens = 0
        self._seconds, self._started = now - self._started, now
        steps = (pl_module.learning_rate, pl_module.grad_norm, self.pairs_seen, speed, float(peak_memory()))
        row: dict[str, float] = {"step": trainer.global_step, "stage/index": stage.index}
        row |= {f"train/{key}": value for key, value in values.items()}
        return row | {f"train/{key}": value for key, value in zip(_STEP_COLUMNS, steps, strict=True)}

    def _summarise(self, stage: Stage, pairs: float, values: dict[str, float], memory: float) -> bool:
        """Add a step to its stage's summary; True on the first step of the stage."""
        first = stage.index not in self.summaries
        if first:
            self.summaries[stage.index] = StageSummary(stage.index, stage.name, len(stage.pair_ids))
            self.summaries[stage.index].loss_first = values["loss"]
        summary = self.summaries[stage.index]
        if summary.steps < stage.epoch_steps[0]:
            # Mean over one pass: gamma_ref is fixed within a stage.
            total = summary.gamma_ref * summary.gamma_ref_pairs + values["gamma_ref"] * pairs
            summary.gamma_ref_pairs += pairs
            summary.gamma_ref = total / summary.gamma_ref_pairs
        summary.steps += 1
        summary.loss_last = values["loss"]
        summary.accuracy_last = values["rewards/accuracies"]
        summary.seconds += self._seconds
        summary.peak_memory = max(summary.peak_memory, int(memory))
        return first

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put held-out metrics into the row of the step that they were measured at."""
        pl_module = stage_module(pl_module)
        if self._file is not None and trainer.state.fn == "fit":
            values = {k: v.item() for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
            self._file.amend(trainer.global_step, pl_module.stage_under_way.index, values)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Rewrite `summary.json`."""
        if trainer.is_global_zero and not is_try(trainer):
            rows = [asdict(summary) for summary in self.summaries.values()]
            write_json(Path(trainer.default_root_dir) / "summary.json", {"stages": rows})


def _columns(val_names: list[str]) -> list[str]:
    keys = (*PreferenceMetrics.KEYS, *PreferenceMetrics.M0_KEYS)
    train = [f"train/{key}" for key in (*keys, *_STEP_COLUMNS)]
    return ["step", "stage/index", *train, *(f"val/{name}/{key}" for name in val_names for key in (*keys, "pairs"))]


def peak_memory() -> int:
    """Peak bytes so far: of the GPU where there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return peak_bytes()


class StageProgress(pl.Callback):
    """Says at the start what `check` says of the rows; then stage, source and time left in Lightning's bar.

    Passes without a bar of Lightning's (ranking, cached logps, exports) get one in the same manner. Where nobody
    watches stdout no bar is shown at all.
    """

    def __init__(self) -> None:
        self._began: tuple[float, int] | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Decide whether bars are shown."""
        bar = trainer.progress_bar_callback
        if isinstance(bar, TQDMProgressBar | RichProgressBar) and not is_terminal():
            bar.disable()
        BARS.use(bar_opener(trainer))

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """No bars from now on."""
        BARS.use(None)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """No bars from now on."""
        BARS.use(None)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Rows kept, cut and dropped by reason, and lengths, of each source. What is to be warned of was said."""
        data = data_of(trainer)
        for report in data.reports.values() if trainer.is_global_zero else ():
            for finding in source_lines(report, data.store, report.dropped, report.marks):
                if finding.level == "info":
                    log.info("%s", finding.text)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update the text once an optimizer step."""
        pl_module = stage_module(pl_module)
        bar = trainer.progress_bar_callback
        if self._began is None:
            self._began = (time.perf_counter(), trainer.global_step)
        if isinstance(bar, TQDMProgressBar) and bar.is_enabled:
            bar.train_progress_bar.set_description(self._text(trainer, pl_module.stage_under_way, pl_module.record))
        elif isinstance(bar, RichProgressBar) and bar.progress is not None:
            text = self._text(trainer, pl_module.stage_under_way, pl_module.record)
            assert bar.train_progress_bar_id is not None
            bar.progress.update(bar.train_progress_bar_id, description=text)

    def _text(self, trainer: pl.Trainer, stage: Stage, record: StageRecord) -> str:
        stages = data_of(trainer).stages()
        total = sum(s.num_steps for s in stages)
        assert self._began is not None
        began, first = self._began
        done = trainer.global_step - first
        left = "?" if done < 1 else clock((time.perf_counter() - began) / done * (total - trainer.global_step))
        index = record.reference
        reference = f"{'external' if index < 0 else f'M_{index}'} {record.digests[index][:8]}"
        return f"stage {stage.index}/{len(stages)} {stage.name}, reference {reference}, {left} left for all stages"
