"""Rank 9: `sdpo-lightning demo`: stepwise DPO on a generated language whose true preference is known.

Makes a tiny SFT model and three sources, runs the main job and plain pooled DPO through the command line, and
measures M_0, every M_t and the pooled model on held-out pairs. Fails if nothing was learned.
"""

from __future__ import annotations

import json
import math
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sdpo_lightning.cli import CurriculumCLI
from sdpo_lightning.data.ranking import ranking_table
from sdpo_lightning.files import write_json
from sdpo_lightning.synthetic import SOURCE_NAMES, held_out_accuracy, preference_rate, write_inputs
from sdpo_lightning.verbs import verb_parser

Score = tuple[float, float]


@dataclass
class ModelScores:
    """Figures of one model on the held-out pairs: source -> (value, standard error)."""

    accuracy: dict[str, Score]
    preference: dict[str, Score]

    def means(self) -> tuple[Score, Score]:
        """Mean accuracy and mean preference rate over the sources, with standard errors."""
        return _mean(self.accuracy.values()), _mean(self.preference.values())


def run_demo(words: Sequence[str]) -> None:
    """Run the demo.

    Args:
        words: the words after `demo`.

    Raises:
        SystemExit: with 1 if M_T didn't learn, or, with `--control`, if it seems to have.
    """
    options = verb_parser("demo").parse_args(list(words))
    root = Path(options.root or ("runs/demo-control" if options.control else "runs/demo"))
    inputs = root / "inputs"
    # Matrices this small only wait for a second thread.
    torch.set_num_threads(1)
    # A run's folder holds one run; the demo's is its own.
    shutil.rmtree(root, ignore_errors=True)
    print(f"making a tiny SFT model and three sources in {inputs}", flush=True)
    write_inputs(inputs, seed=options.seed, control=options.control)
    _fit(root, inputs, [])
    _fit(root / "pooled", inputs, ["--data.partition=pooled"])
    curriculum = json.loads((root / "curriculum.json").read_text())
    summary = json.loads((root / "summary.json").read_text())
    scores = _score_models(root, inputs, curriculum)
    print("\nranking of the sources by M_0\n" + ranking_table(curriculum))
    print("\nstages\n" + _stage_table(curriculum, summary, scores))
    print("\nheld-out pairs\n" + _score_table(scores))
    gains = _gains(scores["M_0"], scores[f"M_{len(summary['stages'])}"])
    summary["demo"] = {name: vars(score) for name, score in scores.items()} | {"gains": gains}
    write_json(root / "summary.json", summary)
    _judge(gains, options.control)


def _fit(root: Path, inputs: Path, extra: list[str]) -> None:
    config = resources.files("sdpo_lightning.configs").joinpath("demo.yaml")
    sources = [
        {"name": name, "path": str(inputs / f"{name}.jsonl"), "val_path": str(inputs / f"{name}.val.jsonl")}
        for name in SOURCE_NAMES
    ]
    arguments = [
        "fit",
        f"--config={config}",
        f"--trainer.default_root_dir={root}",
        f"--model.model_name_or_path={inputs / 'model'}",
        f"--data.sources={json.dumps(sources)}",
    ]
    with warnings.catch_warnings():
        # Our own command line is still in sys.argv.
        warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
        CurriculumCLI(args=arguments + extra)


def _score_models(root: Path, inputs: Path, curriculum: dict[str, Any]) -> dict[str, ModelScores]:
    folders = {"M_0": inputs / "model"}
    for stage in curriculum["stages"]:
        folders[f"M_{stage['index']}"] = root / "stages" / f"{stage['index']:02d}-{stage['name']}"
    folders["pooled DPO"] = root / "pooled" / "stages" / "01-pooled"
    tokenizer = AutoTokenizer.from_pretrained(folders["M_0"])
    held_out = {
        name: [json.loads(line) for line in (inputs / f"{name}.val.jsonl").read_text().splitlines()]
        for name in SOURCE_NAMES
    }
    found = {}
    for label, folder in folders.items():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        found[label] = ModelScores(
            {name: held_out_accuracy(model, tokenizer, rows) for name, rows in held_out.items()},
            {name: preference_rate(model, tokenizer, rows, name) for name, rows in held_out.items()},
        )
    return found


def _mean(scores: Any) -> Score:
    values = list(scores)
    return (
        sum(value for value, _ in values) / len(values),
        math.sqrt(sum(error**2 for _, error in values)) / len(values),
    )


def _gains(before: ModelScores, after: ModelScores) -> dict[str, Score]:
    pairs = zip(("accuracy", "preference"), before.means(), after.means(), strict=True)
    return {name: (a - b, math.hypot(se_a, se_b)) for name, (b, se_b), (a, se_a) in pairs}


def _judge(gains: dict[str, Score], control: bool) -> None:
    for name, (gain, error) in gains.items():
        print(f"gain in {name} of M_T over M_0: {100 * gain:+.1f} points (se {100 * error:.1f})")
    learned = [gain >= 0.10 and gain > 3 * error for gain, error in gains.values()]
    if control:
        if any(gain > 3 * error for gain, error in gains.values()):
            raise SystemExit("control failed: a gain from shuffled labels")
        print("control passed: shuffled labels give no gain")
    elif not all(learned):
        raise SystemExit("demo failed: M_T does not beat M_0 by 10 points and 3 standard errors")


def _cell(score: Score) -> str:
    return f"{100 * score[0]:5.1f} ({100 * score[1]:.1f})"


def _stage_table(curriculum: dict[str, Any], summary: dict[str, Any], scores: dict[str, ModelScores]) -> str:
    ranked = {source["name"]: source for source in curriculum["sources"]}
    header = (
        f"{'stage':5} {'source':12} {'pairs':>6} {'M_0 accuracy':>13} {'gamma_ref':>10} {'loss first':>10} "
        f"{'last':>7} {'held-out accuracy':>18} {'seconds':>8}"
    )
    lines = [header]
    for stage in summary["stages"]:
        source = ranked[stage["name"]]
        m0 = _cell((source["reward_accuracy"], source["standard_error"]))
        held_out = _cell(scores[f"M_{stage['index']}"].accuracy[stage["name"]])
        lines.append(
            f"{stage['index']:<5} {stage['name']:12} {stage['pairs']:6} {m0:>13} {stage['gamma_ref']:10.2f} "
            f"{stage['loss_first']:10.4f} {stage['loss_last']:7.4f} {held_out:>18} {stage['seconds']:8.1f}"
        )
    return "\n".join(lines)


def _score_table(scores: dict[str, ModelScores]) -> str:
    lines = []
    for title, key in (
        ("accuracy: share with gamma > 0, % (se)", "accuracy"),
        ("true preference rate of the model's own samples, % (se)", "preference"),
    ):
        lines.append(f"{title}")
        lines.append(f"{'model':12}" + "".join(f"{name:>15}" for name in (*SOURCE_NAMES, "mean")))
        for label, score in scores.items():
            values = getattr(score, key)
            cells = [values[name] for name in SOURCE_NAMES] + [_mean(values.values())]
            lines.append(f"{label:12}" + "".join(f"{_cell(cell):>15}" for cell in cells))
    return "\n".join(lines)
