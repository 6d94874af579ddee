"""The report: what it shows of a run, and how a real browser shows it."""

from __future__ import annotations

import json
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import make_rows, write_jsonl
from runs import fit

from sdpo_lightning import PreferenceSource
from sdpo_lightning.cli import main
from sdpo_lightning.report_charts import BarChart, LineChart, Series, nice_ticks, number, svg
from sdpo_lightning.report_command import run_report
from sdpo_lightning.report_data import read_run
from sdpo_lightning.report_figures import gamma_chart, thinned
from sdpo_lightning.report_page import run_page

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
ATTACK = "<script>document.title='broken'</script>"


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_model_dir) -> Path:
    """Two sources, both with held-out pairs; ranked."""
    folder = tmp_path_factory.mktemp("report")
    paths = [write_jsonl(folder / f"{name}.jsonl", make_rows(30, seed, name)) for seed, name in enumerate("ab")]
    sources = [PreferenceSource(path.stem, str(path)) for path in paths]
    fit(folder / "run", tiny_model_dir, sources, order="easy_to_hard", val_fraction=0.4)
    return folder / "run"


@pytest.fixture
def attacked(run, tmp_path) -> Path:
    """The same run, with HTML wherever a name or a text can stand."""
    copy = tmp_path / "run"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("stages", "checkpoints", "*.html"))
    for name in ("curriculum.json", "summary.json", "matrix.json"):
        text = (run / name).read_text() if (run / name).exists() else "{}"
        (copy / name).write_text(re.sub(r'"a"', json.dumps("a" + ATTACK), text))
    answers = [
        {"model": t, "source": ATTACK, "prompt": ATTACK + "x" * 300, "answer": ATTACK, "tokens": 3} for t in (0, 1)
    ]
    (copy / "samples.json").write_text(json.dumps({"rows": answers}))
    (copy / "config.yaml").write_text(f"model: {json.dumps(ATTACK + 'y' * 300)}\n")
    return copy


def test_a_page_needs_nothing_else(run):
    page = run_page(read_run(run))
    assert not re.search(r"<script|<link rel=.stylesheet|@import|url\(|src=", page)
    assert set(re.findall(r'href="([^"]*)"', page)) == {"data:,"}


def test_the_page_shows_the_runs_numbers(run):
    page = run_page(read_run(run))
    summary = json.loads((run / "summary.json").read_text())["stages"]
    assert [stage["index"] for stage in summary] == [1, 2]
    for stage in summary:
        assert f'<td class="num">{stage["gamma_ref"]:.4g}</td>' in page
        assert f'<td class="num">{stage["loss_last"]:.4g}</td>' in page
    for source in json.loads((run / "curriculum.json").read_text())["sources"]:
        assert number(source["reward_accuracy"]) in page
    for key in ("ranking", "gamma", "loss", "margins", "accuracies", "rewards", "rewards_m0", "speed", "memory"):
        assert page.count(f'<figure id="{key}">') == 1, key


def test_boundaries_are_the_first_steps_of_the_stages(run):
    found = read_run(run)
    steps = {stage["index"]: stage["steps"] for stage in found.stages}
    assert [step for step, _ in found.boundaries()] == [1, 1 + steps[1]]
    assert [name for _, name in found.boundaries()] == found.order


def test_markup_in_data_stays_text(attacked):
    page = run_page(read_run(attacked))
    assert "<script" not in page and page.count("&lt;script&gt;") >= 4


def test_what_is_missing_is_said_and_left_out(run, tmp_path):
    copy = tmp_path / "run"
    copy.mkdir()
    shutil.copy(run / "curriculum.json", copy)
    (copy / "summary.json").write_text("{cut o")
    page = run_page(read_run(copy))
    assert "metrics.csv: not there" in page and "summary.json: not JSON" in page
    assert 'id="ranking"' in page and 'id="loss"' not in page


@pytest.mark.parametrize("cut", ["3,1,0.", "3,1,2e-", "3,", ""])
def test_a_row_that_is_being_written_is_left_out(tmp_path, cut):
    (tmp_path / "metrics.csv").write_text(f"step,stage/index,train/loss\n1,1,0.5\n2,1,0.25\n{cut}")
    steps = read_run(tmp_path).steps
    assert steps == [{"step": n, "stage/index": 1, "train/loss": loss} for n, loss in ((1, 0.5), (2, 0.25))]


def test_the_verb_writes_the_page_and_pngs(run, capsys):
    pytest.importorskip("matplotlib")
    main(["report", str(run)])
    assert (run / "report.html").read_text() == run_page(read_run(run))
    said = capsys.readouterr().out
    figures = len(re.findall("<figure id=", (run / "report.html").read_text()))
    assert f"{figures} PNGs" in said
    for path in (run / "report").iterdir():
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert len(list((run / "report").iterdir())) == figures


def test_a_folder_that_is_no_run_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["report", str(tmp_path)])
    assert stopped.value.code == 2
    assert "neither curriculum.json nor metrics.csv" in capsys.readouterr().err


def test_several_runs_are_compared(run, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(run, other, ignore=shutil.ignore_patterns("stages", "checkpoints"))
    for folder, beta in ((run, 0.1), (other, 0.5)):
        (folder / "config.yaml").write_text(f"model:\n  beta: {beta}\n  liger: false\n")
    out = tmp_path / "both.html"
    try:
        run_report([str(run), str(other), f"--out={out}"])
    finally:
        (run / "config.yaml").unlink()
    page = out.read_text()
    assert re.search(r"<td>model.beta</td><td>0.1</td><td>0.5</td>", page)
    assert "model.liger" not in page
    loss = re.search(r'<figure id="loss">.*?</figure>', page, re.S)[0]
    assert loss.count("<polyline") == 2 and "<title>other</title>" in loss


def test_reading_needs_neither_torch_nor_lightning():
    modules = "report_data, report_charts, report_figures, report_page, report_png, report_style"
    code = (
        f"import sys; from sdpo_lightning import {modules}; print(sorted({{'torch', 'lightning'}} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_lines_are_thinned_within_a_stage_only():
    from sdpo_lightning.report_data import Run

    # 300 steps by twos: 3 stages of 101, 99 and 100 steps give 51 + 50 + 50 points.
    rows = [{"step": float(i + 1), "stage/index": 1.0 + (i >= 101) + (i >= 200), "x": float(i)} for i in range(300)]
    points = thinned(Run("r", Path("r"), steps=rows), "x")
    assert len(points) == 151
    # The 51st is step 101 alone, the next the mean of steps 102 and 103.
    assert points[50] == (101.0, 100.0) and points[51] == (102.5, 101.5)


def test_charts_place_their_points():
    chart = LineChart("k", "t", "x", (Series("a<b", ((0.0, 0.0), (1.0, 1.0))),))
    points = re.search(r'points="([\d.]+),([\d.]+) ([\d.]+),([\d.]+)"', svg(chart))
    x0, y0, x1, y1 = (float(value) for value in points.groups())
    # From the left margin, 50, to the right one, 400 - 12; a larger value stands higher.
    assert (x0, x1) == (50.0, 388.0) and y0 > y1
    assert "a&lt;b" in svg(chart)
    bars = svg(BarChart("k", "t", (("a", 0.25, 0.1), ("b", 0.5, 0.1)), 1.0))
    widths = [float(width) for width in re.findall(r'width="([\d.]+)" height="20"', bars)]
    # Of 400 - 104 - 48 = 248: a quarter and a half.
    assert widths == [62.0, 124.0]


def test_ticks_are_round():
    assert nice_ticks(0.0, 1.0) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert nice_ticks(-2.3, 6.1) == pytest.approx([-2, 0, 2, 4, 6])
    assert [number(value) for value in (0, 0.69315, 1234, 6.34e8)] == ["0", "0.693", "1.23k", "634M"]


def test_gamma_of_each_model_without_a_matrix(run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("stages", "checkpoints", "matrix.json"))
    found = read_run(copy)
    last = found.steps[-1]
    chart = gamma_chart(found)
    assert [line.name for line in chart.series] == found.order
    for line in chart.series:
        # M_0, M_1, M_2; the last validation is M_2's.
        assert [x for x, _ in line.points] == [0.0, 1.0, 2.0]
        assert line.points[-1][1] == last[f"val/{line.name}/gamma"]


# ---- a real browser

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium in PATH")


def _browse(page: Path, width: int, dark: bool, *words: str) -> subprocess.CompletedProcess:
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr", scheme]
    profile = f"--user-data-dir={page.parent / 'profile'}"
    command = [CHROMIUM, *flags, profile, f"--window-size={width},1500", *words, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


PROBE = """<script>addEventListener("load", () => {
  const root = document.documentElement, svgs = [...document.querySelectorAll("svg")];
  const back = getComputedStyle(document.body).backgroundColor;
  const scale = Math.min(...svgs.map(s => s.getBoundingClientRect().width / 400));
  const state = {asked: WIDTH, inner: innerWidth, scroll: root.scrollWidth, charts: svgs.length, back, scale};
  root.setAttribute("data-state", JSON.stringify(state)); });</script>"""


@needs_browser
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [400, 1280])
def test_a_browser_shows_it(attacked, width, dark):
    page, charts = attacked / "page.html", len(re.findall("<svg", run_page(read_run(attacked))))
    # A window can't be narrower than about 500 pixels, a frame can.
    inner = run_page(read_run(attacked)).replace("</body>", PROBE.replace("WIDTH", str(width)) + "</body>")
    page.write_text(inner)
    frame = attacked / "frame.html"
    frame.write_text(
        f'<body style="margin:0"><iframe src="page.html" width="{width}" height="1400" style="border:0"></iframe>'
        '<script>addEventListener("load", () => document.documentElement.setAttribute("data-state", '
        'document.querySelector("iframe").contentDocument.documentElement.dataset.state))</script>'
    )
    done = _browse(frame, 1280, dark, "--allow-file-access-from-files", "--dump-dom")
    state = json.loads(re.search(r'data-state="([^"]*)"', done.stdout)[1].replace("&quot;", '"'))
    assert "CONSOLE" not in done.stderr
    assert state["inner"] == state["asked"] == width
    assert state["scroll"] <= width
    assert state["charts"] == charts > 8
    # Text of 12 units is at least 10 pixels high.
    assert state["scale"] * 12 >= 10
    assert state["back"] == ("rgb(20, 23, 27)" if dark else "rgb(246, 247, 249)")


@needs_browser
def test_a_browser_draws_it(run):
    page, picture = run / "report.html", run / "shot.png"
    page.write_text(run_page(read_run(run)))
    done = _browse(page, 1280, False, f"--screenshot={picture}")
    assert "CONSOLE" not in done.stderr
    assert struct.unpack(">II", picture.read_bytes()[16:24]) == (1280, 1500)
    # An empty page of that size compresses to a few kilobytes.
    assert picture.stat().st_size > 30_000


@needs_browser
def test_a_console_error_would_be_seen(tmp_path):
    page = tmp_path / "page.html"
    page.write_text("<body><script>no_such_name()</script>")
    assert "CONSOLE" in _browse(page, 1280, False, "--dump-dom").stderr
