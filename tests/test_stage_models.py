"""What is measured of S and every M_t: the stage x source matrix and the sample answers."""

from __future__ import annotations

import json
import random
import re
import shutil
import struct
import sys
import warnings
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from helpers import make_rows, write_jsonl
from runs import assert_same_weights, made_sources, metrics, reproducible
from runs import fit as short_fit
from transformers import AutoModelForCausalLM

from sdpo_lightning import PreferenceSource, StageEvaluation, StageSamples
from sdpo_lightning.cli import main
from sdpo_lightning.matrix import matrix_rows, merged
from sdpo_lightning.report_callback import RunReport
from sdpo_lightning.sampling import until_end
from sdpo_lightning.types import ConfigurationError, LogpTable, PairLogps

ARGS = {"order": "easy_to_hard", "val_fraction": 0.4, "shuffle": True}


def fit(*arguments, **more):
    """With the samples that every run makes, not the short ones of other tests."""
    return short_fit(*arguments, answer_tokens=None, **more)


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> list[PreferenceSource]:
    return made_sources(tmp_path_factory.mktemp("sources"), {"a": 24, "b": 24})


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_model_dir, sources) -> Path:
    folder = tmp_path_factory.mktemp("run") / "run"
    fit(folder, tiny_model_dir, sources, **ARGS)
    return folder


def rows_of(folder: Path, name: str) -> list[dict]:
    return json.loads((folder / name).read_text())["rows"]


def table(ids: list[int], chosen: list[float], rejected: list[float], lengths: list[tuple[int, int]]) -> LogpTable:
    chosen_lengths, rejected_lengths = torch.tensor(lengths).T
    logps = PairLogps(torch.tensor(chosen), torch.tensor(rejected), chosen_lengths, rejected_lengths)
    return LogpTable.build(torch.tensor(ids), logps)


def test_a_row_by_hand():
    second = 1 << 40
    lengths = [(10, 9), (10, 8), (4, 4), (5, 5)]
    ids = [0, 1, 2, second]
    policy = table(ids, [-10.0, -20.0, -8.0, -5.0], [-13.0, -16.0, -8.0, -10.0], lengths)
    m0 = table(ids, [-12.0, -21.0, -8.0, -5.0], [-12.0, -16.0, -8.0, -10.0], lengths)
    first, other = matrix_rows(2, policy, lambda i: "ab"[i >> 40], m0, None)
    assert (first["source"], first["pairs"], other["source"], other["pairs"]) == ("a", 3, "b", 1)
    # gamma 3, -4, 0: mean -1/3, variance (100/9 + 121/9 + 1/9) / 2 = 37/3.
    assert first["gamma"] == pytest.approx(-1 / 3)
    assert first["gamma_standard_error"] == pytest.approx((37 / 3 / 3) ** 0.5)
    # Right, wrong, a tie.
    assert first["accuracy"] == pytest.approx(0.5)
    # Changes since M_0: 2 and -1; 1 and 0; none, and a tie counts 0.
    assert first["reward_accuracy_m0"] == pytest.approx(2 / 3)
    assert first["reward_accuracy"] is None
    # Halves of the squares: (2 + .5) / 2, (.5 + 0) / 2 and 0: mean 1.5 / 3, deviations .75, -.25, -.5.
    assert first["kl_estimate_m0"] == pytest.approx(0.5)
    assert first["kl_estimate_m0_standard_error"] == pytest.approx(((0.5625 + 0.0625 + 0.25) / 2 / 3) ** 0.5)
    assert first["kl_estimate"] is None and other["kl_estimate_m0_standard_error"] is None
    # -10/10, -20/10, -8/4 and -13/9, -16/8, -8/4.
    assert first["chosen_logps_per_token"] == pytest.approx(-5 / 3)
    assert first["rejected_logps_per_token"] == pytest.approx(-(13 / 9 + 4) / 3)
    assert (first["chosen_length"], first["rejected_length"]) == (8.0, 7.0)
    # 9 of 10 is within 10 %, 8 isn't: the first pair and the tie.
    assert (first["length_controlled_accuracy"], first["length_controlled_pairs"]) == (0.75, 2)
    # One pair has no standard error; and it has not changed.
    assert other["gamma"] == 5.0 and other["gamma_standard_error"] is None and other["reward_accuracy_m0"] == 0.0


def test_a_model_that_comes_again_replaces_itself_and_what_came_later():
    rows = [{"model": t, "old": True} for t in (0, 1, 1, 2)]
    assert merged(rows, [{"model": 1, "old": False}]) == [rows[0], {"model": 1, "old": False}]


def test_the_matrix_agrees_with_what_training_logs(run):
    rows = {(row["model"], row["source"]): row for row in rows_of(run, "matrix.json")}
    assert set(rows) == {(t, source) for t in (0, 1, 2) for source in "ab"}
    last = {row["stage/index"]: row for row in metrics(run)}
    for t in (1, 2):
        for source in "ab":
            row, logged = rows[t, source], {k: last[str(t)][f"val/{source}/{k}"] for k in ("gamma", "pairs")}
            assert row["gamma"] == pytest.approx(float(logged["gamma"]), abs=1e-4)
            assert row["pairs"] == float(logged["pairs"]) > 2
            for ours, theirs in (
                ("accuracy", "accuracies_gamma"),
                ("reward_accuracy", "rewards/accuracies"),
                ("reward_accuracy_m0", "rewards_m0/accuracies"),
            ):
                assert row[ours] == pytest.approx(float(last[str(t)][f"val/{source}/{theirs}"]), abs=1e-4), ours
    assert rows[0, "a"]["reward_accuracy"] is None and rows[0, "a"]["reward_accuracy_m0"] is None


class StopsAt(pl.Callback):
    """Ends a run at a step, as a killed one: no export."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer, *_):
        trainer.should_stop = trainer.global_step >= self.step


@pytest.mark.parametrize("stop", ["within stage 1", "at the end of stage 1", "within stage 2"])
def test_a_resumed_run_leaves_the_same(tmp_path, tiny_model_dir, sources, run, stop):
    first = sum(row["stage/index"] == "1" for row in metrics(run))
    step = {"within stage 1": 2, "at the end of stage 1": first, "within stage 2": first + 2}[stop]
    fit(tmp_path, tiny_model_dir, sources, callbacks=[StopsAt(step)], **ARGS)
    assert 1 <= len({row["model"] for row in rows_of(tmp_path, "matrix.json")}) < 3
    checkpoint = max((tmp_path / "checkpoints").glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    fit(tmp_path, tiny_model_dir, sources, ckpt_path=checkpoint, **ARGS)
    for name in ("matrix.json", "samples.json"):
        assert (tmp_path / name).read_text() == (run / name).read_text(), name


def test_training_is_the_same_bit_for_bit_without_them(tmp_path, tiny_model_dir, sources, run):
    fit(tmp_path, tiny_model_dir, sources, callbacks=[StageEvaluation(0), StageSamples([])], **ARGS)
    assert not (tmp_path / "matrix.json").exists() and not (tmp_path / "samples.json").exists()
    assert reproducible(tmp_path) == reproducible(run)
    for folder in (run / "stages").iterdir():
        assert_same_weights(folder, tmp_path / "stages" / folder.name)


def test_random_states_and_the_mode_stay(tmp_path, tiny_model_dir, sources):
    seen = []

    def states() -> list:
        return [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()]

    class Evaluation(StageEvaluation):
        def look_at(self, trainer, pl_module, index):
            before = states(), pl_module.policy.training
            super().look_at(trainer, pl_module, index)
            seen.append((index, before == (states(), pl_module.policy.training)))

    class Samples(StageSamples):
        look_at = Evaluation.look_at

    Samples.look_at = lambda self, trainer, pl_module, index: _watched(self, trainer, pl_module, index, seen, states)
    fit(tmp_path, tiny_model_dir, sources, callbacks=[Evaluation(), Samples()], **ARGS)
    assert sorted(seen) == [(t, True) for t in (0, 0, 1, 1, 2, 2)]


def _watched(callback, trainer, pl_module, index, seen, states) -> None:
    before = states(), pl_module.policy.training
    StageSamples.look_at(callback, trainer, pl_module, index)
    seen.append((index, before == (states(), pl_module.policy.training)))


def test_samples_are_the_greedy_answers_of_the_exported_models(run, tiny_model_dir, tiny_tokenizer):
    rows = rows_of(run, "samples.json")
    # Three prompts by default: a's first, b's first, a's second.
    assert [row["model"] for row in rows] == [0] * 3 + [1] * 3 + [2] * 3
    assert [row["source"] for row in rows[:3]] == ["a", "b", "a"]
    assert [row["prompt"] for row in rows[:3]] == [row["prompt"] for row in rows[6:]]
    folders = [tiny_model_dir, *sorted((run / "stages").iterdir())]
    for row in rows:
        model = AutoModelForCausalLM.from_pretrained(folders[row["model"]], dtype=torch.float32).eval()
        ids = tiny_tokenizer(row["prompt"], return_tensors="pt")["input_ids"]
        # One token at a time, without a cache, a mask or `generate`.
        answer: list[int] = []
        while len(answer) < 64 and answer[-1:] != [tiny_tokenizer.eos_token_id]:
            whole = torch.cat([ids, torch.tensor([answer], dtype=torch.int64)], 1)
            with torch.no_grad():
                answer.append(int(model(whole).logits[0, -1].argmax()))
        assert row["tokens"] == len(answer)
        assert row["answer"] == tiny_tokenizer.decode(answer, skip_special_tokens=True)


def test_own_prompts(tmp_path, tiny_model_dir, sources):
    prompts = ["w3 w4", [{"role": "user", "content": "w5"}]]
    fit(tmp_path, tiny_model_dir, sources, callbacks=[StageSamples(prompts, max_new_tokens=2)], **ARGS)
    rows = rows_of(tmp_path, "samples.json")
    assert [row["prompt"] for row in rows[:2]] == ["w3 w4", "<start> user w5 <eos> <start> assistant"]
    assert all(row["source"] is None and 1 <= row["tokens"] <= 2 for row in rows) and len(rows) == 6


def test_the_command_line_takes_them(tmp_path, tiny_model_dir, sources):
    callbacks = [
        {"class_path": "sdpo_lightning.StageSamples", "init_args": {"prompts": ["w3"], "max_new_tokens": 2}},
        {"class_path": "sdpo_lightning.StageEvaluation", "init_args": {"pairs_per_source": 3}},
    ]
    given = {
        "trainer": {"default_root_dir": str(tmp_path / "run"), "accelerator": "cpu", "callbacks": callbacks},
        "model": {"model_name_or_path": str(tiny_model_dir)},
        "data": {"sources": [{"name": s.name, "path": s.path} for s in sources], "max_length": 64, "val_fraction": 0.4},
    }
    (tmp_path / "config.json").write_text(json.dumps(given))
    main(["fit", f"--config={tmp_path / 'config.json'}"])
    run = tmp_path / "run"
    assert [row["prompt"] for row in rows_of(run, "samples.json")] == ["w3"] * 3
    assert {row["pairs"] for row in rows_of(run, "matrix.json")} == {3}
    page = (run / "report.html").read_text()
    assert "model_name_or_path" in page and "Not there" not in page


def test_an_answer_ends_with_its_end_token():
    assert until_end([5, 6, 1, 0, 0], {1}) == [5, 6, 1]
    assert until_end([5, 6, 7], {1}) == [5, 6, 7]


def test_what_goes_wrong_in_samples_and_report_ends_no_run(tmp_path, tiny_model_dir, sources, monkeypatch, caplog):
    def fails(*_, **__):
        raise RuntimeError("no room")

    monkeypatch.setattr("transformers.GenerationMixin.generate", fails)
    monkeypatch.setattr("sdpo_lightning.report_callback.report_run", fails)
    fit(tmp_path, tiny_model_dir, sources, **ARGS)
    assert "no sample answers of M_2: no room" in caplog.text and "no report" in caplog.text
    assert len(list((tmp_path / "stages").iterdir())) == 2
    assert not (tmp_path / "samples.json").exists() and not (tmp_path / "report.html").exists()


def test_a_model_without_generate_is_trained_all_the_same(tmp_path, tiny_model_dir, sources, monkeypatch, caplog):
    class Other:
        """Not what the model is."""

    monkeypatch.setattr("sdpo_lightning.stage_models.GenerationMixin", Other)
    fit(tmp_path, tiny_model_dir, sources, **ARGS)
    assert "no sample answers of M_2: LlamaForCausalLM has no `generate`" in caplog.text
    assert len(list((tmp_path / "stages").iterdir())) == 2


def test_fit_leaves_a_report_at_its_end_only(tmp_path, tiny_model_dir, sources, run):
    page = (run / "report.html").read_text()
    for t in (0, 1, 2):
        assert page.count(f"<td>M_{t}</td>") >= 1 and f"M_{t}</b>" in page
    assert json.loads((run / "versions.json").read_text())["torch"] in page
    # Within the last stage.
    fit(tmp_path, tiny_model_dir, sources, callbacks=[StopsAt(len(metrics(run)) - 2)], **ARGS)
    assert not (tmp_path / "report.html").exists()


def test_fit_leaves_a_png_of_each_chart(tmp_path, tiny_model_dir, pictures, caplog):
    pytest.importorskip("matplotlib")
    # So long a name leaves no room for bars, of which matplotlib warns; that isn't worth a word at a run's end.
    source = PreferenceSource("a" * 120, str(write_jsonl(tmp_path / "a.jsonl", make_rows(12, 1, "a"))))
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        short_fit(tmp_path / "run", tiny_model_dir, [source], order="easy_to_hard", val_fraction=0.4)
    keys = re.findall(r'<figure id="(\w+)">', (tmp_path / "run" / "report.html").read_text())
    assert sorted(path.name for path in (tmp_path / "run" / "report").iterdir()) == sorted(f"{key}.png" for key in keys)
    assert {"loss", "gamma", "ranking"} <= set(keys)
    for path in (tmp_path / "run" / "report").iterdir():
        # 6.4 x 4 inches at 120 dots each.
        assert struct.unpack(">II", path.read_bytes()[16:24]) == (768, 480)
    assert "PNG" not in caplog.text and not [w for w in warned if "layout" in str(w.message)]


def test_png_that_cannot_be_written_ends_no_run(tmp_path, tiny_model_dir, sources, pictures, caplog):
    pytest.importorskip("matplotlib")
    tmp_path.joinpath("report").write_text("a file where the folder should be")
    short_fit(tmp_path, tiny_model_dir, sources)
    assert f"no PNGs of the report (`sdpo-lightning report {tmp_path}` draws them)" in caplog.text
    assert (tmp_path / "report.html").exists() and len(list((tmp_path / "stages").iterdir())) == 2
    assert (tmp_path / "report").read_text() == "a file where the folder should be"


def test_without_matplotlib_the_page_is_all(tmp_path, tiny_model_dir, sources, pictures, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    short_fit(tmp_path, tiny_model_dir, sources)
    assert (tmp_path / "report.html").exists() and not (tmp_path / "report").exists()
    assert "PNG" not in caplog.text and "matplotlib" not in caplog.text


@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_rank_alone_draws(tmp_path, tiny_model_dir, sources, monkeypatch, rank):
    drawn = []
    monkeypatch.setattr("sdpo_lightning.report_callback.draw_run", drawn.append)
    trainer, module = short_fit(tmp_path, tiny_model_dir, sources)
    (tmp_path / "report.html").unlink()
    drawn.clear()
    monkeypatch.setattr(type(trainer), "is_global_zero", property(lambda _: rank == 0))
    RunReport().on_fit_end(trainer, module)
    assert [found.folder for found in drawn] == ([tmp_path] if rank == 0 else [])
    assert (tmp_path / "report.html").exists() == (rank == 0)


def test_a_finished_run_makes_up_for_what_it_lost(tmp_path, tiny_model_dir, sources, run):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    for name in ("matrix.json", "samples.json"):
        kept = [row for row in rows_of(run, name) if row["model"] < 2]
        (copy / name).write_text(json.dumps({"rows": kept}))
    checkpoint = max((copy / "checkpoints").glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    fit(copy, tiny_model_dir, sources, ckpt_path=checkpoint, **ARGS)
    for name in ("matrix.json", "samples.json"):
        assert rows_of(copy, name) == rows_of(run, name)


@pytest.mark.parametrize("make", [lambda: StageEvaluation(-1), lambda: StageSamples(max_new_tokens=0)])
def test_wrong_numbers_are_refused(make):
    with pytest.raises(ConfigurationError):
        make()
