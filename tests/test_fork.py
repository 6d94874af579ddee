"""`--fork`: a new run from another one's M_{t-1} is bit for bit the run that had its settings from the start."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from helpers import make_rows, write_jsonl
from runs import adamw, assert_same_weights, fit, metrics, reproducible
from safetensors.torch import load_file

from sdpo_lightning import (
    AdapterReference,
    CachedReference,
    DPOLitModule,
    Fork,
    LoraSettings,
    PreferenceSource,
    ResidentReference,
    StageExport,
)
from sdpo_lightning.cli import main
from sdpo_lightning.ledger import Ledger
from sdpo_lightning.types import ConfigurationError, ResumeError

LATER_BETA = 0.3


class LaterBeta(DPOLitModule):
    """beta 0.1 in stage 1, then 0.3."""

    def preference_loss(self, policy, reference):
        self.beta = 0.1 if self.stage.index == 1 else LATER_BETA
        return super().preference_loss(policy, reference)


def forked(run, from_stage):
    """Makes modules of a fork."""

    def make(*args, **kwargs):
        module = DPOLitModule(*args, **kwargs)
        module.fork = Fork(str(run), from_stage)
        return module

    return make


@pytest.fixture(scope="module")
def dropout_model_dir(tiny_model_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dropout") / "model"
    shutil.copytree(tiny_model_dir, folder)
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"attention_dropout": 0.0', '"attention_dropout": 0.2'))
    return folder


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    paths = {name: write_jsonl(folder / f"{name}.jsonl", make_rows(7, 0, name)) for name in ("a", "b", "c")}
    return [PreferenceSource(name, str(path)) for name, path in paths.items()]


DATA = {"order": "easy_to_hard", "val_fraction": 0.2}


@pytest.fixture(scope="module")
def parent(dropout_model_dir, sources, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("parent") / "run"
    fit(run_dir, dropout_model_dir, sources, module_args={"disable_dropout": False}, **DATA)
    return run_dir


def _from_the_start(run_dir, model_dir, sources, reference, **data):
    module_args = {"disable_dropout": False}
    return fit(run_dir, model_dir, sources, None, reference, module_class=LaterBeta, module_args=module_args, **data)


def _fork(run_dir, parent, from_stage, model_dir, sources, reference=None, module_args=None, **args):
    module_args = {"disable_dropout": False, "beta": LATER_BETA} | (module_args or {})
    made = forked(parent, from_stage)
    return fit(run_dir, model_dir, sources, None, reference, module_class=made, module_args=module_args, **args)


@pytest.mark.parametrize("reference", [ResidentReference, CachedReference])
def test_a_fork_equals_the_run_from_the_start(tmp_path, parent, dropout_model_dir, sources, reference):
    # Two passes over later stages, and another beta: stage 1 has neither.
    first = json.loads((parent / "curriculum.json").read_text())["order"][0]
    data = DATA | {"epochs_per_stage": {first: 1, "*": 2}}
    before = {path: path.read_bytes() for path in parent.rglob("*") if path.is_file()}
    _from_the_start(tmp_path / "whole", dropout_model_dir, sources, reference(), **data)
    trainer, _ = _fork(tmp_path / "fork", parent, 2, dropout_model_dir, sources, reference(), **data)
    whole, stages = tmp_path / "whole", sorted(path.name for path in (tmp_path / "whole" / "stages").iterdir())
    assert sorted(path.name for path in (tmp_path / "fork" / "stages").iterdir()) == stages[1:]
    for name in stages[1:]:
        assert_same_weights(whole / "stages" / name, tmp_path / "fork" / "stages" / name)
    later = [row for row in reproducible(whole) if int(row["stage/index"]) > 1]
    assert reproducible(tmp_path / "fork") == later
    assert trainer.global_step == int(metrics(whole)[-1]["step"])
    # The parent is only read.
    assert {path: path.read_bytes() for path in parent.rglob("*") if path.is_file()} == before


def test_it_records_its_parent(tmp_path, parent, dropout_model_dir, sources):
    _fork(tmp_path / "fork", parent, 3, dropout_model_dir, sources, **DATA)
    ledger, theirs = Ledger.read(tmp_path / "fork"), Ledger.read(parent)
    assert (ledger.parent.run, ledger.parent.from_stage) == (str(parent), 3)
    assert [stage.name for stage in ledger.stages] == [stage.name for stage in theirs.stages]
    for ours, other in zip(ledger.stages[:2], theirs.stages[:2], strict=True):
        assert ours.output.sha256 == other.output.sha256
        assert Path(ours.output.folder) == parent / other.output.folder
    assert ledger.stages[2].reference.sha256 == theirs.stages[1].output.sha256
    assert ledger.stages[2].output.folder.startswith("stages/03-")
    # Steps of the run up to each stage's end.
    steps = [stage["steps"] for stage in json.loads((parent / "curriculum.json").read_text())["stages"]]
    assert [stage.steps for stage in theirs.stages] == [sum(steps[: n + 1]) for n in range(3)]


def test_a_stopped_fork_goes_on(tmp_path, parent, dropout_model_dir, sources):
    _fork(tmp_path / "whole", parent, 2, dropout_model_dir, sources, **DATA)
    steps = Ledger.read(parent).stages[0].steps
    stop = {"trainer_args": {"max_steps": steps + 1}}
    _fork(tmp_path / "fork", parent, 2, dropout_model_dir, sources, **DATA, **stop)
    [checkpoint] = (tmp_path / "fork" / "checkpoints").glob("stopped*.ckpt")
    fit(
        tmp_path / "fork",
        dropout_model_dir,
        sources,
        checkpoint,
        module_args={"disable_dropout": False, "beta": LATER_BETA},
        **DATA,
    )
    for path in (tmp_path / "whole" / "stages").iterdir():
        assert_same_weights(path, tmp_path / "fork" / "stages" / path.name)
    assert reproducible(tmp_path / "fork") == reproducible(tmp_path / "whole")


def test_new_sources_may_follow(tmp_path, parent, dropout_model_dir, sources):
    """M_0 ranks again where there are other rows; the stages before t must come out the same."""
    more = write_jsonl(tmp_path / "d.jsonl", make_rows(6, 1, "d"))
    order = json.loads((parent / "curriculum.json").read_text())["order"]
    given = sorted(sources, key=lambda source: order.index(source.name))
    fit(tmp_path / "given", dropout_model_dir, given, module_args={"disable_dropout": False})
    three = [*given[:2], PreferenceSource("d", str(more))]
    _fork(tmp_path / "fork", tmp_path / "given", 3, dropout_model_dir, three)
    assert [path.name for path in (tmp_path / "fork" / "stages").iterdir()] == ["03-d"]


def test_a_plain_folder_may_stand_in(tmp_path, parent, dropout_model_dir, sources):
    """With M_1 alone and no random state: without dropout the numbers are the run's."""
    args = {"module_args": {"disable_dropout": True}}
    fit(tmp_path / "run", dropout_model_dir, sources, **args)
    folder = next((tmp_path / "run" / "stages").glob("01-*"))
    shutil.copytree(folder, tmp_path / "model")
    args = {"module_args": {"disable_dropout": True, "beta": 0.1}}
    _fork(tmp_path / "fork", tmp_path / "model", 2, dropout_model_dir, sources, **args)
    for name in ("02-b", "03-c"):
        assert_same_weights(tmp_path / "run" / "stages" / name, tmp_path / "fork" / "stages" / name)
    assert reproducible(tmp_path / "fork") == [r for r in reproducible(tmp_path / "run") if r["stage/index"] != "1"]
    ledger = Ledger.read(tmp_path / "fork")
    assert ledger.parent.sha256 is None
    assert ledger.stages[0].output.sha256 == Ledger.read(tmp_path / "run").stages[0].output.sha256


def test_a_fork_deletes_no_model_of_its_parent(tmp_path, tiny_model_dir, sources):
    keeps = {"callbacks": [StageExport(keep_last=1)]}
    fit(tmp_path / "all", tiny_model_dir, sources)
    made = forked(tmp_path / "all", 3)
    fit(tmp_path / "fork", tiny_model_dir, sources, module_class=made, callbacks=[StageExport(keep_last=1)])
    assert len(list((tmp_path / "all" / "stages").iterdir())) == 3
    # A parent that deleted M_1, and kept M_2 for its checkpoint.
    fit(tmp_path / "last", tiny_model_dir, sources, **keeps)
    with pytest.raises(ResumeError, match="M_1 in .* which kept its last models only"):
        fit(tmp_path / "other", tiny_model_dir, sources, module_class=forked(tmp_path / "last", 2))
    fit(tmp_path / "third", tiny_model_dir, sources, module_class=forked(tmp_path / "last", 3))
    assert_same_weights(tmp_path / "third" / "stages" / "03-c", tmp_path / "all" / "stages" / "03-c")


def test_a_fork_of_a_fork(tmp_path, parent, dropout_model_dir, sources):
    _fork(tmp_path / "one", parent, 2, dropout_model_dir, sources, **DATA)
    _fork(tmp_path / "two", tmp_path / "one", 3, dropout_model_dir, sources, **DATA)
    [last] = (tmp_path / "two" / "stages").iterdir()
    assert_same_weights(last, tmp_path / "one" / "stages" / last.name)
    assert Ledger.read(tmp_path / "two").stages[0] == Ledger.read(tmp_path / "one").stages[0]


def test_adapters(tmp_path, tiny_model_dir, sources):
    args = {"lora": LoraSettings(r=4, alpha=8), "optimizer": adamw(1e-2)}
    fit(tmp_path / "run", tiny_model_dir, sources, None, AdapterReference(), module_args=args)
    made = forked(tmp_path / "run", 2)
    fit(tmp_path / "fork", tiny_model_dir, sources, None, AdapterReference(), module_class=made, module_args=args)
    for name in ("02-b", "03-c"):
        folders = (tmp_path / run / "stages" / name for run in ("fork", "run"))
        ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in folders)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert reproducible(tmp_path / "fork") == [r for r in reproducible(tmp_path / "run") if r["stage/index"] != "1"]
    args = {"lora": LoraSettings(r=4, alpha=16)}
    with pytest.raises(ResumeError, match="lora_alpha: 8 -> 16"):
        fit(tmp_path / "other", tiny_model_dir, sources, None, AdapterReference(), module_class=made, module_args=args)


def test_what_is_refused(tmp_path, parent, dropout_model_dir, tiny_model_dir, sources):
    def begin(run, stage, model=dropout_model_dir, given=sources, name="fork", **data):
        return _fork(tmp_path / name, run, stage, model, given, **(DATA | data))

    with pytest.raises(ConfigurationError, match="`--from-stage` is 1, expected 2 or more"):
        begin(parent, 1)
    with pytest.raises(ConfigurationError, match="neither a run .ledger.json. nor a model"):
        begin(tmp_path, 2)
    with pytest.raises(ConfigurationError, match="has finished 3 stages; give at most 4"):
        begin(parent, 5)
    with pytest.raises(ConfigurationError, match="`--from-stage` is 4, but the plan has 3 stages"):
        begin(parent, 4)
    with pytest.raises(ConfigurationError, match="the run itself"):
        _fork(parent, parent, 2, dropout_model_dir, sources, **DATA)
    with pytest.raises(ResumeError, match="stage 1 is .* with .* pairs, in .* it was"):
        begin(parent, 2, order="reversed")
    with pytest.raises(ResumeError, match="stage 1 is '.' with .* pairs, in .* it was"):
        begin(parent, 2, max_length=16)
    other = tmp_path / "other"
    shutil.copytree(parent, other)
    model = next((other / "stages").glob("01-*")) / "model.safetensors"
    model.write_bytes(model.read_bytes()[:-1] + b"\x01")
    with pytest.raises(ResumeError, match="M_1 in .* isn't as that run left it"):
        begin(other, 2)
    assert not (tmp_path / "fork" / "stages").exists()


def test_another_s_is_refused(tmp_path, parent, dropout_model_dir, sources):
    with pytest.raises(ResumeError, match="S has sha .* began with"):
        _fork(tmp_path / "fork", parent, 2, next((parent / "stages").glob("03-*")), sources, **DATA)


# ---- the command line


@pytest.fixture
def config(tmp_path, tiny_model_dir, sources):
    path = tmp_path / "config.yaml"
    content = {
        "trainer": {"accelerator": "cpu", "enable_progress_bar": False},
        "model": {
            "model_name_or_path": str(tiny_model_dir),
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3}},
        },
        "data": {
            "sources": [{"name": source.name, "path": source.path} for source in sources],
            "order": "given",
            "batch_size": 2,
        },
    }
    path.write_text(yaml.safe_dump(content))
    return path


def _command(config, run_dir, *more):
    main(["fit", "--config", str(config), "--trainer.default_root_dir", str(run_dir), *map(str, more)])


def test_by_command_line_and_again(tmp_path, config, capsys):
    _command(config, tmp_path / "run")
    fork = ("--fork", tmp_path / "run", "--from-stage", 3, "--model.beta", 0.5)
    _command(config, tmp_path / "fork", *fork)
    [last] = (tmp_path / "fork" / "stages").iterdir()
    written = yaml.safe_load((tmp_path / "fork" / "config.yaml").read_text())
    assert (written["fork"], written["from_stage"]) == (str(tmp_path / "run"), 3)
    times = {path: path.stat().st_mtime_ns for path in last.iterdir()}
    capsys.readouterr()
    # The same command again, and its own config.
    _command(config, tmp_path / "fork", *fork)
    main(["fit", "--config", str(tmp_path / "fork" / "config.yaml")])
    assert capsys.readouterr().out.count("going on from") == 2
    assert {path: path.stat().st_mtime_ns for path in last.iterdir()} == times


def test_a_fork_that_left_no_checkpoint_begins_again(tmp_path, config, capsys):
    _command(config, tmp_path / "run")
    fork = ("--fork", tmp_path / "run", "--from-stage", 2)
    _command(config, tmp_path / "whole", *fork)
    _command(config, tmp_path / "fork", *fork, "--trainer.max_steps", 5)
    shutil.rmtree(tmp_path / "fork" / "checkpoints")
    with pytest.raises(SystemExit, match="2"):
        _command(config, tmp_path / "fork")
    assert "is a fork of" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        _command(config, tmp_path / "fork", "--fork", tmp_path / "run", "--from-stage", 3)
    assert "is a fork of" in capsys.readouterr().err
    _command(config, tmp_path / "fork", *fork)
    for name in ("02-b", "03-c"):
        assert_same_weights(tmp_path / "whole" / "stages" / name, tmp_path / "fork" / "stages" / name)


def test_one_flag_without_the_other(tmp_path, config, capsys):
    with pytest.raises(SystemExit, match="2"):
        _command(config, tmp_path / "run", "--fork", tmp_path)
    assert "`--fork` needs `--from-stage`" in capsys.readouterr().err


def test_check_looks_at_the_parent(tmp_path, config, capsys):
    words = ["check", "--config", str(config), "--trainer.default_root_dir", str(tmp_path / "fork")]
    with pytest.raises(SystemExit, match="2"):
        main([*words, "--fork", str(tmp_path), "--from-stage", "2"])
    assert "is neither a run" in capsys.readouterr().err
