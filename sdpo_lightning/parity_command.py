"""Rank 9: the verb `parity`: the first steps of a run beside T chained runs of an installed TRL.

Each side is a process of its own: peaks of memory don't mix, and neither library sees what the other has set.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch.cli import LightningArgumentParser

from sdpo_lightning.cli import EstimateCLI
from sdpo_lightning.data.datamodule import CurriculumDataModule
from sdpo_lightning.files import write_json
from sdpo_lightning.module import DPOLitModule
from sdpo_lightning.parity import Side, compare, shared_config, table, trl_settings
from sdpo_lightning.types import ConfigurationError, SelfCheckError

_FIGURES = ("losses", "grad_norms", "seconds", "pairs", "peak")


class ParityCLI(EstimateCLI):
    """Takes what `fit` takes, and makes nothing of it in this process."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """What `parity` alone takes."""
        super().add_arguments_to_parser(parser)
        parser.add_argument("--steps", type=int, default=20, help="optimizer steps a stage")
        parser.add_argument("--minutes", type=float, default=10.0, help="beyond them TRL isn't run a second time")
        parser.add_argument("--json", type=str | None, help="file for all figures, step by step")
        parser.add_argument("--scratch", type=str | None, help="folder for models of both sides; they are deleted")

    def instantiate_classes(self) -> None:
        """Nothing: the two sides are programs."""

    def plain(self) -> dict[str, Any]:
        """The config as plain values, the optimizer's default written out."""
        return yaml.safe_load(self.parser.dump(self.config, skip_none=False))


def run_parity(
    words: Sequence[str], model_class: type[DPOLitModule], datamodule_class: type[CurriculumDataModule]
) -> None:
    """Run both sides and print the comparison.

    Args:
        words: after `parity`.
        model_class: ours; another one has no counterpart in TRL.
        datamodule_class: ours.

    Raises:
        ConfigurationError: TRL is missing, or a setting has no counterpart in it.
        SelfCheckError: it isn't the same training, or a side didn't come to its end.
    """
    began = time.monotonic()
    if (model_class, datamodule_class) != (DPOLitModule, CurriculumDataModule):
        raise ConfigurationError("`parity` compares our own classes with TRL; call it as `sdpo-lightning parity`")
    trl = _trl_version()
    config = ParityCLI(model_class, datamodule_class, words, run=False).plain()
    if config["steps"] < 1:
        raise ConfigurationError(f"`--steps` is {config['steps']}, expected at least 1")
    cuda = config["trainer"]["accelerator"] in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    bf16 = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    precision = _precision(config["trainer"]["precision"], bf16)
    with tempfile.TemporaryDirectory(dir=config["scratch"], prefix="parity-") as folder:
        shared = shared_config(config, precision, Path(folder) / "ours")
        print(f"TRL {trl}, {'one GPU' if cuda else 'CPU'}, {precision}, {config['steps']} steps a stage", flush=True)
        ours, stages = _our_side(Path(folder), shared, config["steps"])
        settings = trl_settings(shared, cuda)
        first = time.monotonic()
        theirs = _their_side(Path(folder), settings, stages)
        took = time.monotonic() - first
        enough = time.monotonic() - began + took <= 60 * config["minutes"]
        again = _their_side(Path(folder), settings, stages) if enough else None
    found = compare(ours, theirs, again, precision) | {"trl": trl, "precision": precision, "cuda": cuda}
    print(table(found))
    if config["json"]:
        write_json(Path(config["json"]), found)
    if not found["same"]:
        raise SelfCheckError("`parity`: the losses differ from TRL's by more than is allowed, see above")


def _trl_version() -> str:
    try:
        return version("trl")
    except PackageNotFoundError as error:
        raise ConfigurationError("`parity` needs TRL, which isn't installed: pip install 'trl==1.16.0'") from error


def _precision(given: Any, bf16: bool) -> str:
    if given is None:
        return "bf16-mixed" if bf16 else "32-true"
    return "32-true" if str(given) in ("32", "32-true") else str(given)


def _our_side(folder: Path, config: dict[str, Any], steps: int) -> tuple[Side, list[dict[str, Any]]]:
    given, out = folder / "config.yaml", folder / "ours.json"
    given.write_text(yaml.safe_dump(config))
    _run("this package", ["sdpo_lightning.parity_ours", str(given), str(steps), str(out)])
    found = json.loads(out.read_text())
    return Side(*(found[name] for name in _FIGURES)), found["stages"]


def _their_side(folder: Path, settings: dict[str, Any], stages: list[dict[str, Any]]) -> Side:
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        given, out = Path(scratch) / "job.json", Path(scratch) / "trl.json"
        given.write_text(json.dumps({"settings": settings, "stages": stages, "scratch": scratch, "out": str(out)}))
        _run("TRL", ["sdpo_lightning.parity_trl", str(given)])
        found = json.loads(out.read_text())
    return Side(*(found[name] for name in _FIGURES))


def _run(who: str, words: Sequence[str]) -> None:
    # TRL would spread a batch over all GPUs that it sees.
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
    done = subprocess.run(
        [sys.executable, "-m", *words], capture_output=True, text=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": first}
    )
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
        name, _, text = said[-1].partition(": ")
        kind = ConfigurationError if name.endswith(".ConfigurationError") else SelfCheckError
        raise kind(text if kind is ConfigurationError else f"`parity`: {who} ended with: {said[-1]}")
