"""Cases 14 to 18 and 36: foreign caches, changed data, changed plans, misuse."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from harness import compare, killed_within
from safetensors import safe_open
from safetensors.torch import load_file, save_file


def stage_names(job) -> list[str]:
    return [stage["name"] for stage in json.loads((job.run_dir / "curriculum.json").read_text())["stages"]]


# ---- case 14


@pytest.mark.parametrize("how", ["other_file", "other_key"])
def test_a_foreign_cache_is_not_used(job, whole, how):
    reference = whole("CachedReference")[0]
    job = killed_within(replace(job, reference="CachedReference"), reference.run_dir, 2)
    path = job.run_dir / "references" / "02.safetensors"
    if how == "other_file":
        path.write_bytes((job.run_dir / "references" / "01.safetensors").read_bytes())
    else:
        with safe_open(path, framework="pt") as handle:
            key = handle.metadata()["key"]
        tensors = load_file(path)
        tensors["chosen"] = tensors["chosen"] + 1
        save_file(tensors, path, metadata={"key": key[::-1]})
    ended = job.start()
    assert ended.code == 0, ended.text
    assert "02.safetensors" in ended.text and "computed again" in ended.text
    compare(reference.run_dir, job.run_dir)


# ---- case 16


def edit(job, name: str, kind: str) -> int:
    """Change one row of a source; returns its number, from 1."""
    path = job.folder / f"{name}.jsonl"
    lines = path.read_text().splitlines()
    if kind == "edit":
        row = json.loads(lines[2])
        lines[2] = json.dumps(row | {"chosen": " w9 w8"})
        number = 3
    elif kind == "append":
        lines.append(json.dumps({"prompt": "w5 w6 w7", "chosen": " w1", "rejected": " w2"}))
        number = len(lines)
    elif kind == "delete":
        number = len(lines)
        lines.pop()
    else:
        lines[1], lines[2] = lines[2], lines[1]
        number = 2
    path.write_text("".join(line + "\n" for line in lines))
    return number


@pytest.mark.parametrize("kind", ["edit", "append", "delete", "reorder"])
@pytest.mark.parametrize("stage", [1, 2])
def test_changed_rows_of_a_stage_that_has_begun(job, whole, kind, stage):
    # Without held-out pairs: a new row can't move others between the sides then.
    job = replace(job, more=("--data.val_fraction=0",))
    ended = job.start({"SDPO_FAILPOINT": "after_swap:2"})
    assert ended.code == 137, ended.text
    # A checkpoint of stage 2 is needed.
    ended = replace(job, more=(*job.more, "--trainer.max_steps=7")).start()
    assert ended.code == 0, ended.text
    name = stage_names(job)[stage - 1]
    number = edit(job, name, kind)
    ended = job.start()
    assert ended.code == 3 and "Traceback" not in ended.text, ended.text
    assert f"{name!r}, of stage {stage}, first in row {number}," in ended.text


@pytest.mark.parametrize("kind", ["edit", "append", "delete", "reorder"])
def test_changed_rows_that_are_accepted(job, kind):
    job = replace(job, more=("--data.val_fraction=0", "--trainer.max_steps=7"))
    assert job.start().code == 0
    name = stage_names(job)[1]
    number = edit(job, name, kind)
    ended = replace(job, more=("--data.val_fraction=0", "--data.on_changed_rows=accept")).start()
    if kind == "delete":
        assert ended.code == 3 and f"row {number} is gone: restore it" in ended.text, ended.text
        return
    assert ended.code == 0, ended.text
    [accepted] = json.loads((job.run_dir / "ledger.json").read_text())["accepted"]
    assert f"{name!r}, of stage 2, first in row {number}, and stage 2 has begun" in accepted
    assert accepted in (job.run_dir / "stages" / f"02-{name}" / "README.md").read_text()
    # The stage keeps the pairs that it began with.
    pairs = [stage["pairs"] for stage in json.loads((job.run_dir / "ledger.json").read_text())["stages"]]
    assert pairs[1] == json.loads((job.run_dir / "curriculum.json").read_text())["stages"][1]["pairs"]
    # Later resumes compare with the rows that were accepted.
    ended = replace(job, more=("--data.val_fraction=0",)).start()
    assert ended.code == 0 and "already complete" in ended.text, ended.text


@pytest.mark.parametrize("kind", ["edit", "append", "delete", "reorder"])
def test_changed_rows_of_a_later_stage(job, kind):
    job = replace(job, more=("--data.val_fraction=0",))
    ended = replace(job, more=(*job.more, "--trainer.max_steps=2")).start()
    assert ended.code == 0, ended.text
    name = stage_names(job)[2]
    number = edit(job, name, kind)
    ended = job.start()
    assert ended.code == 0, ended.text
    assert f"{name!r}, of stage 3, first in row {number}, which has not begun" in ended.text


# ---- cases 17 and 18


@pytest.mark.parametrize(
    "words, expected",
    [
        (["--model.beta=0.2"], "model.beta: 0.1 -> 0.2"),
        (["--model.optimizer.init_args.lr=1e-3"], "model.optimizer.lr: 0.01 -> 0.001"),
        (["--model.optimizer=torch.optim.SGD", "--model.optimizer.init_args.lr=1e-2"], "model.optimizer: AdamW -> SGD"),
        (["--model.warmup_ratio=0.5"], "model.warmup_ratio: 0.1 -> 0.5"),
        (["--model.lr_scheduler=constant"], "model.lr_scheduler: linear -> constant"),
        (["--trainer.gradient_clip_val=1"], "trainer.gradient_clip_val: None -> 1"),
        (["--data.seed=1"], "data.seed: 0 -> 1"),
        (["--data.order=reversed"], "data.order: easy_to_hard -> reversed"),
        (["--data.stages=[[b], [a], [c]]"], "data.stages: [['a'], ['b'], ['c']] -> [['b'], ['a'], ['c']]"),
        (["--data.stages=[[a], [b, c]]"], "data.stages: [['a'], ['b'], ['c']] -> [['a'], ['b', 'c']]"),
        (["--data.epochs_per_stage=2"], "data.epochs_per_stage"),
        (["--data.batch_size=4"], "data.batch_size x processes: 2 -> 4"),
        (["--trainer.accumulate_grad_batches=2"], "trainer.accumulate_grad_batches: 1 -> 2"),
    ],
)
def test_another_plan_is_refused(job, stopped, words, expected):
    ended = replace(stopped, more=tuple(words)).start()
    assert ended.code == 3 and "Traceback" not in ended.text, ended.text
    assert expected in ended.text


@pytest.fixture(scope="module")
def stopped(whole, tiny_model_dir, tmp_path_factory):
    """A run that was killed in stage 2. Nobody goes on with it."""
    folder = tmp_path_factory.mktemp("stopped")
    return killed_within(replace(whole()[0], folder=folder), whole()[0].run_dir, 2)


def test_after_all_refusals_it_still_goes_on(stopped, whole):
    # Last of those that use it.
    ended = stopped.start()
    assert ended.code == 0, ended.text
    compare(whole()[0].run_dir, stopped.run_dir)
