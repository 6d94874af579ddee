"""Rank 0: what is said of a finished stage: a table for people, a line for programs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

# Column of a matrix row -> heading.
_COLUMNS = {
    "pairs": "pairs",
    "accuracy": "gamma > 0",
    "length_controlled_accuracy": "like length",
    "reward_accuracy": "since M_{t-1}",
    "reward_accuracy_m0": "since M_0",
    "gamma": "gamma",
    "kl_estimate_m0": "from S",
    "chosen_logps_per_token": "chosen a token",
}
# Of a row of `summary.json`.
_SUMMARY = ("pairs", "steps", "seconds", "loss_first", "loss_last", "accuracy_last", "gamma_ref")


def stage_title(index: int, count: int, summary: Mapping[str, Any], model: str, digest: str) -> str:
    """One sentence on a stage.

    Args:
        index: t.
        count: T.
        summary: its row of `summary.json`; empty where it isn't known.
        model: folder of M_t.
        digest: of M_t.
    """
    if not summary:
        return f"stage {index}/{count} done: M_{index} in {model}, sha {digest[:8]}"
    return (
        f"stage {index}/{count} {summary['name']} done: {summary['pairs']:,} pairs, {summary['steps']:,} steps, "
        f"{clock(summary['seconds'])}, loss {_number(summary['loss_first'])} -> {_number(summary['loss_last'])}; "
        f"M_{index} in {model}, sha {digest[:8]}"
    )


def stage_table(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells, a line a source.

    Args:
        rows: of `matrix.json`, of one model.
    """
    heads = ["held out", *_COLUMNS.values()]
    return heads, [[str(row["source"]), *(_number(row.get(column)) for column in _COLUMNS)] for row in rows]


def stage_line(
    index: int, count: int, summary: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], model: str, digest: str
) -> str:
    """The same as one line: `stage_end` and a JSON object.

    Args:
        index: t.
        count: T.
        summary: its row of `summary.json`.
        rows: of `matrix.json`, of M_t.
        model: folder of M_t.
        digest: of M_t.
    """
    found: dict[str, Any] = {"stage": index, "stages": count, "name": summary.get("name")}
    found |= {key: _short(summary.get(key)) for key in _SUMMARY}
    found |= {"model": model, "sha256": digest}
    # What follows a word that ends in "token" would be hidden as a secret.
    names = {column: column.removesuffix("_per_token") for column in _COLUMNS}
    found["held_out"] = {row["source"]: {name: _short(row.get(c)) for c, name in names.items()} for row in rows}
    return f"stage_end {json.dumps(found)}"


def clock(seconds: float) -> str:
    """Hours, minutes and seconds."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


def _short(value: Any) -> Any:
    return round(value, 6) if isinstance(value, float) else value


def _number(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.3f}"
