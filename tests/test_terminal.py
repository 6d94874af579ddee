"""What is shown on a terminal, and what is left in a log where there is none."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from runs import adamw, fit, made_sources

from sdpo_lightning import CachedReference, CurriculumDataModule, DPOLitModule, PreferenceSource, StageSamples
from sdpo_lightning.bars import BARS, Bars
from sdpo_lightning.redaction import hide_in_text
from sdpo_lightning.stage_lines import clock, stage_line, stage_table, stage_title
from sdpo_lightning.terminal import plain_table, shown_bar

SUMMARY = {
    "name": "easy",
    "pairs": 1200,
    "steps": 150,
    "seconds": 192.4,
    "loss_first": 0.69314718,
    "loss_last": 0.5,
    "accuracy_last": 0.75,
    "gamma_ref": -3.25,
}
ROW = {
    "source": "a",
    "pairs": 40,
    "accuracy": 0.625,
    "reward_accuracy": None,
    "gamma": -1.5,
    "chosen_logps_per_token": -1.234567,
}
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> list[PreferenceSource]:
    return made_sources(tmp_path_factory.mktemp("sources"), {"a": 8, "b": 8})


def test_what_is_said_of_a_stage():
    # 192.4 seconds are 3 minutes and 12.
    expected = "stage 1/3 easy done: 1,200 pairs, 150 steps, 0:03:12, loss 0.693 -> 0.500; M_1 in stages/01-easy, sha "
    assert stage_title(1, 3, SUMMARY, "stages/01-easy", "0123456789") == expected + "01234567"
    assert stage_title(1, 3, {}, "x", "0123456789") == "stage 1/3 done: M_1 in x, sha 01234567"
    heads, rows = stage_table([ROW])
    assert heads[:3] == ["held out", "pairs", "gamma > 0"] and rows[0][:4] == ["a", "40", "0.625", "-"]
    assert plain_table(["held out", "n"], [["a", "1,000"], ["long name", "2"]]) == [
        "held out       n",
        "a          1,000",
        "long name      2",
    ]
    name, found = stage_line(1, 3, SUMMARY, [ROW], "stages/01-easy", "0123456789").split(" ", 1)
    read = json.loads(found)
    assert name == "stage_end" and (read["stage"], read["stages"], read["name"]) == (1, 3, "easy")
    assert (read["loss_first"], read["sha256"]) == (0.693147, "0123456789")
    # What the command line's filter would take for a secret.
    assert hide_in_text(found) == found
    assert read["held_out"]["a"]["accuracy"] == 0.625 and read["held_out"]["a"]["reward_accuracy"] is None
    assert clock(3 * 3600 + 62) == "3:01:02"


def test_a_bar_moves_after_each_item_and_closes():
    said: list = []

    class Bar:
        def __init__(self, title, total):
            said.append((title, total))

        def __enter__(self):
            return lambda: said.append("moved")

        def __exit__(self, *_):
            said.append("closed")

    bars = Bars()
    assert list(bars.track([1, 2], "off")) == [1, 2] and said == []
    bars.use(Bar)
    assert list(bars.track([1, 2], "two")) == [1, 2]
    assert list(bars.track(iter([1]), "unknown")) == [1]
    assert said == [("two", 2), "moved", "moved", "closed", ("unknown", None), "moved", "closed"]
    said.clear()
    with pytest.raises(RuntimeError):
        for _ in bars.track([1, 2], "fails"):
            raise RuntimeError
    assert said == [("fails", 2), "closed"]


def test_without_a_terminal_a_run_leaves_one_line_a_stage(tmp_path, tiny_model_dir, sources, caplog, capfd):
    """Bars are asked for, and stay off."""
    caplog.set_level("INFO")
    trainer = pl.Trainer(
        default_root_dir=tmp_path, accelerator="cpu", logger=False, callbacks=[StageSamples([])], max_epochs=-1
    )
    assert isinstance(trainer.progress_bar_callback, RichProgressBar)
    model = DPOLitModule(str(tiny_model_dir), reference=CachedReference(), optimizer=adamw())
    trainer.fit(model, CurriculumDataModule(sources, batch_size=2, max_length=64, val_fraction=0.3))
    assert shown_bar(trainer) is None and BARS._open is None
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("stage_end ")]
    read = [json.loads(line.removeprefix("stage_end ")) for line in lines]
    assert [(row["stage"], row["stages"]) for row in read] == [(1, 2), (2, 2)]
    matrix = {(row["model"], row["source"]): row for row in json.loads((tmp_path / "matrix.json").read_text())["rows"]}
    for row, summary in zip(read, json.loads((tmp_path / "summary.json").read_text())["stages"], strict=True):
        assert row["loss_last"] == pytest.approx(summary["loss_last"], abs=1e-6) and row["name"] == summary["name"]
        assert row["model"] == f"stages/0{row['stage']}-{row['name']}"
        assert row["sha256"] == model.record.digests[row["stage"]]
        for source, cell in row["held_out"].items():
            assert cell["gamma"] == pytest.approx(matrix[row["stage"], source]["gamma"], abs=1e-6)
        assert set(row["held_out"]) == {"a", "b"}
    out = capfd.readouterr().out
    assert "Epoch" not in out and "left for all stages" not in out and "ranking" not in out


@pytest.mark.parametrize("bar_class", [RichProgressBar, TQDMProgressBar])
def test_bars_of_ranking_reference_and_export(tmp_path, tiny_model_dir, sources, monkeypatch, capsys, bar_class):
    for name in ("logs", "terminal"):
        monkeypatch.setattr(f"sdpo_lightning.{name}.is_terminal", lambda: True)
    shown, use = [], BARS.use

    def listening(open_bar):
        def note(title, total):
            shown.append((title, total))
            return open_bar(title, total)

        use(None if open_bar is None else note)

    monkeypatch.setattr(BARS, "use", listening)
    trainer = pl.Trainer(
        default_root_dir=tmp_path, accelerator="cpu", logger=False, callbacks=[bar_class(), StageSamples([])]
    )
    model = DPOLitModule(str(tiny_model_dir), reference=CachedReference(), optimizer=adamw())
    trainer.fit(model, CurriculumDataModule(sources, batch_size=2, max_length=64, val_fraction=0.3))
    titles = [title for title, _ in shown]
    order = json.loads((tmp_path / "curriculum.json").read_text())["order"]
    expected = ["ranking by M_0", *(f"logps of stage {t}'s reference" for t in (1, 2))]
    expected += [f"held-out pairs by M_{t}" for t in (0, 1, 2)]
    expected += [f"writing 0{t}-{name}" for t, name in enumerate(order, 1)]
    assert set(expected) <= set(titles)
    # 16 pairs by 2.
    assert dict(shown)["ranking by M_0"] == 8
    said = ESCAPES.sub("", capsys.readouterr().out)
    for t, name in enumerate(order, 1):
        assert f"stage {t}/2 {name} done: " in " ".join(said.split())
    assert BARS._open is None


def config(folder: Path, model_dir: Path, sources, bar: str) -> list[str]:
    given = {
        "trainer": {
            "default_root_dir": str(folder / "run"),
            "accelerator": "cpu",
            "callbacks": [{"class_path": f"lightning.pytorch.callbacks.{bar}"}],
        },
        "model": {"model_name_or_path": str(model_dir), "reference": {"class_path": "sdpo_lightning.CachedReference"}},
        "data": {"sources": [{"name": s.name, "path": s.path} for s in sources], "max_length": 64, "val_fraction": 0.3},
    }
    (folder / "config.json").write_text(json.dumps(given))
    return [sys.executable, "-m", "sdpo_lightning", "fit", f"--config={folder / 'config.json'}"]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "TERM": "xterm", "COLUMNS": "160", "LINES": "50"}


@pytest.mark.slow
@pytest.mark.parametrize("bar", ["RichProgressBar", "TQDMProgressBar"])
def test_on_a_terminal(tmp_path, tiny_model_dir, sources, bar):
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 160, 0, 0))
    command = config(tmp_path, tiny_model_dir, sources, bar)
    process = subprocess.Popen(command, env=environment(), stdout=theirs, stderr=theirs)
    os.close(theirs)
    said = b""
    while True:
        try:
            part = os.read(ours, 1 << 16)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        said += part
    assert process.wait(60) == 0, said[-3000:]
    text = ESCAPES.sub("", said.decode(errors="replace"))
    for wanted in ("ranking by M_0", "logps of stage 2's reference", "writing 01-", "left for all stages", "since M_0"):
        assert wanted in text, wanted
    assert re.search(r"stage 2/2 \w, reference M_1 [0-9a-f]{8}, ", text) and "stage_end" not in text
    assert len(re.findall(r"stage \d/2 \w done:", text)) == 2


@pytest.mark.slow
@pytest.mark.parametrize("bar", ["RichProgressBar", "TQDMProgressBar"])
def test_without_a_terminal_nothing_is_drawn(tmp_path, tiny_model_dir, sources, bar):
    command = config(tmp_path, tiny_model_dir, sources, bar)
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    both = done.stdout + done.stderr
    assert "\r" not in both and "\x1b" not in both and "left for all stages" not in both
    lines = [line for line in done.stderr.splitlines() if line.startswith("stage_end ")]
    assert [json.loads(line.split(" ", 1)[1])["stage"] for line in lines] == [1, 2]
    assert "since M_0" not in both


def test_a_run_without_held_out_pairs_has_its_line_too(tmp_path, tiny_model_dir, sources, caplog):
    caplog.set_level("INFO")
    fit(tmp_path, tiny_model_dir, sources)
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("stage_end ")]
    assert [json.loads(line.split(" ", 1)[1])["held_out"] for line in lines] == [{}, {}]
