"""Resume from EVERY checkpoint is bit for bit the uninterrupted run."""

import shutil
from pathlib import Path

import pytest
import torch
from helpers import make_rows, write_jsonl
from runs import assert_same_weights, fit, reproducible

from sdpo_lightning import CachedReference, PreferenceSource, ResidentReference, StageCheckpoint

EPOCHS = {"b": 2, "*": 1}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    found = []
    for seed, (name, count) in enumerate((("a", 5), ("b", 7), ("c", 3))):
        path = folder / f"{name}.jsonl"
        write_jsonl(path, make_rows(count, seed, name))
        found.append(PreferenceSource(name, str(path)))
    return found


@pytest.fixture(scope="module")
def dropout_model_dir(tiny_model_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dropout") / "model"
    shutil.copytree(tiny_model_dir, folder)
    config = (folder / "config.json").read_text()
    assert '"attention_dropout": 0.0' in config
    (folder / "config.json").write_text(config.replace('"attention_dropout": 0.0', '"attention_dropout": 0.2'))
    return folder


def _run(run_dir: Path, model_dir, sources, accumulate, reference, ckpt_path=None, **module_args):
    every = StageCheckpoint(every_n_train_steps=1, save_top_k=-1)
    ends = StageCheckpoint(every_n_epochs=1, save_top_k=-1, filename="end-{epoch}-{step}")
    return fit(
        run_dir,
        model_dir,
        sources,
        ckpt_path,
        reference(),
        [every, ends],
        trainer_args={"accumulate_grad_batches": accumulate},
        module_args=module_args,
        order="easy_to_hard",
        val_fraction=0.2,
        epochs_per_stage=EPOCHS,
    )


def _check_every_checkpoint(tmp_path, model_dir, sources, accumulate, reference, **module_args):
    whole = tmp_path / "whole"
    trainer, _ = _run(whole, model_dir, sources, accumulate, reference, **module_args)
    checkpoints = sorted((whole / "checkpoints").glob("*.ckpt"))
    assert len(checkpoints) >= trainer.global_step
    folders = sorted(path.name for path in (whole / "stages").glob("0*"))
    assert len(folders) == 3
    for checkpoint in checkpoints:
        resumed = tmp_path / f"from-{checkpoint.stem}"
        shutil.copytree(whole, resumed, ignore=shutil.ignore_patterns("checkpoints"))
        entered = torch.load(checkpoint, weights_only=True)["stage_record"]["entered"]
        for folder in folders[entered:]:
            shutil.rmtree(resumed / "stages" / folder)
        _run(resumed, model_dir, sources, accumulate, reference, ckpt_path=checkpoint, **module_args)
        for folder in folders:
            assert_same_weights(whole / "stages" / folder, resumed / "stages" / folder)
        assert reproducible(resumed) == reproducible(whole), checkpoint.name
        shutil.rmtree(resumed)
    return trainer


def test_every_checkpoint_resident(tmp_path, tiny_model_dir, sources):
    trainer = _check_every_checkpoint(tmp_path, tiny_model_dir, sources, 1, ResidentReference)
    assert trainer.global_step > 6


def test_every_checkpoint_accumulation_and_dropout_cached(tmp_path, dropout_model_dir, sources):
    _check_every_checkpoint(tmp_path, dropout_model_dir, sources, 2, CachedReference, disable_dropout=False)


def test_dropout_makes_a_difference(tmp_path, dropout_model_dir, sources):
    # Else the test above would pass without random states in the checkpoint.
    _run(tmp_path / "on", dropout_model_dir, sources, 1, ResidentReference, disable_dropout=False)
    _run(tmp_path / "off", dropout_model_dir, sources, 1, ResidentReference, disable_dropout=True)
    assert reproducible(tmp_path / "on") != reproducible(tmp_path / "off")
