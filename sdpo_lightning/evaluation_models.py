"""Rank 3: the models that are evaluated: M_0 ... M_T of a run directory, or one model folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sdpo_lightning.files import file_digest
from sdpo_lightning.ledger import LEDGER, Ledger, is_intact
from sdpo_lightning.types import ConfigurationError, ResumeError


@dataclass(frozen=True)
class EvaluatedModel:
    """A model on the disk, or S by its hub name.

    Attributes:
        label: `M_t`, or the folder's name.
        folder: of the model or adapter.
        sha256: of M_t as the ledger has it; of the files of a plain folder.
        base: the model below an adapter.
    """

    label: str
    folder: str
    sha256: str
    base: str | None = None


@dataclass(frozen=True)
class FoundModels:
    """What there is to evaluate.

    Attributes:
        models: in order.
        left_out: label -> why.
        is_run: whether they are those of a run.
    """

    models: list[EvaluatedModel]
    left_out: dict[str, str]
    is_run: bool


def find_models(path: Path, s: str | None = None) -> FoundModels:
    """M_0 ... M_T of a run directory, or the model of a plain folder.

    Args:
        path: of either.
        s: folder or hub name of S, for a run without a `config.yaml`.

    Raises:
        ConfigurationError: it is neither, or S isn't known.
        ResumeError: a model isn't as the run left it.
    """
    if not path.is_dir():
        raise ConfigurationError(f"`evaluate`: no folder {str(path)!r}; give a run directory or a model folder")
    ledger = Ledger.read(path)
    if ledger is not None:
        return _of_run(path, ledger, s)
    if not any((path / name).exists() for name in ("config.json", "adapter_config.json")):
        raise ConfigurationError(
            f"`evaluate`: {path} holds neither {LEDGER} nor a config.json; give a run directory or a model folder"
        )
    found = EvaluatedModel(path.resolve().name, str(path), file_digest(path), _base(path))
    return FoundModels([found], {}, is_run=False)


def _of_run(path: Path, ledger: Ledger, s: str | None) -> FoundModels:
    s = s or _s_of_config(path)
    left_out: dict[str, str] = {}
    models: list[EvaluatedModel] = []
    if s is None:
        left_out["M_0"] = "the run has no config.yaml that names S; give `--s`"
    elif ledger.stages:
        models.append(EvaluatedModel("M_0", s, ledger.s_sha256 or ledger.stages[0].reference.sha256))
    for stage in ledger.stages:
        label, made = f"M_{stage.index}", stage.output
        if made is None or made.folder is None:
            left_out[label] = f"stage {stage.index} {stage.name!r} isn't done"
        elif made.removed:
            left_out[label] = "the run kept its last models only"
        elif not is_intact(path, made):
            raise ResumeError(f"{path / made.folder} isn't as the run left it; restore it, or evaluate it as a folder")
        else:
            folder = path / made.folder
            models.append(EvaluatedModel(label, str(folder), made.sha256, _base(folder)))
    if not models:
        raise ConfigurationError(f"`evaluate`: {path} has no model yet: {left_out}")
    return FoundModels(models, left_out, is_run=True)


def _base(folder: Path) -> str | None:
    """The model below an adapter; None where the folder holds a whole model."""
    path = folder / "adapter_config.json"
    return json.loads(path.read_text())["base_model_name_or_path"] if path.exists() else None


def _s_of_config(path: Path) -> str | None:
    file = path / "config.yaml"
    config: Any = yaml.safe_load(file.read_text()) if file.exists() else None
    model = (config or {}).get("model") or {}
    # In subclass mode the settings lie one deeper.
    return (model.get("init_args") or model).get("model_name_or_path")
