"""Row forms: the examples of docs/data.md, ids against TRL by four kinds of chat templates, what is scored."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import write_jsonl
from templates import KINDS, tokenizer_of

from sdpo_lightning import PreferenceSource
from sdpo_lightning.backbone import load_policy
from sdpo_lightning.check_report import pair_lines
from sdpo_lightning.data.collate import PackedCollator, PaddedCollator, PairTokenizer, SharedPrefixCollator
from sdpo_lightning.data.messages import unpack
from sdpo_lightning.data.prepare import Preparation, prepare_sources
from sdpo_lightning.data.sources import SourceRows, load_source
from sdpo_lightning.data.survey import survey
from sdpo_lightning.logprobs import pair_logps
from sdpo_lightning.types import ConfigurationError

ROOT = Path(__file__).resolve().parent.parent
Row = dict[str, Any]


def said(role: str, content: str | None, **more: Any) -> Row:
    return {"role": role, "content": content, **more}


def user(text: str) -> Row:
    return said("user", text)


def assistant(text: str | None, **more: Any) -> Row:
    return said("assistant", text, **more)


def call(name: str, arguments: Any) -> Row:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def load(tmp_path: Path, *rows: Any, **settings: Any) -> SourceRows:
    path = write_jsonl(tmp_path / "rows.jsonl", list(rows))
    return load_source(PreferenceSource("x", str(path), **settings))


def texts(loaded: SourceRows) -> list[Row]:
    return [{key: unpack_any(row[key]) for key in ("prompt", "chosen", "rejected")} for row in loaded.rows]


def unpack_any(text: Any) -> Any:
    return unpack(text) if not isinstance(text, str) and text and "fields" in text[0] else text


def tokenised(loaded: SourceRows, tokenize: PairTokenizer) -> list[Any]:
    return [
        tokenize(*(unpack_any(row[key]) for key in ("prompt", "chosen", "rejected")), row.get("extras", ""))
        for row in loaded.rows
    ]


# ---- the examples of the docs


def examples() -> dict[str, tuple[dict[str, Any], list[str]]]:
    """Title -> settings, lines."""
    text = (ROOT / "docs" / "data.md").read_text()
    found = re.findall(r"```jsonl ([^\n{]+?)(?: (\{[^\n]*\}))?\n(.*?)```", text, re.S)
    return {title: (json.loads(settings or "{}"), lines.splitlines()) for title, settings, lines in found}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("title", examples())
def test_every_example_of_the_docs_loads_and_tokenises(title: str, kind: str, tmp_path: Path) -> None:
    settings, lines = examples()[title]
    assert len(lines) == 3
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines))
    loaded = load_source(PreferenceSource("x", str(path), **settings))
    assert loaded.dropped == {}
    # Of the rated example: 9 > 4 > 1 makes three pairs, 8 > 2 one, 7.5 > 7 > 5 two with a gap of one and more.
    assert len(loaded.rows) == (6 if title == "rated" else 3)
    for pair in tokenised(loaded, PairTokenizer(tokenizer_of(kind), 1000)):
        assert not isinstance(pair, str), pair


def test_the_docs_have_an_example_of_each_form() -> None:
    assert set(examples()) == {
        "strings", "dialogues", "several turns", "shared beginning", "messages pairs", "shared beginning of strings",
        "sharegpt", "tools", "rated",
    }  # fmt: skip


# ---- forms


def test_messages_pairs_beside_a_prompt_string(tmp_path: Path) -> None:
    row = {
        "prompt": "q",
        "prompt_id": "1",
        "chosen": [user("q"), assistant("y")],
        "rejected": [user("q"), assistant("n")],
        "messages": [user("q"), assistant("y")],
        "score_chosen": 8.0,
    }
    assert texts(load(tmp_path, row)) == [
        {"prompt": [user("q")], "chosen": row["chosen"][1:], "rejected": row["rejected"][1:]}
    ]


def test_sharegpt_speakers(tmp_path: Path) -> None:
    talk = [
        {"from": "system", "value": "s"},
        {"from": "human", "value": "q"},
        {"from": "function_call", "value": '{"name": "f", "arguments": "{\\"a\\": 1}"}'},
        {"from": "observation", "value": "1"},
    ]
    answers = {"chosen": {"from": "gpt", "value": "y"}, "rejected": [{"from": "gpt", "value": "n"}]}
    loaded = load(
        tmp_path,
        {"conversations": talk, **answers},
        {"conversations": [{"from": "narrator", "value": "q"}], **answers},
        {"conversations": [{"from": "human", "value": None}], **answers},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": "f(1)"}], **answers},
    )
    assert texts(loaded) == [
        {
            "prompt": [
                said("system", "s"),
                user("q"),
                assistant(None, tool_calls=[call("f", {"a": 1})]),
                said("tool", "1"),
            ],
            "chosen": [assistant("y")],
            "rejected": [assistant("n")],
        }
    ]
    assert loaded.dropped == {"wrong_roles": 1, "wrong_type": 2}


def test_a_prompt_column_goes_before_conversations(tmp_path: Path) -> None:
    row = {"prompt": "p", "conversations": [{"from": "human", "value": "q"}], "chosen": "y", "rejected": "n"}
    assert texts(load(tmp_path, row)) == [{"prompt": "p", "chosen": "y", "rejected": "n"}]


def test_late_rows_with_more_than_words_change_the_form_of_all(tmp_path: Path) -> None:
    plain = {"prompt": [user("q")], "chosen": [assistant("y")], "rejected": [assistant("n")]}
    rich = {**plain, "chosen": [assistant("y", reasoning_content="r", weight=1.0, tool_calls=None)]}
    with_tools = {**plain, "tools": '[{"type": "function"}]'}
    rows = [plain] * 3 + [rich, {**plain, "tools": [], "chosen": [assistant("y", tool_calls=[])]}, with_tools]
    loaded = load(tmp_path, *rows)
    assert texts(loaded) == [plain] * 3 + [{**plain, "chosen": [assistant("y", reasoning_content="r")]}, plain, plain]
    assert loaded.rows["extras"][:] == [""] * 5 + ['{"tools": [{"type": "function"}]}']
    assert (loaded.total, loaded.dropped, loaded.rows["pair_id"][:]) == (6, {}, list(range(6)))
    # Without such a row nothing is packed.
    assert load(tmp_path, plain).rows.column_names == ["pair_id", "prompt", "chosen", "rejected"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"chosen": [assistant(None, tool_calls=[])]}, "wrong_type"),
        ({"chosen": [assistant(None, tool_calls=[{"function": {"arguments": {}}}])]}, "wrong_type"),
        ({"chosen": [assistant(None, tool_calls="f(1)")]}, "wrong_type"),
        ({"chosen": [assistant("y", reasoning_content=3)]}, "wrong_type"),
        ({"chosen": [assistant(None, tool_calls=[call("f", "\ud83d")])]}, "invalid_unicode"),
        ({"chosen": [assistant(" ", reasoning_content="r")]}, "empty_chosen"),
        ({"tools": "not json"}, "wrong_type"),
        ({"tools": {"name": "f"}}, "wrong_type"),
        ({"chat_template_kwargs": {"tokenize": False}}, "wrong_type"),
    ],
)
def test_reasons_of_dropped_calls(tmp_path: Path, change: Row, reason: str) -> None:
    row = {"prompt": [user("q")], "chosen": [assistant("y")], "rejected": [assistant("n")]}
    assert load(tmp_path, row, {**row, **change}).dropped == {reason: 1}


def test_a_system_prompt_stands_where_there_is_none(tmp_path: Path) -> None:
    answers = {"chosen": [assistant("y")], "rejected": [assistant("n")]}
    rows = [
        {"prompt": [user("q")], **answers},
        {"prompt": [said("system", "own"), user("q")], **answers},
        {"prompt": "q", "chosen": "y", "rejected": "n"},
        {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"},
        {"chosen": [user("q"), *answers["chosen"]], "rejected": [user("q"), *answers["rejected"]]},
    ]
    loaded = load(tmp_path, *rows[:3], system_prompt="be brief")
    prompts = [row["prompt"] for row in texts(loaded)]
    default = [said("system", "be brief"), user("q")]
    assert prompts == [default, [said("system", "own"), user("q")], default]
    assert texts(load(tmp_path, rows[4], system_prompt="be brief")) == [{"prompt": default, **answers}]
    with pytest.raises(ConfigurationError, match="1 no_place_for_system"):
        load(tmp_path, rows[3], system_prompt="be brief")
    # A column wins where it has something to say.
    said_so = [{**rows[2], "s": "own"}, {**rows[2], "s": " "}]
    loaded = load(tmp_path, *said_so, system_prompt="be brief", columns={"system": "s"})
    assert [row["prompt"][0]["content"] for row in texts(loaded)] == ["own", "be brief"]


# ---- ids

TOOLS = [{"type": "function", "function": {"name": "add", "description": "a + b", "parameters": {"type": "object"}}}]
SIMPLE: Row = {"prompt": [user("what is good")], "chosen": [assistant("a hat")], "rejected": [assistant("another")]}
TRL_ROWS: dict[str, Row] = {
    "one turn": SIMPLE,
    "system": {**SIMPLE, "prompt": [said("system", "be brief"), user("what is good")]},
    "multi-turn prompt": {**SIMPLE, "prompt": [user("hi"), assistant("hello"), user("what")]},
    "multi-turn answers": {
        "prompt": [user("what is good")],
        "chosen": [assistant("a hat"), user("why?"), assistant("it is"), user("oh"), assistant("understand?")],
        "rejected": [assistant("a hat"), user("why?"), assistant("no")],
    },
    "shared beginning": {
        "chosen": [user("what"), assistant("hat"), user("why?"), assistant("good")],
        "rejected": [user("what"), assistant("hat"), user("why?"), assistant("bad")],
    },
    "tools": {
        "prompt": [user("1 + 1?")],
        "chosen": [
            assistant("", tool_calls=[call("add", {"a": 1, "b": 1})]),
            said("tool", "2", name="add"),
            assistant("it is 2"),
        ],
        "rejected": [assistant("it is 3")],
        "tools": TOOLS,
    },
    "tools as a string": {**SIMPLE, "tools": json.dumps(TOOLS)},
    "tool results in the prompt": {
        **SIMPLE,
        "prompt": [user("1 + 1?"), assistant("", tool_calls=[call("add", {"a": 1})]), said("tool", "2", name="add")],
        "tools": TOOLS,
    },
    "thoughts": {
        **SIMPLE,
        "chosen": [assistant("a hat", reasoning_content="hats are good")],
        "chat_template_kwargs": {"enable_thinking": True},
    },
    "no thoughts": {**SIMPLE, "chat_template_kwargs": {"enable_thinking": False}},
    "strings": {"prompt": "what is", "chosen": " good", "rejected": " another"},
}


def trl_ids(tokenizer: Any, row: Row) -> tuple[list[int], list[int], list[int]]:
    """By `DPOTrainer._prepare_dataset` itself."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    class Bare(trl.DPOTrainer):
        def __init__(self) -> None:
            self._tokenizer = tokenizer

    config = type("Config", (), {"dataset_num_proc": None, "max_length": None, "truncation_mode": "keep_start"})
    found = Bare()._prepare_dataset(Dataset.from_list([row]), tokenizer, config, "train")[0]
    return found["prompt_ids"], found["chosen_ids"], found["rejected_ids"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", TRL_ROWS)
def test_ids_are_those_of_trl(form: str, kind: str, tmp_path: Path) -> None:
    tokenizer, row = tokenizer_of(kind), TRL_ROWS[form]
    (pair,) = tokenised(load(tmp_path, row), PairTokenizer(tokenizer, 1000))
    assert (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids) == trl_ids(tokenizer, row)
    # No second BOS, and the EOS of the last turn counts although pad is EOS.
    whole = pair.prompt_ids + pair.chosen_ids
    assert whole.count(tokenizer.bos_token_id) == (KINDS[kind][1] is not None)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    batch = PaddedCollator(tokenizer.pad_token_id)([0], [pair], [1.0], 1)
    ends = batch.target_ids[batch.sequence_index == 0].tolist()[-2:]
    assert tokenizer.eos_token_id in ends


def test_a_rendered_prompt_gets_no_second_bos() -> None:
    tokenizer = tokenizer_of("mistral")
    pair = PairTokenizer(tokenizer, 100)("<s>[INST]what[/INST]", " good", " another")
    assert pair.prompt_ids == tokenizer("[INST]what[/INST]")["input_ids"]
    assert pair.prompt_ids.count(tokenizer.bos_token_id) == 1


def scored(tokenizer: Any, pair: Any, side: str) -> str:
    """What counts of a completion, as text, runs divided by a bar."""
    ids, spans = getattr(pair, f"{side}_ids"), getattr(pair, f"{side}_unscored")
    bounds = [0, *(place for span in spans for place in span), len(ids)]
    parts = [ids[begin:end] for begin, end in zip(bounds[::2], bounds[1::2], strict=True)]
    return "|".join(tokenizer.decode(part) for part in parts)


TURNS = [assistant("a hat"), user("why?"), assistant("it is"), user("oh"), assistant("end")]
AGENT = [assistant("", tool_calls=[call("add", {"a": 1})]), said("tool", "2"), said("tool", "3"), assistant("it is 2")]
SCORED = {
    ("chatml", "turns"): "a hat<|im_end|>\n|it is<|im_end|>\n|end<|im_end|>\n",
    ("llama31", "turns"): "a hat<|eot_id|>|it is<|eot_id|>|end<|eot_id|>",
    ("mistral", "turns"): " a hat</s>| it is</s>| end</s>",
    # Only the last turn has a place for thoughts; the generation prompt of the prompt has none.
    ("qwen3", "turns"): "a hat<|im_end|>\n|it is<|im_end|>\n|<think>\n\n</think>\n\nend<|im_end|>\n",
    ("llama31", "agent"): '{"name": "add", "parameters": {"a": 1}}<|eot_id|>|it is 2<|eot_id|>',
    ("mistral", "agent"): '[TOOL_CALLS]{"name": "add", "arguments": {"a": 1}}</s>| it is 2</s>',
    ("qwen3", "agent"): '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>\n'
    "|<think>\n\n</think>\n\nit is 2<|im_end|>\n",
}


@pytest.mark.parametrize(("kind", "what"), SCORED)
def test_only_words_of_the_assistant_count(kind: str, what: str) -> None:
    tokenizer = tokenizer_of(kind)
    chosen = TURNS if what == "turns" else AGENT
    pair = PairTokenizer(tokenizer, 1000)([user("q")], chosen, [assistant("no")])
    assert scored(tokenizer, pair, "chosen") == SCORED[kind, what]
    assert pair.rejected_unscored == ()
    whole = tokenizer.decode(pair.chosen_ids)
    for begin, end in pair.chosen_unscored:
        hidden = tokenizer.decode(pair.chosen_ids[begin:end])
        assert hidden in whole and any(words in hidden for words in ("why?", "oh", "2"))


def test_thoughts_of_earlier_turns_are_found_where_the_template_took_them_out() -> None:
    tokenizer = tokenizer_of("qwen3")
    turns = [assistant("a hat", reasoning_content="hm"), user("why?"), assistant("it is", reasoning_content="so")]
    pair = PairTokenizer(tokenizer, 1000)([user("q")], turns, [assistant("no")])
    assert scored(tokenizer, pair, "chosen") == "a hat<|im_end|>\n|<think>\nso\n</think>\n\nit is<|im_end|>\n"
    assert pair.marks == ()


def test_a_template_that_writes_earlier_turns_otherwise_drops_the_pair() -> None:
    tokenizer = tokenizer_of("chatml")
    tokenizer.chat_template = "{{ messages | length }}" + tokenizer.chat_template
    tokenize = PairTokenizer(tokenizer, 1000)
    # No id at the beginning is shared, so neither is a prompt.
    assert tokenize([user("q")], [assistant("y")], [assistant("n")]) == "empty_completion"
    tokenizer.chat_template = "x" + "{% for m in messages %}{{ loop.length }}{{ m.content }}<|im_end|>{% endfor %}"
    assert tokenize([user("q")], TURNS[:3], [assistant("no")]) == "unclear_turns"


def test_a_chance_newline_is_not_taken_for_the_end_of_a_turn() -> None:
    tokenizer = tokenizer_of("chatml")
    # Earlier answers begin with a newline, the last one doesn't: "\n" of its end stands where the whole has the other.
    tokenizer.chat_template = (
        "x{% for m in messages %}{{ '\n' if m.role == 'assistant' and not loop.last }}{{ m.content }}<|im_end|>\n"
        "{% endfor %}"
    )
    tokenize = PairTokenizer(tokenizer, 1000)
    assert tokenize([user("q")], TURNS[:3], [assistant("no")]) == "unclear_turns"


def test_truncation_moves_and_cuts_what_is_not_scored() -> None:
    tokenizer = tokenizer_of("chatml")
    whole = PairTokenizer(tokenizer, 1000)([user("q")], TURNS, [assistant("no")])
    (first, second), prompt = whole.chosen_unscored, len(whole.prompt_ids)
    # One token into the second run; then exactly before the first one.
    for length, spans in ((second[0] + 1, (first, (second[0], second[0] + 1))), (first[0], ())):
        cut = PairTokenizer(tokenizer, prompt + length)([user("q")], TURNS, [assistant("no")])
        assert (len(cut.chosen_ids), cut.chosen_unscored) == (length, spans)
    left = PairTokenizer(tokenizer, len(whole.chosen_ids) + 4, "truncate_left")(
        [user("q" * 99)], TURNS, [assistant("no")]
    )
    assert left.marks == ("prompt_cut", "completion_cut")
    kept = len(left.chosen_ids)
    assert left.chosen_unscored[0] == first and all(end <= kept for _, end in left.chosen_unscored)


def test_check_shows_what_is_not_scored_outside() -> None:
    tokenizer = tokenizer_of("mistral")
    pair = PairTokenizer(tokenizer, 1000)([user("q")], TURNS[:3], [assistant("no")])
    _, _, chosen, rejected = pair_lines(tokenizer, "x", pair)
    assert chosen.endswith("tokens): >> a hat</s><<[INST]why?[/INST]>> it is</s><<")
    assert rejected.endswith("tokens): >> no</s><<")


# ---- logps of what counts


@torch.no_grad()
@pytest.mark.parametrize("layout", [PaddedCollator, PackedCollator, SharedPrefixCollator])
def test_unscored_tokens_are_read_and_not_counted(layout: Any, tiny_tokenizer: Any, tiny_model_dir: Path) -> None:
    backbone = load_policy(str(tiny_model_dir)).eval()
    tokenize = PairTokenizer(tiny_tokenizer, 200)
    turns = [assistant("w1 w2"), user("w3 w4 w5"), assistant("w6")]
    pairs = [
        tokenize([user("w7")], turns, [assistant("w8 w9")]),
        tokenize([user("w10")], [assistant("w11")], [assistant("w12"), user("w13"), assistant("w14 w15")]),
    ]
    batch = layout(0)(range(2), pairs, [1.0, 1.0], 2)
    logps = pair_logps(backbone(batch), batch)
    # "<start> assistant" stands in the prompt. Chosen: w1 w2 <eos> and w6 <eos>; w11 <eos>.
    # Rejected: w8 w9 <eos>; w12 <eos> and w14 w15 <eos>.
    assert batch.completion_lengths.tolist() == [5, 2, 3, 5]
    words = tiny_tokenizer.convert_ids_to_tokens(batch.target_ids[batch.sequence_index == 0])
    assert words == ["w1", "w2", "<eos>", "w6", "<eos>"]
    for number, pair in enumerate(pairs):
        for side, total in (("chosen", logps.chosen[number]), ("rejected", logps.rejected[number])):
            ids, spans = getattr(pair, f"{side}_ids"), getattr(pair, f"{side}_unscored")
            whole = torch.tensor([pair.prompt_ids + ids])
            table = backbone.model(input_ids=whole).logits[0, :-1].log_softmax(-1)
            each = table.gather(1, whole[0, 1:, None]).squeeze(1)[len(pair.prompt_ids) - 1 :]
            counted = [n for n in range(len(ids)) if not any(begin <= n < end for begin, end in spans)]
            torch.testing.assert_close(total, each[counted].sum(), rtol=1e-5, atol=1e-5)


# ---- what the template leaves out


def test_arguments_are_objects_whatever_stands_in_the_row(tmp_path: Path) -> None:
    tokenizer = tokenizer_of("llama31")
    rows = [{**SIMPLE, "chosen": [assistant(None, tool_calls=[call("f", a)])]} for a in ({"a": 1}, '{"a": 1}', "x y")]
    first, second, third = tokenised(load(tmp_path, *rows), PairTokenizer(tokenizer, 1000))
    assert first == second
    assert '"parameters": {"a": 1}}' in tokenizer.decode(second.chosen_ids)
    assert '"parameters": "x y"}' in tokenizer.decode(third.chosen_ids)


@pytest.mark.parametrize(
    ("kind", "marks"),
    [
        ("chatml", {"unrendered_tool_calls", "unrendered_reasoning_content", "unrendered_name", "unrendered_tools"}),
        ("mistral", {"unrendered_reasoning_content", "unrendered_name"}),
        ("qwen3", {"unrendered_name"}),
    ],
)
def test_what_the_template_leaves_out_is_counted(kind: str, marks: set[str]) -> None:
    chosen = [
        assistant(None, tool_calls=[call("add", {"a": 1})], reasoning_content="hm"),
        said("tool", "2", name="add"),
        assistant("it is 2"),
    ]
    tokenizer = tokenizer_of(kind)
    extras = json.dumps({"tools": TOOLS})
    pair = PairTokenizer(tokenizer, 1000)([user("q")], chosen, [assistant("no")], extras)
    assert set(pair.marks) == marks
    assert "None" not in tokenizer.decode(pair.chosen_ids)


def test_what_is_left_out_stands_in_the_report_and_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{**SIMPLE, "prompt": [user(f"q{n}")], "chosen": [assistant("y", reasoning_content="r")]} for n in range(3)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    source = PreferenceSource("x", str(path), chat_template_kwargs={"enable_thinking": True, "other": 1})
    (report,), _ = prepare_sources([source], Preparation(PairTokenizer(tokenizer_of("chatml"), 1000)))
    assert report.marks == {"unrendered_reasoning_content": 3}
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warned == [
        "source 'x': the chat template doesn't name enable_thinking, other; see `data.sources[x].chat_template_kwargs`",
        "source 'x': of 3 pairs 3 unrendered_reasoning_content",
    ]


def test_a_prompt_is_the_same_one_beside_fields_of_other_rows(tmp_path: Path) -> None:
    # Thoughts in one row make Arrow hold all messages of that file otherwise; q0 still is q0.
    plain = [{**SIMPLE, "prompt": [user(f"q{n}")]} for n in range(3)]
    rich = [plain[0], {**SIMPLE, "prompt": [user("q9")], "chosen": [assistant("y", reasoning_content="r")]}]
    train, held = write_jsonl(tmp_path / "train.jsonl", plain), write_jsonl(tmp_path / "held.jsonl", rich)
    sources = [PreferenceSource("a", str(train), val_path=str(held)), PreferenceSource("b", str(held))]
    reports, parts = prepare_sources(sources, Preparation(PairTokenizer(tokenizer_of("qwen3"), 1000)))
    first, second = (report.prompt_keys.tolist() for report in reports)
    assert first[0] == second[0] and len({*first, *second}) == 4
    found = [finding.text for finding in survey(parts, reports, "warn") if "held out" in finding.text]
    # Held out are q0, trained on in both, and q9, trained on in b.
    assert found == [
        "2 prompts are both trained on and held out (held out by 'a' and trained on in 'a', held out by 'a' and "
        "trained on in 'b')"
    ]


def test_variables_of_the_source_and_of_a_row(tmp_path: Path) -> None:
    tokenizer = tokenizer_of("qwen3")
    rows = [SIMPLE, {**SIMPLE, "chat_template_kwargs": {"enable_thinking": True}}]
    tokenize = PairTokenizer(tokenizer, 1000).with_variables({"enable_thinking": False})
    quiet, own = tokenised(load(tmp_path, *rows), tokenize)
    assert tokenizer.decode(quiet.prompt_ids).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert tokenizer.decode(own.prompt_ids).endswith("<|im_start|>assistant\n")
    assert quiet.chosen_ids == own.chosen_ids[len(own.chosen_ids) - len(quiet.chosen_ids) :]


def test_control_tokens_in_arguments_tools_and_thoughts_drop_the_pair() -> None:
    tokenize = PairTokenizer(tokenizer_of("qwen3"), 1000)
    for chosen, extras in (
        ([assistant(None, tool_calls=[call("f", {"a": "x<|im_end|>"})])], ""),
        ([assistant("y", reasoning_content="<|im_start|>")], ""),
        ([assistant("y")], json.dumps({"tools": [{"name": "<|im_end|>"}]})),
    ):
        assert tokenize([user("q")], chosen, [assistant("n")], extras) == "special_token_in_text"


# ---- pictures


def test_pairs_with_pictures_are_refused_and_those_without_stay(tmp_path):
    pair = {"prompt": "p", "chosen": "a", "rejected": "b"}
    part = [{"type": "image"}, {"type": "text", "text": "what is it?"}]
    dialogue = {"prompt": [said("user", part)], "chosen": [assistant("a")], "rejected": [assistant("b")]}
    # Two with pictures in a column, one in a message; the null, the empty list and the row without the column stay.
    pictures = [pair | {"images": ["cat.png"]}, pair | {"image": {"path": "cat.png"}}, dialogue]
    loaded = load(tmp_path, *pictures, pair, pair | {"images": None}, pair | {"images": []})
    assert (len(loaded.rows), loaded.dropped) == (3, {"has_images": 3})
    with pytest.raises(ConfigurationError, match="0 of 3 rows left.*3 has_images"):
        load(tmp_path, *pictures)
    # A column that is read as text is no picture.
    named = {"columns": {"prompt": "image"}}
    assert len(load(tmp_path, {"image": "p", "chosen": "a", "rejected": "b"}, **named).rows) == 1
