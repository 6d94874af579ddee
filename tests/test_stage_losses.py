"""`StageLosses`: a loss a stage is the chain of runs with each of them."""

from __future__ import annotations

import json

import pytest
from helpers import make_rows, write_jsonl
from runs import assert_same_weights, fit, losses, metrics, reproducible

from sdpo_lightning import PreferenceSource, StageLosses, StageSettings
from sdpo_lightning.batch_objectives import AOTLoss, BCOShiftedLoss, SFTLoss, SimPOLoss, WeightedSum
from sdpo_lightning.cli import main
from sdpo_lightning.completion_logps import SummedLogps, WPOLogps
from sdpo_lightning.ledger import Ledger
from sdpo_lightning.objectives import HingeLoss, IPOLoss, SigmoidLoss
from sdpo_lightning.types import ConfigurationError, ResumeError

pytestmark = pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    paths = {name: write_jsonl(folder / f"{name}.jsonl", make_rows(6, 0, name)) for name in ("a", "b")}
    return [PreferenceSource(name, str(path)) for name, path in paths.items()]


def test_the_loss_of_a_stage_is_found_by_name_then_place_then_star():
    found = StageLosses({"*": SigmoidLoss(), "2": HingeLoss(), "b": IPOLoss()})
    assert [type(found.of_stage(*place)) for place in ((1, "a"), (2, "a"), (2, "b"), (1, "b"))] == [
        SigmoidLoss, HingeLoss, IPOLoss, IPOLoss
    ]
    assert StageLosses({"b": IPOLoss()}).of_stage(1, "a") == SigmoidLoss()
    # Within a sum, and a sum within it.
    both = WeightedSum([found, SFTLoss()], [1.0, 0.5]).of_stage(2, "a")
    assert both == WeightedSum([HingeLoss(), SFTLoss()], [1.0, 0.5])
    assert StageLosses({"1": both}).of_stage(1, "a") == both


def test_what_one_of_them_needs_all_need():
    assert StageLosses({"a": SimPOLoss()}).whole_logps and not StageLosses({"a": SimPOLoss()}).uses_reference
    assert StageLosses({"a": AOTLoss(), "b": SigmoidLoss()}).across_pairs
    assert StageLosses({"a": SimPOLoss(), "b": SigmoidLoss()}).uses_reference


def test_a_run_is_the_chain_of_runs_with_each(tmp_path, tiny_model_dir, sources):
    both = StageLosses({"a": IPOLoss(), "2": HingeLoss()})
    fit(tmp_path / "one", tiny_model_dir, sources, module_args={"loss": both})
    fit(tmp_path / "first", tiny_model_dir, sources[:1], module_args={"loss": IPOLoss()})
    m1 = tmp_path / "first" / "stages" / "01-a"
    fit(tmp_path / "second", m1, sources[1:], module_args={"loss": HingeLoss()})
    assert_same_weights(tmp_path / "one" / "stages" / "01-a", m1)
    assert_same_weights(tmp_path / "one" / "stages" / "02-b", tmp_path / "second" / "stages" / "01-b")
    found = losses(tmp_path / "one")
    # 6 pairs by 2. At a stage's start IPO is (0 - 1 / 0.2)^2 = 25, the hinge is 1.
    assert found == losses(tmp_path / "first") + losses(tmp_path / "second") and len(found) == 6
    assert (found[0], found[3]) == (pytest.approx(25.0), pytest.approx(1.0))


def test_a_memory_is_resumed_and_another_choice_refused(tmp_path, tiny_model_dir, sources):
    def start(folder, other=None, checkpoint=None, **limits):
        loss = StageLosses({"b": other or BCOShiftedLoss()})
        fit(tmp_path / folder, tiny_model_dir, sources, checkpoint, module_args={"loss": loss}, trainer_args=limits)

    start("whole")
    # 3 steps of stage 1, 2 of 3 of stage 2.
    start("cut", max_steps=5)
    [checkpoint] = (tmp_path / "cut" / "checkpoints").glob("*.ckpt")
    with pytest.raises(ResumeError, match="model.loss"):
        start("cut", HingeLoss(), checkpoint)
    start("cut", None, checkpoint)
    assert reproducible(tmp_path / "cut") == reproducible(tmp_path / "whole")
    assert_same_weights(tmp_path / "cut" / "stages" / "02-b", tmp_path / "whole" / "stages" / "02-b")
    assert "BCOShiftedLoss" in json.dumps(Ledger.read(tmp_path / "cut").plan["model.loss"])


@pytest.mark.parametrize(
    "args, data, text",
    [
        ({"loss": StageLosses({"c": HingeLoss()})}, {}, r"model.loss.init_args.losses\[c\]`: no stage is called 'c'"),
        ({"loss": StageLosses({"a": HingeLoss()})}, {"stage_settings": {"a": StageSettings(label_smoothing=0.1)}},
         "which has its own for all stages"),
        ({"loss": StageLosses({"a": AOTLoss()}), "logps": WPOLogps()}, {}, "sorts the pairs of a micro-batch"),
        ({"loss": StageLosses({"a": SimPOLoss()}), "logps": SummedLogps(0.5)}, {}, "a mean over whole answers"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path, tiny_model_dir, sources, args, data, text):
    with pytest.raises(ConfigurationError, match=text):
        fit(tmp_path, tiny_model_dir, sources, module_args=args, **data)


def test_the_command_line(tmp_path, tiny_model_dir, sources, capsys):
    given = {"class_path": "sdpo_lightning.StageLosses", "init_args": {"losses": {
        "b": {"class_path": "sdpo_lightning.objectives.HingeLoss"},
    }}}
    listed = [{"name": source.name, "path": source.path} for source in sources]
    words = [
        f"--trainer.default_root_dir={tmp_path / 'run'}", "--trainer.accelerator=cpu", "--data.order=given",
        "--trainer.enable_progress_bar=false", f"--model.model_name_or_path={tiny_model_dir}",
        f"--data.sources={json.dumps(listed)}", "--data.max_length=64", "--data.batch_size=2",
        '--trainer.callbacks+={"class_path": "sdpo_lightning.StageSamples", "init_args": {"prompts": []}}',
    ]
    main(["check", *words, f"--model.loss={json.dumps(given)}"])
    lines = capsys.readouterr().out.splitlines()
    assert "stage 1 'a': loss SigmoidLoss" in lines and "stage 2 'b': loss HingeLoss" in lines
    main(["fit", *words, f"--model.loss={json.dumps(given)}", "--trainer.log_every_n_steps=1"])
    rows = [float(row["train/loss"]) for row in metrics(tmp_path / "run")]
    # ln 2, and 1 = max(0, 1 - 0).
    assert (rows[0], rows[3]) == (pytest.approx(0.6931, abs=1e-4), pytest.approx(1.0))
    given["init_args"]["losses"]["bb"] = given["init_args"]["losses"].pop("b")
    with pytest.raises(SystemExit):
        main(["check", *words, f"--model.loss={json.dumps(given)}"])
    assert "no stage is called 'bb' (did you mean 'b'?)" in capsys.readouterr().err
