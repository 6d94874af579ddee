"""Cuts by class_path: every pair exactly as often as its setting says, and in a run."""

import json
from collections import Counter

import pytest
import torch
from helpers import make_rows, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import assert_same_weights, fit, reproducible

from sdpo_lightning import Chunk, CurriculumDataModule, Partition, PreferenceSource, StageCheckpoint
from sdpo_lightning.data.partitions import DropHardest, Quantiles, Replay, read_partition
from sdpo_lightning.types import ConfigurationError, ResumeError

# Sources of 1 to 12 pairs: ids, and a score each; few values, so that there are ties.
VALUES = st.sampled_from([-2.0, -0.5, 0.0, 1.0, 3.0])
SOURCES = st.lists(st.lists(VALUES, min_size=1, max_size=12), min_size=1, max_size=4)


def inputs(drawn, repeat=1):
    ids = {f"s{n}": [(n << 40) + i for i in range(len(part))] * repeat for n, part in enumerate(drawn)}
    scores = {f"s{n}": torch.tensor(part) for n, part in enumerate(drawn)}
    return [[name] for name in ids], ids, scores


def counts(chunks) -> Counter:
    return Counter(i for chunk in chunks for i in chunk.pair_ids)


def score_of(scores, pair_id) -> float:
    return scores[f"s{pair_id >> 40}"][pair_id & ((1 << 40) - 1)].item()


@settings(max_examples=100, deadline=None)
@given(SOURCES, st.integers(1, 5), st.integers(1, 3))
def test_quantiles(drawn, stages, repeat):
    groups, ids, scores = inputs(drawn, repeat)
    chunks = Quantiles(stages).cut(groups, ids, scores, 0)
    assert counts(chunks) == Counter(i for part in ids.values() for i in part)
    sizes = [len(chunk.pair_ids) for chunk in chunks]
    assert max(sizes) - min(sizes) <= 1 and sizes == Quantiles(stages).sizes(groups, ids)
    ordered = [score_of(scores, i) for chunk in chunks for i in chunk.pair_ids]
    assert ordered == sorted(ordered, reverse=True)
    assert [chunk.name for chunk in chunks] == Quantiles(stages).names(groups)


def test_quantiles_by_hand():
    groups, ids, scores = inputs([[3.0, -2.0, 0.0], [1.0, 1.0]])
    a, b = ids["s0"], ids["s1"]
    # 3, 1, 1, 0, -2, in parts of 2 and 3.
    easy, hard = Quantiles(2).cut(groups, ids, scores, 0)
    assert (easy.pair_ids, hard.pair_ids) == ([a[0], b[0]], [b[1], a[2], a[1]])


@settings(max_examples=100, deadline=None)
@given(SOURCES, st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.9]))
def test_drop_hardest(drawn, share):
    groups, ids, scores = inputs(drawn)
    chunks = DropHardest(share).cut(groups, ids, scores, 0)
    found, total = counts(chunks), sum(map(len, drawn))
    assert set(found.values()) <= {1} and len(found) == total - int(share * total)
    gone = [score_of(scores, i) for part in ids.values() for i in part if i not in found]
    kept = [score_of(scores, i) for i in found]
    assert not gone or not kept or max(gone) <= min(kept)
    for chunk, (name,) in zip(chunks, groups, strict=True):
        # In the order of the file.
        assert list(chunk.pair_ids) == [i for i in ids[name] if i in found] and chunk.name == name


@settings(max_examples=100, deadline=None)
@given(SOURCES, st.sampled_from([0.0, 0.1, 0.25, 0.5]), st.integers(0, 3))
def test_replay(drawn, share, seed):
    groups, ids, scores = inputs(drawn)
    chunks = Replay(share).cut(groups, ids, {}, seed)
    earlier: list[int] = []
    for chunk, (name,) in zip(chunks, groups, strict=True):
        own, more = list(chunk.pair_ids[: len(ids[name])]), list(chunk.pair_ids[len(ids[name]) :])
        assert own == ids[name]
        # n own pairs and m others are a share of m / (n + m): m = n r / (1 - r), rounded; or all that there are.
        assert len(more) == min(len(earlier), round(share / (1 - share) * len(own)))
        assert len(set(more)) == len(more) and set(more) <= set(earlier)
        earlier += own
    again = Replay(share).cut(groups, ids, {}, seed)
    assert [list(c.pair_ids) for c in again] == [list(c.pair_ids) for c in chunks]


@pytest.mark.parametrize(
    "make, text",
    [
        (lambda: Quantiles(0), "`stages` of Quantiles is 0"),
        (lambda: DropHardest(1.0), "`share` of DropHardest is 1.0"),
        (lambda: Replay(-0.1), "`share` of Replay is -0.1"),
        (lambda: Quantiles().cut([["s0"]], {"s0": [1, 2]}, {"s0": torch.ones(1)}, 0), "scored 1 of 2 pairs"),
        (lambda: Quantiles().cut([["s0"]], {"s0": [1]}, {"s0": torch.tensor([torch.nan])}, 0), "scored 0 of 1 pairs"),
        (
            lambda: CurriculumDataModule([PreferenceSource("a", "x")], partition=Replay(), merge_ties=True),
            "`data.merge_ties` with `data.partition` Replay",
        ),
    ],
)
def test_what_is_refused(make, text):
    with pytest.raises(ConfigurationError, match=text):
        make()


def test_plain_values():
    own = {"class_path": "sdpo_lightning.data.partitions.Quantiles", "init_args": {"stages": 2}}
    assert read_partition(own) == Quantiles(2)
    assert read_partition("pooled") == "pooled"
    assert read_partition({"class_path": "somewhere.Else"}) == "by_source"


# ---- in a run


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    paths = {name: write_jsonl(folder / f"{name}.jsonl", make_rows(7, 0, name)) for name in ("a", "b")}
    return [PreferenceSource(name, str(path)) for name, path in paths.items()]


@pytest.mark.parametrize("partition", [Quantiles(2), DropHardest(0.3), Replay(0.3)])
def test_a_run_resumes_exactly(tmp_path, tiny_model_dir, sources, partition):
    args = {"order": "easy_to_hard", "val_fraction": 0.2, "partition": partition}

    def run(ckpt_path=None, **more):
        each = StageCheckpoint(every_n_train_steps=1, save_top_k=-1)
        fit(tmp_path / "run", tiny_model_dir, sources, ckpt_path, callbacks=[each], **(args | more))

    run()
    stages = json.loads((tmp_path / "run" / "curriculum.json").read_text())["stages"]
    whole = reproducible(tmp_path / "run")
    last = sorted((tmp_path / "run" / "checkpoints").glob("epoch=1-step=*.ckpt"))[0]
    before = {path.name: path for path in (tmp_path / "run" / "stages").iterdir()}
    saved = {name: (path / "model.safetensors").read_bytes() for name, path in before.items()}
    run(last)
    assert reproducible(tmp_path / "run") == whole
    assert {name: (path / "model.safetensors").read_bytes() for name, path in before.items()} == saved
    with pytest.raises(ResumeError, match="data.partition: .* -> by_source"):
        run(last, partition="by_source")
    assert len(stages) == 2 and all(stage["pairs"] > 0 for stage in stages)


def test_reversed_quantiles(tmp_path, tiny_model_dir, sources):
    names = []
    for order in ("easy_to_hard", "reversed"):
        fit(tmp_path / order, tiny_model_dir, sources, partition=Quantiles(2), order=order)
        stages = json.loads((tmp_path / order / "curriculum.json").read_text())["stages"]
        names.append([stage["name"] for stage in stages])
    assert names[0] == names[1][::-1] == ["quantile-1", "quantile-2"]


class EvenAndOdd(Partition):
    """Another project's."""

    def names(self, groups):
        return ["even", "odd"]

    def sizes(self, groups, pair_ids):
        return [1, 1]

    def cut(self, groups, pair_ids, scores, seed):
        ids = [i for part in pair_ids.values() for i in part]
        return [Chunk("even", ids[::2]), Chunk("odd", ids[1::2])]

    def settings(self):
        return {"class": "EvenAndOdd"}


def test_one_of_another_project(tmp_path, tiny_model_dir, sources):
    fit(tmp_path / "run", tiny_model_dir, sources, partition=EvenAndOdd())
    assert sorted(path.name for path in (tmp_path / "run" / "stages").iterdir()) == ["01-even", "02-odd"]
    fit(tmp_path / "again", tiny_model_dir, sources, partition=EvenAndOdd())
    assert_same_weights(tmp_path / "run" / "stages" / "02-odd", tmp_path / "again" / "stages" / "02-odd")
