"""MT-Bench: questions, dialogues, FastChat's files, ratings by an endpoint of this machine."""

import json
import math
from pathlib import Path

import pytest
from chat_server import chat_server
from helpers import make_rows, write_jsonl
from runs import fit

from sdpo_lightning import PreferenceSource
from sdpo_lightning.cli import main
from sdpo_lightning.generation import Answer, Generator, Sampling
from sdpo_lightning.mt_bench import (
    UNPARSABLE,
    Question,
    answer_questions,
    judge_prompt,
    rating_jobs,
    read_questions,
    read_rating,
    score,
)
from sdpo_lightning.types import ConfigurationError

ROWS = [
    {"question_id": 81, "category": "writing", "turns": ["w1 w2", "w3"]},
    {"question_id": 101, "category": "math", "turns": ["w4", "w5 w6"], "reference": ["right-one", "right-two"]},
    {"question_id": 131, "category": "stem", "turns": ["w9 w10", "w11"]},
]


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")


class Echo(Generator):
    """Says what it was asked and how."""

    def __init__(self):
        self.asked: list[tuple[float, list[str]]] = []

    @property
    def model_name(self) -> str:
        return "echo"

    def generate(self, prompts, sampling: Sampling):
        self.asked.append((sampling.temperature, [prompt[-1]["content"] for prompt in prompts]))
        said = [
            f"{len(prompt)} {prompt[-1]['content']} after {prompt[-2]['content']}"
            if len(prompt) > 1
            else f"1 {prompt[0]['content']}"
            for prompt in prompts
        ]
        return [[Answer(text, finished="w9" not in text)] for text in said]


def test_questions_are_read_and_other_lines_named(tmp_path):
    questions = read_questions(write_jsonl(tmp_path / "q.jsonl", ROWS))
    assert questions[1] == Question(101, "math", ("w4", "w5 w6"), ("right-one", "right-two"))
    assert [question.question_id for question in questions] == [81, 101, 131]
    for bad in ({"turns": ["a"]}, {"question_id": 1, "turns": []}, {"question_id": 1, "turns": [1]}, ROWS[0]):
        with pytest.raises(ConfigurationError, match="line 4"):
            read_questions(write_jsonl(tmp_path / "q.jsonl", [*ROWS, bad]))
    (tmp_path / "q.jsonl").write_text("\n")
    with pytest.raises(ConfigurationError, match="is empty"):
        read_questions(tmp_path / "q.jsonl")
    with pytest.raises(ConfigurationError, match="question.jsonl"):
        read_questions(tmp_path / "none.jsonl")


def test_the_second_turn_follows_the_first_answer_at_the_category_s_temperature(tmp_path):
    questions, echo = read_questions(write_jsonl(tmp_path / "q.jsonl", ROWS)), Echo()
    rows = answer_questions(questions, echo, "M_1", 32)
    assert echo.asked == [
        (0.0, ["w4"]), (0.1, ["w9 w10"]), (0.7, ["w1 w2"]), (0.0, ["w5 w6"]), (0.1, ["w11"]), (0.7, ["w3"]),
    ]  # fmt: skip
    assert [row["question_id"] for row in rows] == [81, 101, 131]
    # Three messages: user, assistant, user.
    assert rows[0]["choices"] == [{"index": 0, "turns": ["1 w1 w2", "3 w3 after 1 w1 w2"]}]
    assert [row["cut_turns"] for row in rows] == [0, 0, 2]
    assert {"question_id", "answer_id", "model_id", "choices", "tstamp"} <= rows[0].keys()
    assert len({row["answer_id"] for row in rows}) == 3


def test_the_judge_sees_the_dialogue_up_to_the_graded_answer_and_the_reference():
    question = Question(101, "math", ("first?", "second?"), ("right one", "right two"))
    first, second = (judge_prompt(question, ["said one", "said two"], turn)[1]["content"] for turn in (0, 1))
    assert all(text in first for text in ("first?", "right one", "said one"))
    assert not any(text in first for text in ("second?", "right two", "said two"))
    order = [second.index(text) for text in ("first?", "right one", "said one", "second?", "right two", "said two")]
    assert order == sorted(order) and second.count("grade this one") == 1
    with pytest.raises(ConfigurationError, match="has 2 turns and 1 answers"):
        rating_jobs([question], [{"question_id": 101, "model_id": "m", "choices": [{"turns": ["one"]}]}], "j")


@pytest.mark.parametrize(
    ("text", "rating"),
    [
        ("Good. Grade: [[7]]", 7),
        ("[[ 8.5 ]]", 8.5),
        ("Not [[3]] but [[9]]", 9),
        ("[[10]]", 10),
        ("Rating: 7", UNPARSABLE),
        ("[7]", UNPARSABLE),
        ("[[0]]", UNPARSABLE),
        ("[[11]]", UNPARSABLE),
        ("[[n]]", UNPARSABLE),
        ("", UNPARSABLE),
    ],
)
def test_ratings_are_read_or_marked(text, rating):
    assert read_rating(text) == rating


def test_means_and_the_error_over_questions_by_hand():
    given = {1: (8, 6), 2: (4, UNPARSABLE), 3: (9, 5)}
    rows = [{"question_id": q, "turn": t, "score": s} for q, pair in given.items() for t, s in enumerate(pair, 1)]
    found = score(rows)
    # Turn 1: (8 + 4 + 9) / 3 = 7; turn 2: (6 + 5) / 2 = 5.5; all: 32 / 5 = 6.4.
    assert found.turns == [7.0, 5.5] and found.mean == 6.4
    assert (found.unparsable, found.ratings) == (1, 6)
    # Residuals s - r m: 14 - 12.8 = 1.2; 4 - 6.4 = -2.4; 14 - 12.8 = 1.2. Squares 1.44 + 5.76 + 1.44 = 8.64.
    assert found.standard_error == pytest.approx(math.sqrt(3 / 2 * 8.64) / 5)
    nothing = score([{"question_id": 1, "turn": 1, "score": UNPARSABLE}])
    assert (nothing.mean, nothing.turns, nothing.standard_error) == (None, [None], None)


@pytest.fixture
def run(tiny_model_dir, tmp_path) -> Path:
    source = PreferenceSource("a", str(write_jsonl(tmp_path / "a.jsonl", make_rows(4, 0))))
    fit(tmp_path / "run", tiny_model_dir, [source])
    (tmp_path / "run" / "config.yaml").write_text(f"model: {{model_name_or_path: {tiny_model_dir}}}\n")
    return tmp_path / "run"


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_models_of_a_run_answer_and_are_rated(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("JUDGE_KEY", "a-key-of-the-judge")
    questions = write_jsonl(tmp_path / "q.jsonl", ROWS)
    words = ["evaluate", str(run), "--suite", "mt_bench", "--questions", str(questions), "--max_new_tokens", "4"]
    words += ["--device", "cpu"]
    main(words)
    assert "--judge_url" in capsys.readouterr().out
    folder = run / "evaluation" / "mt_bench"
    answers = {label: lines(folder / "model_answer" / f"{label}.jsonl") for label in ("M_0", "M_1")}
    assert all([len(row["choices"][0]["turns"]) for row in rows] == [2, 2, 2] for rows in answers.values())

    def reply(body):
        # Turn 2 has two answers in it; the one about math can't be read there.
        text = body["messages"][1]["content"]
        turn = text.count("=== Assistant")
        return "no grade" if turn == 2 and "right-one" in text else f"[[{9 - turn}]]"

    with chat_server(reply) as server:
        judged = [*words, "--judge_url", server.url, "--judge_model", "org/judge", "--judge_key_env", "JUDGE_KEY"]
        main(judged)
        assert len(server.bodies) == 2 * 3 * 2 and {body["temperature"] for body in server.bodies} == {0.0}
        # The same again asks for nothing: neither answers nor ratings.
        main(judged)
        assert len(server.bodies) == 12
        # A rating that is lost is asked for, and only that one.
        path = folder / "model_judgment" / "org-judge_single.jsonl"
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
        main(judged)
        assert len(server.bodies) == 13
    assert {label: lines(folder / "model_answer" / f"{label}.jsonl") for label in answers} == answers
    rows = lines(path)
    assert len(rows) == 12 and {row["judge"] for row in rows} == {"org/judge"}
    assert sorted(row["score"] for row in rows if row["model"] == "M_1") == [-1, 7, 7, 8, 8, 8]
    table = json.loads((folder / "mt_bench.json").read_text())
    # (3 x 8 + 2 x 7) / 5 = 7.6.
    assert [(row["model"], row["turns"], row["mean"], row["unparsable"]) for row in table["rows"]] == [
        ("M_0", [8.0, 7.0], 7.6, 1),
        ("M_1", [8.0, 7.0], 7.6, 1),
    ]
    assert "| M_1 | 8.00 | 7.00 | 7.60 ± " in (folder / "mt_bench.md").read_text()
    written = [
        path.read_text() for path in run.rglob("*") if path.is_file() and path.suffix in (".json", ".jsonl", ".md")
    ]
    assert written and not any("a-key-of-the-judge" in text for text in written)

    # Other settings: new answers, the old ones set aside.
    main([*words, "--max_new_tokens", "3", "--only", "M_1"])
    assert lines(folder / "stale" / "M_1.jsonl") == answers["M_1"]
    assert lines(folder / "model_answer" / "M_1.jsonl")[0]["tstamp"] != answers["M_1"][0]["tstamp"]
