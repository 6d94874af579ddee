"""Presets: two local rows of each schema, and the table of docs/datasets.md."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import datasets
import pytest
from helpers import write_jsonl

from sdpo_lightning import PreferenceSource
from sdpo_lightning.data.presets import PRESETS
from sdpo_lightning.data.sources import load_source

ROOT = Path(__file__).resolve().parent.parent
Row = dict[str, Any]


def said(*texts: str) -> list[Row]:
    return [{"role": "assistant" if n % 2 else "user", "content": text} for n, text in enumerate(texts)]


def binarized(**more: Any) -> list[Row]:
    return [{"prompt": "q", "chosen": said("q", "y"), "rejected": said("q", "n"), **more}]


def hh(*turns: str) -> str:
    return "".join(f"\n\n{'Assistant' if n % 2 else 'Human'}: {text}" for n, text in enumerate(turns))


TALK = ([said("q")[0]], said("q", "y")[1:], said("q", "n")[1:])
SYSTEM = [{"role": "system", "content": "s"}]
# Rows as they stand on the hub (columns beyond those that are read included), and what becomes of them.
SCHEMAS: dict[str, tuple[list[Row], list[tuple[Any, Any, Any]]]] = {
    "hh_rlhf": (
        [{"chosen": hh("a", "b", "q", "y"), "rejected": hh("a", "b", "q", "n")}],
        [(hh("a", "b", "q") + "\n\nAssistant:", " y", " n")],
    ),
    "orca_dpo_pairs": (
        [
            {"system": "s", "question": "q", "chosen": "y", "rejected": "n"},
            {"system": "", "question": "q", "chosen": "y", "rejected": "n"},
        ],
        [(SYSTEM + TALK[0], *TALK[1:]), TALK],
    ),
    "distilabel_orca": (
        [{"system": "s", "input": "q", "chosen": "y", "rejected": "n", "status": "tie", "chosen_score": 7.0}],
        [(SYSTEM + TALK[0], *TALK[1:])],
    ),
    "ultrafeedback_binarized": (
        binarized(prompt_id="1", messages=said("q", "y"), score_chosen=8.0, score_rejected=2.0),
        [TALK],
    ),
    "ultrafeedback_binarized_cleaned": (binarized(prompt_id="1", messages=said("q", "y"), source="flan"), [TALK]),
    "ultrafeedback_argilla": (binarized(source="flan", **{"chosen-rating": 5.0, "chosen-model": "m"}), [TALK]),
    "ultrafeedback_rated": (
        [
            {
                "instruction": "q",
                "completions": [{"response": text, "overall_score": s, "model": "m"} for text, s in ("a3", "y9", "n1")],
            }
        ],
        [("q", "y", "n")],
    ),
    "capybara": (
        [{"prompt": "x", "chosen": said("a", "b", "q", "y"), "rejected": said("a", "b", "q", "n"), "conversation": []}],
        [(said("a", "b", "q"), *TALK[1:])],
    ),
    "helpsteer3": (
        [
            {"domain": "d", "context": said("q"), "response1": "y", "response2": "n", "overall_preference": -2},
            {"domain": "d", "context": said("q"), "response1": "n", "response2": "y", "overall_preference": 1},
            {"domain": "d", "context": said("q"), "response1": "n", "response2": "y", "overall_preference": 0},
        ],
        [TALK, TALK],
    ),
    "tulu_preference_mix": (binarized(id="1", source="s"), [TALK]),
    "skywork_preference": ([{"chosen": said("q", "y"), "rejected": said("q", "n"), "source": "s"}], [TALK]),
    "nectar": (
        [{"prompt": "q", "answers": [{"answer": text, "rank": rank} for text, rank in ("a2", "n3", "y1")]}],
        [("q", "y", "n")],
    ),
    "pku_safe_rlhf": (
        [{"prompt": "q", "response_0": "n", "response_1": "y", "better_response_id": 1, "safer_response_id": 0}],
        [("q", "y", "n")],
    ),
}  # fmt: skip


def load(preset: str, path: str) -> list[tuple[Any, Any, Any]]:
    loaded = load_source(PreferenceSource("x", path, preset=preset))
    assert set(loaded.dropped) <= {"tied"}
    return [(row["prompt"], row["chosen"], row["rejected"]) for row in loaded.rows]


def test_every_preset_has_rows_here() -> None:
    assert set(SCHEMAS) == set(PRESETS)


@pytest.mark.parametrize("preset", SCHEMAS)
def test_rows_of_the_schema_become_pairs(preset: str, tmp_path: Path) -> None:
    rows, expected = SCHEMAS[preset]
    assert load(preset, str(write_jsonl(tmp_path / "rows.jsonl", rows))) == expected
    # In Arrow, as from the hub.
    folder = tmp_path / "saved"
    split = PRESETS[preset].split
    datasets.DatasetDict({split: datasets.Dataset.from_list(rows)}).save_to_disk(folder)
    assert load(preset, str(folder)) == expected


@pytest.mark.parametrize("preset", PRESETS)
def test_the_hub_is_asked_for_name_and_split(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(path: str, split: str) -> datasets.Dataset:
        asked.append((path, split))
        return datasets.Dataset.from_list(SCHEMAS[preset][0])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(load_source(PreferenceSource("x", preset=preset)).rows) == len(SCHEMAS[preset][1])
    assert asked == [(PRESETS[preset].path, PRESETS[preset].split)]


def test_keys_of_the_user_win_one_by_one() -> None:
    source = PreferenceSource("x", "mine.jsonl", "test", {"prompt": "q"}, preset="orca_dpo_pairs")
    assert (source.path, source.split, source.columns) == ("mine.jsonl", "test", {"system": "system", "prompt": "q"})
    assert PRESETS["orca_dpo_pairs"].columns["prompt"] == "question"
    plain = PreferenceSource("x", preset="hh_rlhf")
    assert (plain.split, plain.columns) == ("train", None)


def test_the_table_of_the_docs_is_that_of_the_code() -> None:
    text = (ROOT / "docs" / "datasets.md").read_text()
    found = re.findall(r"^\| `(\w+)` \| `([^`]+)` \| `(\w+)` \| ([^|]+) \|", text, re.M)
    written = {name: (path, split, columns) for name, path, split, columns in found}
    assert written == {
        name: (p.path, p.split, ", ".join(f"{key}: {value}" for key, value in p.columns.items()) or "by name")
        for name, p in PRESETS.items()
    }
