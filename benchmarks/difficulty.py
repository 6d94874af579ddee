"""The order of real sources under each `data.difficulty`, by one pass of a model: `python -m benchmarks.difficulty`.

The data and the model are read from the folder that `SDPO_SHARED` names (default `../shared`). Every difficulty is a
function of the same logps, so that one pass of the model serves all.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from sdpo_lightning.cli import CurriculumCLI
from sdpo_lightning.data.curriculum import easy_to_hard, reward_accuracy
from sdpo_lightning.data.difficulty import find_difficulty
from sdpo_lightning.data.ranking import rank_sources, ranking_table

NAMES = ("sum_logps", "mean_logps", "length_matched", "residual")
SOURCES = ("hh_harmless", "pandalm", "llmbar", "alpaca_eval_weak", "alpaca_eval_strong")
RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Measure, print and write `results/difficulty.{json,md}`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit", type=int, default=150, help="pairs of each source")
    parser.add_argument("--max_length", type=int, default=512)
    given = parser.parse_args()
    shared = Path(os.environ.get("SDPO_SHARED", "../shared"))
    sources = [
        {"name": name, "path": str(shared / "data" / f"{name}.jsonl.gz"), "limit": given.limit} for name in SOURCES
    ]
    with TemporaryDirectory() as folder:
        cli = CurriculumCLI(
            args=[
                "rank",
                f"--trainer.default_root_dir={folder}",
                "--trainer.accelerator=cpu",
                "--trainer.enable_progress_bar=false",
                f"--model.model_name_or_path={shared / 'model'}",
                f"--data.sources={json.dumps(sources)}",
                f"--data.max_length={given.max_length}",
            ]
        )
        curriculum = cli.datamodule.curriculum()
    reports, m0, orders = list(cli.datamodule.reports.values()), cli.model.m0_logps, {}
    for name in NAMES:
        scores = rank_sources(reports, [report.train_ids for report in reports], find_difficulty(name), m0)
        accuracies = {source: reward_accuracy(values)[0] for source, values in scores.items()}
        orders[name] = {source: round(accuracies[source], 3) for source in easy_to_hard(accuracies)}
    settings = {**vars(given), "torch": torch.__version__, "threads": torch.get_num_threads()}
    result = {"settings": settings, "sources": curriculum["sources"], "orders": orders}
    result["length_order"] = curriculum["length_order"]
    (RESULTS / "difficulty.json").write_text(json.dumps(result, indent=1) + "\n")
    lines = [
        "# The order of real sources under each difficulty",
        f"`python -m benchmarks.difficulty`: the first {given.limit} rows of each source at `data.max_length` "
        f"{given.max_length}, scored by one pass of a Llama of 5.8 million parameters on a CPU (torch "
        f"{torch.__version__}, {torch.get_num_threads()} thread).",
        "It serves mechanics: how far an order follows length for another model is for that model to say.",
        "",
        "```",
        ranking_table(curriculum),
        "```",
        "| difficulty | order, easy to hard (accuracy) |",
        "|---|---|",
        *(f"| `{n}` | {', '.join(f'{s} {a:.3f}' for s, a in order.items())} |" for n, order in orders.items()),
    ]
    (RESULTS / "difficulty.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
