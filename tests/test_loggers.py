"""Lightning's loggers by class_path: the same names and values as in CSVLogger's file; and what callbacks find."""

from __future__ import annotations

import csv
import json

import lightning.pytorch as pl
import pytest
from helpers import make_rows, write_jsonl
from lightning.pytorch.loggers import CSVLogger
from runs import fit, metrics

from sdpo_lightning import PreferenceSource
from sdpo_lightning.cli import main


def test_tensorboard_has_the_names_and_values_of_csv(tmp_path, tiny_model_dir):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    loggers = {
        name: {"class_path": f"lightning.pytorch.loggers.{name}", "init_args": {"save_dir": str(tmp_path / name)}}
        for name in ("CSVLogger", "TensorBoardLogger")
    }
    samples = {"every_n_steps": 3, "num_prompts": 2, "max_new_tokens": 2}
    callbacks = [
        {"class_path": "sdpo_lightning.SampleStatistics", "init_args": samples},
        {"class_path": "sdpo_lightning.StageSamples", "init_args": {"prompts": []}},
    ]
    paths = [write_jsonl(tmp_path / f"{name}.jsonl", make_rows(8, seed, name)) for seed, name in enumerate("ab")]
    given = {
        "trainer": {
            "default_root_dir": str(tmp_path / "run"),
            "accelerator": "cpu",
            "enable_progress_bar": False,
            "callbacks": callbacks,
            "logger": list(loggers.values()),
        },
        "model": {"model_name_or_path": str(tiny_model_dir)},
        "data": {
            "sources": [{"name": path.stem, "path": str(path)} for path in paths],
            "batch_size": 2,
            "max_length": 64,
            "val_fraction": 0.3,
        },
    }
    (tmp_path / "config.json").write_text(json.dumps(given))
    main(["fit", f"--config={tmp_path / 'config.json'}"])
    [path] = (tmp_path / "CSVLogger").rglob("metrics.csv")
    with path.open(newline="") as handle:
        rows = list(csv.DictReader(handle))
    names = set(rows[0]) - {"step"}
    [events] = (tmp_path / "TensorBoardLogger").rglob("events.out.*")
    found = EventAccumulator(str(events.parent)).Reload()
    assert set(found.Tags()["scalars"]) - {"hp_metric"} == names
    wanted = {"train/loss", "train/lr", "train/rewards_m0/margins", "stage/index", "samples/kl_sft", "val/a/loss"}
    assert wanted < names
    for name in names:
        theirs = [float(row[name]) for row in rows if row[name]]
        assert [event.value for event in found.Scalars(name)] == pytest.approx(theirs, rel=1e-5), name
    # And of our own file.
    ours = {key for row in metrics(tmp_path / "run") for key, value in row.items() if value}
    assert ours - {"step"} <= names
    losses = [float(row["train/loss"]) for row in metrics(tmp_path / "run")]
    assert [event.value for event in found.Scalars("train/loss")] == pytest.approx(losses, rel=1e-5)


class Reads(pl.Callback):
    """What a callback finds once a step is over, as one with a `monitor` does."""

    def __init__(self):
        self.found = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step:
            self.on_train_end(trainer, pl_module)

    def on_train_end(self, trainer, pl_module):
        self.found.append({name: value.item() for name, value in trainer.callback_metrics.items()})


@pytest.mark.parametrize("logs", [False, True])
def test_callbacks_find_every_step_with_a_logger_or_without(tmp_path, tiny_model_dir, logs):
    sources = [PreferenceSource(n, str(write_jsonl(tmp_path / f"{n}.jsonl", make_rows(6, 0, n)))) for n in "ab"]
    reads = Reads()
    logger = CSVLogger(tmp_path) if logs else False
    fit(tmp_path / "run", tiny_model_dir, sources, callbacks=[reads], trainer_args={"logger": logger})
    rows = metrics(tmp_path / "run")
    # 2 stages of 6 pairs, 2 a step.
    assert len(rows) == len(reads.found) == 6
    for row, found in zip(rows, reads.found, strict=True):
        given = {name: float(value) for name, value in row.items() if value and name != "step"}
        assert {"train/loss", "train/rewards/margins", "train/lr", "stage/index"} < given.keys() == found.keys()
        assert found == pytest.approx(given, rel=1e-6)
