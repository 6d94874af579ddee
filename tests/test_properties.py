"""Properties of the whole way, rows -> ids -> micro-batches -> logps; and a few inputs of `benchmarks.fuzz_rows`."""

from __future__ import annotations

import random

import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import fuzz_rows
from sdpo_lightning.backbone import load_policy
from sdpo_lightning.data.collate import (
    PackedCollator,
    PaddedCollator,
    PairTokenizer,
    SharedPrefixCollator,
    TokenizedPair,
)
from sdpo_lightning.data.curriculum import cut_into_chunks
from sdpo_lightning.data.findings import contradictions, list_keys, pair_keys, repeats, shared_prompts
from sdpo_lightning.data.loader import PairStore, StageLoader, epoch_order
from sdpo_lightning.logprobs import pair_logps

FEW = settings(max_examples=60, deadline=None, derandomize=True)
texts = st.lists(st.integers(0, 59).map(lambda n: f"w{n}"), min_size=1, max_size=12).map(" ".join)
rows = st.tuples(texts, texts, texts)


@pytest.fixture(scope="module")
def backbone(tiny_model_dir):
    return load_policy(str(tiny_model_dir)).eval()


def tokenised(tokenizer, row: tuple[str, str, str], chat: bool) -> TokenizedPair | str:
    prompt, chosen, rejected = row
    if not chat:
        return tokenizer(prompt, f" {chosen}", f" {rejected}")
    sides = [[{"role": "assistant", "content": text}] for text in (chosen, rejected)]
    return tokenizer([{"role": "user", "content": prompt}], *sides)


@torch.no_grad()
def logps_of(backbone, collator, pairs: list[TokenizedPair]) -> torch.Tensor:
    """`[2, B]` of the pairs as one micro-batch."""
    batch = collator(range(len(pairs)), pairs, [1.0] * len(pairs), len(pairs))
    logps = pair_logps(backbone(batch), batch)
    return torch.stack([logps.chosen, logps.rejected])


@FEW
@given(
    given_rows=st.lists(rows, min_size=1, max_size=5),
    chat=st.booleans(),
    limit=st.sampled_from([2, 3, 4, 5, 6, 7, 8, 20]),
    rule=st.sampled_from(["drop", "truncate_left"]),
    multiple=st.sampled_from([1, 4, 16]),
    layout=st.sampled_from([PaddedCollator, PackedCollator, SharedPrefixCollator]),
)
def test_padding_packing_and_batch_mates_never_change_a_pair(
    tiny_tokenizer, backbone, given_rows, chat, limit, rule, multiple, layout
):
    tokenizer = PairTokenizer(tiny_tokenizer, limit, rule)
    found = [tokenised(tokenizer, row, chat) for row in given_rows]
    pairs = [pair for pair in found if isinstance(pair, TokenizedPair)]
    if not pairs:
        return
    together = logps_of(backbone, layout(0, multiple), pairs)
    for number, pair in enumerate(pairs):
        # One sequence a forward pass, by hand.
        for side, ids in enumerate((pair.chosen_ids, pair.rejected_ids)):
            whole = torch.tensor([pair.prompt_ids + ids])
            with torch.no_grad():
                logits = backbone.model(input_ids=whole).logits[0]
            first = len(pair.prompt_ids)
            scored = logits[first - 1 : -1].log_softmax(-1).gather(1, whole[0, first:, None])
            assert scored.shape[0] == len(ids) > 0
            torch.testing.assert_close(together[side, number], scored.sum(), rtol=1e-5, atol=1e-5)


@FEW
@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    partition=st.sampled_from(["by_source", "pooled", "random"]),
    world=st.integers(1, 3),
    accumulate=st.integers(1, 3),
    batch=st.integers(1, 4),
    seed=st.integers(0, 9),
)
def test_every_pair_is_in_one_chunk_and_comes_once_a_pass(sizes, partition, world, accumulate, batch, seed):
    ids = {f"s{n}": [(n << 40) + 3 * i for i in range(size)] for n, size in enumerate(sizes)}
    every = [i for part in ids.values() for i in part]
    chunks = cut_into_chunks(partition, [[name] for name in ids], ids, seed)
    assert sorted(i for chunk in chunks for i in chunk.pair_ids) == every
    columns = {name: [[1, 2]] * len(every) for name in ("prompt_ids", "chosen_ids", "rejected_ids")}
    store = PairStore([Dataset.from_dict({"pair_id": every, **columns})])
    for chunk in chunks:
        order = epoch_order(chunk.pair_ids, seed, chunk.name, 0)
        seen = []
        for rank in range(world):
            loader = StageLoader(store, PaddedCollator(0), order, batch, rank, world, accumulate)
            for micro in loader:
                seen += micro.pair_id[micro.weights > 0].tolist()
        assert sorted(seen) == sorted(chunk.pair_ids)


# ---- keys and counts

ids = st.lists(st.integers(0, 3), min_size=1, max_size=3)


@FEW
@given(st.lists(st.tuples(st.integers(0, 1), ids, ids).filter(lambda p: p[1] != p[2]), max_size=12), st.integers(1, 4))
def test_counts_are_those_of_a_slow_count(pairs, chunk_rows):
    def column(number: int) -> pa.ChunkedArray:
        values = [pair[number] for pair in pairs]
        parts = [values[n : n + chunk_rows] for n in range(0, len(values), chunk_rows)]
        return pa.chunked_array([pa.array(part, pa.list_(pa.int32())) for part in parts], pa.list_(pa.int32()))

    keys = pair_keys(np.array([pair[0] for pair in pairs], np.int64), column(1), column(2))
    plain = [(prompt, tuple(chosen), tuple(rejected)) for prompt, chosen, rejected in pairs]
    assert repeats(keys) == len(plain) - len(set(plain))
    both_ways = {(p, *sorted((a, b))) for p, a, b in plain if (p, b, a) in plain}
    assert contradictions(keys) == len(both_ways)
    half = len(pairs) // 2
    left, right = keys.at(np.arange(half)), keys.at(np.arange(half, len(pairs)))
    assert shared_prompts([left], [right]) == len({p[0] for p in plain[:half]} & {p[0] for p in plain[half:]})


def test_lists_have_keys_of_their_own():
    lists = [[], [0], [0, 0], [1], [1, 0], [0, 1], [2**31 - 1]]
    lists += [row for n in range(2, 2000) for row in ([n], [0, n])]
    column = pa.chunked_array([pa.array(lists, pa.list_(pa.int32()))])
    assert len(set(list_keys(column).tolist())) == len(lists)
    # A slice of a column has the keys of its rows.
    assert list_keys(column.slice(3, 4)).tolist() == list_keys(column)[3:7].tolist()


# ---- damaged files


def test_damaged_files_end_in_counted_drops_or_a_clear_refusal():
    result = fuzz_rows.fuzz(400, 1)
    assert result["faults"] == []
    assert result["outcomes"]["kept pairs"] > 50 and result["outcomes"]["refused files"] > 20
    assert sum(key.startswith("dropped: ") for key in result["outcomes"]) >= 8


def test_the_fuzzer_keeps_what_it_finds(monkeypatch):
    def broken(*_):
        raise AttributeError("'NoneType' object has no attribute 'strip'")

    monkeypatch.setattr(fuzz_rows, "load_source", broken)
    result = fuzz_rows.fuzz(3, 1)
    assert [fault["input"] for fault in result["faults"]] == [0, 1, 2]
    assert "AttributeError" in result["faults"][0]["error"]
    assert bytes.fromhex(result["faults"][0]["hex"]) == fuzz_rows.make_input(random.Random("1:0"))
