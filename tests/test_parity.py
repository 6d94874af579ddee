"""The verb `parity`: its arithmetic by hand, what it refuses, and the whole of it against the installed TRL."""

import json
import math
from importlib.metadata import PackageNotFoundError

import pytest
from helpers import make_rows, write_jsonl
from runs import parity_in_this_process

from sdpo_lightning import parity_command, parity_ours, parity_trl
from sdpo_lightning.cli import main
from sdpo_lightning.parity import Side, compare, difference, relative, table, tolerance, trl_loss
from sdpo_lightning.types import ConfigurationError, SelfCheckError

pytestmark = pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")


@pytest.fixture
def arguments(tmp_path, tiny_model_dir):
    """Two sources of 13 and 9 pairs; a step is 2 x 2 of them."""
    sources = []
    for seed, (name, count) in enumerate((("a", 13), ("b", 9))):
        path = write_jsonl(tmp_path / f"{name}.jsonl", make_rows(count, seed, name))
        sources.append({"name": name, "path": str(path)})
    return [
        "parity",
        f"--trainer.default_root_dir={tmp_path / 'run'}",
        "--trainer.accelerator=cpu",
        "--trainer.accumulate_grad_batches=2",
        "--trainer.gradient_clip_val=1.0",
        f"--model.model_name_or_path={tiny_model_dir}",
        "--model.optimizer.init_args.lr=1e-3",
        "--model.optimizer.init_args.weight_decay=0.1",
        "--model.warmup_ratio=0.4",
        f"--data.sources={json.dumps(sources)}",
        "--data.batch_size=2",
        "--data.max_length=64",
        f"--scratch={tmp_path}",
        f"--json={tmp_path / 'parity.json'}",
    ]


def side(losses, norms=(1.0, 2.0), seconds=2.0, peak=100.0):
    return Side({"a": losses}, {"a": list(norms)}, seconds, 8, peak)


def test_differences_by_hand():
    assert difference([1.0, 2.0], [1.5, 1.75]) == 0.5
    assert difference([1.0], [1.0, 2.0]) == math.inf
    assert difference([math.nan], [1.0]) == math.inf and difference([math.inf], [math.inf]) == math.inf
    # 1 / 2 and 6 / 4 are both half away from 1.
    assert relative([1.0, 6.0], [2.0, 4.0]) == 0.5
    assert tolerance("32-true", 0.0) == 1e-3
    # TRL differs from itself by more: three times that is allowed.
    assert tolerance("32-true", 0.01) == pytest.approx(0.03)


def test_the_verdict():
    ours, theirs = side([0.69, 0.60], peak=50.0), side([0.69, 0.6005], (1.0, 2.02), seconds=4.0)
    found = compare(ours, theirs, side([0.69, 0.6006]), "32-true")
    [stage] = found["stages"]
    assert stage["difference"] == pytest.approx(5e-4) and stage["spread"] == pytest.approx(1e-4)
    assert stage["grad_norm_difference"] == pytest.approx(0.02 / 2.02)
    assert found["pairs_a_second"] == [4.0, 2.0] and found["peak_bytes"] == [50.0, 100.0]
    assert found["same"] and "x 2.00" in table(found) and "x 0.50" in table(found)
    # 0.0015 is too much, unless two runs of TRL are 0.001 apart.
    far = side([0.69, 0.6015])
    assert not compare(ours, far, far, "32-true")["same"]
    assert not compare(ours, far, None, "32-true")["same"]
    assert "NOT the same" in table(compare(ours, far, None, "32-true"))
    assert compare(ours, far, side([0.69, 0.6025]), "32-true")["same"]


def test_losses_with_a_counterpart():
    assert trl_loss(None) == "sigmoid"
    given = {"class_path": "sdpo_lightning.objectives.IPOLoss", "init_args": {"divergence": None}}
    assert trl_loss(given) == "ipo"
    for name, settings in (("SigmoidLoss", {"label_smoothing": 0.1}), ("DPOPLoss", {"penalty": 50.0})):
        with pytest.raises(ConfigurationError, match=name):
            trl_loss({"class_path": f"sdpo_lightning.objectives.{name}", "init_args": settings})


@pytest.mark.parametrize(
    "words, expected",
    [
        (["--model.lora.r=4"], "`model.lora`"),
        (["--model.reference=sdpo_lightning.FixedReference"], "`model.reference`"),
        (["--model.label_smoothing=0.1"], "`model.label_smoothing`"),
        (["--model.policy_starts_at=sft"], "`model.policy_starts_at`"),
        (["--model.loss=sdpo_lightning.objectives.DPOPLoss"], "DPOPLoss"),
        (["--trainer.gradient_clip_algorithm=value"], "`trainer.gradient_clip_algorithm`"),
        (["--trainer.precision=16-mixed"], "`trainer.precision`"),
        (["--steps=0"], "`--steps` is 0"),
    ],
)
def test_what_has_no_counterpart_is_refused(arguments, capsys, monkeypatch, words, expected):
    monkeypatch.setattr(parity_command, "_run", lambda *_: pytest.fail("a side was started"))
    monkeypatch.setattr(parity_command, "version", lambda name: "1.16.0")
    with pytest.raises(SystemExit) as stop:
        main([*arguments, *words])
    assert stop.value.code == 2 and expected in capsys.readouterr().err


def test_without_trl(arguments, capsys, monkeypatch):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(parity_command, "version", missing)
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2 and "pip install 'trl==1.16.0'" in capsys.readouterr().err


def test_another_module_has_no_counterpart(arguments, capsys):
    class Own(parity_ours.TimedModule):
        pass

    with pytest.raises(SystemExit) as stop:
        main(arguments, model_class=Own)
    assert stop.value.code == 2 and "our own classes" in capsys.readouterr().err


def test_both_sides(arguments, tmp_path, capsys, monkeypatch):
    pytest.importorskip("trl")
    monkeypatch.setattr(parity_command, "_run", parity_in_this_process)
    main([*arguments, "--steps=3"])
    found = json.loads((tmp_path / "parity.json").read_text())
    # 13 pairs are three whole steps of four, 9 are two.
    assert [(stage["name"], stage["steps"]) for stage in found["stages"]] == [("a", 3), ("b", 2)]
    assert found["pairs"] == 20 and found["precision"] == "32-true" and found["same"]
    for stage in found["stages"]:
        assert stage["loss_first"] == pytest.approx([math.log(2)] * 2, abs=1e-6)
        assert stage["difference"] < 1e-4 and stage["grad_norm_difference"] < 1e-3
        assert stage["spread"] == 0.0
        # A run that learns nothing would agree as well; in the first step of a warm-up the rate is 0.
        assert abs(stage["loss_last"][0] - math.log(2)) > 1e-3 or stage["steps"] == 2
    assert "the same training" in capsys.readouterr().out
    # Nothing of it stays, and the run's own folder is untouched.
    assert not list(tmp_path.glob("parity-*")) and not (tmp_path / "run").exists()

    # A chain that is wrong is noticed: TRL with twice the learning rate.
    train = parity_trl._optimizer
    monkeypatch.setattr(parity_trl, "_optimizer", lambda given, model: twice(train(given, model)))
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--steps=3", "--minutes=0"])
    assert stop.value.code == 1
    said = capsys.readouterr()
    assert "NOT the same training" in said.out and "not measured" in said.out and "differ from TRL's" in said.err


def twice(optimizer):
    for group in optimizer.param_groups:
        group["lr"] *= 2
    return optimizer


@pytest.mark.slow
def test_as_programs_of_their_own(arguments, tmp_path, capsys):
    pytest.importorskip("trl")
    main([*arguments, "--steps=2", "--model.loss=sdpo_lightning.objectives.HingeLoss"])
    found = json.loads((tmp_path / "parity.json").read_text())
    assert found["same"] and all(stage["loss_first"] == pytest.approx([1.0] * 2, abs=1e-6) for stage in found["stages"])
    assert min(found["peak_bytes"]) > 0 and min(found["pairs_a_second"]) > 0
    # What one side says when it fails is passed on.
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--data.batch_size=100"])
    assert stop.value.code == 2 and "less than a step of 200" in capsys.readouterr().err
    with pytest.raises(SelfCheckError, match="TRL ended with"):
        parity_command._run("TRL", ["sdpo_lightning.parity_trl", str(tmp_path / "no.json")])
