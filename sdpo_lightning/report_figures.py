"""Rank 1: the charts of a run, and of several runs beside each other."""

from __future__ import annotations

from collections.abc import Sequence

from sdpo_lightning.report_charts import BarChart, Chart, LineChart, Series
from sdpo_lightning.report_data import Run, is_number

# Points of a line; more can't be told apart.
_POINTS = 200


def ranking_chart(run: Run) -> BarChart | None:
    """M_0's reward accuracy on each source, in training order (arXiv 2403.19270, section 3.2)."""
    rows = {row["name"]: row for row in run.sources if is_number(row.get("reward_accuracy"))}
    bars = tuple(
        (name, rows[name]["reward_accuracy"], rows[name].get("standard_error") or 0.0)
        for name in run.order
        if name in rows
    )
    note = "Share of pairs with gamma > 0, with one standard error; the line is chance."
    return BarChart("ranking", "Accuracy of M_0, in training order", bars, 1.0, 0.5, note) if bars else None


def gamma_chart(run: Run) -> LineChart | None:
    """gamma of each M_t on each source's held-out pairs (arXiv 2403.19270, Fig. 2)."""
    note = "What gamma_ref is where M_t is the reference: nats, held-out pairs, with one standard error."
    return _model_chart(run, "gamma", "Mean gamma of each model", "gamma", note)


def distance_chart(run: Run) -> LineChart | None:
    """How far each M_t is from S on each source's held-out pairs."""
    note = "Half the squared change of an answer's logp since S, the data's answers: no KL, but it grows with it."
    return _model_chart(run, "distance", "Distance of each model from S, nats", "kl_estimate_m0", note)


def _model_chart(run: Run, key: str, title: str, column: str, note: str) -> LineChart | None:
    lines = []
    for source in run.measured_sources():
        cells = [(t, run.cell(t, source)) for t in run.models()]
        cells = [(t, cell) for t, cell in cells if is_number(cell.get(column))]
        errors = tuple(cell.get(f"{column}_standard_error") or 0.0 for _, cell in cells)
        lines.append(Series(source, tuple((float(t), cell[column]) for t, cell in cells), errors))
    lines = [line for line in lines if line.points]
    ticks = {float(t): f"M_{t}" for t in run.models()}
    return LineChart(key, title, "model", tuple(lines), (), 0.0, ticks, note) if lines else None


def step_chart(run: Run, key: str, title: str, columns: dict[str, str], level: float | None = None) -> LineChart | None:
    """Columns of `metrics.csv` over the steps, stage boundaries marked; None where there are none.

    Args:
        run: to read.
        key: of the chart.
        title: of the chart.
        columns: column -> what the line is called.
        level: to compare with.
    """
    lines = tuple(Series(name, points) for column, name in columns.items() if (points := thinned(run, column)))
    return LineChart(key, title, "optimizer step", lines, tuple(run.boundaries()), level) if lines else None


def thinned(run: Run, column: str) -> tuple[tuple[float, float], ...]:
    """Means over neighbouring steps, never across a boundary."""
    points: list[tuple[float, float]] = []
    width = max(1, -(-len(run.steps) // _POINTS))
    for index in sorted({row["stage/index"] for row in run.steps}):
        rows = [row for row in run.steps if row["stage/index"] == index and is_number(row.get(column))]
        for start in range(0, len(rows), width):
            part = rows[start : start + width]
            points.append((sum(r["step"] for r in part) / len(part), sum(r[column] for r in part) / len(part)))
    return tuple(points)


def training_charts(run: Run) -> list[Chart]:
    """Loss, rewards, margins and accuracies of all stages on one axis (arXiv 2403.19270, Fig. 3)."""
    within, across = "within the stage (M_{t-1})", "since M_0"
    charts = [
        step_chart(run, "loss", "Loss, nats", {"train/loss": "loss"}, 0.6931),
        step_chart(
            run,
            "margins",
            "Reward margins",
            {"train/rewards/margins": within, "train/rewards_m0/margins": across},
            0.0,
        ),
        step_chart(
            run,
            "accuracies",
            "Reward accuracy",
            {"train/rewards/accuracies": within, "train/rewards_m0/accuracies": across},
            0.5,
        ),
        step_chart(
            run,
            "rewards",
            "Rewards within the stage (M_{t-1})",
            {"train/rewards/chosen": "chosen", "train/rewards/rejected": "rejected"},
            0.0,
        ),
        step_chart(
            run,
            "rewards_m0",
            "Rewards since M_0",
            {"train/rewards_m0/chosen": "chosen", "train/rewards_m0/rejected": "rejected"},
            0.0,
        ),
    ]
    return [chart for chart in charts if chart is not None]


def cost_charts(run: Run) -> list[Chart]:
    """Speed and memory."""
    charts = [
        step_chart(run, "speed", "Tokens a second, all ranks", {"train/tokens_per_second": "tokens a second"}),
        step_chart(run, "memory", "Peak memory of a rank, bytes", {"train/peak_memory": "peak"}),
    ]
    return [chart for chart in charts if chart is not None]


def length_charts(run: Run) -> list[Chart]:
    """Tokens of the answers in the data, and of the models' own."""
    sources = run.measured_sources()
    first = {source: next((r for r in run.matrix if r["source"] == source), {}) for source in sources}
    bars = tuple(
        (f"{source} {side[0]}", first[source][f"{side}_length"], 0.0)
        for source in sources
        for side in ("chosen", "rejected")
        if is_number(first[source].get(f"{side}_length"))
    )
    charts: list[Chart] = []
    if bars:
        charts.append(
            BarChart("lengths", "Tokens of the held-out answers", bars, note="c: chosen, r: rejected; means.")
        )
    counts: dict[int, list[int]] = {}
    for row in run.samples:
        counts.setdefault(row["model"], []).append(row["tokens"])
    if counts:
        bars = tuple((f"M_{t}", sum(n) / len(n), 0.0) for t, n in sorted(counts.items()))
        charts.append(
            BarChart("sampled", "Tokens of the sampled answers", bars, note="Means over the sampled prompts.")
        )
    return charts


def drawn_charts(run: Run) -> list[Chart]:
    """What `SampleStatistics` measured on answers that the policy drew itself."""
    note = "Monte Carlo means, with one standard error; M_0 is S."
    kl = {"samples/kl_reference": "to the reference", "samples/kl_sft": "to S"}
    charts = [
        _drawn(run, "kl", "KL of the policy, nats an answer", kl, 0.0, note),
        _drawn(run, "entropy", "Entropy, nats a token", {"samples/entropy": "entropy"}),
        _drawn(run, "drawn_length", "Tokens of drawn answers", {"samples/answer_length": "tokens"}),
    ]
    return [chart for chart in charts if chart is not None]


def _drawn(
    run: Run, key: str, title: str, columns: dict[str, str], level: float | None = None, note: str = ""
) -> LineChart | None:
    lines = []
    for column, name in columns.items():
        rows = [row for row in run.drawn if is_number(row.get(column))]
        points = tuple((row["step"], row[column]) for row in rows)
        lines.append(Series(name, points, tuple(row.get(f"{column}_standard_error", 0.0) for row in rows)))
    lines = [line for line in lines if line.points]
    return LineChart(key, title, "optimizer step", tuple(lines), (), level, {}, note) if lines else None


def source_charts(run: Run) -> list[Chart]:
    """What M_0 and later models make of each source."""
    charts = (ranking_chart(run), gamma_chart(run), distance_chart(run))
    return [chart for chart in charts if chart is not None]


def run_charts(run: Run) -> list[Chart]:
    """All charts of a run."""
    return [*source_charts(run), *training_charts(run), *length_charts(run), *drawn_charts(run), *cost_charts(run)]


def comparison_charts(runs: Sequence[Run], names: Sequence[str]) -> list[Chart]:
    """Lines of several runs over each other.

    Args:
        runs: to compare.
        names: what each is called.
    """
    charts: list[Chart] = []
    for key, title, level in (
        ("loss", "Loss, nats", 0.6931),
        ("rewards_m0/accuracies", "Reward accuracy since M_0", 0.5),
        ("rewards_m0/margins", "Reward margins since M_0", 0.0),
        ("rewards/accuracies", "Reward accuracy within the stage", 0.5),
    ):
        lines = [Series(n, thinned(run, f"train/{key}")) for n, run in zip(names, runs, strict=True)]
        lines = [line for line in lines if line.points]
        if lines:
            charts.append(LineChart(key.replace("/", "_"), title, "optimizer step", tuple(lines), (), level))
    return charts
