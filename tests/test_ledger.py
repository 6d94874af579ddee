"""The ledger of a run under a plain Trainer: what it says, and which checkpoints it refuses."""

import json
import shutil

import pytest
import torch
from helpers import make_rows, write_jsonl
from runs import assert_same_weights, fit

from sdpo_lightning import PreferenceSource, checkpoint
from sdpo_lightning.ledger import Ledger, plan_digest
from sdpo_lightning.types import ConfigurationError, ResumeError


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    paths = {name: write_jsonl(folder / f"{name}.jsonl", make_rows(6, 0, name)) for name in ("a", "b")}
    return [PreferenceSource(name, str(path)) for name, path in paths.items()]


@pytest.fixture(scope="module")
def whole(tiny_model_dir, sources, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    fit(run_dir, tiny_model_dir, sources)
    return run_dir


@pytest.fixture
def stopped(tmp_path, tiny_model_dir, sources):
    """Stopped in stage 2: 3 steps are in stage 1."""
    fit(tmp_path / "run", tiny_model_dir, sources, trainer_args={"max_steps": 4})
    return tmp_path / "run"


def test_what_it_says(whole):
    content = json.loads((whole / "ledger.json").read_text())
    first, second = content["stages"]
    assert [stage["status"] for stage in content["stages"]] == ["done", "done"]
    assert first["reference"]["folder"] is None and first["output"]["folder"] == "stages/01-a"
    assert second["reference"]["sha256"] == first["output"]["sha256"] != first["reference"]["sha256"]
    assert (first["pairs"], first["seed"]) == (6, 0) and first["data"] != second["data"]
    assert content["plans"] == [plan_digest(content["plan"])]
    assert content["plan"]["model.beta"] == 0.1 and content["plan"]["model.optimizer.lr"] == 1e-3


def test_a_plain_trainer_goes_on_with_ckpt_path(stopped, whole, tiny_model_dir, sources):
    # Nothing resumes by itself there.
    with pytest.raises(ConfigurationError, match="holds the models of an earlier run"):
        fit(stopped, tiny_model_dir, sources)
    fit(stopped, tiny_model_dir, sources, ckpt_path=stopped / "checkpoints" / "stopped-step=4.ckpt")
    for name in ("01-a", "02-b"):
        assert_same_weights(whole / "stages" / name, stopped / "stages" / name)
    assert json.loads((stopped / "ledger.json").read_text()) == json.loads((whole / "ledger.json").read_text())


def test_a_checkpoint_ahead_of_the_ledger_is_refused(stopped, tiny_model_dir, sources):
    ledger = Ledger.read(stopped)
    del ledger.stages[1:]
    ledger.write(stopped)
    with pytest.raises(ResumeError, match="of stage 2, ledger.json knows of 1"):
        fit(stopped, tiny_model_dir, sources, ckpt_path=stopped / "checkpoints" / "stopped-step=4.ckpt")


def test_a_checkpoint_of_another_run_is_refused(stopped, tiny_model_dir, sources):
    ledger = Ledger.read(stopped)
    path = stopped / "ledger.json"
    path.write_text(path.read_text().replace(ledger.stages[1].reference.sha256, "0" * 64))
    with pytest.raises(ResumeError, match="M_1 has sha .* it is of another run"):
        fit(stopped, tiny_model_dir, sources, ckpt_path=stopped / "checkpoints" / "stopped-step=4.ckpt")


def test_another_plan_in_the_ledger_is_refused(stopped, tiny_model_dir, sources):
    ledger = Ledger.read(stopped)
    ledger.plans, ledger.plan = ["0" * 64], ledger.plan | {"model.beta": 0.3}
    ledger.write(stopped)
    with pytest.raises(ResumeError, match="model.beta: 0.3 -> 0.1"):
        fit(stopped, tiny_model_dir, sources, ckpt_path=stopped / "checkpoints" / "stopped-step=4.ckpt")


def test_a_ledger_that_is_gone_or_damaged(stopped, whole, tiny_model_dir, sources, tmp_path, caplog):
    shutil.copytree(stopped, tmp_path / "damaged")
    (tmp_path / "damaged" / "ledger.json").write_text('{"plan": {}')
    with pytest.raises(ResumeError, match="ledger.json is damaged"):
        fit(
            tmp_path / "damaged",
            tiny_model_dir,
            sources,
            ckpt_path=tmp_path / "damaged" / "checkpoints" / "stopped-step=4.ckpt",
        )
    (stopped / "ledger.json").unlink()
    fit(stopped, tiny_model_dir, sources, ckpt_path=stopped / "checkpoints" / "stopped-step=4.ckpt")
    assert "it is made again from the checkpoint" in caplog.text
    assert_same_weights(whole / "stages" / "02-b", stopped / "stages" / "02-b")


@pytest.mark.parametrize("change", [{"beta": 0.2}, {"label_smoothing": 0.1}, {"lr_scheduler": "constant"}])
def test_another_setting_of_the_module_is_refused(stopped, tiny_model_dir, sources, change):
    [(key, value)] = change.items()
    with pytest.raises(ResumeError, match=f"model.{key}: .* -> {value}"):
        fit(
            stopped,
            tiny_model_dir,
            sources,
            ckpt_path=stopped / "checkpoints" / "stopped-step=4.ckpt",
            module_args=change,
        )


def test_nothing_is_written_by_a_try(tmp_path, tiny_model_dir, sources):
    fit(tmp_path / "run", tiny_model_dir, sources, trainer_args={"fast_dev_run": True})
    assert not (tmp_path / "run").exists()


def test_checkpoints_hold_tensors_and_plain_values_only(stopped):
    content = torch.load(stopped / "checkpoints" / "stopped-step=4.ckpt", weights_only=True)
    assert plan_digest(content["run_plan"]) in Ledger.read(stopped).plans


def test_a_small_disk_is_said_beforehand(tmp_path, tiny_model_dir, sources, monkeypatch, caplog):
    usage = checkpoint.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    fit(tmp_path / "run", tiny_model_dir, sources, trainer_args={"max_steps": 1})
    # 24.9 thousand weights of 4 bytes: 3 * 2 of them in checkpoints, and an export.
    assert "has 1,000 bytes free; checkpoints need about 69" in caplog.text
