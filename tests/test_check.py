"""The verb `check`: what it says of sound runs, that it makes and writes nothing, and that it goes on after errors."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
from helpers import write_jsonl
from runs import command_line

from sdpo_lightning import CurriculumDataModule, DPOLitModule
from sdpo_lightning.check_run import review
from sdpo_lightning.cli import main

CONFIGS = Path(__file__).resolve().parent.parent / "configs"

pytestmark = pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")


@pytest.fixture
def words(tmp_path, tiny_model_dir):
    return [*command_line(tmp_path, tiny_model_dir, {"a": 10, "b": 11}), "--data.order=given"]


def said(given: list[str], capsys, code: int = 0, **classes) -> tuple[list[str], list[str]]:
    """Lines on stdout and on stderr that begin with `error:`."""
    capsys.readouterr()
    try:
        main(["check", *given], **classes)
        found = 0
    except SystemExit as stop:
        found = stop.code
    printed = capsys.readouterr()
    assert found == code, printed.err
    return printed.out.splitlines(), [line for line in printed.err.splitlines() if line.startswith("error:")]


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["--data.partition=pooled", "--data.batch_tokens=64"],
        ["--data.partition=random", "--data.epochs_per_stage=2", "--trainer.accumulate_grad_batches=2"],
        ["--data.stages=[[b, a]]", "--data.val_fraction=0.2", "--trainer.limit_train_batches=3"],
        ["--data.partition=sdpo_lightning.data.partitions.Replay", "--data.partition.init_args.share=0.3"],
    ],
)
def test_the_plan_is_that_of_fit(tmp_path, words, capsys, more):
    lines, _ = said([*words, *more], capsys)
    # It makes no directory, and none of the run's classes.
    assert not (tmp_path / "run").exists()
    main(["fit", *words, *more])
    curriculum = json.loads((tmp_path / "run" / "curriculum.json").read_text())
    for row in curriculum["stages"]:
        plan = f"{row['pairs']} pairs, {row['epochs']} epochs, {row['steps']} optimizer steps"
        assert f"stage {row['index']} {row['name']!r}: {plan}" in lines
    for row in curriculum["sources"]:
        held = f"{row['pairs']} pairs to train on, {row['val_pairs']} held out"
        assert any(f"source {row['name']!r}: " in line and held in line for line in lines)
    assert lines[-1] == "0 errors, 0 warnings"


def test_lengths_and_what_the_loss_sees(tmp_path, words, capsys):
    rows = [{"prompt": "w1 " * n + "w2", "chosen": " w3" * n, "rejected": " w4"} for n in range(1, 21)]
    path = write_jsonl(tmp_path / "c.jsonl", rows)
    words = [*words, f"--data.sources=[{{name: c, path: {path}}}]"]
    lines, _ = said([*words, "--show=2"], capsys)
    # n + 1 tokens of prompt, n and EOS chosen, 2 rejected; of 20 the 11th, the 20th (95 % of 19 is 18.05) and the last.
    assert "source 'c': tokens p50/p95/max: prompt 12/21/21, chosen 12/21/21, rejected 2/2/2" in lines
    at = lines.index("source 'c', row 2:")
    assert lines[at + 1 : at + 4] == [
        "  prompt (3 tokens): 'w1 w1 w2'",
        "  chosen (3 tokens): >>w3 w3 <eos><<",
        "  rejected (2 tokens): >>w4 <eos><<",
    ]
    assert "source 'c', row 3:" not in lines


def test_the_config_that_a_run_left_can_be_checked(tmp_path, words, capsys):
    main(["fit", *words])
    lines, _ = said([f"--config={tmp_path / 'run' / 'config.yaml'}"], capsys)
    assert f"warning: {tmp_path / 'run' / 'stages'} holds the models of an earlier run" in lines


def test_all_errors_are_named_at_once(tmp_path, words, capsys):
    given = [*words, "--data.max_length=3", "--model.beta=0", "--trainer.precision=bf16-true", "--ckpt_path=/nowhere"]
    _, errors = said(given, capsys, 2)
    for part in ("`ckpt_path`", "`trainer.precision`", "source 'a': 0 of 10", "source 'b': 0 of 11"):
        assert sum(part in line for line in errors) == 1, errors
    _, errors = said([*words, "--model.beta=0", "--data.tokenizer=/nowhere"], capsys, 2)
    assert len(errors) == 2 and "`model.beta` is 0" in errors[0] and "no tokenizer at '/nowhere'" in errors[1]


def test_a_small_disk_is_refused(words, capsys, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10, 9, 1))
    _, [error] = said(words, capsys, 2)
    assert error.startswith("error: disk: the run will leave about") and "save fewer checkpoints" in error


@pytest.mark.parametrize("name", ["zephyr_7b", "qlora_7b", "slurm/solar_10.7b_2_nodes"])
def test_shipped_configs_are_checked_where_their_models_are_not(capsys, name):
    lines, errors = said([f"--config={CONFIGS / name}.yaml"], capsys, 2)
    # Offline here: neither the model's config nor its tokenizer; all else is looked at.
    assert len(errors) == 2 and "no model config" in errors[0] and "no tokenizer" in errors[1]
    assert any(line.startswith("disk: not known") for line in lines)


def test_adapters_on_a_stand_in(words, capsys):
    more = ["--model.lora.r=4", "--model.quantization=nf4"]
    assert said([*words, *more], capsys)[0][-1] == "0 errors, 0 warnings"


class Own(DPOLitModule):
    """Has weights of its own kind, and no name for them."""

    def __init__(self, size: int = 3) -> None:
        super().__init__("none")

    def load_weights(self, path):
        raise AssertionError("read")


class OwnData(CurriculumDataModule):
    """Takes one setting more."""

    def __init__(self, sources: list, flavour: str = "x", max_length: int = 64) -> None:
        super().__init__(sources, max_length=max_length)


def test_own_classes_are_not_made(tmp_path, words, capsys):
    given = [words[0], words[1], words[4], "--data.flavour=y"]
    lines, _ = said(given, capsys, model_class=Own, datamodule_class=OwnData)
    assert "without `model.model_name_or_path` the data can't be looked at" in lines


def test_a_review_takes_groups_with_classes(tmp_path, words, tiny_model_dir):
    model = {"class_path": "mine.Own", "init_args": {"model_name_or_path": str(tiny_model_dir)}}
    sources = json.loads(words[4].partition("=")[2])
    data = {"class_path": "mine.Data", "init_args": {"sources": sources, "flavour": "y"}}
    found = review({"trainer": {"default_root_dir": str(tmp_path)}, "model": model, "data": data})
    assert sum("its code will run" in finding.text for finding in found) == 2
    assert sum("pairs to train on" in finding.text for finding in found) == 2


LONG = "which of these fourteen words make up a question that an exam might ask"


@pytest.fixture
def exam(tmp_path):
    """A source with one prompt that an exam asks, one that shares 13 words with it, and others; and the exam."""
    prompts = ["w1 w2 w3", f"Please tell me {LONG.upper()}?", "What is 2 + 2?", f"{' '.join(LONG.split()[:12])} w9"]
    rows = [{"prompt": prompt, "chosen": " w1", "rejected": f" w{i + 2}"} for i, prompt in enumerate(prompts)]
    source = {"name": "a", "path": str(write_jsonl(tmp_path / "exam_a.jsonl", rows))}
    questions = [{"question": "what is 2 2", "choices": ["four", {"text": "five"}]}, {"question": LONG}]
    return source, write_jsonl(tmp_path / "exam.jsonl", questions)


def test_prompts_of_an_evaluation_set_are_found(tmp_path, words, exam, capsys):
    source, path = exam
    (tmp_path / "other.txt").write_text("nothing of it\n\nfour\n")
    given = [w for w in words if not w.startswith("--data.sources")] + [f"--data.sources={json.dumps([source])}"]
    lines, _ = said([*given, "--benchmarks", str(path), str(tmp_path / "other.txt")], capsys)
    found = [line for line in lines if "exam.jsonl" in line or "other.txt" in line]
    # Row 3 is a question, case and punctuation aside; row 2 has 13 words in a row of one, row 4 has only 12.
    assert found == [
        f"no training prompt stands in '{tmp_path / 'other.txt'}'",
        f"warning: source 'a': 1 prompts stand in '{path}', rows 3; leave them out",
        f"warning: source 'a': 1 prompts share 13 words in a row with '{path}', rows 2; leave them out",
    ]


def test_an_evaluation_set_that_cannot_be_read_is_an_error(tmp_path, words, capsys):
    (tmp_path / "bad.jsonl").write_text("{")
    for name in ("none.txt", "bad.jsonl"):
        _, errors = said([*words, "--benchmarks", str(tmp_path / name)], capsys, code=2)
        assert len(errors) == 1 and f"`--benchmarks`: '{tmp_path / name}' can't be read" in errors[0]
