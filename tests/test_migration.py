"""The tables of docs/migration.md against the installed TRL and our parser."""

import dataclasses
import inspect
import re
from pathlib import Path

import pytest
import torch
import yaml
from runs import ParsesOnly

from sdpo_lightning import (
    DPOLitModule,
    batch_objectives,
    completion_logps,
    divergences,
    export,
    objectives,
    updating_reference,
)
from sdpo_lightning import reference as references

trl = pytest.importorskip("trl")

from transformers import TrainingArguments  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")
DOC = Path(__file__).resolve().parent.parent / "docs" / "migration.md"
HOMES = (objectives, batch_objectives, completion_logps, divergences, references, updating_reference, export)


def tables() -> list[list[list[str]]]:
    """Cells of each row of the tables that begin with `DPOConfig`."""
    found, rows = [], None
    for line in DOC.read_text().splitlines():
        if line.startswith("| `DPOConfig` |"):
            found.append(rows := [])
        elif not line.startswith("|"):
            rows = None
        elif rows is not None and not line.startswith("|---"):
            rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return found


@pytest.fixture(scope="module")
def defaults() -> dict:
    """Every setting of `fit` under its dotted name, with what it is when nothing is given."""
    words = ["fit", "--model.model_name_or_path=x", "--data.sources=[]"]
    parsed = ParsesOnly(args=words).config.fit.as_dict()
    flat = {}

    def walk(prefix, value):
        flat[prefix] = value
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{prefix}.{key}", inner)

    for key, value in parsed.items():
        walk(key, value)
    # The default optimizer is a function: what it sets is read off what it makes.
    made = inspect.signature(DPOLitModule).parameters["optimizer"].default([torch.nn.Parameter(torch.zeros(1))])
    assert type(made) is torch.optim.AdamW
    return flat | {f"model.optimizer.init_args.{key}": made.defaults[key] for key in ("lr", "weight_decay")}


def config_default(name: str):
    field = {f.name: f for f in dataclasses.fields(trl.DPOConfig)}[name]
    return field.default if field.default is not dataclasses.MISSING else field.default_factory()


def test_every_key_of_trl_stands_in_the_first_table():
    shared = {field.name for field in dataclasses.fields(TrainingArguments)}
    own = {field.name for field in dataclasses.fields(trl.DPOConfig)} - shared
    assert len(own) > 20
    first, second = tables()
    assert sorted(row[0].strip("`") for row in first) == sorted(own)
    assert {row[0].strip("`") for row in second} <= shared
    assert len(second) > 15


@pytest.mark.parametrize("row", [row for table in tables() for row in table], ids=lambda row: row[0].strip("`"))
def test_names_and_defaults(row, defaults):
    theirs, given, ours, default, note = row
    expected = config_default(theirs.strip("`"))
    expected = getattr(expected, "value", expected)
    assert given == f"`{expected}`".replace("'", '"')
    names = re.findall(r"`([^`]+)`", ours)
    assert names or ours == "none"
    for name in names:
        assert name in defaults, name
    if default:
        [value] = {yaml.safe_load(default.strip("`"))}
        for name in names:
            assert defaults[name] == (float(value) if isinstance(defaults[name], float) else value)
    # Classes that the note names exist and take these settings.
    for name, arguments in re.findall(r"`([A-Z]\w+)(?:\((\w+)\))?`", note):
        [found] = {getattr(home, name) for home in HOMES if name in vars(home)}
        assert not arguments or arguments in inspect.signature(found).parameters
