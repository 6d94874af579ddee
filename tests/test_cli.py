"""The command line: verbs, exit codes, shipped configs, and bad input before any weights are loaded."""

import csv
import json
import shutil
from pathlib import Path
from typing import Union

import lightning.pytorch as pl
import pytest
import yaml
from helpers import make_rows, write_jsonl
from runs import ParsesOnly, command_line, losses, metrics
from transformers import AutoTokenizer

from sdpo_lightning import DPOLitModule
from sdpo_lightning.cli import CurriculumCLI, main

CONFIGS = Path(__file__).resolve().parent.parent / "configs"

pytestmark = pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")


@pytest.fixture
def arguments(tmp_path, tiny_model_dir):
    return command_line(tmp_path, tiny_model_dir, {"a": 10, "b": 10})


@pytest.fixture
def no_weights(monkeypatch):
    def load_weights(self, path):
        raise AssertionError("weights are loaded before the input is checked")

    monkeypatch.setattr(DPOLitModule, "load_weights", load_weights)


def refused(words, capsys, code=2) -> str:
    """Run, expect an exit code, and return the one line of the error."""
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == code
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    return lines[0]


# ---- verbs


def test_fit_validate_test_predict(tmp_path, arguments):
    run = tmp_path / "run"
    main(["fit", *arguments, "--data.val_fraction=0.2", "--model.optimizer.init_args.lr=1e-2"])
    assert sorted(path.name[:2] for path in (run / "stages").iterdir()) == ["01", "02"]
    assert yaml.safe_load((run / "config.yaml").read_text())["data"]["val_fraction"] == 0.2
    [checkpoint] = (run / "checkpoints").glob("*.ckpt")
    for verb in ("validate", "test"):
        main([verb, *arguments, "--data.val_fraction=0.2", f"--ckpt_path={checkpoint}"])
    main(["predict", *arguments, "--data.val_fraction=0.2", f"--ckpt_path={checkpoint}"])
    with (run / "predictions.csv").open(newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert len({row["pair_id"] for row in rows}) == len(rows) == 20
    assert {row["source"] for row in rows} == {"a", "b"}
    # The checkpoint's policy is M_2 and its reference is M_1: they differ.
    assert any(abs(float(row["policy_chosen"]) - float(row["reference_chosen"])) > 1e-4 for row in rows)


@pytest.mark.parametrize("reference", ["ResidentReference", "CachedReference"])
def test_validate_measures_against_the_reference_of_the_stage(tmp_path, arguments, reference):
    extra = [f"--model.reference={reference}", "--data.val_fraction=0.3", "--model.optimizer.init_args.lr=1e-2"]
    main(["fit", *arguments, *extra])
    run = tmp_path / "run"
    [checkpoint] = (run / "checkpoints").glob("*.ckpt")
    last = metrics(run)[-1]
    cli = CurriculumCLI(args=["validate", *arguments, *extra, f"--ckpt_path={checkpoint}"])
    for name in ("a", "b"):
        key = f"val/{name}/rewards/margins"
        assert cli.trainer.callback_metrics[key].item() == pytest.approx(float(last[key]), abs=1e-5)
        assert abs(float(last[key])) > 1e-4


def test_rank_prints_the_order_without_training(tmp_path, arguments, capsys):
    main(["rank", *arguments, "--data.order=given"])
    run = tmp_path / "run"
    curriculum = json.loads((run / "curriculum.json").read_text())
    assert curriculum["order"] == ["a", "b"]
    assert all(0 <= source["reward_accuracy"] <= 1 for source in curriculum["sources"])
    assert "accuracy of M_0" in capsys.readouterr().out
    assert not (run / "stages").exists() and not (run / "metrics.csv").exists()


def test_random_pooled_and_reversed(tmp_path, arguments):
    main(["fit", *arguments, "--data.partition=pooled", f"--trainer.default_root_dir={tmp_path / 'p'}"])
    assert [path.name for path in (tmp_path / "p" / "stages").iterdir()] == ["01-pooled"]
    main(["fit", *arguments, "--data.partition=random", f"--trainer.default_root_dir={tmp_path / 'r'}"])
    stages = json.loads((tmp_path / "r" / "curriculum.json").read_text())["stages"]
    assert [(stage["name"], stage["pairs"]) for stage in stages] == [("random-1", 10), ("random-2", 10)]
    orders = []
    for order in ("easy_to_hard", "reversed"):
        main(["rank", *arguments, f"--data.order={order}"])
        orders.append(json.loads((tmp_path / "run" / "curriculum.json").read_text())["order"])
    assert orders[0] == orders[1][::-1]


def test_stages_and_merge_ties(tmp_path, arguments):
    main(["fit", *arguments, "--data.stages=[[a, b]]", "--data.order=given"])
    stages = json.loads((tmp_path / "run" / "curriculum.json").read_text())["stages"]
    assert [(stage["name"], stage["pairs"]) for stage in stages] == [("a+b", 20)]
    # Ten pairs each: any two accuracies are closer than two standard errors here.
    main(["fit", *arguments, "--data.merge_ties=true", f"--trainer.default_root_dir={tmp_path / 'm'}"])
    curriculum = json.loads((tmp_path / "m" / "curriculum.json").read_text())
    scores = {row["name"]: (row["reward_accuracy"], row["standard_error"]) for row in curriculum["sources"]}
    (p, se_p), (q, se_q) = scores.values()
    tied = abs(p - q) < 2 * (se_p**2 + se_q**2) ** 0.5
    assert len(curriculum["stages"]) == (1 if tied else 2)
    assert tied


def test_fast_dev_run_is_one_batch_and_no_export(tmp_path, arguments):
    cli = CurriculumCLI(args=["fit", *arguments, "--trainer.fast_dev_run=true"])
    assert cli.trainer.global_step == 1
    # It leaves nothing, so that it may be tried in a run's own folder.
    assert not (tmp_path / "run").exists()


def test_limit_and_accumulation_enter_the_steps(tmp_path, arguments):
    extra = ["--trainer.limit_train_batches=3", "--trainer.accumulate_grad_batches=2", "--data.batch_size=2"]
    main(["fit", *arguments, *extra])
    stages = json.loads((tmp_path / "run" / "curriculum.json").read_text())["stages"]
    # 3 micro-batches by 2 are 2 steps a stage.
    assert [stage["steps"] for stage in stages] == [2, 2]
    assert len(losses(tmp_path / "run")) == 4
    # 4 pairs in the full step and 2 in the incomplete one.
    assert [float(row["train/pairs_seen"]) for row in metrics(tmp_path / "run")] == [4, 6, 10, 12]


# ---- refusals


def with_source(arguments, path, **more):
    source = {"name": "x", "path": str(path), **more}
    return [word for word in arguments if not word.startswith("--data.sources")] + [
        f"--data.sources={json.dumps([source])}"
    ]


@pytest.mark.parametrize(
    "words, expected",
    [
        (["--data.foo=1"], "--data.foo"),
        (["--trainer.max_epochs=7"], "`trainer.max_epochs` is 7, but the plan has 2"),
        (["--trainer.overfit_batches=2"], "`trainer.overfit_batches`"),
        (["--trainer.val_check_interval=50", "--data.val_fraction=0.2"], "`trainer.val_check_interval` is 50"),
        (["--data.max_length=1"], "`data.max_length` is 1"),
        (["--data.max_length=3"], "0 of 10 pairs left (10 prompt_too_long)"),
        (["--data.stages=[[a]]"], "`data.stages` must name each source once"),
        (["--data.tokenizer=/nowhere"], "`data.tokenizer`"),
        (["--model.beta=0"], "`model.beta` is 0"),
        (["--trainer.precision=bf16-true"], "`trainer.precision` is 'bf16-true'"),
        (["--data.epochs_per_stage={aa: 3}"], "`data.epochs_per_stage` holds 'aa'"),
        (["--data.partition=pooled", "--data.stages=[[a, b]]"], "`data.stages` has no meaning"),
        (["--ckpt_path=/nowhere.ckpt"], "`ckpt_path`: there is no"),
        (["--data.on_bad_row=error", "--data.max_length=3"], "row 1: prompt_too_long"),
    ],
)
def test_bad_settings(arguments, capsys, no_weights, words, expected, tmp_path):
    assert expected in refused(["fit", *arguments, *words], capsys)
    # A refused run leaves nothing behind.
    assert not (tmp_path / "run").exists()


def test_missing_run_directory(arguments, capsys, no_weights):
    assert "`trainer.default_root_dir`" in refused(["fit", *arguments[1:]], capsys)


def test_missing_file_and_unknown_column(arguments, capsys, no_weights, tmp_path):
    assert "not found" in refused(["fit", *with_source(arguments, tmp_path / "no.jsonl")], capsys)
    words = with_source(arguments, tmp_path / "a.jsonl", columns={"prompt": "question"})
    assert "unknown column 'question'" in refused(["fit", *words], capsys)


def test_chat_without_template_and_no_eos(arguments, capsys, no_weights, tmp_path, tiny_model_dir):
    chat = {
        "prompt": [{"role": "user", "content": "w1"}],
        "chosen": [{"role": "assistant", "content": "w2"}],
        "rejected": [{"role": "assistant", "content": "w3"}],
    }
    words = with_source(arguments, write_jsonl(tmp_path / "chat.jsonl", [chat]))
    for change, expected in (("chat_template", "no chat template"), ("eos_token", "no EOS token")):
        folder = tmp_path / change
        shutil.copytree(tiny_model_dir, folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        setattr(tokenizer, change, None)
        for file in folder.glob("*template*"):
            file.unlink()
        tokenizer.save_pretrained(folder)
        assert expected in refused(["fit", *words, f"--data.tokenizer={folder}"], capsys)


@pytest.mark.parametrize(
    "file", ["lfs_pointer.jsonl.gz", "derived_truncated.jsonl.gz", "derived_latin1.jsonl", "derived_empty.jsonl"]
)
def test_unreadable_files(arguments, capsys, no_weights, shared, file):
    assert file in refused(["fit", *with_source(arguments, shared / "data" / "quirks" / file)], capsys)


def test_every_quirk_is_trained_or_refused(tmp_path, arguments, shared, capsys):
    """None crashes, none trains silently: pairs kept + rows dropped by reason = rows read."""
    trained, refusals = {}, []
    for path in sorted((shared / "data" / "quirks").iterdir()):
        if path.suffix == ".md":
            continue
        words = with_source(arguments, path, limit=6)
        words += [f"--model.model_name_or_path={shared / 'model'}", "--data.max_length=1024", "--data.batch_size=2"]
        words += ["--trainer.limit_train_batches=1", "--data.order=given"]
        run = tmp_path / path.name
        words += [f"--trainer.default_root_dir={run}"]
        try:
            main(["fit", *words])
        except SystemExit as stop:
            assert stop.code == 2, path.name
            refusals.append(path.name)
        else:
            [source] = json.loads((run / "curriculum.json").read_text())["sources"]
            trained[path.name] = (source["pairs"], sum(source["dropped"].values()))
            assert len(losses(run)) == 1
    assert sum(trained["one_token_answers.jsonl.gz"]) == 6
    # Its control tokens are another model's: plain text here.
    assert trained["special_tokens_in_text.jsonl.gz"] == (6, 0)
    for name in ("chosen_equals_rejected.jsonl.gz", "kto_unpaired.jsonl.gz", "non_string_values.jsonl.gz"):
        assert name in refusals
    assert len(trained) >= 8 and len(refusals) >= 8


def test_another_plan_on_resume_exits_with_3(tmp_path, arguments, capsys):
    main(["fit", *arguments, "--trainer.max_steps=1"])
    checkpoint = tmp_path / "run" / "checkpoints" / "stopped-step=1.ckpt"
    words = ["fit", *arguments, f"--ckpt_path={checkpoint}"]
    assert "data.seed: 0 -> 5" in refused([*words, "--data.seed=5"], capsys, code=3)
    main(words)
    assert len(list((tmp_path / "run" / "stages").iterdir())) == 2


def test_one_batch_is_no_share_whatever_was_imported_before(monkeypatch):
    # What Lightning's annotation is where an import has just made this equal one: `typing` keeps that.
    other, hints = Union[float, int, None], pl.Trainer.__init__.__annotations__  # noqa: UP007
    assert other == hints["limit_train_batches"] and other.__args__[0] is float
    for name in ("limit_train_batches", "limit_val_batches", "limit_test_batches"):
        monkeypatch.setitem(hints, name, other)
    words = ["--trainer.limit_train_batches=1", "--trainer.limit_val_batches=0.5", "--trainer.limit_test_batches=1.0"]
    words += ["--model.model_name_or_path=m", "--data.sources=[]"]
    given = ParsesOnly(args=["fit", *words]).config.fit.trainer
    found = [given.limit_train_batches, given.limit_val_batches, given.limit_test_batches]
    assert [repr(value) for value in found] == ["1", "0.5", "1.0"]


# ---- shipped configs


@pytest.mark.parametrize("name", ["demo", "zephyr_7b", "solar_10.7b"])
def test_shipped_configs_run_on_a_stand_in(tmp_path, tiny_model_dir, name):
    config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    assert config["trainer"]["default_root_dir"] == f"runs/{name}"
    sources = []
    for seed, source in enumerate(config["data"]["sources"]):
        rows = make_rows(8, seed, source["name"])
        columns = source.get("columns", {})
        rows = [{columns.get(key, key): value for key, value in row.items()} for row in rows]
        if "system" in columns:
            rows = [{**row, columns["system"]: "w5"} for row in rows]
        path = write_jsonl(tmp_path / f"{source['name']}.jsonl", rows)
        sources.append({**source, "path": str(path), "val_path": None})
    words = [
        "fit",
        f"--config={CONFIGS / name}.yaml",
        f"--data.sources={json.dumps(sources)}",
        f"--model.model_name_or_path={tiny_model_dir}",
        f"--trainer.default_root_dir={tmp_path / 'run'}",
        "--trainer.accelerator=cpu",
        "--trainer.devices=1",
        "--trainer.strategy=auto",
        "--trainer.precision=32-true",
        "--trainer.enable_progress_bar=false",
    ]
    cli = CurriculumCLI(args=words)
    assert cli.model.beta == config["model"]["beta"]
    assert len(list((tmp_path / "run" / "stages").iterdir())) == len(sources)
