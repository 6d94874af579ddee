"""From units to what the table and the figures show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from benchmarks.paper.rows import Settings, grid, line, make_rows, sdpo_grid
from benchmarks.paper.statistics import at_kl, mean_and_error, paired

Unit = dict[str, Any]
# Seed -> row -> unit.
Units = Mapping[int, Mapping[str, Unit]]

# What a step of the way from plain DPO to sDPO adds: (what, with it, without it).
STEPS = (
    ("of that: order", "order_only", "dpo"),
    ("of that: restarts", "fixed", "order_only"),
    ("of that: the moving reference", "sdpo", "fixed"),
)
CLAIMS = (
    ("sDPO above DPO", "sdpo", "dpo"),
    ("sDPO above the best-tuned DPO", "sdpo", "best"),
    ("tuned sDPO above the best-tuned DPO", "best_sdpo", "best"),
    ("sDPO above DPO with beta / T", "sdpo", "dpo_beta_t"),
    ("easy to hard above random (Table 3)", "sdpo", "random"),
    ("easy to hard above hard to easy", "sdpo", "reversed"),
    ("target = M_{t-1} above target = S (section 4.5)", "sdpo", "target_s"),
    ("an aligned reference above S (Table 1)", "external", "dpo"),
    ("a moving reference above a fixed one (TR-DPO)", "tr_dpo", "dpo"),
)


def main_rows(settings: Settings) -> list[str]:
    """Rows of the table that are units, S first."""
    others = sdpo_grid(settings) | line(settings) | grid(settings)
    return ["s", *(name for name in make_rows(settings) if name not in others)]


def choose(units: Units, names: Sequence[str]) -> str | None:
    """The row of the highest mean preference on the validation prompts of the seeds that have all of them."""
    having = [rows for rows in units.values() if all(name in rows for name in names)]
    if not having:
        return None
    return max(names, key=lambda name: fmean(rows[name]["validation"]["preference"][0] for rows in having))


def best_rows(units: Units, settings: Settings) -> dict[str, str | None]:
    """`best` and `best_sdpo` -> the unit that is chosen, the same for all seeds."""
    return {
        "best": choose(units, ["dpo", *grid(settings)]),
        "best_sdpo": choose(units, ["sdpo", *sdpo_grid(settings)]),
    }


def values_of(unit: Unit, dpo_line: Sequence[tuple[float, float]]) -> dict[str, float | None]:
    """Columns of one unit: shares in points of 100, KL and gamma in nats."""
    test = unit["test"]
    reached = at_kl(dpo_line, test["kl"][0]) if len(dpo_line) > 1 else None
    preference = 100 * test["preference"][0]
    accuracy, gamma = unit.get("accuracy"), unit.get("gamma_ref")
    return {
        "preference": preference,
        "kl": test["kl"][0],
        "kl_sampling_error": test["kl"][1],
        "quality": test["quality"][0],
        "malformed": 100 * test["malformed"][0],
        "accuracy": None if accuracy is None else 100 * accuracy,
        "gamma_ref": gamma,
        "excess": None if reached is None else preference - reached,
    }


def columns(units: Units, settings: Settings) -> dict[str, dict[int, dict[str, float | None]]]:
    """Row -> seed -> columns. `excess` is the preference less that of plain DPO at the same KL, seed by seed."""
    names, found = best_rows(units, settings), {}
    for seed, rows in units.items():
        points = [rows[n]["test"] for n in ("s", "dpo", "dpo_beta_t", *line(settings)) if n in rows]
        dpo_line = [(test["kl"][0], 100 * test["preference"][0]) for test in points]
        shown = {name: _with_m0(unit, rows) if name == "s" else unit for name, unit in rows.items()}
        shown |= {key: rows[n] for key, n in names.items() if n in rows}
        for name, unit in shown.items():
            found.setdefault(name, {})[seed] = values_of(unit, dpo_line)
    return found


def _with_m0(unit: Unit, rows: Mapping[str, Unit]) -> Unit:
    """S with its accuracy on the held-out pairs, which every run has measured before its first step."""
    found = [row["accuracy"] for row in rows.get("dpo", {}).get("matrix", []) if row["model"] == 0]
    return unit | ({"accuracy": fmean(found)} if found else {})


def difference(table: Mapping[str, Any], key: str, left: str, right: str) -> dict[str, float | None] | None:
    """Paired difference of one column of two rows, over the seeds that have both."""
    ours, theirs = table.get(left, {}), table.get(right, {})
    both = [(ours[seed][key], theirs[seed][key]) for seed in ours if seed in theirs]
    numbers = [a - b for a, b in both if a is not None and b is not None]
    return paired(numbers).row() if numbers else None


def summarise(units: Units, settings: Settings) -> dict[str, Any]:
    """Everything that the table shows, as plain values."""
    table, rows = columns(units, settings), {}
    for name, seeds in table.items():
        row: dict[str, Any] = {"seeds": len(seeds)}
        for key in ("preference", "kl", "quality", "malformed", "accuracy", "gamma_ref", "excess"):
            numbers = [v[key] for v in seeds.values() if v[key] is not None]
            row[key] = mean_and_error(numbers) if numbers else None
        row["excess_seeds"] = sum(v["excess"] is not None for v in seeds.values())
        first = next(iter(units.values()), {}).get(name, {})
        row |= {key: first.get(key) for key in ("steps", "pairs")}
        row["minus_dpo"] = difference(table, "preference", name, "dpo")
        rows[name] = row
    compared = [
        {
            "claim": what,
            "rows": [left, right],
            "preference": difference(table, "preference", left, right),
            "excess": difference(table, "excess", left, right),
            "kl": difference(table, "kl", left, right),
        }
        for what, left, right in (CLAIMS[0], *STEPS, *CLAIMS[1:])
    ]
    return {"rows": rows, "comparisons": compared, "chosen": best_rows(units, settings)}


def figure_2(units: Units) -> dict[str, list[list[float]]]:
    """Source -> per seed the mean gamma of M_0 ... M_T of `sdpo` on its held-out pairs."""
    found: dict[str, list[list[float]]] = {}
    for rows in units.values():
        matrix = rows["sdpo"]["matrix"] if "sdpo" in rows else []
        for source in dict.fromkeys(row["source"] for row in matrix):
            found.setdefault(source, []).append([row["gamma"] for row in matrix if row["source"] == source])
    return found


def figure_3(units: Units) -> dict[str, list[float]]:
    """Row -> mean loss over seeds of each step of the last stage, for both beginnings of the policy."""
    found = {}
    for name in ("sdpo", "target_s"):
        curves = [rows[name]["losses"][-1] for rows in units.values() if name in rows]
        if curves:
            found[name] = [fmean(step) for step in zip(*curves, strict=True)]
    return found
