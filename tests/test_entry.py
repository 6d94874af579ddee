"""One swap a boundary, whichever way the run is started."""

import json
import logging
import math
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import lightning.pytorch as pl
import pytest
from helpers import make_rows, write_jsonl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from runs import adamw, assert_same_weights, fit
from safetensors.torch import load_file, save_file

from sdpo_lightning import (
    CurriculumDataModule,
    DPOLitModule,
    PreferenceSource,
    ResidentReference,
    StageCheckpoint,
    StageExport,
    StageTransition,
)
from sdpo_lightning.cli import CurriculumCLI
from sdpo_lightning.types import ConfigurationError, ResumeError

pytestmark = pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")
ROOT = Path(__file__).resolve().parent.parent


class CountingReference(ResidentReference):
    """Counts how often each stage makes it advance."""

    def __init__(self):
        super().__init__()
        self.stages = []

    def advance(self, policy, stage, inputs):
        self.stages.append(stage.index)
        super().advance(policy, stage, inputs)


class OwnTransition(StageTransition):
    """A user's subclass."""


@pytest.fixture
def sources(tmp_path):
    return [
        PreferenceSource(name, str(write_jsonl(tmp_path / f"{name}.jsonl", make_rows(6, seed, name))))
        for seed, name in enumerate(("a", "b", "c"))
    ]


@pytest.mark.parametrize("callbacks", [[], [StageTransition], [OwnTransition], [OwnTransition, StageExport]])
def test_plain_trainer(tmp_path, tiny_model_dir, sources, callbacks):
    reference = CountingReference()
    trainer, _ = fit(tmp_path / "run", tiny_model_dir, sources, reference=reference, callbacks=[c() for c in callbacks])
    assert reference.stages == [1, 2, 3]
    assert sum(isinstance(callback, StageTransition) for callback in trainer.callbacks) == 1
    assert sum(isinstance(callback, ModelCheckpoint) for callback in trainer.callbacks) == 1
    assert len(list((tmp_path / "run" / "stages").iterdir())) == 3


@pytest.mark.parametrize("callback", ["StageTransition", "OwnTransition", None])
@pytest.mark.parametrize("cli_class", [LightningCLI, CurriculumCLI])
def test_command_lines(tmp_path, tiny_model_dir, sources, callback, cli_class):
    words = [
        "fit",
        f"--trainer.default_root_dir={tmp_path / 'run'}",
        "--trainer.accelerator=cpu",
        "--trainer.logger=false",
        "--trainer.enable_progress_bar=false",
        f"--model.model_name_or_path={tiny_model_dir}",
        f"--model.reference={__name__}.CountingReference",
        f"--data.sources={json.dumps([vars(source) for source in sources])}",
    ]
    if callback is not None:
        module = __name__ if callback == "OwnTransition" else "sdpo_lightning"
        words.append(f"--trainer.callbacks+={module}.{callback}")
    if cli_class is LightningCLI:
        cli = LightningCLI(DPOLitModule, CurriculumDataModule, auto_configure_optimizers=False, args=words)
    else:
        cli = CurriculumCLI(args=words)
    assert cli.model.reference.stages == [1, 2, 3]
    assert sum(isinstance(c, StageTransition) for c in cli.trainer.callbacks) == 1
    assert len(list((tmp_path / "run" / "stages").iterdir())) == 3


def test_another_checkpoint_callback_is_refused_in_words(tmp_path, tiny_model_dir, sources):
    with pytest.raises(ConfigurationError, match="StageCheckpoint"):
        fit(tmp_path, tiny_model_dir, sources, callbacks=[ModelCheckpoint(every_n_train_steps=2)])


def test_a_trainer_without_our_data_module_is_told(tmp_path, tiny_model_dir):
    trainer = pl.Trainer(default_root_dir=tmp_path, accelerator="cpu", logger=False, enable_progress_bar=False)
    with pytest.raises(ConfigurationError, match="the Trainer has none: call `trainer.fit"):
        trainer.fit(DPOLitModule(str(tiny_model_dir)), train_dataloaders=[1])


def test_checkpointing_can_be_switched_off(tmp_path, tiny_model_dir, sources):
    fit(tmp_path / "run", tiny_model_dir, sources, trainer_args={"enable_checkpointing": False})
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert len(list((tmp_path / "run" / "stages").iterdir())) == 3


def test_resume_does_not_rank(tmp_path, tiny_model_dir, sources, caplog):
    caplog.set_level(logging.INFO)
    trainer, _ = fit(tmp_path, tiny_model_dir, sources, order="easy_to_hard", trainer_args={"max_steps": 4})
    assert "scoring 18 pairs by M_0" in caplog.text
    before = json.loads((tmp_path / "curriculum.json").read_text())
    caplog.clear()
    [checkpoint] = (tmp_path / "checkpoints").glob("stopped-step=4.ckpt")
    fit(tmp_path, tiny_model_dir, sources, ckpt_path=checkpoint, order="easy_to_hard")
    assert "scoring" not in caplog.text
    assert json.loads((tmp_path / "curriculum.json").read_text()) == before
    assert len(list((tmp_path / "stages").iterdir())) == 3


def test_resume_refuses_another_plan_or_other_rows(tmp_path, tiny_model_dir, sources):
    fit(tmp_path, tiny_model_dir, sources, trainer_args={"max_steps": 4})
    [checkpoint] = (tmp_path / "checkpoints").glob("stopped-step=4.ckpt")
    with pytest.raises(ResumeError, match="data.seed: 0 -> 1"):
        fit(tmp_path, tiny_model_dir, sources, ckpt_path=checkpoint, seed=1)
    with pytest.raises(ResumeError, match="data.batch_size x processes: 2 -> 3"):
        fit(tmp_path, tiny_model_dir, sources, ckpt_path=checkpoint, batch_size=3)
    path = Path(sources[0].path)
    path.write_text(path.read_text().replace("w1", "w3", 1))
    with pytest.raises(ResumeError, match="tokenised rows of data.sources"):
        fit(tmp_path, tiny_model_dir, sources, ckpt_path=checkpoint)


def test_a_run_folder_holds_one_run(tmp_path, tiny_model_dir, sources):
    fit(tmp_path, tiny_model_dir, sources)
    with pytest.raises(ConfigurationError, match="models of an earlier run"):
        fit(tmp_path, tiny_model_dir, sources)


def test_missing_weights_are_not_made_up(tmp_path, tiny_model_dir, sources):
    folder = tmp_path / "headless"
    shutil.copytree(tiny_model_dir, folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigurationError, match="lm_head.weight"):
        fit(tmp_path / "run", folder, sources)


def test_readme_python_example(tmp_path, tiny_model_dir, sources):
    text = (ROOT / "README.md").read_text()
    code = text.split("```python\n", 1)[1].split("```", 1)[0]
    assert len(code.strip().splitlines()) < 15
    for old, new in (
        ("path/to/sft-model", str(tiny_model_dir)),
        ("easy.jsonl", sources[0].path),
        ("hard.jsonl", sources[1].path),
        ("runs/mine", str(tmp_path / "run")),
    ):
        assert old in code
        code = code.replace(old, new)
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "run" / "stages").iterdir())) == 2


def test_module_command_says_what_is_wrong(tmp_path):
    words = [sys.executable, "-m", "sdpo_lightning", "fit", "--trainer.default_root_dir", str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("error: ")
    assert "Traceback" not in done.stderr




def test_a_validated_module_can_be_trained(tmp_path, tiny_model_dir, sources):
    """Lightning validates in inference mode, whose tensors can't be copied into: not here."""
    data = {"order": "given", "batch_size": 2, "max_length": 64, "val_fraction": 0.4}
    settings = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    pl.seed_everything(0)
    module = DPOLitModule(str(tiny_model_dir), optimizer=adamw(), warmup_ratio=0.2)
    validated = pl.Trainer(default_root_dir=tmp_path / "v", **settings).validate(
        module, CurriculumDataModule(sources, **data), verbose=False
    )
    # The policy is S, and so is its reference.
    assert validated[0]["val/a/loss"] == pytest.approx(math.log(2), abs=1e-6)
    trainer = pl.Trainer(default_root_dir=tmp_path / "run", log_every_n_steps=1, **settings)
    trainer.fit(module, CurriculumDataModule(sources, **data))
    fit(tmp_path / "fresh", tiny_model_dir, sources, **data)
    for folder in ("01-a", "02-b", "03-c"):
        assert_same_weights(tmp_path / "run" / "stages" / folder, tmp_path / "fresh" / "stages" / folder)


def test_a_reference_that_waits_on_the_host_gives_the_same(tmp_path, tiny_model_dir, sources):
    """On a CPU host and device are one memory: this shows the path, not the move."""
    data = {"order": "given", "batch_size": 2, "max_length": 64}
    every = [StageCheckpoint(every_n_train_steps=1, save_top_k=-1)]
    fit(tmp_path / "plain", tiny_model_dir, sources, **data)
    parked = ResidentReference(offload=True)
    fit(tmp_path / "run", tiny_model_dir, sources, reference=parked, callbacks=every, **data)
    homes = parked._model._parked._homes
    assert homes and all(weight.data_ptr() == home.data_ptr() for weight, home in homes)
    for folder in ("01-a", "02-b", "03-c"):
        assert_same_weights(tmp_path / "run" / "stages" / folder, tmp_path / "plain" / "stages" / folder)
    # 6 pairs by 2: step 5 lies in stage 2. The reference is read again, and waits again.
    checkpoint = tmp_path / "run" / "checkpoints" / "epoch=1-step=5.ckpt"
    again = ResidentReference(offload=True)
    fit(tmp_path / "run", tiny_model_dir, sources, ckpt_path=checkpoint, reference=again, **data)
    assert again._model._parked is not None
    assert_same_weights(tmp_path / "run" / "stages" / "03-c", tmp_path / "plain" / "stages" / "03-c")
