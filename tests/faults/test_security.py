"""Case 34: nothing that is read may run code, nothing is written outside the run directory, no secret is written."""

from __future__ import annotations

import json
import logging
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml
from helpers import make_rows, write_jsonl
from safetensors.torch import load_file
from torch.distributed.checkpoint.api import CheckpointException

from sdpo_lightning import CurriculumDataModule, DPOLitModule
from sdpo_lightning.cli import main
from sdpo_lightning.data.curriculum import stage_plan
from sdpo_lightning.files import FOLDERS
from sdpo_lightning.plain_shards import PlainPlanner, check_shards
from sdpo_lightning.redaction import HIDDEN, HidesSecrets, hide_in_config, hide_in_text
from sdpo_lightning.types import Chunk, ConfigurationError

pytestmark = pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")
# In the form of a hub's token, and in none; both are made up.
HUB_TOKEN, PLAIN_SECRET = "hf_" + "Q7x" * 11, "correct-horse-battery-staple"


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self):
        return (Path.touch, (self.sentinel,))


@pytest.fixture
def sentinel(tmp_path) -> Path:
    return tmp_path / "sentinel"


@pytest.fixture
def words(tmp_path, tiny_model_dir):
    path = write_jsonl(tmp_path / "a.jsonl", make_rows(8, 1))

    def give(model: Path = tiny_model_dir, sources: list[dict] | None = None) -> list[str]:
        return [
            f"--trainer.default_root_dir={tmp_path / 'run'}",
            "--trainer.accelerator=cpu",
            "--trainer.enable_progress_bar=false",
            f"--model.model_name_or_path={model}",
            f"--data.sources={json.dumps(sources or [{'name': 'a', 'path': str(path)}])}",
            "--data.max_length=64",
            "--data.order=given",
        ]

    return give


def stopped(words: list[str], capsys, code: int) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == code
    return capsys.readouterr().err


# ---- code in files


def test_the_payload_does_run_where_it_may(sentinel):
    pickle.loads(pickle.dumps(Payload(sentinel)))
    assert sentinel.exists()


@pytest.mark.parametrize("form", ["pickle", "torch"])
@pytest.mark.parametrize("verb", ["fit", "validate", "predict"])
def test_a_checkpoint_with_code_is_refused_without_running_it(
    tmp_path, words, sentinel, capsys, monkeypatch, form, verb
):
    # Where a caller leaves it open, this variable would have torch run it.
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    path = tmp_path / "evil.ckpt"
    content = {"state_dict": {}, "stage_record": Payload(sentinel)}
    path.write_bytes(pickle.dumps(content)) if form == "pickle" else torch.save(content, path)
    said = stopped([verb, *words(), f"--ckpt_path={path}"], capsys, 3)
    assert "error: `ckpt_path` holds more than tensors and plain values" in said
    assert not sentinel.exists()
    # A run that is locked and left again.
    assert [left.name for left in (tmp_path / "run").rglob("*") if left.name != ".lock"] == []


def test_no_flag_makes_checkpoints_run_code(tmp_path, words, capsys):
    torch.save({"state_dict": {}}, tmp_path / "plain.ckpt")
    given = ["fit", *words(), f"--ckpt_path={tmp_path / 'plain.ckpt'}", "--weights_only=false"]
    assert "`weights_only` is false" in stopped(given, capsys, 2)


def test_a_checkpoint_of_ours_is_read_with_weights_only(tmp_path, words, monkeypatch):
    main(["fit", *words(), "--trainer.max_steps=1"])
    [checkpoint] = (tmp_path / "run" / "checkpoints").glob("*.ckpt")
    asked, load = [], torch.load

    def watched(*args, **settings):
        asked.append(settings.get("weights_only"))
        return load(*args, **settings)

    monkeypatch.setattr(torch, "load", watched)
    main(["fit", *words(), f"--ckpt_path={checkpoint}"])
    assert asked and all(value is True for value in asked)


def test_nothing_in_the_package_loads_otherwise():
    root = Path(__file__).resolve().parents[2] / "sdpo_lightning"
    texts = {path.name: path.read_text() for path in root.rglob("*.py")}
    assert any("torch.load(" in text for text in texts.values())
    for name, text in texts.items():
        assert text.count("torch.load(") == text.count("weights_only=True)"), name
        assert "trust_remote_code=True" not in text and "trust_remote_code: true" not in text, name
    for path in root.parent.joinpath("configs").rglob("*.yaml"):
        assert "trust_remote_code" not in path.read_text()


def test_a_distributed_checkpoint_with_code_is_refused_without_running_it(tmp_path, sentinel):
    dcp.save({"x": torch.ones(2), "lr": 0.1}, checkpoint_id=tmp_path / "plain")
    check_shards(tmp_path / "plain")
    state = {"x": torch.zeros(2), "lr": 0.0}
    dcp.load(state, checkpoint_id=tmp_path / "plain", planner=PlainPlanner())
    assert state["lr"] == 0.1 and state["x"].tolist() == [1, 1]
    # In the place of a value, and in that of the list of shards.
    dcp.save({"x": torch.ones(2), "lr": Payload(sentinel)}, checkpoint_id=tmp_path / "value")
    with pytest.raises(CheckpointException, match="Weights only load failed"):
        dcp.load(state, checkpoint_id=tmp_path / "value", planner=PlainPlanner())
    (tmp_path / "plain" / ".metadata").write_bytes(pickle.dumps(Payload(sentinel)))
    with pytest.raises(pickle.UnpicklingError, match="no place in a checkpoint"):
        check_shards(tmp_path / "plain")
    assert not sentinel.exists()


@pytest.mark.parametrize("pickled", [True, False])
def test_a_model_with_pickled_weights_only_is_refused(tmp_path, words, sentinel, capsys, tiny_model_dir, pickled):
    folder = tmp_path / "bin"
    shutil.copytree(tiny_model_dir, folder)
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(state | ({"evil": Payload(sentinel)} if pickled else {}), folder / "pytorch_model.bin")
    assert "no causal LM with safetensors weights" in stopped(["fit", *words(folder)], capsys, 2)
    assert not sentinel.exists() and not (tmp_path / "run" / "stages").exists()


@pytest.mark.parametrize("pickled", [True, False])
def test_pickled_weights_need_a_flag_and_run_nothing_with_it(
    tmp_path, words, sentinel, capsys, monkeypatch, tiny_model_dir, pickled
):
    # It would turn off the default, but not what is asked for.
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    folder = tmp_path / "bin"
    shutil.copytree(tiny_model_dir, folder)
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(state | ({"evil": Payload(sentinel)} if pickled else {}), folder / "pytorch_model.bin")
    given = ["fit", *words(folder), "--model.allow_bin_weights=true"]
    if pickled:
        said = stopped(given, capsys, 2)
        assert "holds more than tensors" in said and "none of it was run" in said
        assert not (tmp_path / "run" / "stages").exists()
    else:
        main(given)
        capsys.readouterr()
        # The same weights as those of the safetensors: so is what they are trained to.
        first = load_file(next((tmp_path / "run" / "stages").glob("01-*")) / "model.safetensors")
        shutil.rmtree(tmp_path / "run")
        main(["fit", *words()])
        second = load_file(next((tmp_path / "run" / "stages").glob("01-*")) / "model.safetensors")
        assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert not sentinel.exists()


@pytest.mark.parametrize("model_type", ["llama", "own_kind"])
@pytest.mark.parametrize("verb", ["check", "fit", "estimate"])
def test_code_of_a_model_repository_never_runs(tmp_path, words, sentinel, capsys, tiny_model_dir, model_type, verb):
    folder = tmp_path / "remote"
    shutil.copytree(tiny_model_dir, folder)
    code = f"from pathlib import Path\nPath({str(sentinel)!r}).touch()\nclass Own: pass\n"
    (folder / "evil.py").write_text(code)
    for name, keys in (
        ("config.json", {"AutoConfig": "evil.Own", "AutoModelForCausalLM": "evil.Own"}),
        ("tokenizer_config.json", {"AutoTokenizer": [None, "evil.Own"]}),
    ):
        config = json.loads((folder / name).read_text())
        config |= {"auto_map": keys} | ({"model_type": model_type} if name == "config.json" else {})
        (folder / name).write_text(json.dumps(config))
    try:
        main([verb, *words(folder)])
        code = 0
    except SystemExit as stop:
        code = stop.code
    # One that transformers knows needs none of it.
    assert code == (0 if model_type == "llama" else 2)
    assert "Traceback" not in capsys.readouterr().err
    assert not sentinel.exists()
    assert not any("evil" in path.name for path in (tmp_path / "run").rglob("*"))


# ---- paths


@pytest.mark.parametrize("name", ["../../x", "/tmp/x", "..", "a/b", "~", "a\\..\\b"])
@pytest.mark.parametrize("verb", ["check", "fit"])
def test_source_names_that_leave_the_run_directory_are_refused(tmp_path, words, capsys, name, verb):
    before = sorted(path.name for path in tmp_path.iterdir())
    sources = [{"name": name, "path": str(tmp_path / "a.jsonl")}]
    assert "error:" in stopped([verb, *words(sources=sources)], capsys, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize("name", ["../../x", "/tmp/x", "", ".hidden", "a/b", "a" * 201])
def test_stage_names_that_leave_the_run_directory_are_refused(name):
    with pytest.raises(ConfigurationError, match="folder's name"):
        stage_plan([Chunk(name, [1])], [[1]])


class NamesAPath(CurriculumDataModule):
    """An own partition with a name that climbs."""

    def partition(self, scores):
        return [Chunk("../../x", self.train_ids())]


def test_an_own_partition_cannot_leave_the_run_directory(tmp_path, words, capsys):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(["fit", *words()], datamodule_class=NamesAPath)
    assert stop.value.code == 2 and "'../../x'" in capsys.readouterr().err
    assert not list(tmp_path.glob("x*")) and not (tmp_path / "run" / "stages").exists()


@pytest.mark.parametrize("name", [*FOLDERS, "stale"])
def test_links_that_leave_the_run_directory_are_refused(tmp_path, words, capsys, name):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).symlink_to(elsewhere)
    for verb in ("check", "fit"):
        assert f"is a link to {elsewhere}" in stopped([verb, *words()], capsys, 2)
    assert not list(elsewhere.iterdir())


# ---- secrets


class WithKey(DPOLitModule):
    """Takes a secret, as a module that talks to a service would."""

    def __init__(self, model_name_or_path: str, hub_token: str = "", notes: str = "") -> None:
        super().__init__(model_name_or_path, warmup_ratio=0.0)
        self.hub_token = hub_token
        logging.getLogger("sdpo_lightning").info("speaking to the hub with %s", hub_token)


def test_secrets_reach_no_file_and_no_line(tmp_path, words, capsys, caplog, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", PLAIN_SECRET)
    given = [*words(), f"--model.hub_token={HUB_TOKEN}", f"--model.notes=see {PLAIN_SECRET}"]
    root = logging.getLogger()
    handler = logging.FileHandler(tmp_path / "log.txt")
    root.addHandler(handler)
    try:
        main(["fit", *given, "--data.val_fraction=0.3"], model_class=WithKey)
        main(["check", *given], model_class=WithKey)
        # An error repeats what was given.
        stopped(["fit", *given, f"--data.batch_size={HUB_TOKEN}"], capsys, 2)
    finally:
        root.removeHandler(handler)
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()] + [tmp_path / "log.txt"]
    assert len(files) > 8
    for path in files:
        content = path.read_bytes()
        assert HUB_TOKEN.encode() not in content and PLAIN_SECRET.encode() not in content, path
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["model"]["hub_token"] == HIDDEN and config["model"]["notes"] == f"see {HIDDEN}"
    # All else of the config is whole.
    assert config["data"]["max_length"] == 64 and config["model"]["model_name_or_path"]
    printed = capsys.readouterr()
    assert HUB_TOKEN not in printed.out + printed.err


def test_errors_of_the_parser_hide_what_they_repeat(words, capsys):
    said = stopped(["fit", *words(), f"--data.batch_size={HUB_TOKEN}"], capsys, 2)
    assert HUB_TOKEN not in said and HIDDEN in said


def test_what_is_hidden_and_what_is_not(monkeypatch):
    monkeypatch.setenv("MY_SECRET", PLAIN_SECRET)
    plain = {"tokenizer": "org/x", "batch_tokens": 4096, "pad_token": "<pad>", "keys": ["a"], "path": "a", "n": None}
    assert hide_in_config(plain) == plain
    secret = {"token": "x", "api_key": "y", "init_args": [{"password": "z", "url": "https://me:word@host/x"}]}
    hidden = {"token": HIDDEN, "api_key": HIDDEN}
    assert hide_in_config(secret) == hidden | {"init_args": [{"password": HIDDEN, "url": f"https://{HIDDEN}@host/x"}]}
    assert hide_in_text(f"a {HUB_TOKEN} b {PLAIN_SECRET}") == f"a {HIDDEN} b {HIDDEN}"
    assert hide_in_text("{'token': 'abcdef'} tokens: 12345") == f"{{'token': '{HIDDEN}'}} tokens: 12345"
    record = logging.LogRecord("x", logging.INFO, "", 0, "key %s of %d", (HUB_TOKEN, 3), None)
    assert HidesSecrets().filter(record) and record.getMessage() == f"key {HIDDEN} of 3"


# ---- code that a config names


def test_check_lists_every_foreign_class(tmp_path, words, capsys, monkeypatch):
    (tmp_path / "foreign_code.py").write_text(
        "import lightning.pytorch as pl\nclass Mine(pl.Callback):\n    def __init__(self): raise SystemExit('it ran')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    known = "lightning.pytorch.callbacks.ModelSummary"
    more = f"--trainer.callbacks=[{{class_path: foreign_code.Mine}}, {{class_path: {known}}}]"
    capsys.readouterr()
    main(["check", *words(), more])
    said = capsys.readouterr().out
    assert said.count("its code will run") == 1
    assert "warning: `trainer.callbacks[0]` names the class 'foreign_code.Mine'" in said
