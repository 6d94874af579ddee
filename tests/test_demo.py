"""The demo and its control, and what the progress bar says."""

import json

import lightning.pytorch as pl
import pytest
from helpers import make_rows, write_jsonl
from lightning.pytorch.callbacks import GradientAccumulationScheduler, RichProgressBar, TQDMProgressBar
from runs import adamw, fit

from sdpo_lightning import CurriculumDataModule, DPOLitModule, PreferenceSource
from sdpo_lightning.demo import ModelScores, _gains, _judge
from sdpo_lightning.demo import run_demo as demo
from sdpo_lightning.types import ConfigurationError


def scores(accuracy, preference):
    return ModelScores({"a": accuracy, "b": accuracy}, {"a": preference, "b": preference})


def test_the_demo_can_fail():
    before = scores((0.5, 0.02), (0.5, 0.02))
    # Two sources with an error of .02 each: the mean has .02 / sqrt 2, a difference of two means .02.
    good = _gains(before, scores((0.8, 0.02), (0.7, 0.02)))
    assert good["accuracy"] == pytest.approx((0.3, 0.02))
    _judge(good, control=False)
    for accuracy, preference in ((0.59, 0.9), (0.9, 0.59), (0.5, 0.5)):
        with pytest.raises(SystemExit, match="demo failed"):
            _judge(_gains(before, scores((accuracy, 0.02), (preference, 0.02))), control=False)
    # 11 points, but less than three standard errors.
    with pytest.raises(SystemExit, match="demo failed"):
        _judge(_gains(before, scores((0.61, 0.08), (0.61, 0.08))), control=False)
    with pytest.raises(SystemExit, match="control failed"):
        _judge(good, control=True)


@pytest.mark.slow
@pytest.mark.parametrize("words", [[], ["--control"]])
def test_demo_and_control(tmp_path, words):
    demo([*words, f"--root={tmp_path / 'run'}"])
    figures = json.loads((tmp_path / "run" / "summary.json").read_text())["demo"]
    assert {"M_0", "M_1", "M_2", "M_3", "pooled DPO"} < figures.keys()
    gains = [gain / error for gain, error in figures["gains"].values()]
    assert all(gain > 3 for gain in gains) if not words else all(gain <= 3 for gain in gains)


@pytest.mark.parametrize("bar_class", [TQDMProgressBar, RichProgressBar])
def test_progress_says_stage_and_source_and_time_left(tmp_path, tiny_model_dir, bar_class, monkeypatch):
    monkeypatch.setattr("sdpo_lightning.logs.is_terminal", lambda: True)

    said = []

    class Listens(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            bar = trainer.progress_bar_callback
            if isinstance(bar, TQDMProgressBar):
                said.append(bar.train_progress_bar.desc.removesuffix(": "))
            else:
                said.append(bar.progress.tasks[bar.train_progress_bar_id].description)

    sources = [
        PreferenceSource(name, str(write_jsonl(tmp_path / f"{name}.jsonl", make_rows(4, 0, name)))) for name in "ab"
    ]
    trainer = pl.Trainer(
        default_root_dir=tmp_path / "run", accelerator="cpu", logger=False, callbacks=[bar_class(), Listens()]
    )
    model = DPOLitModule(str(tiny_model_dir), optimizer=adamw())
    trainer.fit(model, CurriculumDataModule(sources, order="given", batch_size=1, max_length=64))
    sha = model.record.digests
    said = [text for text in said if "?" not in text]
    first = f"stage 1/2 a, reference M_0 {sha[0][:8]}, 0:00:0"
    assert any(text.startswith(first) and text.endswith("left for all stages") for text in said)
    assert any(text.startswith(f"stage 2/2 b, reference M_1 {sha[1][:8]}, 0:00:0") for text in said)


def test_a_changing_accumulation_is_refused(tmp_path, tiny_model_dir):
    source = PreferenceSource("a", str(write_jsonl(tmp_path / "a.jsonl", make_rows(4, 0, "a"))))
    with pytest.raises(ConfigurationError, match="accumulate_grad_batches"):
        fit(tmp_path / "run", tiny_model_dir, [source], callbacks=[GradientAccumulationScheduler({0: 2})])
