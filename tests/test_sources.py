"""Reading of preference sources: kinds of paths, forms of rows, refusals, drops by reason."""

from __future__ import annotations

import gzip
import json
import logging
import os
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, models
from transformers import AutoConfig, PreTrainedTokenizerFast

from sdpo_lightning.data.prepare import load_tokenizer
from sdpo_lightning.data.sources import PreferenceSource, SourceRows, load_source
from sdpo_lightning.types import ConfigurationError

SHARED = Path(os.environ.get("SDPO_SHARED", "../shared"))
if not SHARED.is_absolute():
    SHARED = (Path(__file__).parent.parent / SHARED).resolve()
DATA = SHARED / "data"
needs_shared = pytest.mark.skipif(not DATA.is_dir(), reason=f"no shared data at {DATA} (SDPO_SHARED)")

Row = dict[str, Any]


def string_row(i: int) -> Row:
    return {"prompt": f"question {i}", "chosen": f" good {i}", "rejected": f" bad {i}"}


def user(text: str) -> Row:
    return {"role": "user", "content": text}


def assistant(text: str) -> Row:
    return {"role": "assistant", "content": text}


def write_jsonl(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def load_rows(tmp_path: Path, *rows: Any, columns: dict[str, str] | None = None) -> SourceRows:
    path = write_jsonl(tmp_path / "rows.jsonl", list(rows))
    return load_source(PreferenceSource("x", path, columns=columns))


def texts(loaded: SourceRows) -> list[Row]:
    return [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in loaded.rows]


def refusal(path: Path | str, **settings: Any) -> str:
    """The message with which a source is refused, checked to be one line that names source and setting."""
    with pytest.raises(ConfigurationError) as caught:
        load_source(PreferenceSource("x", str(path), **settings))
    message = str(caught.value)
    assert "\n" not in message
    assert "source 'x'" in message
    assert "`data.sources[x]." in message
    return message


# ---- the declaration of a source


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "a/b", "a b", "é", "a\n"])
def test_names_that_are_no_folder_names_are_refused(name: str) -> None:
    with pytest.raises(ConfigurationError, match="folder's name"):
        PreferenceSource(name, "a.jsonl")


def test_a_plain_name_is_accepted() -> None:
    assert PreferenceSource("Ultra_feedback-1.0", "a.jsonl").split == "train"


def test_limit_and_columns_are_checked() -> None:
    with pytest.raises(ConfigurationError, match=r"data.sources\[x\].limit` is 0"):
        PreferenceSource("x", "a.jsonl", limit=0)
    with pytest.raises(ConfigurationError, match=r"'question'.*prompt.*chosen.*rejected.*system"):
        PreferenceSource("x", "a.jsonl", columns={"question": "prompt"})


# ---- kinds of paths


def make_path(kind: str, folder: Path, rows: list[Row]) -> str:
    path = folder / f"rows.{kind}"
    if kind == "jsonl":
        write_jsonl(path, rows)
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif kind == "folder":
        datasets.Dataset.from_list(rows).save_to_disk(path)
    else:
        empty = datasets.Dataset.from_list([{"other": 1}])
        datasets.DatasetDict({"train": datasets.Dataset.from_list(rows), "test": empty}).save_to_disk(path)
    return str(path)


KINDS = ["jsonl", "jsonl.gz", "parquet", "folder", "dict_folder"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_path_gives_the_same_strings(kind: str, tmp_path: Path) -> None:
    rows = [{**string_row(i), "score": i} for i in range(4)]
    loaded = load_source(PreferenceSource("x", make_path(kind, tmp_path, rows), limit=3), source_index=2)
    assert texts(loaded) == [string_row(i) for i in range(3)]
    assert loaded.rows["pair_id"][:] == [(2 << 40) + i for i in range(3)]
    assert loaded.rows.features["pair_id"] == datasets.Value("int64")
    assert loaded.rows.column_names == ["pair_id", "prompt", "chosen", "rejected"]
    assert (loaded.total, loaded.dropped, loaded.conversational) == (3, {}, False)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_path_gives_the_same_messages(kind: str, tmp_path: Path) -> None:
    row = {"prompt": [user("q")], "chosen": [assistant("good")], "rejected": [assistant("bad")]}
    noisy = {key: [{**message, "weight": 1.0} for message in value] for key, value in row.items()}
    loaded = load_source(PreferenceSource("x", make_path(kind, tmp_path, [noisy])))
    assert texts(loaded) == [row]
    assert loaded.conversational


def test_a_hub_name_goes_to_the_hub_with_its_split(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(path: str, split: str) -> datasets.Dataset:
        asked.append((path, split))
        return datasets.Dataset.from_list([string_row(i) for i in range(3)])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    loaded = load_source(PreferenceSource("x", "some-org/some-pairs", split="test_prefs", limit=2))
    assert asked == [("some-org/some-pairs", "test_prefs")]
    assert texts(loaded) == [string_row(0), string_row(1)]


def test_an_error_of_the_hub_is_one_line_with_a_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(path: str, split: str) -> datasets.Dataset:
        raise RuntimeError("no such data set\nand more")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    message = refusal("some-org/some-pairs")
    assert "RuntimeError: no such data set" in message
    assert "network" in message


@pytest.mark.parametrize(
    "path",
    ["pairs.jsonl", "org/pairs.json", "./pairs", "/nowhere/pairs", "~/nowhere/pairs", "~no_one/x", "a/b/c"],
)
def test_what_looks_like_a_local_path_never_goes_to_the_hub(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked the hub"))
    assert "not found" in refusal(path)


# ---- files that are refused


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("empty.jsonl", b"", "empty"),
        ("blank.jsonl", b"\n \r\n\n", "0 rows"),
        ("empty.jsonl.gz", gzip.compress(b"", mtime=0), "0 rows"),
        ("latin1.jsonl", b'{"prompt": "a"}\n{"prompt": "\xe9"}\n', "UTF-8 (line 2)"),
        ("pointer.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git-LFS"),
        ("pointer.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git-LFS"),
        ("plain.jsonl.gz", b'{"prompt": "a"}\n', "BadGzipFile"),
        ("cut.jsonl.gz", gzip.compress(bytes(range(256)) * 9, mtime=0)[:-40], "can't be read"),
        ("damaged.jsonl.gz", gzip.compress(b"{}\n", mtime=0)[:10] + b"\xff" * 30, "can't be read (error: Error -3"),
        ("broken.parquet", b"PAR1 and no more", "can't be read"),
        ("array.json", b"[]", "one JSON object a line"),
        ("table.csv", b"prompt,chosen\n", "unknown kind '.csv'"),
        ("noending", b"{}", "unknown kind ''"),
    ],
)
def test_files_that_cannot_be_read_are_refused(
    tmp_path: Path, name: str, content: bytes, expected: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert expected in refusal(path)


def test_tables_without_rows_and_other_folders_are_refused(tmp_path: Path) -> None:
    table = pa.table({name: pa.array([], pa.string()) for name in ("prompt", "chosen", "rejected")})
    pq.write_table(table, tmp_path / "none.parquet")
    assert "0 rows" in refusal(tmp_path / "none.parquet")
    assert "save_to_disk" in refusal(tmp_path)


def test_a_split_that_is_not_there_is_refused_with_those_that_are(tmp_path: Path) -> None:
    path = make_path("dict_folder", tmp_path, [string_row(0)])
    message = refusal(path, split="val")
    assert "'train', 'test'" in message
    assert message.endswith("change `data.sources[x].split`")


@pytest.mark.parametrize("kind", KINDS)
def test_an_unknown_column_is_refused_with_those_that_are_there(kind: str, tmp_path: Path) -> None:
    path = make_path(kind, tmp_path, [{"question": "q", "answer": "a"}])
    message = refusal(path, columns={"prompt": "query"})
    assert "unknown column 'query', 'chosen', 'rejected'" in message
    assert "['question', 'answer']" in message


def test_a_column_in_one_row_is_enough(tmp_path: Path) -> None:
    row = string_row(0)
    loaded = load_rows(tmp_path, {"chosen": "c", "rejected": "r"}, row)
    assert texts(loaded) == [row]
    assert loaded.dropped == {"missing_prompt": 1}


def test_a_system_column_without_prompts_is_refused(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"sys": "s", "chosen": "c", "rejected": "r"}])
    assert "unknown column 'prompt'" in refusal(path, columns={"system": "sys"})


# ---- lines of a text file


def test_lines_end_at_newlines_only(tmp_path: Path) -> None:
    row = {"prompt": "a\u2028b\u2029c\x85d", "chosen": " good\x0b\x0c", "rejected": " bad\x1c"}
    path = tmp_path / "rows.jsonl"
    line = json.dumps(row, ensure_ascii=False)
    path.write_bytes(b"\xef\xbb\xbf" + line.encode() + b"\r\n\r\n" + line.encode())
    loaded = load_source(PreferenceSource("x", str(path)))
    assert texts(loaded) == [row, row]
    assert loaded.rows["pair_id"][:] == [0, 1]


def test_bad_lines_are_counted_and_placed_by_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    good = json.dumps(string_row(0))
    path.write_text(f'{good}\n\n{{"prompt": \n[1]\n"text"\n{"[" * 100_000}\n{good}\n')
    loaded = load_source(PreferenceSource("x", str(path)), source_index=1, first_row=1 << 39)
    assert loaded.dropped == {"invalid_json": 2, "not_an_object": 2}
    assert loaded.examples == {
        "invalid_json": [f"{path}:3", f"{path}:6"],
        "not_an_object": [f"{path}:4", f"{path}:5"],
    }
    # Rows 0 to 5 of the file; the blank line is none of them.
    assert loaded.rows["pair_id"][:] == [(1 << 40) + (1 << 39), (1 << 40) + (1 << 39) + 5]
    assert loaded.total == 6


def test_limit_counts_rows_before_any_is_dropped(tmp_path: Path) -> None:
    rows = [{**string_row(i), "chosen": ""} if i % 2 else string_row(i) for i in range(10)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    loaded = load_source(PreferenceSource("x", path, limit=5))
    assert (loaded.total, loaded.dropped) == (5, {"empty_chosen": 2})
    assert loaded.rows["pair_id"][:] == [0, 2, 4]


def test_the_held_out_file_is_read_in_place_of_the_other(tmp_path: Path) -> None:
    held_out = write_jsonl(tmp_path / "val.jsonl", [string_row(7)])
    source = PreferenceSource("x", write_jsonl(tmp_path / "a.jsonl", [string_row(0)]), val_path=held_out)
    assert texts(load_source(source, path=source.val_path)) == [string_row(7)]
    with pytest.raises(ConfigurationError, match=r"not found.*change `data.sources\[x\].val_path`"):
        load_source(source, path="gone.jsonl")


# ---- forms of rows


def test_whole_dialogues_beside_a_prompt_lose_it(tmp_path: Path) -> None:
    prompt = [user("a"), assistant("b"), user("c")]
    row = {"prompt": prompt, "chosen": [*prompt, assistant("y")], "rejected": [*prompt, assistant("n")]}
    assert texts(load_rows(tmp_path, row)) == [
        {"prompt": prompt, "chosen": [assistant("y")], "rejected": [assistant("n")]}
    ]


@pytest.mark.parametrize("whole", [True, False])
def test_a_string_prompt_beside_messages(tmp_path: Path, whole: bool) -> None:
    start = [user("q")] if whole else []
    row = {"prompt": "q", "chosen": [*start, assistant("y")], "rejected": [*start, assistant("n")]}
    assert texts(load_rows(tmp_path, row)) == [
        {"prompt": [user("q")], "chosen": [assistant("y")], "rejected": [assistant("n")]}
    ]


def test_completions_of_several_turns_start_and_end_with_the_assistant(tmp_path: Path) -> None:
    longer = [assistant("b"), user("c"), assistant("d")]
    row = {"prompt": [user("a")], "chosen": longer, "rejected": [assistant("n")]}
    open_end = {**row, "chosen": longer[:2]}
    wrong_start = {**row, "rejected": longer[1:]}
    answered = {**row, "prompt": [user("a"), assistant("b")]}
    loaded = load_rows(tmp_path, row, open_end, wrong_start, answered)
    assert texts(loaded) == [row]
    assert loaded.dropped == {"wrong_roles": 3}


def test_hh_strings_are_cut_after_the_last_shared_marker(tmp_path: Path) -> None:
    start = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    late = "\n\nHuman: a\n\nAssistant: b\n\nHuman: "
    loaded = load_rows(
        tmp_path,
        {"chosen": start + " yes", "rejected": start + " yonder"},
        # The sides part within the human's turn: the last marker that both share is the one before it.
        {"chosen": late + "c\n\nAssistant: d", "rejected": late + "e\n\nAssistant: f"},
        {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: d"},
        {"chosen": start + " one", "rejected": start + " two\n\nHuman: three"},
        {"chosen": start + " one", "rejected": start + " two  Human: no\n\nAssistant: three"},
        {"chosen": start, "rejected": start + " two"},
        {"chosen": start + " same", "rejected": start + " same"},
    )
    assert texts(loaded) == [
        {"prompt": start, "chosen": " yes", "rejected": " yonder"},
        {
            "prompt": "\n\nHuman: a\n\nAssistant:",
            "chosen": " b\n\nHuman: c\n\nAssistant: d",
            "rejected": " b\n\nHuman: e\n\nAssistant: f",
        },
    ]
    assert loaded.dropped == {"no_shared_prompt": 1, "wrong_roles": 2, "empty_chosen": 1, "identical": 1}


def test_dialogues_without_a_prompt_are_cut_before_an_assistant_turn(tmp_path: Path) -> None:
    start = [user("a"), assistant("b"), user("c")]
    yes, no = [assistant("y")], [assistant("n")]
    loaded = load_rows(
        tmp_path,
        {"chosen": start + yes, "rejected": start + no},
        {"chosen": [*start, *yes], "rejected": [*start[:2], user("e"), *no]},
        {"chosen": [user("a"), *yes], "rejected": [user("b"), *no]},
        {"chosen": yes, "rejected": no},
        {"chosen": [user("a"), *yes], "rejected": [user("a"), user("b"), *no]},
        {"chosen": start + yes, "rejected": start + yes},
        {"chosen": [], "rejected": start + yes},
    )
    assert texts(loaded) == [
        {"prompt": start, "chosen": yes, "rejected": no},
        {
            "prompt": [user("a")],
            "chosen": [assistant("b"), user("c"), *yes],
            "rejected": [assistant("b"), user("e"), *no],
        },
    ]
    assert loaded.dropped == {"no_shared_prompt": 4, "identical": 1}


def test_other_column_names(tmp_path: Path) -> None:
    row = {"question": "q", "good": "y", "rejected": "n", "prompt": 3, "system": "not asked for"}
    loaded = load_rows(tmp_path, row, columns={"prompt": "question", "chosen": "good"})
    assert texts(loaded) == [{"prompt": "q", "chosen": "y", "rejected": "n"}]


def test_a_system_column_makes_strings_conversational(tmp_path: Path) -> None:
    row = {"system": "be brief", "question": "q", "chosen": "y", "rejected": "n"}
    rows = [
        row,
        {**row, "system": ""},
        {**row, "system": None},
        {**row, "system": 1},
        {**row, "question": " "},
    ]
    loaded = load_rows(tmp_path, *rows, columns={"system": "system", "prompt": "question"})
    answers = {"chosen": [assistant("y")], "rejected": [assistant("n")]}
    system = {"role": "system", "content": "be brief"}
    assert texts(loaded) == [
        {"prompt": [system, user("q")], **answers},
        {"prompt": [user("q")], **answers},
        {"prompt": [user("q")], **answers},
    ]
    assert loaded.dropped == {"wrong_type": 1, "empty_prompt": 1}


def test_a_system_text_goes_before_messages_that_have_none(tmp_path: Path) -> None:
    system = {"role": "system", "content": "own"}
    answers = {"chosen": [assistant("y")], "rejected": [assistant("n")]}
    loaded = load_rows(
        tmp_path,
        {"s": "be brief", "prompt": [user("q")], **answers},
        {"s": "be brief", "prompt": [system, user("q")], **answers},
        columns={"system": "s"},
    )
    assert [row["prompt"][0]["content"] for row in loaded.rows] == ["be brief", "own"]
    assert [len(row["prompt"]) for row in loaded.rows] == [2, 2]


# ---- rows that are dropped

TALK: Row = {"prompt": [user("q")], "chosen": [assistant("y")], "rejected": [assistant("n")]}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"prompt": None}, "missing_prompt"),
        ({"chosen": None}, "missing_chosen"),
        ({"rejected": None}, "missing_rejected"),
        ({"chosen": True}, "wrong_type"),
        ({"chosen": 1}, "wrong_type"),
        ({"chosen": assistant("y")}, "wrong_type"),
        ({"chosen": "y"}, "wrong_type"),
        ({"chosen": "y", "rejected": "n"}, "wrong_type"),
        ({"chosen": [{"role": "assistant"}]}, "wrong_type"),
        ({"chosen": [{"content": "y"}]}, "wrong_type"),
        ({"chosen": [{"role": "assistant", "content": None}]}, "wrong_type"),
        ({"chosen": [{"role": "assistant", "content": [{"type": "text", "text": "y"}]}]}, "wrong_type"),
        ({"chosen": ["y"]}, "wrong_type"),
        ({"prompt": []}, "empty_prompt"),
        ({"prompt": [user(" \n")]}, "empty_prompt"),
        ({"chosen": []}, "empty_chosen"),
        ({"chosen": [assistant("\t")]}, "empty_chosen"),
        ({"rejected": [assistant("")]}, "empty_rejected"),
        ({"rejected": [user("n")]}, "wrong_roles"),
        ({"rejected": [assistant("y")]}, "identical"),
        ({"rejected": [assistant("half a pair \ud83d")]}, "invalid_unicode"),
        ({"prompt": "q", "chosen": "y", "rejected": "n"}, "other_form"),
    ],
)
def test_reasons_of_dropped_messages(tmp_path: Path, change: Row, reason: str) -> None:
    loaded = load_rows(tmp_path, TALK, {**TALK, **change})
    assert loaded.dropped == {reason: 1}
    assert loaded.examples == {reason: [f"{tmp_path / 'rows.jsonl'}:2"]}
    assert texts(loaded) == [TALK]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"prompt": " "}, "empty_prompt"),
        ({"chosen": ""}, "empty_chosen"),
        ({"rejected": "\n"}, "empty_rejected"),
        ({"rejected": " good 0"}, "identical"),
        ({"prompt": [user("q")]}, "wrong_type"),
        ({"prompt": {"text": "q"}}, "wrong_type"),
        ({"rejected": 2.5}, "wrong_type"),
        (TALK, "other_form"),
    ],
)
def test_reasons_of_dropped_strings(tmp_path: Path, change: Row, reason: str) -> None:
    loaded = load_rows(tmp_path, string_row(0), {**string_row(0), **change})
    assert loaded.dropped == {reason: 1}
    assert not loaded.conversational


def test_the_first_valid_row_decides_the_form(tmp_path: Path) -> None:
    loaded = load_rows(tmp_path, {**string_row(0), "chosen": ""}, TALK, string_row(1))
    assert loaded.conversational
    assert loaded.dropped == {"empty_chosen": 1, "other_form": 1}


def test_three_examples_are_kept(tmp_path: Path) -> None:
    bad = {**string_row(0), "chosen": ""}
    loaded = load_rows(tmp_path, *[bad] * 5, string_row(0))
    assert loaded.dropped == {"empty_chosen": 5}
    assert [place.rsplit(":", 1)[1] for place in loaded.examples["empty_chosen"]] == ["1", "2", "3"]


def test_a_bad_row_stops_the_run_if_asked(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [string_row(0), {**string_row(1), "chosen": ""}, {}])
    with pytest.raises(ConfigurationError, match=r"a\.jsonl:2: empty_chosen.*data\.on_bad_row"):
        load_source(PreferenceSource("x", path), on_bad_row="error")


def test_a_source_without_rows_is_refused_by_reason(tmp_path: Path) -> None:
    rows = [{**string_row(0), "chosen": ""}] * 3 + [{**string_row(0), "rejected": " good 0"}]
    message = refusal(write_jsonl(tmp_path / "a.jsonl", rows))
    assert "0 of 4 rows left" in message
    assert "3 empty_chosen (first at 1), 1 identical (first at 4)" in message


def test_a_file_without_objects_is_refused_by_reason_not_for_its_columns(tmp_path: Path) -> None:
    assert "2 not_an_object" in refusal(write_jsonl(tmp_path / "a.jsonl", [[string_row(0)], 1]))


@pytest.mark.parametrize(("rows", "level"), [(100, logging.INFO), (99, logging.WARNING)])
def test_more_than_one_percent_of_drops_warns(
    tmp_path: Path, rows: int, level: int, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="sdpo_lightning"):
        load_rows(tmp_path, *[string_row(i) for i in range(rows - 1)], {**string_row(0), "chosen": ""})
    assert [record.levelno for record in caplog.records] == [level]
    assert f"1 of {rows} rows" in caplog.text


def test_clean_sources_log_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="sdpo_lightning"):
        load_rows(tmp_path, string_row(0))
    assert caplog.records == []


# ---- real data

REAL = {  # pairs by SOURCES.md, whether conversational
    "hh_harmless": (1826, True),
    "pandalm": (578, False),
    "llmbar": (587, False),
    "lf_dpo_en_zh": (450, True),
    "alpaca_eval_weak": (1288, True),
    "alpaca_eval_strong": (1290, True),
}


@needs_shared
@pytest.mark.parametrize("name", REAL)
def test_real_sources_load_whole(name: str) -> None:
    loaded = load_source(PreferenceSource(name, str(DATA / f"{name}.jsonl.gz")), source_index=3)
    assert (len(loaded.rows), loaded.conversational) == REAL[name]
    assert (loaded.dropped, loaded.total) == ({}, REAL[name][0])
    assert loaded.rows["pair_id"][-1] == (3 << 40) + REAL[name][0] - 1


# File -> rows kept, rows dropped by reason (where one is kept), or the text of the refusal.
QUIRKS: dict[str, tuple[int, dict[str, int]] | str] = {
    "adversarial_text.jsonl.gz": (40, {}),
    "chosen_equals_rejected.jsonl.gz": "81 identical",
    "derived_bad_keys.jsonl.gz": "0 of 40 rows left",
    "derived_blank_lines.jsonl": (40, {}),
    "derived_bom_crlf.jsonl": (40, {}),
    "derived_empty.jsonl": "is empty",
    "derived_json_array.json": "one JSON object a line",
    "derived_latin1.jsonl": "not UTF-8 (line 1)",
    "derived_not_gzip.jsonl.gz": "BadGzipFile",
    "derived_one_row.jsonl": (1, {}),
    "derived_truncated.jsonl.gz": "EOFError",
    "derived_truncated_last_line.jsonl": (20, {"invalid_json": 1}),
    "empty_answers_conv.jsonl.gz": "25 empty_rejected (first at 1), 5 empty_chosen",
    "empty_answers_str.jsonl.gz": "51 empty_rejected (first at 1), 1 empty_chosen",
    "huge_answers.jsonl.gz": (12, {}),
    "implicit_prompt.jsonl.gz": (149, {"empty_chosen": 1}),
    "kto_unpaired.jsonl.gz": "unknown column 'chosen', 'rejected'; expected one of ['messages', 'label']",
    "lfs_pointer.jsonl.gz": "git-LFS pointer",
    "non_string_values.jsonl.gz": "6 wrong_type",
    "one_token_answers.jsonl.gz": (300, {}),
    # One speaker twice in a row, in the shared prompt (4) or in an answer (5).
    "prompt_mismatch.jsonl.gz": "9 wrong_roles",
    "sharegpt_raw.jsonl.gz": (60, {}),
    "special_tokens_in_text.jsonl.gz": (39, {}),  # texts are whole here; tokenising has its own rules
    "ties_raw.jsonl.gz": "unknown column 'chosen', 'rejected'",
    "too_long.jsonl.gz": (34, {}),
    "unicode_oddities.jsonl.gz": (100, {}),
}


@needs_shared
@pytest.mark.parametrize("name", QUIRKS)
def test_quirks_are_kept_dropped_or_refused(name: str) -> None:
    expected, path = QUIRKS[name], DATA / "quirks" / name
    if isinstance(expected, str):
        assert expected in refusal(path)
        return
    loaded = load_source(PreferenceSource("x", str(path)))
    assert (len(loaded.rows), loaded.dropped) == expected
    assert loaded.total == len(loaded.rows) + sum(loaded.dropped.values())


@needs_shared
def test_every_quirk_has_its_expectation() -> None:
    assert {path.name for path in (DATA / "quirks").iterdir()} - {"QUIRKS.md"} == set(QUIRKS)


@needs_shared
def test_bad_keys_are_counted_one_by_one(tmp_path: Path) -> None:
    lines = gzip.decompress((DATA / "quirks" / "derived_bad_keys.jsonl.gz").read_bytes())
    path = tmp_path / "with_one_good_row.jsonl"
    path.write_bytes(lines + json.dumps(string_row(0)).encode())
    loaded = load_source(PreferenceSource("x", str(path)))
    # Five rows each of eight kinds: 1 and 3 both lack the rejected answer, 4 to 6 have a wrong type.
    assert loaded.dropped == {
        "missing_chosen": 5,
        "missing_rejected": 10,
        "missing_prompt": 5,
        "wrong_type": 15,
        "empty_prompt": 5,
    }
    assert [place.rsplit(":", 1)[1] for place in loaded.examples["wrong_type"]] == ["5", "6", "7"]
    assert loaded.rows["pair_id"][:] == [40]


@needs_shared
def test_hh_rows_are_put_together_again() -> None:
    path = DATA / "quirks" / "implicit_prompt.jsonl.gz"
    raw = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
    loaded = load_source(PreferenceSource("x", str(path)))
    for row in loaded.rows:
        dialogue = raw[row["pair_id"]]
        assert row["prompt"].endswith("\n\nAssistant:")
        assert (row["prompt"] + row["chosen"], row["prompt"] + row["rejected"]) == (
            dialogue["chosen"],
            dialogue["rejected"],
        )
        assert "\n\nHuman:" not in row["chosen"] + row["rejected"]


# ---- tokenizers


# Of the first two transformers makes one from the special tokens, of the last none.
@pytest.mark.parametrize("kind", ["qwen2", "gpt2", "mistral"])
def test_a_tokenizer_without_files_is_none(tmp_path: Path, kind: str) -> None:
    AutoConfig.for_model(kind).save_pretrained(tmp_path)
    with pytest.raises(ConfigurationError, match="no tokenizer at .*; set `data.tokenizer` or"):
        load_tokenizer(str(tmp_path))


def test_a_tokenizer_whose_letters_were_added_is_one(tmp_path: Path) -> None:
    """Added tokens that aren't special stand for text."""
    core = Tokenizer(models.BPE())
    core.add_tokens(list("ACGT"))
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>").save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path))("GATC").input_ids == [2, 0, 3, 1]
