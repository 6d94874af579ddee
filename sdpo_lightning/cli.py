"""Rank 8: the command line: Lightning's verbs, and `rank`, `estimate`, `check`, `report`, `evaluate`, `parity`, `demo`.

Exit codes: 0 done; 1 stopped by a fault at run time; 2 the configuration or the data is wrong; 3 a resume or
a cache is refused; 143 and 130 stopped by SIGTERM and SIGINT. `--debug` shows tracebacks.
"""

from __future__ import annotations

import csv
import logging
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from transformers.utils import logging as transformers_logging

from sdpo_lightning.data.datamodule import CurriculumDataModule
from sdpo_lightning.data.ranking import ranking_table
from sdpo_lightning.estimate_inputs import read_loads, read_run
from sdpo_lightning.estimate_report import report
from sdpo_lightning.exits import exit_codes
from sdpo_lightning.files import write_json
from sdpo_lightning.module import DPOLitModule
from sdpo_lightning.parser import OneLineParser
from sdpo_lightning.quick import answered
from sdpo_lightning.ranks import leave_group
from sdpo_lightning.redaction import HidesSecrets, hide_in_config
from sdpo_lightning.start import checkpoint_to_go_on_from, fork_to_begin
from sdpo_lightning.stopping import STOP
from sdpo_lightning.types import ConfigurationError


class CurriculumTrainer(pl.Trainer):
    """The Trainer with the verb `rank`, and predictions that are kept."""

    def rank(self, model: pl.LightningModule, datamodule: pl.LightningDataModule | None = None) -> dict[str, Any]:
        """Score the sources by M_0 and print the order, without training.

        Args:
            model: gives M_0 and `compute_logps`.
            datamodule: the sources.

        Returns:
            What `curriculum.json` holds.
        """
        assert isinstance(datamodule, CurriculumDataModule)
        datamodule.ranking_requested = True
        limit, self.limit_train_batches = self.limit_train_batches, 0
        self.fit(model, datamodule=datamodule)
        self.limit_train_batches = limit
        curriculum = datamodule.curriculum()
        if self.is_global_zero:
            write_json(Path(self.default_root_dir) / "curriculum.json", curriculum)
            print(ranking_table(curriculum))
        return curriculum

    def predict(
        self,
        model: pl.LightningModule | None = None,
        dataloaders: Any = None,
        datamodule: pl.LightningDataModule | None = None,
        return_predictions: bool | None = None,
        ckpt_path: str | Path | None = None,
        weights_only: bool | None = None,
    ) -> list[Any] | None:
        """Run inference on your data, and write `predictions.csv` into the run directory.

        Args:
            model: as in Lightning.
            dataloaders: as in Lightning.
            datamodule: as in Lightning.
            return_predictions: as in Lightning.
            ckpt_path: as in Lightning.
            weights_only: as in Lightning.
        """
        predictions = super().predict(
            model, dataloaders, datamodule, return_predictions, ckpt_path, weights_only=weights_only
        )
        rows = [row for batch in predictions or [] for row in batch]
        if rows:
            name = "predictions.csv" if self.world_size == 1 else f"predictions-{self.global_rank}.csv"
            folder = Path(self.default_root_dir)
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / name).open("w", newline="") as handle:
                writer = csv.DictWriter(handle, list(rows[0]), lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)
        return predictions


class ConfigAfterChecks(SaveConfigCallback):
    """Writes `config.yaml` when training begins: a refused run leaves no file behind."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Nothing yet."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write it."""
        if trainer.is_global_zero:
            folder = Path(trainer.default_root_dir)
            folder.mkdir(parents=True, exist_ok=True)
            # Whoever starts a run from this file doesn't mean to go on from that checkpoint.
            self.config.ckpt_path = None
            text = self.parser.dump(self.config, skip_none=False)
            given = yaml.safe_load(text)
            if (clean := hide_in_config(given)) != given:
                text = yaml.safe_dump(clean, sort_keys=False)
            (folder / "config.yaml").write_text(text)


class CurriculumCLI(LightningCLI):
    """`LightningCLI` for stepwise DPO. Another project gives its own classes: `CurriculumCLI(MyModule)`.

    Args:
        model_class: the module, or a subclass.
        datamodule_class: the data module, or a subclass.
        args: the words after the program's name; default `sys.argv[1:]`.
        subclass_mode: take `model.class_path` and `data.class_path` instead of fixed classes.
        run: whether `args` begin with a verb, which is then run.
    """

    def __init__(
        self,
        model_class: type[DPOLitModule] = DPOLitModule,
        datamodule_class: type[CurriculumDataModule] = CurriculumDataModule,
        args: Sequence[str] | None = None,
        subclass_mode: bool = False,
        run: bool = True,
    ) -> None:
        super().__init__(
            model_class,
            datamodule_class,
            save_config_callback=ConfigAfterChecks,
            trainer_class=CurriculumTrainer,
            trainer_defaults={"log_every_n_steps": 1, "max_epochs": -1, "logger": False},
            seed_everything_default=0,
            parser_class=OneLineParser,
            subclass_mode_model=subclass_mode,
            subclass_mode_data=subclass_mode,
            args=None if args is None else list(args),
            auto_configure_optimizers=False,
            run=run,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's verbs and `rank`."""
        return LightningCLI.subcommands() | {"rank": {"model", "datamodule"}}

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Without Lightning's warning that `sys.argv` is there too, which repeats what may be secret."""
        self.config = parser.parse_args(args)

    def before_instantiate_classes(self) -> None:
        """Ask for a run directory, and compute in bf16 where a GPU can.

        Raises:
            ConfigurationError: no run directory is given, or a checkpoint might run code.
        """
        trainer = self.config[self.subcommand].trainer
        if "weights_only" in self.config[self.subcommand]:
            if self.config[self.subcommand].weights_only is False:
                raise ConfigurationError("`weights_only` is false: any code in a checkpoint would run; leave it out")
            self.config[self.subcommand].weights_only = True
        if trainer.precision is None and _has_bf16_gpu(trainer.accelerator):
            # fp32 master weights stay: see docs/hardware.md.
            trainer.precision = "bf16-mixed"
        if trainer.default_root_dir is None:
            raise ConfigurationError("`trainer.default_root_dir` is missing: the folder for all that the run leaves")
        checkpoint = self.config[self.subcommand].get("ckpt_path")
        if checkpoint is not None and not Path(checkpoint).exists():
            raise ConfigurationError(f"`ckpt_path`: there is no {checkpoint!r}")
        if self.subcommand == "fit":
            config, run_dir = self.config.fit, Path(trainer.default_root_dir)
            self._go_on_from = checkpoint
            if not trainer.fast_dev_run:
                self._go_on_from = checkpoint_to_go_on_from(run_dir, checkpoint, config.resume)
            # A fork that has a checkpoint is a run like any other.
            begins = self._go_on_from is None
            self._fork = fork_to_begin(config.fork, config.from_stage, run_dir) if begins else None

    def before_fit(self) -> None:
        """Go on where the run directory says; not in the config, so that a checkpoint's settings override nothing."""
        self.config_init.fit.ckpt_path = self._go_on_from
        self.model.goes_on_from = self._go_on_from
        self.model.fork = self._fork

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add `--resume`, to all verbs, so that a run's `config.yaml` serves them all."""
        parser.add_argument(
            "--resume",
            type=Literal["auto", "never"],
            default="auto",
            help="fit: go on with the run in `trainer.default_root_dir`, or refuse a folder that isn't empty.",
        )
        parser.add_argument("--fork", type=str | None, help="fit: another run, or a model folder taken for M_{t-1}.")
        parser.add_argument("--from-stage", type=int | None, help="fit: t, the first stage that a fork trains.")

    def _parse_ckpt_path(self) -> None:
        """Lightning would have a checkpoint's hyper-parameters override the command line without a word."""


class EstimateCLI(CurriculumCLI):
    """Takes what `fit` takes, makes nothing of it, and prints what the run would need."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """What `estimate` alone takes, and what a config for `fit` may hold without a meaning here."""
        super().add_arguments_to_parser(parser)
        parser.add_argument("--device_memory_gb", type=float | None, help="of a card, 10^9 bytes; default: this one's")
        parser.add_argument("--model_config", type=str | None, help="config.json of the model, instead of the model's")
        parser.add_argument("--ckpt_path", type=str | None)
        parser.add_argument("--weights_only", type=bool | None)

    def before_instantiate_classes(self) -> None:
        """No run directory is needed."""

    def instantiate_classes(self) -> None:
        """Only sizes are read."""
        config = self.config.as_dict()
        self.sizes = read_run(config, config["model_config"])
        self.loads, self.source = read_loads(config, self.sizes)

    def text(self) -> str:
        """The estimate, and whether it fits a card where one is given or there."""
        memory = self.config["device_memory_gb"]
        card = None if memory is None else memory * 1e9
        if card is None and self.sizes.cuda and torch.cuda.is_available():
            card = float(torch.cuda.get_device_properties(0).total_memory)
        return report(self.sizes, self.loads, self.source, card)


def _has_bf16_gpu(accelerator: Any) -> bool:
    wanted = accelerator in ("auto", "gpu", "cuda")
    return wanted and torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def main(
    args: Sequence[str] | None = None,
    model_class: type[DPOLitModule] = DPOLitModule,
    datamodule_class: type[CurriculumDataModule] = CurriculumDataModule,
) -> None:
    """The command `sdpo-lightning`, and the three lines of another project's own.

    Args:
        args: the words after the program's name; default `sys.argv[1:]`.
        model_class: the module, or a subclass.
        datamodule_class: the data module, or a subclass.

    Raises:
        SystemExit: with the exit codes above, other than 0.
    """
    words = sys.argv[1:] if args is None else list(args)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for handler in logging.getLogger().handlers:
        if not any(isinstance(present, HidesSecrets) for present in handler.filters):
            handler.addFilter(HidesSecrets())
    logging.getLogger("httpx").setLevel(logging.WARNING)
    # A bar for each weight file says nothing that our own lines don't.
    transformers_logging.disable_progress_bar()
    with exit_codes(debug, (MisconfigurationException,)):
        if answered(words):
            return
        if words[:1] == ["demo"]:
            # Only here: the demo runs this very command line.
            from sdpo_lightning.demo import run_demo

            run_demo(words[1:])
        elif words[:1] == ["check"]:
            # Only here: it is made of this command line.
            from sdpo_lightning.check_command import run_check

            run_check(words[1:], model_class, datamodule_class)
        elif words[:1] == ["--print_completion"]:
            # Only here: it is made of this command line and of `check`.
            from sdpo_lightning.check_command import CheckCLI
            from sdpo_lightning.completion_command import print_completion

            print_completion(words[1:], CheckCLI, model_class, datamodule_class)
        elif words[:1] == ["evaluate"]:
            # Only here: no other verb answers or asks.
            from sdpo_lightning.evaluate_command import run_evaluate

            run_evaluate(words[1:])
        elif words[:1] == ["parity"]:
            # Only here: it is made of this command line.
            from sdpo_lightning.parity_command import run_parity

            run_parity(words[1:], model_class, datamodule_class)
        elif words[:1] == ["estimate"]:
            print(EstimateCLI(model_class, datamodule_class, words[1:], run=False).text())
        else:
            with STOP.listening() if words[:1] == ["fit"] else nullcontext():
                CurriculumCLI(model_class, datamodule_class, words)
            leave_group()
