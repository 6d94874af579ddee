"""Rank 0: messages of a dialogue as they stand in files -> one form, and how Arrow holds what goes beyond text.

A plain message is `{role, content}`. One with tool calls, reasoning or a name has more keys: Arrow keeps them as JSON,
because the keys of arguments differ from row to row.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

Message = dict[str, Any]
Text = str | list[Message]
# Runs of places, (begin, end), ascending.
Spans = tuple[tuple[int, int], ...]

# What chat templates may render beside role and content.
FIELDS = ("tool_calls", "reasoning_content", "reasoning", "thinking", "name", "tool_call_id")
# What `apply_chat_template` takes for itself, so that no variable of a template can have such a name.
RESERVED = frozenset(
    "chat_template conversation messages tools documents tokenize return_dict return_tensors add_generation_prompt "
    "continue_final_message padding truncation max_length return_assistant_tokens_mask tokenizer_kwargs".split()
)
_SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "tool": "tool",
    "system": "system",
}

_MEDIA = ("image", "image_url", "video", "audio", "input_audio")


class BadRow(Exception):
    """A row that is dropped; the message is the reason."""


def text_of(value: Any) -> Text:
    """A string, or messages in the common form.

    Args:
        value: a string, a list of `{role, content, ...}` or of sharegpt's `{from, value}`, or one of the latter.

    Raises:
        BadRow: with the reason to drop the row.
    """
    if isinstance(value, list):
        return [_message(item) for item in value]
    if isinstance(value, dict) and _is_sharegpt(value):
        return [_message(value)]
    return checked_string(value)


def checked_string(value: Any) -> str:
    """The value, if it is a string that Arrow can hold.

    Raises:
        BadRow: it isn't.
    """
    if not isinstance(value, str):
        raise BadRow("wrong_type")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:  # half a surrogate pair, as JSON's "\ud83d" alone: Arrow can't hold it
        raise BadRow("invalid_unicode") from None
    return value


def _is_sharegpt(item: dict[str, Any]) -> bool:
    return item.get("from") is not None and item.get("role") is None


def _message(item: Any) -> Message:
    if not isinstance(item, dict):
        raise BadRow("wrong_type")
    if _is_sharegpt(item):
        return _sharegpt_message(item)
    role, content = checked_string(item.get("role")), item.get("content")
    if isinstance(content, list) and any(isinstance(part, dict) and part.get("type") in _MEDIA for part in content):
        raise BadRow("has_images")
    more = _fields(item) if len(item) > 2 or content is None else {}
    # A call needs no words; without one an answer has nothing to say.
    if content is not None or "tool_calls" not in more:
        content = checked_string(content)
    return {"role": role, "content": content, **more}


def _sharegpt_message(item: dict[str, Any]) -> Message:
    role = _SPEAKERS.get(checked_string(item["from"]))
    if role is None:
        raise BadRow("wrong_roles")
    content = checked_string(item.get("value"))
    if item["from"] != "function_call":
        return {"role": role, "content": content}
    called = from_json(content)
    calls = called if isinstance(called, list) else [called]
    if not all(isinstance(call, dict) and "name" in call for call in calls):
        raise BadRow("wrong_type")
    return {"role": role, "content": None, "tool_calls": _tool_calls([{"function": call} for call in calls])}


def _fields(item: dict[str, Any]) -> dict[str, Any]:
    """What the message has beside role and content; an empty value is none (Arrow fills missing keys with null)."""
    found = {key: item[key] for key in FIELDS if item.get(key)}
    for key, value in found.items():
        if key == "tool_calls":
            found[key] = _tool_calls(from_json(value) if isinstance(value, str) else value)
        else:
            checked_string(value)
    return {key: value for key, value in found.items() if value}


def _tool_calls(calls: Any) -> list[dict[str, Any]]:
    """The calls, their arguments as an object: some templates write a string with quotes around it once more."""
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise BadRow("wrong_type")
    result = []
    for call in calls:
        call = {key: value for key, value in call.items() if value is not None}
        function = call.get("function")
        inner = dict(function) if isinstance(function, dict) else call
        if isinstance(inner.get("arguments"), str):
            inner["arguments"] = _object(inner["arguments"])
        if not isinstance(inner.get("name"), str):
            raise BadRow("wrong_type")
        result.append({"type": "function", **call, "function": inner} if inner is not call else call)
    to_json(result)
    return result


def _object(text: str) -> Any:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, dict) else text


def from_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        BadRow: it is none.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise BadRow("wrong_type") from None


def to_json(value: Any) -> str:
    """JSON that keeps the order of keys.

    Raises:
        BadRow: a value that JSON has no form for, or text that Arrow can't hold.
    """
    try:
        return checked_string(json.dumps(value, ensure_ascii=False))
    except (TypeError, ValueError, RecursionError):
        raise BadRow("wrong_type") from None


def is_plain(text: Text) -> bool:
    """Whether the text is a string, or its messages have role and content only."""
    return isinstance(text, str) or all(len(message) == 2 for message in text)


def pack(text: Text) -> Text:
    """Messages as `{role, content, fields}`, the last one JSON of what else they have."""
    if isinstance(text, str):
        return text
    return [{"role": m["role"], "content": m["content"] or "", "fields": _packed_fields(m)} for m in text]


def _packed_fields(message: Message) -> str:
    more = {key: value for key, value in message.items() if key != "role" and (key != "content" or value is None)}
    return to_json(more) if more else ""


def unpack(text: Text) -> Text:
    """The reverse of `pack`."""
    if isinstance(text, str):
        return text
    parts = ({"role": m["role"], "content": m["content"]} | json.loads(m["fields"] or "{}") for m in text)
    return list(parts)


def strings_in(value: Any) -> Iterator[str]:
    """Every string of a plain value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        inner: Iterable[Any] = [*value, *value.values()] if isinstance(value, dict) else value
        for part in inner:
            yield from strings_in(part)
