"""The paper in miniature: `python -m benchmarks.paper [--seeds N] [--minutes M] [--smoke]`.

Trains every row for every seed, keeps each result in a file of its own, and goes on where it was when it is started
again. Then writes tables, figures and `results.json`. `--shared` runs the mechanics on real pairs instead.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.data_size import machine
from benchmarks.paper.figures import draw
from benchmarks.paper.results import Units, best_rows, figure_2, figure_3, main_rows, summarise
from benchmarks.paper.rows import Settings, grid, line, sdpo_grid
from benchmarks.paper.shared import run_shared
from benchmarks.paper.table import markdown, titles
from benchmarks.paper.units import Bench, quiet
from sdpo_lightning.files import write_json

HERE = Path(__file__).parent
SMOKE = Settings(
    epochs=1,
    batch_size=16,
    pairs={"feedback": 48, "orca": 32},
    held_out=16,
    sft_steps=20,
    hidden=16,
    per_prompt=1,
    prompts=16,
)
SMOKE_ROWS = ("s", "dpo", "fixed", "sdpo", "target_s")


def jobs(bench: Bench, seeds: Sequence[int], tuned_on: Sequence[int]) -> Iterator[tuple[int, str]]:
    """(seed, unit) in an order that gives whole seeds first; what was chosen by then is asked of the files.

    Args:
        bench: of the units.
        seeds: to do.
        tuned_on: seeds that have the whole grid.
    """
    settings = bench.settings
    common = [*main_rows(settings), *line(settings)]
    searched = [*grid(settings), *sdpo_grid(settings)]
    for seed in seeds:
        yield from ((seed, name) for name in common)
        if seed in tuned_on:
            yield from ((seed, name) for name in searched if name not in common)
        else:
            chosen = best_rows({s: units_of(bench, s) for s in tuned_on}, settings)
            yield from ((seed, name) for name in chosen.values() if name is not None and name not in common)


def units_of(bench: Bench, seed: int) -> dict[str, Any]:
    """Kept results of a seed."""
    found = {name: bench.kept(seed, name) for name in ["s", *bench.rows]}
    return {name: unit for name, unit in found.items() if unit is not None}


def collect(bench: Bench, seeds: Sequence[int], needed: Sequence[str]) -> dict[str, Any]:
    """What `results.json` holds, of the seeds that have the needed units; empty where none has."""
    found: Units = {seed: units_of(bench, seed) for seed in seeds}
    units = {seed: rows for seed, rows in found.items() if set(needed) <= rows.keys()}
    if not units:
        return {}
    settings = bench.settings
    summary = summarise(units, settings)
    return {
        "seeds": list(units),
        "machine": machine(),
        "settings": next(iter(units.values()))["s"]["settings"],
        "summary": summary,
        "titles": titles(settings, summary["chosen"]),
        "dpo_line": ["dpo", "dpo_beta_t", *line(settings)],
        "sdpo_line": ["sdpo", *sdpo_grid(settings)],
        "figure_2": figure_2(units),
        "figure_3": figure_3(units),
        "units": [unit for rows in units.values() for unit in rows.values()],
    }


def write(found: dict[str, Any], settings: Settings, folder: Path) -> None:
    """`results.json`, `units.jsonl` (a line each), `table.md` and the figures."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "results.json", {key: rounded(value) for key, value in found.items() if key != "units"})
    # The settings stand in `results.json`, and the losses of two rows in its figure 3.
    lines = [{key: unit[key] for key in unit if key not in ("settings", "losses")} for unit in found["units"]]
    text = "".join(json.dumps(rounded(line)) + "\n" for line in lines)
    (folder / "units.jsonl").write_text(text, encoding="utf-8")
    (folder / "table.md").write_text(markdown(found["summary"], settings), encoding="utf-8")
    draw(found, folder)


def rounded(value: Any) -> Any:
    """Plain values with 5 decimals; None for what is no number."""
    if isinstance(value, float):
        return None if value != value else round(value, 5)
    if isinstance(value, dict):
        return {str(key): rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list | tuple) else value


def smoke(work: Path) -> dict[str, Any]:
    """A few rows of two seeds at a size that says nothing; every step of a real run, from S to the figures."""
    bench = Bench(work, SMOKE)
    with quiet():
        for seed, names in ((0, SMOKE_ROWS), (1, SMOKE_ROWS[:2])):
            for name in names:
                bench.run(seed, name)
    found = collect(bench, (0, 1), SMOKE_ROWS[:2])
    write(found, SMOKE, work)
    return found


def main(words: Sequence[str] | None = None) -> None:
    """Run, or go on."""
    parser = argparse.ArgumentParser("benchmarks.paper", description=__doc__)
    parser.add_argument("--seeds", type=int, default=5, help="0 to N - 1")
    parser.add_argument("--tuned-on", type=int, default=1, help="seeds 0 to N - 1 have the whole grid")
    parser.add_argument("--minutes", type=float, default=None, help="begin no unit after so many minutes")
    parser.add_argument("--work", type=Path, default=Path("runs/paper"))
    parser.add_argument("--results", type=Path, default=HERE)
    parser.add_argument("--smoke", action="store_true", help="a few rows at a size that says nothing")
    parser.add_argument("--shared", action="store_true", help="the mechanics on ../shared (or $SDPO_SHARED)")
    given = parser.parse_args(words)
    # Matrices this small only wait for a second thread.
    torch.set_num_threads(1)
    if given.smoke:
        print(json.dumps(smoke(given.work / "smoke")["summary"]["rows"]["dpo"]))
        return
    if given.shared:
        print(json.dumps(run_shared(given.work / "shared", given.results / "shared.json"), indent=1))
        return
    bench, began = Bench(given.work, Settings()), time.monotonic()
    seeds, tuned_on = range(given.seeds), range(given.tuned_on)
    with quiet():
        for seed, name in jobs(bench, seeds, tuned_on):
            if given.minutes is not None and time.monotonic() - began > 60 * given.minutes:
                break
            if bench.kept(seed, name) is None:
                found = bench.run(seed, name)
                test = found["test"]
                print(
                    f"seed {seed} {name}: preference {100 * test['preference'][0]:.1f} %, KL {test['kl'][0]:.2f} nats, "
                    f"{found['seconds']} s",
                    flush=True,
                )
    if found := collect(bench, seeds, main_rows(bench.settings)):
        write(found, bench.settings, given.results)
        print((given.results / "table.md").read_text())


if __name__ == "__main__":
    main()
