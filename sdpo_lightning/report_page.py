"""Rank 2: one HTML file without scripts and without anything from elsewhere. All that comes from data is escaped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from sdpo_lightning.report_charts import COLOURS, BarChart, Chart, number, svg
from sdpo_lightning.report_data import Run, is_number
from sdpo_lightning.report_figures import (
    comparison_charts,
    cost_charts,
    drawn_charts,
    length_charts,
    source_charts,
    training_charts,
)
from sdpo_lightning.report_style import CSS

# Column of a matrix row -> heading; each is a share.
_HEAT_MAPS = {
    "accuracy": "Accuracy: share with gamma > 0",
    "reward_accuracy_m0": "Reward accuracy against M_0",
    "reward_accuracy": "Reward accuracy against M_{t-1}",
    "length_controlled_accuracy": "Accuracy among answers of like length (within 10 %)",
}


def run_page(run: Run) -> str:
    """The report of one run."""
    stages = len(run.stages)
    lead = (
        f"{stages} stage{'s' if stages != 1 else ''}, {len(run.sources)} sources, {sum(_steps(run)):,} optimizer steps"
    )
    sections = [
        _section("Stages", [_stages(run)]),
        _section("Sources and reference", [_charts(source_charts(run))]),
        _section("Training", [_charts(training_charts(run))]),
        _section("Models and sources", [_heat_maps(run)]),
        _section("Length of answers", [_charts(length_charts(run))]),
        _section("Answers drawn from the policy", [_charts(drawn_charts(run))]),
        _section("Samples", [_samples(run)]),
        _section("Time and memory", [_charts(cost_charts(run))]),
        _section("Data", [_data(run), _findings(run)]),
        _section("Configuration", [_versions(run), _config(run)]),
        _section("Not there", [_missing(run)]),
    ]
    return _page(f"Run {run.name}", lead, sections)


def comparison_page(runs: Sequence[Run]) -> str:
    """Several runs beside each other."""
    names = labels(runs)
    charts = _charts(comparison_charts(runs, names))
    sections = [
        _section("Results", [_results(runs, names)]),
        _section("Training", [charts]),
        _section("Accuracy of the last model", [_last_models(runs, names)]),
        _section("Settings that differ", [_differences(runs, names)]),
    ]
    return _page(f"{len(runs)} runs", " and ".join(names), sections)


def labels(runs: Sequence[Run]) -> list[str]:
    """The folders' names, or their paths where two are called the same."""
    names = [run.name for run in runs]
    return names if len(set(names)) == len(names) else [str(run.folder) for run in runs]


def _page(title: str, lead: str, sections: Sequence[str]) -> str:
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        # Else a browser asks for an icon.
        f'<link rel="icon" href="data:,"><title>{escape(title)}</title><style>{CSS}</style></head>\n'
        f"<body><header><h1>{escape(title)}</h1><p>{escape(lead)}</p></header>\n<main>\n"
        + "\n".join(section for section in sections if section)
        + "\n</main></body></html>\n"
    )


def _section(title: str, parts: Iterable[str]) -> str:
    body = "".join(parts)
    return f"<section><h2>{escape(title)}</h2>{body}</section>" if body else ""


def _charts(charts: Sequence[Chart]) -> str:
    return f'<div class="grid">{"".join(_card(chart) for chart in charts)}</div>' if charts else ""


def _card(chart: Chart) -> str:
    legend = ""
    if not isinstance(chart, BarChart) and len(chart.series) > 1:
        keys = (
            f'<span><i class="key s{i % COLOURS}"></i>{escape(line.name)}</span>' for i, line in enumerate(chart.series)
        )
        legend = f'<p class="legend">{"".join(keys)}</p>'
    note = f'<p class="note">{escape(chart.note)}</p>' if chart.note else ""
    return f'<figure id="{chart.key}"><h3>{escape(chart.title)}</h3>{legend}{svg(chart)}{note}</figure>'


def _table(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Numbers stand on the right."""
    numeric = [any(is_number(row[i]) for row in rows) for i in range(len(heads))]
    head = "".join(f"<th{' class=num' * right}>{escape(n)}</th>" for n, right in zip(heads, numeric, strict=True))
    body = "".join(f"<tr>{''.join(_cell(value) for value in row)}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


class _Html(str):
    """A cell that is HTML."""


def _cell(value: Any) -> str:
    if isinstance(value, _Html):
        return value
    if value is None:
        return '<td class="num soft">–</td>'
    if is_number(value):
        text = f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
        return f'<td class="num">{text}</td>'
    return f"<td>{escape(str(value))}</td>"


def _steps(run: Run) -> list[int]:
    return [stage.get("steps", 0) for stage in run.stages]


def _stages(run: Run) -> str:
    heads = {
        "index": "t",
        "name": "stage",
        "pairs": "pairs",
        "steps": "steps",
        "gamma_ref": "gamma_ref",
        "loss_first": "first loss",
        "loss_last": "last loss",
        "accuracy_last": "last accuracy",
        "seconds": "seconds",
        "peak_memory": "peak memory",
    }
    rows = [
        [_bytes(stage.get(key)) if key == "peak_memory" else stage.get(key) for key in heads] for stage in run.stages
    ]
    return _table(list(heads.values()), rows) if rows else ""


def _bytes(count: Any) -> Any:
    return f"{number(float(count))}B" if is_number(count) else None


def _heat_maps(run: Run) -> str:
    sources, tables = run.measured_sources(), []
    for key, title in _HEAT_MAPS.items():
        known = [t for t in run.models() if any(is_number(run.cell(t, source).get(key)) for source in sources)]
        if known:
            rows = [[f"M_{t}", *(_heat(run.cell(t, source), key) for source in sources)] for t in known]
            tables.append(f"<figure><h3>{escape(title)}</h3>{_table(['', *sources], rows)}</figure>")
    pairs = sorted({row["pairs"] for row in run.matrix})
    counts = f"{pairs[0]:,}" if len(set(pairs)) == 1 else f"{pairs[0]:,} to {pairs[-1]:,}" if pairs else ""
    note = f'<p class="note">Held-out pairs, {counts} of a source.</p>'
    return f'<div class="grid">{"".join(tables)}</div>{note}' if tables else ""


def _heat(cell: dict[str, Any], key: str) -> _Html:
    value = cell.get(key)
    if not is_number(value):
        return _Html('<td class="num soft">–</td>')
    # Two hues that meet at chance; text keeps the page's colour, so the strongest is still pale.
    hue, strength = ("good", value - 0.5) if value >= 0.5 else ("bad", 0.5 - value)
    count = cell.get("length_controlled_pairs") if key == "length_controlled_accuracy" else None
    small = f" <small>of {count}</small>" if count is not None else ""
    return _Html(f'<td class="num heat {hue}" style="--strength:{100 * strength:.0f}%">{100 * value:.1f} %{small}</td>')


def _samples(run: Run) -> str:
    prompts: dict[str, list[dict[str, Any]]] = {}
    for row in run.samples:
        prompts.setdefault(row["prompt"], []).append(row)
    blocks = []
    for prompt, rows in prompts.items():
        answers = "".join(
            f'<div class="answer"><b>{"S = " if row["model"] == 0 else ""}M_{int(row["model"])}</b>'
            f"<p>{escape(row['answer']) or '<i>nothing</i>'}</p></div>"
            for row in sorted(rows, key=lambda row: row["model"])
        )
        source = f"<b>{escape(rows[0]['source'])}</b> " if rows[0].get("source") else ""
        blocks.append(
            f'<article><p class="prompt">{source}{escape(prompt)}</p><div class="answers">{answers}</div></article>'
        )
    return "".join(blocks)


def _data(run: Run) -> str:
    reasons = sorted({reason for row in run.sources for reason in row.get("dropped", {})})
    rows = [
        [row["name"], row["pairs"], row["val_pairs"], *(row["dropped"].get(reason, 0) for reason in reasons)]
        for row in run.sources
    ]
    if not rows:
        return ""
    none = "" if reasons else '<p class="note">No row was dropped.</p>'
    return _table(["source", "pairs", "held out", *(f"dropped: {reason}" for reason in reasons)], rows) + none


def _findings(run: Run) -> str:
    heads = ["t", "source", "trained on", "held out", "standard error", "memorised"]
    rows = [
        [f["stage"], f["source"], f["train"], f["held_out"], f["standard_error"], "yes" if f["is_memorised"] else "no"]
        for f in run.findings
    ]
    title = "<h3>Has the reference been trained on its pairs? Change of gamma since S, nats a token</h3>"
    return title + _table(heads, rows) if rows else ""


def _versions(run: Run) -> str:
    return _table(["program", "version"], list(run.versions.items())) if run.versions else ""


def _config(run: Run) -> str:
    if not run.config:
        return ""
    return f'<details><summary>config.yaml</summary><pre tabindex="0">{escape(run.config)}</pre></details>'


def _missing(run: Run) -> str:
    rows = "".join(f"<li>{escape(name)}: {escape(why)}</li>" for name, why in run.missing.items())
    return f"<ul>{rows}</ul>" if rows else ""


def _results(runs: Sequence[Run], names: Sequence[str]) -> str:
    heads = [
        "run",
        "stages",
        "pairs",
        "steps",
        "last loss",
        "last accuracy",
        "held-out accuracy",
        "seconds",
        "peak memory",
    ]
    rows = []
    for name, run in zip(names, runs, strict=True):
        last = run.stages[-1] if run.stages else {}
        cells = _last_cells(run)
        memory = max((s.get("peak_memory") or 0 for s in run.stages), default=0)
        rows.append(
            [
                name,
                len(run.stages),
                sum(s.get("pairs", 0) for s in run.stages),
                sum(_steps(run)),
                last.get("loss_last"),
                last.get("accuracy_last"),
                sum(cells.values()) / len(cells) if cells else None,
                float(sum(s.get("seconds", 0.0) for s in run.stages)),
                _bytes(memory or None),
            ]
        )
    return _table(heads, rows)


def _last_cells(run: Run) -> dict[str, float]:
    """Source -> accuracy of the last model that was measured."""
    models = run.models()
    cells = {s: run.cell(models[-1], s).get("accuracy") for s in run.measured_sources()} if models else {}
    return {source: value for source, value in cells.items() if is_number(value)}


def _last_models(runs: Sequence[Run], names: Sequence[str]) -> str:
    sources = list(dict.fromkeys(source for run in runs for source in run.measured_sources()))
    rows = []
    for name, run in zip(names, runs, strict=True):
        cells = _last_cells(run)
        if cells:
            shown = [_heat({"accuracy": cells.get(source)}, "accuracy") for source in sources]
            rows.append([f"{name}, M_{run.models()[-1]}", *shown])
    note = '<p class="note">Share of held-out pairs with gamma > 0.</p>'
    return _table(["", *sources], rows) + note if rows else ""


def _differences(runs: Sequence[Run], names: Sequence[str]) -> str:
    settings = [run.settings for run in runs]
    keys = list(dict.fromkeys(key for values in settings for key in values))
    rows = [
        [key, *(str(values.get(key, "–")) for values in settings)]
        for key in keys
        if len({str(values.get(key, "–")) for values in settings}) > 1
    ]
    return _table(["setting", *names], rows) if rows else ""
