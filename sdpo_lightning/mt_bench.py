"""Rank 2: MT-Bench (Zheng et al. 2023, arXiv 2306.05685): questions, answers and ratings in FastChat's files.

The questions are the user's file, the wording of the judge's instruction is ours: ratings are comparable with each
other, not with published ones.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdpo_lightning.generation import Generator, Message, Prompt, Sampling
from sdpo_lightning.publishing import write_text
from sdpo_lightning.types import ConfigurationError

Row = dict[str, Any]

# By category, as FastChat draws them; others at `DEFAULT_TEMPERATURE`.
TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}
DEFAULT_TEMPERATURE = 0.7
# FastChat's mark of a rating that can't be read.
UNPARSABLE = -1
_AT_ONCE = 16
_JUDGMENT_TOKENS = 2048
_RATING = re.compile(r"\[\[\s*(\d+(?:\.\d+)?)\s*\]\]")

JUDGE = (
    "You grade the answers of an AI assistant. Weigh whether the last answer does what the user asked, is correct, "
    "goes as deep as the question needs, and is clear. How long it is counts neither for nor against it. Explain "
    "your grade in a few sentences, then end with the grade itself, a number from 1 (useless) to 10 (flawless) in "
    "double square brackets, as in: Grade: [[6]]"
)


@dataclass(frozen=True)
class Question:
    """One line of FastChat's `question.jsonl`.

    Attributes:
        question_id: of the question.
        category: decides the temperature.
        turns: what the user says, one after the other.
        reference: right answers, turn by turn, for the judge; may be empty.
    """

    question_id: int | str
    category: str
    turns: tuple[str, ...]
    reference: tuple[str, ...] = ()


def read_questions(path: Path) -> list[Question]:
    """Read a file of questions.

    Args:
        path: JSON lines with `question_id`, `category`, `turns`, perhaps `reference`.

    Raises:
        ConfigurationError: no such file, or a line of another form.
    """
    if not path.is_file():
        raise ConfigurationError(f"`--questions`: there is no file {str(path)!r}; give MT-Bench's question.jsonl")
    found: dict[int | str, Question] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            turns, reference = row["turns"], row.get("reference") or []
            question = Question(row["question_id"], row.get("category", ""), tuple(turns), tuple(reference))
            fits = bool(turns) and all(isinstance(text, str) for text in (*turns, *reference))
        except (ValueError, KeyError, TypeError, AttributeError):
            fits = False
        if not fits or question.question_id in found:
            raise ConfigurationError(
                f"{path}, line {number}: expected an object with its own `question_id` and `turns`, a list of texts"
            )
        found[question.question_id] = question
    if not found:
        raise ConfigurationError(f"`--questions`: {path} is empty")
    return list(found.values())


def answer_questions(
    questions: Sequence[Question], generator: Generator, model_id: str, max_new_tokens: int, seed: int = 0
) -> list[Row]:
    """A model's answers to all turns, as lines of FastChat's `model_answer/MODEL.jsonl`.

    Args:
        questions: of the benchmark.
        generator: the model.
        model_id: name in the lines.
        max_new_tokens: most tokens of an answer.
        seed: of the draws.
    """
    said: dict[int | str, list[str]] = {question.question_id: [] for question in questions}
    cut = dict.fromkeys(said, 0)
    for turn in range(max(len(question.turns) for question in questions)):
        asked = [question for question in questions if turn < len(question.turns)]
        for temperature in sorted({_temperature(question) for question in asked}):
            group = [question for question in asked if _temperature(question) == temperature]
            prompts: list[Prompt] = [_dialogue(question, said[question.question_id]) for question in group]
            for question, answers in zip(
                group, generator.generate(prompts, Sampling(max_new_tokens, temperature, seed=seed + turn)), strict=True
            ):
                said[question.question_id].append(answers[0].text.strip())
                cut[question.question_id] += not answers[0].finished
    return [
        {
            "question_id": key,
            "answer_id": _digest(model_id, key, turns),
            "model_id": model_id,
            "choices": [{"index": 0, "turns": turns}],
            "tstamp": time.time(),
            "cut_turns": cut[key],
        }
        for key, turns in said.items()
    ]


def _temperature(question: Question) -> float:
    return TEMPERATURES.get(question.category, DEFAULT_TEMPERATURE)


def _dialogue(question: Question, answers: Sequence[str]) -> list[Message]:
    messages: list[Message] = []
    for turn, text in enumerate(question.turns[: len(answers) + 1]):
        messages.append({"role": "user", "content": text})
        if turn < len(answers):
            messages.append({"role": "assistant", "content": answers[turn]})
    return messages


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:22]


def judge_prompt(question: Question, answers: Sequence[str], turn: int) -> list[Message]:
    """What the judge is asked about one answer, the turns before it in view.

    Args:
        question: that was asked.
        answers: to its turns.
        turn: of the answer that is graded, from 0.
    """
    parts = []
    for place in range(turn + 1):
        parts.append(f"=== User, turn {place + 1} ===\n{question.turns[place]}")
        if place < len(question.reference):
            parts.append(f"=== A right answer to turn {place + 1}, for comparison ===\n{question.reference[place]}")
        last = " (grade this one)" if place == turn else ""
        parts.append(f"=== Assistant, turn {place + 1}{last} ===\n{answers[place]}")
    parts.append("=== End ===\nGrade the assistant's last answer.")
    return [{"role": "system", "content": JUDGE}, {"role": "user", "content": "\n\n".join(parts)}]


def read_rating(text: str) -> float:
    """The last `[[n]]` of a judgment, 1 to 10; `UNPARSABLE` where there is none."""
    found = _RATING.findall(text)
    rating = float(found[-1]) if found else UNPARSABLE
    return rating if 1 <= rating <= 10 else UNPARSABLE


@dataclass(frozen=True)
class Job:
    """One rating that is to be asked for.

    Attributes:
        entry: what is known of its line in FastChat's `model_judgment/JUDGE_single.jsonl`.
        prompt: for the judge.
    """

    entry: Row
    prompt: list[Message]

    @property
    def key(self) -> tuple[Any, ...]:
        """As `rating_key` of its line."""
        return rating_key(self.entry)


def rating_key(row: Row) -> tuple[Any, ...]:
    """What makes a rating the same: judge, model and the judge's whole question, the answer in it."""
    return row["judge"], row["model"], row["question_id"], row["turn"], _digest(row["user_prompt"])


def rating_jobs(questions: Sequence[Question], answers: Sequence[Row], judge: str) -> list[Job]:
    """A rating a turn.

    Args:
        questions: of the benchmark.
        answers: lines of `answer_questions`.
        judge: its name.

    Raises:
        ConfigurationError: questions without an answer to each turn.
    """
    said = {row["question_id"]: row for row in answers}
    jobs = []
    for question in questions:
        row = said.get(question.question_id)
        turns = row["choices"][0]["turns"] if row is not None else []
        if row is None or len(turns) != len(question.turns):
            raise ConfigurationError(
                f"question {question.question_id!r} has {len(question.turns)} turns and {len(turns)} answers; remove "
                "the file of answers to have them made again"
            )
        for turn in range(len(turns)):
            prompt = judge_prompt(question, turns, turn)
            entry = {
                "question_id": question.question_id,
                "model": row["model_id"],
                "judge": judge,
                "turn": turn + 1,
                "user_prompt": prompt[1]["content"],
            }
            jobs.append(Job(entry, prompt))
    return jobs


def rate(jobs: Sequence[Job], judge: Generator) -> Iterator[list[Row]]:
    """Ratings, some at a time, so that little is lost where the endpoint fails.

    Args:
        jobs: that are to be done.
        judge: rates.
    """
    for start in range(0, len(jobs), _AT_ONCE):
        part = jobs[start : start + _AT_ONCE]
        replies = judge.generate([job.prompt for job in part], Sampling(_JUDGMENT_TOKENS))
        texts = [reply[0].text for reply in replies]
        yield [
            job.entry | {"judgment": text, "score": read_rating(text), "tstamp": time.time()}
            for job, text in zip(part, texts, strict=True)
        ]


@dataclass(frozen=True)
class Score:
    """A model's ratings.

    Attributes:
        turns: mean rating of turn 1, 2, ...; None where none can be read.
        mean: of all ratings that can be read.
        standard_error: of the mean, by question: ratings of one dialogue belong together.
        unparsable: ratings that can't be read, which count in no mean.
        ratings: asked for.
    """

    turns: list[float | None]
    mean: float | None
    standard_error: float | None
    unparsable: int
    ratings: int


def score(rows: Sequence[Row]) -> Score:
    """Means over the ratings of one model by one judge.

    With n questions of m_q readable ratings that add up to s_q, the mean is r = sum s_q / sum m_q and its standard
    error that of a ratio, sqrt(n / (n - 1) * sum (s_q - r m_q)^2) / sum m_q.

    Args:
        rows: lines of `rate`.
    """
    readable = [row for row in rows if row["score"] != UNPARSABLE]
    by_question: dict[Any, list[float]] = {}
    for row in readable:
        by_question.setdefault(row["question_id"], []).append(row["score"])
    count = max((row["turn"] for row in rows), default=0)
    turns = [_mean([row["score"] for row in readable if row["turn"] == turn]) for turn in range(1, count + 1)]
    mean, n, error = _mean([row["score"] for row in readable]), len(by_question), None
    if mean is not None and n > 1:
        squares = sum((sum(own) - mean * len(own)) ** 2 for own in by_question.values())
        error = math.sqrt(n / (n - 1) * squares) / len(readable)
    return Score(turns, mean, error, len(rows) - len(readable), len(rows))


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def read_lines(path: Path) -> list[Row]:
    """Rows of a JSON-lines file; none where there is no file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def write_lines(path: Path, rows: Sequence[Row]) -> None:
    """Write a JSON-lines file that appears whole or not at all."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
