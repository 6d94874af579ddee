"""Rank 4: MT-Bench over the models of a run: answers, ratings and a table in a folder."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sdpo_lightning.evaluation_models import EvaluatedModel
from sdpo_lightning.files import file_digest, write_json
from sdpo_lightning.generation import Generator
from sdpo_lightning.ledger import set_aside
from sdpo_lightning.mt_bench import (
    Row,
    Score,
    answer_questions,
    rate,
    rating_jobs,
    rating_key,
    read_lines,
    read_questions,
    score,
    write_lines,
)
from sdpo_lightning.publishing import write_text

log = logging.getLogger(__name__)


def run_mt_bench(
    folder: Path,
    models: Sequence[EvaluatedModel],
    questions_file: Path,
    generator: Callable[[EvaluatedModel], Generator],
    max_new_tokens: int,
    settings: Mapping[str, Any],
    judge: Generator | None,
) -> str:
    """Have all models answer and, where there is a judge, be rated; leaves FastChat's files and a table.

    What stands in the folder is kept: answers of the same model, questions and settings, and their ratings.

    Args:
        folder: of the files.
        models: that answer.
        questions_file: FastChat's `question.jsonl`.
        generator: what answers for a model.
        max_new_tokens: most tokens of an answer.
        settings: that answers depend on, for `answers.json`.
        judge: rates; None leaves the answers unrated.

    Returns:
        The table in Markdown, or what to do next where there is no judge.
    """
    questions = read_questions(questions_file)
    made = folder / "answers.json"
    given = {"questions": file_digest(questions_file), "max_new_tokens": max_new_tokens, **settings}
    known = {row["model"]: row for row in read_lines(made)}
    answers: dict[str, list[Row]] = {}
    for model in models:
        path = folder / "model_answer" / f"{model.label}.jsonl"
        entry = {"model": model.label, "sha256": model.sha256, "settings": given}
        if path.exists() and known.get(model.label) != entry:
            log.warning("%s has answers of another model or other settings: moved to %s", path, folder / "stale")
            set_aside(folder, path)
        if not path.exists():
            with generator(model) as answering:
                write_lines(path, answer_questions(questions, answering, model.label, max_new_tokens))
            known[model.label] = entry
            write_lines(made, list(known.values()))
        answers[model.label] = read_lines(path)
        if cut := sum(row.get("cut_turns", 0) for row in answers[model.label]):
            log.warning("%s: %d answers are cut off at %d tokens", model.label, cut, max_new_tokens)
    if judge is None:
        return f"answers: {folder / 'model_answer'}; give `--judge_url` and `--judge_model` to have them rated\n"
    path = folder / "model_judgment" / f"{re.sub(r'[^A-Za-z0-9._-]', '-', judge.model_name).lstrip('.')}_single.jsonl"
    rows = read_lines(path)
    scores = {}
    for label, said in answers.items():
        jobs = rating_jobs(questions, said, judge.model_name)
        done = {rating_key(row) for row in rows}
        for part in rate([job for job in jobs if job.key not in done], judge):
            rows += part
            write_lines(path, rows)
        wanted = {job.key for job in jobs}
        scores[label] = score([row for row in rows if rating_key(row) in wanted])
    return _write_table(folder, scores, judge.model_name, given)


def _write_table(folder: Path, scores: Mapping[str, Score], judge: str, settings: Mapping[str, Any]) -> str:
    rows = [{"model": label, **asdict(found)} for label, found in scores.items()]
    write_json(folder / "mt_bench.json", {"judge": judge, "settings": dict(settings), "rows": rows})
    count = max(len(found.turns) for found in scores.values())
    heads = ["model", *(f"turn {turn + 1}" for turn in range(count)), "MT-Bench", "unreadable"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for label, found in scores.items():
        cells = [_cell(found.turns[turn] if turn < len(found.turns) else None) for turn in range(count)]
        error = "" if found.standard_error is None else f" ± {found.standard_error:.2f}"
        unreadable = f"{found.unparsable} of {found.ratings}"
        lines.append("| " + " | ".join([label, *cells, _cell(found.mean) + error, unreadable]) + " |")
    lines += ["", f"- value ± standard error over questions; judge: {judge}, with a prompt of sdpo_lightning's own"]
    text = "\n".join(lines) + "\n"
    write_text(folder / "mt_bench.md", text)
    return text


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
