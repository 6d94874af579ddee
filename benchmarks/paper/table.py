"""The results as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.paper.rows import Settings, grid, line, make_rows, sdpo_grid

_HEADER = (
    "| row | steps | true preference, % | minus DPO, points | KL(M_T to S), nats | above DPO of that KL, points "
    "(seeds) | not of the form, % | held-out accuracy, % | gamma_ref of the last stage |"
)


def score(value: Sequence[float] | None, digits: int = 1) -> str:
    """Mean and standard error."""
    if value is None:
        return "-"
    mean, error = value
    return f"{mean:.{digits}f}" + ("" if error != error or error is None else f" ({error:.{digits}f})")


def interval(value: Mapping[str, float | None] | None) -> str:
    """Mean and half of the 95 % interval."""
    if value is None:
        return "-"
    width = value["half_width"]
    return f"{value['mean']:+.1f}" + ("" if width is None else f" ± {width:.1f}")


def titles(settings: Settings, chosen: Mapping[str, str | None]) -> dict[str, str]:
    """Row -> title, in the order of the table."""
    rows = make_rows(settings)
    apart = sdpo_grid(settings) | line(settings) | grid(settings)
    best = {
        "best": ("DPO, the best of the grid", chosen["best"]),
        "best_sdpo": ("sDPO, the best of the grid", chosen["best_sdpo"]),
    }
    found = {"s": "S"}
    for name, row in rows.items():
        if name not in apart:
            found[name] = row.title
        if name == "dpo_beta_t":
            found |= {key: f"{title} ({rows[unit].title})" for key, (title, unit) in best.items() if unit}
    return found


def row_table(summary: Mapping[str, Any], settings: Settings) -> list[str]:
    """A line a row."""
    lines = [_HEADER, "|" + "---|" * 9]
    for name, title in titles(settings, summary["chosen"]).items():
        if (row := summary["rows"].get(name)) is None:
            continue
        excess = "-" if row["excess"] is None or name == "s" else f"{score(row['excess'])} ({row['excess_seeds']})"
        cells = [
            title if row["seeds"] == summary["rows"]["s"]["seeds"] else f"{title} ({row['seeds']} seeds)",
            str(row["steps"] or "-"),
            score(row["preference"]),
            "-" if name in ("s", "dpo") else interval(row["minus_dpo"]),
            score(row["kl"], 2),
            excess,
            score(row["malformed"]),
            score(row["accuracy"]),
            score(row["gamma_ref"], 2),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def comparison_table(summary: Mapping[str, Any]) -> list[str]:
    """A line a comparison."""
    lines = [
        "| comparison | seeds | true preference, points | p | KL, nats | at equal KL, points | p (seeds) |",
        "|---|---|---|---|---|---|---|",
    ]
    for found in summary["comparisons"]:
        raw, equal, kl = found["preference"], found["excess"], found["kl"]
        if raw is None:
            continue
        cells = [
            found["claim"],
            str(raw["seeds"]),
            interval(raw),
            _chance(raw),
            "-" if kl is None else f"{kl['mean']:+.2f}",
            interval(equal),
            "-" if equal is None else f"{_chance(equal)} ({equal['seeds']})",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _chance(value: Mapping[str, float | None]) -> str:
    if value["p"] is None:
        return "-"
    return "< 0.001" if value["p"] < 0.001 else f"{value['p']:.3f}"


def line_table(summary: Mapping[str, Any], settings: Settings) -> list[str]:
    """The runs of plain DPO and of sDPO that differ in beta, learning rate and steps alone."""
    rows, lines = make_rows(settings), ["| run | seeds | true preference, % | KL, nats |", "|---|---|---|---|"]
    names = ["dpo", "dpo_beta_t", *line(settings), "sdpo", *sdpo_grid(settings)]
    names += [name for name in grid(settings) if name not in names]
    for name in names:
        if (row := summary["rows"].get(name)) is not None:
            title = rows[name].title
            lines.append(f"| {title} | {row['seeds']} | {score(row['preference'])} | {score(row['kl'], 2)} |")
    return lines


def markdown(summary: Mapping[str, Any], settings: Settings) -> str:
    """All tables."""
    parts = [
        "Means over seeds (standard error over seeds). Differences are paired by seed, with a 95 % interval.",
        *row_table(summary, settings),
        "### Comparisons",
        *comparison_table(summary),
        "### Beta, learning rate and steps",
        *line_table(summary, settings),
    ]
    text = ""
    for part in parts:
        # A table begins and ends with an empty line.
        text += part + ("\n" if part.startswith("|") else "\n\n")
        if part.startswith("#"):
            text = text.replace("|\n" + part, "|\n\n" + part)
    return text.rstrip() + "\n"
