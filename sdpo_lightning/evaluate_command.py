"""Rank 5: the verb `evaluate`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from sdpo_lightning.evaluation import EQ_BENCH, H4, Harness, HarnessSettings, Suite, versions
from sdpo_lightning.evaluation_models import EvaluatedModel, FoundModels, find_models
from sdpo_lightning.evaluation_table import EvaluationTable
from sdpo_lightning.generation import Generator
from sdpo_lightning.generation_http import OpenAIGenerator
from sdpo_lightning.generation_transformers import FolderGenerator
from sdpo_lightning.generation_vllm import VLLMGenerator, VLLMSettings
from sdpo_lightning.mt_bench_run import run_mt_bench
from sdpo_lightning.types import ConfigurationError
from sdpo_lightning.verbs import PROGRAM, VerbParser


def run_evaluate(words: Sequence[str]) -> None:
    """Run a benchmark over the models of a run or on one folder, and print its table.

    Args:
        words: after `evaluate`.

    Raises:
        ConfigurationError: wrong words, no models, a missing extra.
    """
    options = _parser().parse_args(list(words))
    found = find_models(options.models, options.s)
    if options.only:
        if unknown := sorted(set(options.only) - {model.label for model in found.models}):
            raise ConfigurationError(f"`--only` names {unknown}, there are {[model.label for model in found.models]}")
        found = FoundModels([m for m in found.models if m.label in options.only], found.left_out, found.is_run)
    # Never in a model's folder: the ledger has a digest of its files.
    place = options.models / "evaluation" if found.is_run else Path("evaluation") / options.models.resolve().name
    folder = options.out or place
    if options.suite == "mt_bench":
        print(_mt_bench(options, found, folder), end="")
    else:
        print(evaluate_models(found, H4 if options.suite == "h4" else EQ_BENCH, _settings(options), folder), end="")
    print(f"written: {folder}")


def evaluate_models(found: FoundModels, suite: Suite, settings: HarnessSettings, folder: Path) -> str:
    """Run a suite by lm-eval over some models; the files are written anew after each task.

    Args:
        found: the models.
        suite: what is measured.
        settings: of lm-eval.
        folder: of the table.

    Returns:
        The table in Markdown.
    """
    harness = Harness(settings)
    harness.check(suite)
    table = EvaluationTable(folder, suite, settings.record(), versions())
    lines = [(model.label, model.sha256) for model in found.models]
    for model in found.models:
        tasks = table.missing(model.sha256)
        for figures in harness.run(model.folder, model.base, suite, tasks) if tasks else ():
            table.add(model.label, model.sha256, figures)
            table.write(lines, found.left_out)
    return table.write(lines, found.left_out)


def _settings(options: argparse.Namespace) -> HarnessSettings:
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = options.dtype or ("bfloat16" if device.startswith("cuda") else "float32")
    given = (options.apply_chat_template, options.limit, options.task_folder)
    return HarnessSettings(options.batch_size, device, dtype, *given)


def _mt_bench(options: argparse.Namespace, found: FoundModels, folder: Path) -> str:
    if options.questions is None:
        raise ConfigurationError("`--suite mt_bench` needs `--questions FILE`, MT-Bench's question.jsonl")
    if (options.judge_url is None) != (options.judge_model is None):
        raise ConfigurationError("`--judge_url` and `--judge_model` go together; without them answers aren't rated")
    judge = None
    if options.judge_url is not None:
        judge = OpenAIGenerator(options.judge_url, options.judge_model, options.judge_key_env)
    settings = _settings(options)

    def generator(model: EvaluatedModel) -> Generator:
        if options.generator == "vllm":
            if model.base is not None:
                raise ConfigurationError(f"{model.label} is an adapter: export it merged, or leave `--generator` out")
            return VLLMGenerator(model.folder, VLLMSettings(options.vllm_python, options.dtype or "auto"))
        return FolderGenerator(model.folder, settings.batch_size, settings.device, settings.dtype)

    record = {"generator": options.generator, "dtype": settings.dtype}
    out = folder / "mt_bench"
    return run_mt_bench(out, found.models, options.questions, generator, options.max_new_tokens, record, judge)


def _parser() -> VerbParser:
    parser = VerbParser(f"{PROGRAM} evaluate", description="Benchmarks of M_0 ... M_T of a run, or of one model.")
    add = parser.add_argument
    add("models", metavar="RUN_OR_FOLDER", type=Path, help="a run directory, or a model folder")
    add("--suite", choices=("h4", "eq_bench", "mt_bench"), required=True)
    add("--out", type=Path, help="default: RUN/evaluation; of a folder ./evaluation/NAME")
    add("--only", nargs="+", metavar="M_t", help="of a run: only these models")
    add("--s", help="folder or hub name of S, where the run has no config.yaml")
    add("--batch_size", type=_positive, default=8)
    add("--device", help="default: cuda where there is one, else cpu")
    add("--dtype", help="of the weights; default: bfloat16 on a GPU, else float32")
    harness = parser.add_argument_group("h4, eq_bench: by lm-eval, the extra [eval]")
    harness.add_argument("--apply_chat_template", action="store_true", help="ask in the model's chat format")
    harness.add_argument("--limit", type=_positive, help="only the first N documents of a task: no result, a try")
    harness.add_argument("--task_folder", help="YAML files of lm-eval tasks, instead of lm-eval's own")
    dialogue = parser.add_argument_group("mt_bench")
    dialogue.add_argument("--questions", type=Path, help="FastChat's question.jsonl")
    dialogue.add_argument("--generator", choices=("transformers", "vllm"), default="transformers")
    dialogue.add_argument("--vllm_python", help="interpreter of an environment that has vLLM")
    dialogue.add_argument("--max_new_tokens", type=_positive, default=1024)
    dialogue.add_argument("--judge_url", help="an endpoint of OpenAI's chat format, as http://localhost:8000/v1")
    dialogue.add_argument("--judge_model", help="its name there")
    dialogue.add_argument("--judge_key_env", metavar="NAME", help="environment variable that holds the key")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is no number from 1 on")
    return number
