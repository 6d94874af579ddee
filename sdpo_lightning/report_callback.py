"""Rank 6: `report.html` and its PNGs at the end of `fit`."""

from __future__ import annotations

import logging

import lightning.pytorch as pl

from sdpo_lightning.files import write_json
from sdpo_lightning.report_command import draw_run, report_run
from sdpo_lightning.run_parts import run_dir, stage_module
from sdpo_lightning.run_state import has_last_model, leaves_files
from sdpo_lightning.versions import versions

log = logging.getLogger(__name__)

_PACKAGES = ("sdpo-lightning", "torch", "lightning", "transformers", "datasets", "tokenizers", "safetensors", "numpy")


class RunReport(pl.Callback):
    """Leaves `versions.json` and, after the last stage, `report.html`, and PNGs where matplotlib is installed."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write down what runs here."""
        if trainer.is_global_zero and leaves_files(trainer):
            write_json(run_dir(trainer) / "versions.json", versions(_PACKAGES))

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the report. Whatever goes wrong, the run is done, so it is only a warning."""
        if not trainer.is_global_zero or not has_last_model(trainer, stage_module(pl_module)):
            return
        if pl_module.stage is None and (run_dir(trainer) / "report.html").exists():
            # A finished run that was started again: its files stay.
            return
        try:
            run = report_run(run_dir(trainer))
        except Exception as error:
            log.warning("no report (`sdpo-lightning report %s` makes it): %s", run_dir(trainer), error)
            return
        log.info("report: %s", run_dir(trainer) / "report.html")
        try:
            draw_run(run)
        except Exception as error:
            log.warning("no PNGs of the report (`sdpo-lightning report %s` draws them): %s", run_dir(trainer), error)
