"""Resume from EVERY checkpoint is bit for bit the uninterrupted run."""

import shutil
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from helpers import make_rows, write_jsonl
from runs import assert_same_weights, fit, reproducible

from sdpo_lightning import CachedReference, PreferenceSource, ResidentReference, StageCheckpoint, StageTransition
from sdpo_lightning.types import ConfigurationError, ResumeError

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
        # M_t isn't written yet when a checkpoint of stage t is, also not at the end of the last stage.
        for folder in folders[max(entered - 1, 0) :]:
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


@pytest.mark.parametrize("stop", [2, 3, 5])
def test_a_stop_inside_a_stage_goes_on_exactly(tmp_path, tiny_model_dir, sources, stop):
    fit(tmp_path / "whole", tiny_model_dir, sources, epochs_per_stage=EPOCHS)
    cut = {"trainer_args": {"max_steps": stop}}
    fit(tmp_path / "cut", tiny_model_dir, sources, epochs_per_stage=EPOCHS, **cut)
    stopped = tmp_path / "cut" / "checkpoints" / f"stopped-step={stop}.ckpt"
    # 3 steps of stage 1: step 3 ends an epoch, and the epoch's own checkpoint has it.
    [checkpoint] = [stopped] if stop != 3 else (tmp_path / "cut" / "checkpoints").glob("epoch*step=3.ckpt")
    fit(tmp_path / "cut", tiny_model_dir, sources, ckpt_path=checkpoint, epochs_per_stage=EPOCHS)
    for folder in ("01-a", "02-b", "03-c"):
        assert_same_weights(tmp_path / "whole" / "stages" / folder, tmp_path / "cut" / "stages" / folder)
    assert reproducible(tmp_path / "whole") == reproducible(tmp_path / "cut")
    assert len(reproducible(tmp_path / "whole")) == 3 + 2 * 4 + 2


def test_no_save_inside_an_accumulation_window(tmp_path, tiny_model_dir, sources):
    timed = StageCheckpoint(train_time_interval=timedelta(0), save_top_k=-1)
    trainer, _ = fit(
        tmp_path, tiny_model_dir, sources, callbacks=[timed], trainer_args={"accumulate_grad_batches": 2}
    )
    saved = sorted((tmp_path / "checkpoints").glob("*.ckpt"))
    # 5, 7, 3 pairs by 2 are 3, 4, 2 micro-batches, which make 2, 2, 1 steps: one save each.
    assert trainer.global_step == 5
    assert [torch.load(path, weights_only=True)["global_step"] for path in saved] == [1, 2, 3, 4, 5]


class HoldsBack(StageTransition):
    """The reference stays M_0."""

    def should_advance(self, trainer, stage):
        return False


def test_a_reference_that_was_held_back_is_resumed_as_such(tmp_path, tiny_model_dir, sources):
    fit(tmp_path / "whole", tiny_model_dir, sources, callbacks=[HoldsBack()])
    cut = {"trainer_args": {"max_steps": 5}}
    fit(tmp_path / "cut", tiny_model_dir, sources, callbacks=[HoldsBack()], **cut)
    checkpoint = tmp_path / "cut" / "checkpoints" / "stopped-step=5.ckpt"
    assert torch.load(checkpoint, weights_only=True)["stage_record"]["entered"] == 2
    fit(tmp_path / "cut", tiny_model_dir, sources, ckpt_path=checkpoint, callbacks=[HoldsBack()])
    assert reproducible(tmp_path / "whole") == reproducible(tmp_path / "cut")
    with pytest.raises(ConfigurationError, match="can't stay behind at stage 2"):
        fit(tmp_path / "no", tiny_model_dir, sources, reference=CachedReference(), callbacks=[HoldsBack()])


def test_an_altered_reference_is_refused(tmp_path, tiny_model_dir, sources):
    fit(tmp_path, tiny_model_dir, sources, trainer_args={"max_steps": 5})
    checkpoint = tmp_path / "checkpoints" / "stopped-step=5.ckpt"
    shutil.copy(tiny_model_dir / "model.safetensors", tmp_path / "stages" / "01-a" / "model.safetensors")
    with pytest.raises(ResumeError, match="reference M_1 sha mismatch"):
        fit(tmp_path, tiny_model_dir, sources, ckpt_path=checkpoint)
