"""Rank 3: tokenised sources on disk, each found by a fingerprint of all that decides its pairs.

A folder appears whole or not at all and is checked against its own digests before it is used, so a half-written or
damaged one is only ever made again. Errors leave nothing behind.
"""

from __future__ import annotations

import atexit
import hashlib
import inspect
import json
import logging
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
import tokenizers
import transformers
from transformers import PreTrainedTokenizerBase

from sdpo_lightning.data import collate, messages, rated, records, rows, selection, turns
from sdpo_lightning.data import sources as reading
from sdpo_lightning.data.collate import PairTokenizer
from sdpo_lightning.data.declaration import PreferenceSource
from sdpo_lightning.data.records import load_dataset, local_path
from sdpo_lightning.data.sources import origin_of
from sdpo_lightning.files import file_digest
from sdpo_lightning.types import ConfigurationError

log = logging.getLogger(__name__)

_SCHEMA = 5
_CONTENT = "source.json"
_WEEK = 7 * 86_400


@dataclass(frozen=True)
class Fingerprint:
    """All that decides the pairs of a source, as sha256 digests.

    Attributes:
        data: of its files.
        tokenizer: of what the tokenizer does.
        settings: of the source's settings and place, `data.max_length`, `data.on_bad_row`, `data.on_long_prompt`.
        rules: of the versions and the code that read and tokenise.
    """

    data: str
    tokenizer: str
    settings: str
    rules: str

    @property
    def key(self) -> str:
        """Name of the folder, 64 hex digits."""
        return _digest(asdict(self))


def fingerprints(sources: Sequence[PreferenceSource], tokenize: PairTokenizer, on_bad_row: str) -> list[Fingerprint]:
    """Fingerprint all sources; reads all of their files, but parses none.

    Args:
        sources: in the order of `data.sources`: the place is part of the pair ids.
        tokenize: tokenizer and length limit.
        on_bad_row: `drop` or `error`.

    Raises:
        ConfigurationError: a hub data set that can't be had.
    """
    tokenizer, rules = _tokenizer_digest(tokenize.tokenizer), _rules_digest()
    common = {"max_length": tokenize.max_length, "on_bad_row": on_bad_row, "on_long_prompt": tokenize.on_long_prompt}
    return [
        Fingerprint(data_digest(source), tokenizer, _digest(_settings(source) | common | {"index": index}), rules)
        for index, source in enumerate(sources)
    ]


def _settings(source: PreferenceSource) -> dict[str, Any]:
    """Those that decide the tokenised pairs; what a preset stands for is filled in."""
    return {key: value for key, value in asdict(source).items() if key not in ("preset", "repeat", "weight")}


def data_digest(source: PreferenceSource) -> str:
    """Of the bytes of a source, its held-out file included; of the stated revision of a hub data set.

    Raises:
        ConfigurationError: a hub data set that can't be had.
    """
    paths = [(source.path, None), (source.val_path, source.val_path)]
    return _digest([_path_digest(source, path, key) for path, key in paths if path is not None])


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _path_digest(source: PreferenceSource, path: str, val_path: str | None) -> Any:
    local = local_path(path)
    if local is None:
        # Its files lie in the cache of `datasets`, which has a fingerprint of data set, revision and split.
        return load_dataset(origin_of(source, val_path), None)._fingerprint
    try:
        if local.is_dir():
            files = sorted(file for file in local.rglob("*") if file.is_file())
            return [(str(file.relative_to(local)), file_digest(file)) for file in files]
        return file_digest(local)
    except OSError as error:
        # Reading it for good says why in full.
        return type(error).__name__


def _tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Of all that decides ids; not of names and paths, which differ between machines."""
    if tokenizer.is_fast:
        core = json.loads(tokenizer.backend_tokenizer.to_str())
        # Set anew by each call.
        core |= {"truncation": None, "padding": None}
    else:
        with tempfile.TemporaryDirectory() as folder:
            files = [Path(file) for file in tokenizer.save_vocabulary(folder)]
            core = [sorted(tokenizer.get_vocab().items()), [file_digest(file) for file in files]]
    given = {k: v for k, v in tokenizer.init_kwargs.items() if k != "name_or_path" and not k.endswith("_file")}
    plain = {key: value for key, value in given.items() if isinstance(value, str | bool | int | None)}
    added = sorted((number, repr(token)) for number, token in tokenizer.added_tokens_decoder.items())
    named = {key: str(value) for key, value in tokenizer.special_tokens_map.items()}
    kind = type(tokenizer).__qualname__
    return _digest([kind, core, plain, added, named, tokenizer.all_special_tokens, tokenizer.chat_template])


def _rules_digest() -> str:
    package = sys.modules[__name__.partition(".")[0]]
    versions = [_SCHEMA, package.__version__, transformers.__version__, tokenizers.__version__]
    # A rule that is changed between two versions must not find the rows of the old one.
    modules = (collate, messages, rated, records, rows, selection, reading, turns)
    return _digest([*versions, *(inspect.getsource(module) for module in modules)])


def compare_nodes(names: Sequence[str], by_node: Mapping[int, Sequence[Fingerprint]]) -> None:
    """Refuse machines that don't have the same data.

    Args:
        names: of the sources.
        by_node: node rank -> fingerprint of each source.

    Raises:
        ConfigurationError: says which node differs from node 0, in which source and in what.
    """
    first = min(by_node)
    for node, found in sorted(by_node.items()):
        for name, ours, theirs in zip(names, by_node[first], found, strict=True):
            for what, value in asdict(ours).items():
                if asdict(theirs)[what] != value:
                    where = f"`data.sources[{name}].path`" if what == "data" else _ELSEWHERE[what]
                    raise ConfigurationError(
                        f"node {node} has other {what} than node {first} for source {name!r}, expected the same on "
                        f"all nodes; check {where} there"
                    )


_ELSEWHERE = {"tokenizer": "`data.tokenizer`", "settings": "the configuration", "rules": "the installed packages"}


def cached_folder(key: str, build: Callable[[Path], dict[str, Any]]) -> Path:
    """The folder of that key, made if it isn't there or is damaged.

    Args:
        key: of a `Fingerprint`.
        build: writes files into a folder and returns what is kept beside them, as plain values.

    Raises:
        Exception: what `build` raises; nothing is kept then.
    """
    root = Path(datasets.config.HF_DATASETS_CACHE) / "sdpo_lightning"
    folder = root / key
    if _is_whole(folder, key):
        return folder
    with _staging(root, key) as staging:
        content = build(staging)
        files = {file.name: file_digest(file) for file in sorted(staging.iterdir())}
        body = {"key": key, "files": files, "content": content}
        (staging / _CONTENT).write_text(json.dumps(body | {"digest": _digest(body)}))
        return _publish(staging, staging.parent / key, key)


def read_content(folder: Path) -> dict[str, Any]:
    """What `build` returned for a folder of `cached_folder`."""
    return json.loads((folder / _CONTENT).read_text())["content"]


def _is_whole(folder: Path, key: str) -> bool:
    """Whether the folder holds what was put there, byte for byte."""
    try:
        body = json.loads((folder / _CONTENT).read_text())
        stated = body.pop("digest")
        intact = stated == _digest(body) and body["key"] == key
        return intact and all(file_digest(folder / name) == digest for name, digest in body["files"].items())
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return False


@contextmanager
def _staging(root: Path, key: str) -> Iterator[Path]:
    """A new folder beside the place of the final one; gone afterwards, however it ends."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        for left in root.glob(f".{key}.*"):
            if time.time() - left.stat().st_mtime > _WEEK:  # by a process that was killed
                shutil.rmtree(left, ignore_errors=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{key}.", dir=root))
    except OSError as error:
        root = Path(tempfile.mkdtemp(prefix="sdpo_lightning-"))
        atexit.register(shutil.rmtree, root, ignore_errors=True)
        log.warning("tokenised pairs are kept for this run only (%s); set HF_DATASETS_CACHE to a folder", error)
        staging = root / f".{key}"
        staging.mkdir()
    try:
        # Other users of a shared cache may read what `mkdtemp` makes for its owner alone.
        staging.chmod(0o755)
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _publish(staging: Path, folder: Path, key: str) -> Path:
    """Move the folder to its place, unless another process was first with the same."""
    while True:
        try:
            os.replace(staging, folder)
            return folder
        except OSError:
            if not folder.is_dir():
                raise
        if _is_whole(folder, key):
            return folder
        # A damaged one; moved before it is removed, so that nobody finds half of it.
        aside = Path(tempfile.mkdtemp(prefix=f".{key}.", dir=folder.parent))
        try:
            os.replace(folder, aside)
        except OSError:
            pass  # another process took it away
        shutil.rmtree(aside, ignore_errors=True)
