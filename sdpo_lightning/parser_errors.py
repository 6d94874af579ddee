"""Rank 1: jsonargparse's messages in one short line, with the word that was probably meant."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator

from sdpo_lightning.spelling import did_you_mean

_UNKNOWN_KEY = re.compile(
    r"(?:Option|Subcommand '\w+' does not accept option|Group '(?P<group>[\w.]+)' does not accept option)"
    r" '(?P<key>[^']+)'(?: is not accepted)?$"
)
_UNKNOWN_WORDS = re.compile(r"unrecognized arguments: (.*)", re.DOTALL)
_KEY = re.compile(r'Parser key "([^"]+)":\s*')
_CLASS = re.compile(r"<class '([\w.]+)'>")
_LITERAL = re.compile(r"Expected a (?:typing\.)?Literal\[(.*?)\](?:\. Got value: (.*))?$")
_NO_ATTRIBUTE = re.compile(r"module '([\w.]+)' has no attribute '(\w+)'")
_NO_PATH = re.compile(r"Expected a dot import path string: (\w+)$")
# Said of every value that may also be None, a path or a list of others.
_ALWAYS_SAID = (
    *("Does not validate against any of the Union", "Errors:", "Given value", "Subclass types expect one of"),
    *("a class path (str)", "a dict with class_path entry", "a dict without class_path", "a dict with parameters"),
    "Expected a <class 'NoneType'>",
)
# Worth saying only where nothing better is said.
_WEAK = ("Expected a path but", "Not a valid subclass of", "Subtypes:")
_LONGEST = 300
_GIVEN = "Given value: "


def name_key(message: str, known: Iterable[str]) -> str:
    """What jsonargparse says of an unknown key, with the known one that is most like it.

    Args:
        message: "Option 'x' is not accepted" and its like; others come back as they are.
        known: the keys there are.
    """
    found = _UNKNOWN_KEY.match(message)
    if not found:
        return message
    key = f"{found['group']}.{found['key']}" if found["group"] else found["key"]
    return f"unknown key `{key}`{did_you_mean(key, known)}"


def name_words(message: str, options: Iterable[str]) -> str:
    """The same of unknown words on the command line.

    Args:
        message: "unrecognized arguments: --x=1 --y"; others come back as they are.
        options: the options there are, with their dashes.
    """
    found = _UNKNOWN_WORDS.match(message)
    if not found:
        return message
    known = list(options)
    names = [word.partition("=")[0] for word in found[1].split() if word.startswith("-")]
    return message + "".join(did_you_mean(name, known) for name in names)


def shorten(message: str) -> str:
    """One line of what is wrong, without what is always said.

    Args:
        message: jsonargparse's, of several lines.
    """
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    key = _KEY.match(lines[0]) if lines else None
    if key:
        lines[0] = lines[0][key.end() :]
    items = list(dict.fromkeys(line.removeprefix("- ") for line in lines))
    items = [item for item in items if item and not item.startswith(_ALWAYS_SAID)]
    strong = [item for item in items if not item.startswith(_WEAK)] or items or [" ".join(lines)]
    bases = [name for line in lines if "Subtypes:" in line for name in _CLASS.findall(line)]
    given = next((line.removeprefix(_GIVEN) for line in lines if line.startswith(_GIVEN)), "")
    text = "; ".join(_plain(item, bases, given)[:_LONGEST] for item in strong)
    return f"`{key[1]}`: {text}" if key else text


def _plain(item: str, bases: list[str], given: str) -> str:
    if found := _LITERAL.search(item):
        value = found[2] or given
        hint = did_you_mean(value, re.findall("'(.*?)'", found[1]))
        got = f", got {value!r}{hint}" if value else ""
        return f"expected one of {found[1]}{got}"
    if found := _NO_ATTRIBUTE.search(item):
        module = sys.modules.get(found[1])
        names = {*vars(module), *getattr(module, "__all__", ())} if module else ()
        item += did_you_mean(found[2], names)
    if found := _NO_PATH.search(item):
        item = f"{found[1]!r} is neither a class's name nor its path{did_you_mean(found[1], _subclass_names(bases))}"
    return _CLASS.sub(r"\1", item)


def _subclass_names(bases: list[str]) -> Iterator[str]:
    for base in bases:
        module, _, name = base.rpartition(".")
        found = vars(sys.modules.get(module, re)).get(name)
        todo = [found] if isinstance(found, type) else []
        while todo:
            todo += (cls := todo.pop()).__subclasses__()
            yield cls.__name__
