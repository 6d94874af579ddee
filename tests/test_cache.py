"""Tokenised sources on disk: what names them, when they are used, who makes them, and that nothing else changes."""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
from helpers import make_rows, write_jsonl
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from runs import fit
from tokenizers import AddedToken
from transformers import ByT5Tokenizer

from sdpo_lightning import CurriculumDataModule, PreferenceSource
from sdpo_lightning.data import prepare, tokenizing
from sdpo_lightning.data.cache import Fingerprint, cached_folder, compare_nodes, fingerprints
from sdpo_lightning.data.collate import PairTokenizer
from sdpo_lightning.data.curriculum import split_by_prompt
from sdpo_lightning.data.loader import PairStore
from sdpo_lightning.data.prepare import Preparation, hold_out, prepare_sources
from sdpo_lightning.ranks import _portable
from sdpo_lightning.types import ConfigurationError

TESTS = Path(__file__).resolve().parent


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache; the folder of the tokenised sources in it."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "sdpo_lightning"


@pytest.fixture
def tokenize(tiny_tokenizer) -> PairTokenizer:
    return PairTokenizer(tiny_tokenizer, 12)


def bad_rows(count: int) -> list[dict]:
    """Rows of which some are dropped by reading, some by tokenising (a prompt of 12 words and more)."""
    rows = make_rows(count, 3)
    for number in range(0, count, 9):
        rows[number]["chosen"] = " "
    for number in range(4, count, 11):
        rows[number]["prompt"] = "w3 " * 12 + str(number)
    rows[count // 2]["rejected"] = " w1 <eos> w2"
    return rows


def source_in(folder: Path, count: int = 40, held_out: bool = True) -> PreferenceSource:
    path = write_jsonl(folder / "a.jsonl", bad_rows(count))
    val = write_jsonl(folder / "v.jsonl", bad_rows(20) + make_rows(3, 9)) if held_out else None
    return PreferenceSource("a", str(path), val_path=str(val) if val else None)


def outcome(sources: list[PreferenceSource], how: Preparation, fraction: float = 0.3) -> tuple:
    """Reports, ids, ids of tokens and split: all that a run sees of its sources."""
    reports, parts = prepare_sources(sources, how)
    hold_out(reports, fraction, 5)
    store = PairStore(parts)
    ids = [i for report in reports for i in report.train_ids + report.val_ids]
    rows = [report.row() for report in reports]
    return rows, [(r.train_ids, r.val_ids, r.prompt_keys.tolist()) for r in reports], store.digest(ids), store.get(ids)


def fingerprint(source: PreferenceSource, index: int, tokenize: PairTokenizer, on_bad_row: str) -> Fingerprint:
    """Of a source at that place."""
    return fingerprints([source] * (index + 1), tokenize, on_bad_row)[index]


def never(*_: object) -> None:
    pytest.fail("read again")


# ---- a warm start is a cold one


def test_a_warm_start_gives_what_a_cold_one_gives_log_included(tmp_path, tokenize, monkeypatch, caplog):
    other = write_jsonl(tmp_path / "b.jsonl", make_rows(30, 8))
    sources = [source_in(tmp_path), PreferenceSource("b", str(other))]
    with caplog.at_level(logging.INFO, logger="sdpo_lightning"):
        cold = outcome(sources, Preparation(tokenize))
        said = [(record.levelno, record.getMessage()) for record in caplog.records]
        caplog.clear()
        monkeypatch.setattr(prepare, "read_source", never)
        warm = outcome(sources, Preparation(tokenize))
    assert warm == cold
    assert [(record.levelno, record.getMessage()) for record in caplog.records] == said
    # Rows, pairs and cut completions, of the training and of the held-out file; of b the cut completions.
    assert len(said) == 7
    # Of 40 rows 0, 9, 18, 27, 36 have an empty answer; 4, 15, 26, 37 a long prompt; row 20 a control token.
    counts = {"empty_chosen": 5, "prompt_too_long": 4, "special_token_in_text": 1}
    assert counts.items() <= cold[0][0]["dropped"].items()
    assert cold[0][0]["pairs"] == 30


def test_the_cache_changes_nothing_in_a_run(tmp_path, tiny_model_dir, cache):
    path = write_jsonl(tmp_path / "a.jsonl", make_rows(8, 1))
    found = []
    for run in ("cold", "warm"):
        settings = {"batch_size": 2 if run == "cold" else 1, "val_fraction": 0.25}
        module = {"beta": 0.1 if run == "cold" else 0.2}
        sources = [PreferenceSource("a", str(path))]
        trainer, _ = fit(tmp_path / run, tiny_model_dir, sources, module_args=module, **settings)
        found.append([trainer.datamodule.state_dict()["plan"], trainer.datamodule.val_ids()])
        # Neither the size of a batch nor beta, lr or the share held out makes another folder.
        assert len(list(cache.iterdir())) == 1
    digest = "tokenised rows of data.sources (sha256)"
    assert found[0][0][digest] == found[1][0][digest]
    assert found[0][1] == found[1][1]


# ---- what the key depends on


def test_each_setting_and_each_byte_changes_the_key(tmp_path, tokenize):
    source = source_in(tmp_path)
    keys = [fingerprint(source, 0, tokenize, "drop").key]
    assert fingerprint(source, 0, PairTokenizer(tokenize.tokenizer, 12), "drop").key == keys[0]
    changes = {"name": "b", "split": "test", "columns": {"system": "s"}, "limit": 3, "val_path": None}
    changes["path"] = str(shutil.copy(source.path, tmp_path / "copy.jsonl"))
    changes |= {"system_prompt": "s", "chat_template_kwargs": {"x": 1}, "filter": {"lang": "en"}, "sample": 0.5}
    changes |= {"sample_seed": 1, "rated_pairs": "all", "min_gap": 1.0}
    # How often and how heavily a pair counts is no matter of its ids, and a preset's settings are filled in.
    same = {"repeat": 2, "weight": 2.0, "preset": "hh_rlhf"}
    assert changes.keys() | same.keys() == vars(source).keys()
    for key, value in same.items():
        assert fingerprint(replace(source, **{key: value}), 0, tokenize, "drop").key == keys[0]
    keys += [fingerprint(replace(source, **{k: v}), 0, tokenize, "drop").key for k, v in changes.items()]
    keys.append(fingerprint(source, 1, tokenize, "drop").key)
    keys.append(fingerprint(source, 0, tokenize, "error").key)
    keys.append(fingerprint(source, 0, PairTokenizer(tokenize.tokenizer, 13), "drop").key)
    for rule in ("truncate_left", "error"):
        keys.append(fingerprint(source, 0, PairTokenizer(tokenize.tokenizer, 12, rule), "drop").key)
    for path in (source.path, source.val_path):
        with Path(path).open("ab") as file:
            file.write(b"\n")
        keys.append(fingerprint(source, 0, tokenize, "drop").key)
    assert len(set(keys)) == len(keys) == 21


@given(data=st.data())
@hypothesis_settings(max_examples=40, deadline=None)
def test_two_sources_share_a_key_only_if_all_their_settings_are_equal(data, tmp_path_factory, tiny_tokenizer):
    folder = tmp_path_factory.getbasetemp() / "keys"
    folder.mkdir(exist_ok=True)
    paths = [str(write_jsonl(folder / f"{n}.jsonl", make_rows(2, n))) for n in range(2)]
    choices = {
        "name": st.sampled_from("ab"),
        "path": st.sampled_from(paths),
        "split": st.sampled_from(["train", "test"]),
        "columns": st.sampled_from([None, {"prompt": "q"}]),
        "limit": st.sampled_from([None, 1, 2]),
        "val_path": st.sampled_from([None, *paths]),
    }
    place = st.tuples(st.integers(0, 1), st.integers(12, 13), st.sampled_from(["drop", "error"]))
    drawn = [(data.draw(st.fixed_dictionaries(choices)), data.draw(place)) for _ in range(2)]
    keys = [
        fingerprint(PreferenceSource(**given), index, PairTokenizer(tiny_tokenizer, length), on_bad_row).key
        for given, (index, length, on_bad_row) in drawn
    ]
    assert (keys[0] == keys[1]) == (drawn[0] == drawn[1])


def test_the_tokenizer_changes_the_key_but_not_where_it_lies(tmp_path, tiny_tokenizer):
    source = source_in(tmp_path)
    files = []
    for name in ("one", "two"):
        tiny_tokenizer.save_pretrained(tmp_path / name)
        files.append(prepare.load_tokenizer(str(tmp_path / name)))
    template, word, special = (prepare.load_tokenizer(str(tmp_path / "one")) for _ in range(3))
    template.chat_template += " "
    word.add_tokens(["more"])
    special.add_special_tokens({"eos_token": AddedToken("<start>", special=True)})
    keys = [fingerprint(source, 0, PairTokenizer(t, 12), "drop").key for t in [*files, template, word, special]]
    assert keys[0] == keys[1]
    assert len(set(keys)) == 4
    # A call leaves traces in a tokenizer; they don't count.
    files[0]("w1 w2", truncation=True, max_length=1)
    assert fingerprint(source, 0, PairTokenizer(files[0], 12), "drop").key == keys[0]


def test_a_tokenizer_without_a_fast_core_has_a_key_too(tmp_path):
    source = source_in(tmp_path)
    several = [ByT5Tokenizer(), ByT5Tokenizer(), ByT5Tokenizer(extra_ids=3)]
    keys = [fingerprint(source, 0, PairTokenizer(tokenizer, 64), "drop").key for tokenizer in several]
    assert keys[0] == keys[1] != keys[2]


def test_a_folder_is_known_by_its_files_and_a_hub_set_by_its_fingerprint(tmp_path, tokenize, monkeypatch):
    rows = datasets.Dataset.from_list(make_rows(4, 0))
    rows.save_to_disk(tmp_path / "saved")
    saved = PreferenceSource("x", str(tmp_path / "saved"))
    before = fingerprint(saved, 0, tokenize, "drop").key
    (tmp_path / "saved" / "state.json").write_text("{}")
    assert fingerprint(saved, 0, tokenize, "drop").key != before
    hub = PreferenceSource("x", "some-org/some-pairs")
    monkeypatch.setattr(datasets, "load_dataset", lambda path, split: rows)
    one = fingerprint(hub, 0, tokenize, "drop").key
    monkeypatch.setattr(datasets, "load_dataset", lambda path, split: rows.select(range(3)))
    assert fingerprint(hub, 0, tokenize, "drop").key != one


# ---- damage, errors, places that can't be written


@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "no_content", "other_counts", "not_json", "empty"])
def test_a_damaged_folder_is_made_again(tmp_path, tokenize, cache, damage):
    source = source_in(tmp_path)
    cold = outcome([source], Preparation(tokenize))
    (folder,) = cache.iterdir()
    arrow, content = folder / "train-00000.arrow", folder / "source.json"
    whole = arrow.read_bytes()
    if damage == "flip":
        arrow.write_bytes(whole[:-60] + bytes([whole[-60] ^ 1]) + whole[-59:])
    elif damage == "cut":
        arrow.write_bytes(whole[:-60])
    elif damage == "gone":
        arrow.unlink()
    elif damage == "no_content":
        content.unlink()
    elif damage == "other_counts":
        content.write_text(content.read_text().replace('"empty_chosen": 5', '"empty_chosen": 6'))
    elif damage == "not_json":
        content.write_text("[1")
    else:
        shutil.rmtree(folder)
        folder.mkdir()
    assert outcome([source], Preparation(tokenize)) == cold
    assert arrow.read_bytes() == whole
    assert list(cache.iterdir()) == [folder]


def test_an_error_is_never_kept(tmp_path, tokenize, cache):
    source = source_in(tmp_path)
    wrong = [
        (source, Preparation(tokenize, on_bad_row="error"), "bad row"),
        (source, Preparation(PairTokenizer(tokenize.tokenizer, 2)), "0 of 40 pairs left"),
        (PreferenceSource("a", str(tmp_path / "none.jsonl")), Preparation(tokenize), "not found"),
    ]
    for source, how, text in wrong * 2:
        with pytest.raises(ConfigurationError, match=text):
            prepare_sources([source], how)
        assert list(cache.iterdir()) == []
    path = write_jsonl(tmp_path / "none.jsonl", make_rows(3, 0))
    assert outcome([PreferenceSource("a", str(path))], Preparation(tokenize), 0)[0][0]["pairs"] == 3


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path, tokenize, cache, monkeypatch):
    source, build = source_in(tmp_path), prepare.build_source

    def slow(*arguments):
        content = build(*arguments)
        write_jsonl(Path(source.path), make_rows(5, 5))
        return content

    monkeypatch.setattr(prepare, "build_source", slow)
    with pytest.raises(ConfigurationError, match="changed while it was read"):
        prepare_sources([source], Preparation(tokenize))
    assert list(cache.iterdir()) == []


def test_without_a_place_to_write_a_run_keeps_its_pairs_for_itself(tmp_path, tokenize, monkeypatch, caplog):
    source = source_in(tmp_path)
    cold = outcome([source], Preparation(tokenize))
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file" / "cache")
    assert outcome([source], Preparation(tokenize)) == cold
    assert "for this run only" in caplog.text


def test_what_a_killed_process_left_is_removed_after_a_week(cache):
    for name, age in (("old", 8), ("new", 6)):
        (cache / f".key.{name}").mkdir(parents=True)
        os.utime(cache / f".key.{name}", (0, time.time() - age * 86_400))
    cached_folder("key", lambda _: {})
    assert sorted(folder.name for folder in cache.iterdir()) == [".key.new", "key"]


def test_who_comes_second_takes_what_the_first_has_published(cache):
    def build(name: str):
        def write(staging: Path) -> dict:
            if name == "slow":
                cached_folder("key", build("fast"))
            (staging / "a").write_text(name)
            return {"by": name}

        return write

    folder = cached_folder("key", build("slow"))
    assert (folder / "a").read_text() == prepare.read_content(folder)["by"] == "fast"
    assert list(cache.iterdir()) == [folder]


# ---- several processes


def test_processes_give_the_same_pairs_in_the_same_order(tmp_path, tokenize, cache, monkeypatch, capfd):
    monkeypatch.setattr(tokenizing, "SMALL_SOURCE", 0)
    source = source_in(tmp_path, 101, held_out=False)
    alone = outcome([source], Preparation(tokenize, num_proc=1))
    shutil.rmtree(cache)
    assert outcome([source], Preparation(tokenize, num_proc=3)) == alone
    (folder,) = cache.iterdir()
    assert len(list(folder.glob("train-*.arrow"))) == 3
    # No progress bar where stderr is no terminal.
    assert capfd.readouterr() == ("", "")
    # The first bad row of the file is named, whichever process meets one first.
    rows = [row for row in bad_rows(60) if row["chosen"].strip()]
    strict = PreferenceSource("a", str(write_jsonl(tmp_path / "long.jsonl", rows)))
    messages = []
    for num_proc in (1, 3):
        with pytest.raises(ConfigurationError) as caught:
            prepare_sources([strict], Preparation(tokenize, "error", num_proc))
        messages.append(str(caught.value))
    # Row 4 of all rows has the first long prompt; row 0, which had no answer, is taken away: the fourth.
    assert messages[0] == messages[1] == "source 'a', row 4: prompt_too_long (`data.on_bad_row: error`)"


def test_a_process_that_dies_is_an_error(tmp_path, tokenize, monkeypatch, capfd):
    monkeypatch.setattr(tokenizing, "SMALL_SOURCE", 0)
    monkeypatch.setattr(tokenizing, "main", None)
    monkeypatch.setattr(tokenizing, "__name__", "sdpo_lightning.data.no_such_module")
    with pytest.raises(RuntimeError, match="unexpected end.*num_proc"):
        prepare_sources([source_in(tmp_path)], Preparation(tokenize, num_proc=2))
    assert "no_such_module" in capfd.readouterr().err


def test_how_many_processes_tokenise(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    assert tokenizing.processes(8, 1999, 1) == 1
    assert tokenizing.processes(8, 2000, 1) == 8
    assert tokenizing.processes(None, 19_999, 1) == 1
    assert tokenizing.processes(None, 50_000, 1) == 5
    assert tokenizing.processes(None, 1_000_000, 1) == 16
    assert tokenizing.processes(None, 1_000_000, 8) == 2
    assert tokenizing.processes(None, 1_000_000, 32) == 1
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    assert tokenizing.processes(None, 1_000_000, 4) == 2
    with pytest.raises(ConfigurationError, match="`data.num_proc` is 0"):
        CurriculumDataModule([PreferenceSource("a", "a.jsonl")], num_proc=0)


def test_prompt_keys_are_equal_where_prompts_are():
    prompts = [row["prompt"] for row in make_rows(3000, 1)]
    messages = [[{"role": "user", "content": prompt}] for prompt in prompts]
    keys = {tokenizing.prompt_key(prompt) for prompt in [*prompts, *messages]}
    assert len(keys) == 2 * len(set(prompts))
    assert np.array(list(keys), np.int64).min() < 0


@given(numbers=st.lists(st.lists(st.integers(0, 5)), min_size=1, max_size=3), fraction=st.floats(0, 0.9))
def test_keys_split_as_their_prompts_do(numbers, fraction):
    prompts = {str(n): [f"prompt {i}" for i in given] for n, given in enumerate(numbers)}
    keys = {name: [tokenizing.prompt_key(prompt) for prompt in texts] for name, texts in prompts.items()}
    assert split_by_prompt(keys, fraction, 1) == split_by_prompt(prompts, fraction, 1)


# ---- several ranks


class TwoWords(ValueError):
    """Can't be made again from its text alone."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(f"{one} {two}")


def test_an_error_that_cannot_go_over_the_wire_goes_as_its_text():
    assert repr(_portable(TwoWords("a", "b"))) == "RuntimeError('TwoWords: a b')"
    assert repr(_portable(ConfigurationError("c"))) == "ConfigurationError('c')"


def test_nodes_with_other_data_are_named(tmp_path, tokenize):
    source = source_in(tmp_path)
    one = fingerprint(source, 0, tokenize, "drop")
    compare_nodes(["a"], {0: [one], 1: [one]})
    with pytest.raises(ConfigurationError, match=r"node 1 has other data than node 0 for source 'b'.*\[b\].path"):
        compare_nodes(["a", "b"], {0: [one, one], 1: [one, replace(one, data="other")]})
    with pytest.raises(ConfigurationError, match="node 2 has other tokenizer.*`data.tokenizer`"):
        compare_nodes(["a"], {0: [one], 1: [one], 2: [replace(one, tokenizer="other")]})


SCRIPT = """
import datetime, json, os, sys, time
from pathlib import Path
import datasets
import torch.distributed as dist
from sdpo_lightning.data import prepare
from sdpo_lightning.data.collate import PairTokenizer
from sdpo_lightning.data.curriculum import split_by_prompt
from sdpo_lightning.data.loader import PairStore
from sdpo_lightning.data.sources import PreferenceSource
from sdpo_lightning.ranks import _portable
from sdpo_lightning.types import ConfigurationError

rank, port, folder, limit = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), float(sys.argv[4])
# All are there before the time of the collectives counts.
store = dist.TCPStore("127.0.0.1", port, 4, rank == 0, datetime.timedelta(seconds=200))
dist.init_process_group("gloo", store=store, rank=rank, world_size=4, timeout=datetime.timedelta(seconds=limit))
tokenize = PairTokenizer(prepare.load_tokenizer(str(folder / "tokenizer")), 64)
built, build, results = [], prepare.build_source, {}

def slow(*arguments):
    built.append(arguments[0])
    if mode == "disks":
        time.sleep(2 * limit)
    if mode == "error" and node == 0:
        time.sleep(300)
    if mode == "error":
        raise ConfigurationError("no good")
    return build(*arguments)

prepare.build_source = slow
for mode in ("node", "disks", "shared", "other", "error"):
    node, local = (0, rank) if mode == "node" else divmod(rank, 2)
    apart = mode in ("disks", "other")
    datasets.config.HF_DATASETS_CACHE = folder / (f"{mode}{node}" if apart else mode)
    os.chdir(folder / f"node{node if mode == 'other' else 0}")
    built.clear()
    began = time.monotonic()
    result = {}
    how = prepare.Preparation(tokenize, node_rank=node, local_rank=local, local_ranks=2)
    try:
        (report,), parts = prepare.prepare_sources([PreferenceSource("a", "a.jsonl")], how)
        result["digest"] = PairStore(parts).digest(report.train_ids)
    except ConfigurationError as error:
        result["error"] = str(error)
    results[mode] = result | {"built": list(built), "seconds": time.monotonic() - began}
(folder / f"result{rank}.json").write_text(json.dumps(results))
dist.destroy_process_group()
"""
# Seconds after which a collective gives up; some of the work takes twice as long.
LIMIT = 10.0


@pytest.fixture(scope="module")
def ranks(tmp_path_factory, tiny_tokenizer) -> tuple[Path, list[dict]]:
    """What four ranks of a gloo group met, in one after the other of the situations of `SCRIPT`."""
    folder = tmp_path_factory.mktemp("ranks")
    tiny_tokenizer.save_pretrained(folder / "tokenizer")
    for node in range(2):
        write_jsonl(folder / f"node{node}" / "a.jsonl", make_rows(8, node))
    (folder / "script.py").write_text(SCRIPT)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, str(folder / "script.py")]
    processes = [
        subprocess.Popen([*words, str(rank), port, str(folder), str(LIMIT)], env=environment, stderr=subprocess.PIPE)
        for rank in range(4)
    ]
    errors = [process.communicate(timeout=240)[1].decode() for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, errors
    return folder, [json.loads((folder / f"result{rank}.json").read_text()) for rank in range(4)]


@pytest.mark.parametrize("mode", ["node", "disks", "shared"])
def test_one_rank_of_each_node_works(ranks, mode):
    folder, results = ranks
    assert len({result[mode]["digest"] for result in results}) == 1
    expected = [[0], [], [], []] if mode == "node" else [[0], [], [0], []]
    assert [result[mode]["built"] for result in results] == expected
    caches = ["disks0", "disks1"] if mode == "disks" else [mode]
    assert [len(list((folder / name / "sdpo_lightning").iterdir())) for name in caches] == [1] * len(caches)


def test_no_collective_waits_for_the_rank_that_works(ranks):
    assert min(result["disks"]["seconds"] for result in ranks[1]) > 2 * LIMIT


def test_an_error_of_one_rank_is_raised_on_all_at_once(ranks):
    assert [result["error"]["error"] for result in ranks[1]] == ["no good"] * 4
    # Node 1 fails; node 0, which has 300 s of work before it, doesn't finish that first, nor at the process's end.
    assert max(result["error"]["seconds"] for result in ranks[1]) < 60


def test_a_node_with_other_files_stops_all_before_any_is_tokenised(ranks):
    errors = {result["other"]["error"].split(",")[0] for result in ranks[1]}
    assert errors == {"node 1 has other data than node 0 for source 'a'"}
    assert [result["other"]["built"] for result in ranks[1]] == [[]] * 4
