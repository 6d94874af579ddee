"""Stages ranked again by M_{t-1}: every pair exactly once, by the scores of the right model, decided once."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch
from helpers import make_rows, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import fit, reproducible

from sdpo_lightning import (
    CachedFixedReference,
    CurriculumDataModule,
    DPOLitModule,
    Fork,
    PreferenceSource,
    StageCheckpoint,
)
from sdpo_lightning.backbone import load_policy
from sdpo_lightning.data.pacing import RootCompetence
from sdpo_lightning.data.partitions import ByColumn, DropHardest, Quantiles
from sdpo_lightning.data.reordering import accuracies, cut_again, order_again
from sdpo_lightning.types import Chunk, ConfigurationError, ResumeError, StageSettings

FEW = settings(max_examples=80, deadline=None, derandomize=True)
# Chunks of scores; each pair of a chunk is a number of its own.
VALUES = st.sampled_from([-2.0, -0.5, 0.0, 1.0, 3.0])
CHUNKS = st.lists(st.lists(VALUES, min_size=1, max_size=6), min_size=1, max_size=5)


def made_of(drawn) -> tuple[list[Chunk], dict[int, float]]:
    chunks = [Chunk(f"c{n}", [100 * n + i for i in range(len(part))]) for n, part in enumerate(drawn)]
    return chunks, {100 * n + i: score for n, part in enumerate(drawn) for i, score in enumerate(part)}


def plain(chunks) -> list[tuple[str, list[int]]]:
    return [(chunk.name, list(chunk.pair_ids)) for chunk in chunks]


@FEW
@given(CHUNKS, st.integers(0, 5), st.booleans())
def test_what_is_left_is_cut_anew(drawn, decided, hardest_first):
    chunks, scores = made_of(drawn)
    decided = min(decided, len(chunks))
    again = cut_again(chunks, decided, scores, hardest_first)
    assert plain(again[:decided]) == plain(chunks[:decided])
    assert Counter(i for c in again for i in c.pair_ids) == Counter(list(scores))
    assert [(c.name, len(c.pair_ids)) for c in again] == [(c.name, len(c.pair_ids)) for c in chunks]
    found = [scores[i] for c in again[decided:] for i in c.pair_ids]
    assert found == sorted(found, reverse=not hardest_first)
    # What is decided once stays: the same scores again change nothing.
    assert plain(cut_again(again, decided, scores, hardest_first)) == plain(again)


@FEW
@given(CHUNKS, st.integers(0, 5), st.booleans())
def test_what_is_left_is_ordered_anew(drawn, decided, hardest_first):
    chunks, scores = made_of(drawn)
    decided = min(decided, len(chunks))
    again = order_again(chunks, decided, scores, hardest_first)
    assert plain(again[:decided]) == plain(chunks[:decided])
    assert sorted(plain(again)) == sorted(plain(chunks))
    shares = [sum((s > 0) + (s == 0) / 2 for s in part) / len(part) for part in drawn]
    by_name = {f"c{n}": share for n, share in enumerate(shares)}
    assert accuracies(chunks, scores) == pytest.approx(by_name)
    found = [by_name[chunk.name] for chunk in again[decided:]]
    assert found == sorted(found, reverse=not hardest_first)


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"ranked_by": "m0"}, "`data.ranked_by` is 'm0', expected one of"),
        ({"partition": "random"}, "`data.partition: random`, which no difficulty orders"),
        ({"partition": "pooled"}, "`data.partition: pooled`"),
        ({"partition": ByColumn()}, "ByColumn: its pairs can't be cut anew"),
        ({"partition": DropHardest()}, "DropHardest: its pairs can't be cut anew"),
        ({"order": "given"}, "`data.order: given`, which nothing ranks"),
        ({"merge_ties": True}, "`data.merge_ties`"),
        ({"stage_settings": {"2": StageSettings(epochs=2)}}, "epochs by place"),
        ({"difficulty_reference": "base"}, "`data.difficulty_reference`, which is loaded once"),
    ],
)
def test_what_is_refused(more, text):
    sources = [PreferenceSource("a", "x"), PreferenceSource("b", "y")]
    with pytest.raises(ConfigurationError, match=text):
        CurriculumDataModule(sources, **{"ranked_by": "previous"} | more)


# ---- in a run


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    paths = {name: write_jsonl(folder / f"{name}.jsonl", make_rows(6, 0, name)) for name in "abc"}
    return [PreferenceSource(name, str(path)) for name, path in paths.items()]


QUANTILES = {"partition": Quantiles(3), "order": "easy_to_hard", "ranked_by": "previous", "batch_size": 3}


def run_of(folder, model_dir, sources, ckpt_path=None, **more):
    each = StageCheckpoint(every_n_train_steps=1, save_top_k=-1)
    args = QUANTILES | more
    return fit(folder, model_dir, sources, ckpt_path, callbacks=[each], **args)


def gammas(folder, data, ids) -> dict[int, float]:
    """By a plain forward of the exported model, a pair at a time."""
    model, found = load_policy(str(folder)).eval(), {}
    for pair_id, pair in zip(ids, data.store.get(ids), strict=True):
        sums = []
        for side in (pair.chosen_ids, pair.rejected_ids):
            whole = torch.tensor([pair.prompt_ids + side])
            with torch.no_grad():
                logps = model.model(input_ids=whole).logits[0].log_softmax(-1)
            first = len(pair.prompt_ids)
            sums.append(logps[first - 1 : -1].gather(1, whole[0, first:, None]).sum().item())
        found[pair_id] = sums[0] - sums[1]
    return found


@pytest.mark.parametrize("pacing", [None, RootCompetence(0.3)], ids=["plain", "paced"])
def test_the_pairs_of_each_stage_are_those_of_the_model_before_it(tmp_path, tiny_model_dir, sources, pacing):
    folder = tmp_path / "run"
    trainer, _ = run_of(folder, tiny_model_dir, sources, pacing=pacing)
    data, stages = trainer.datamodule, trainer.datamodule.stages()
    left = data.train_ids()
    assert sorted(i for stage in stages for i in stage.pair_ids) == sorted(left)
    for stage in stages:
        before = tiny_model_dir if stage.index == 1 else folder / "stages" / stages[stage.index - 2].folder_name
        score = gammas(before, data, left)
        # 18 pairs in three parts: the 6 easiest of what is left, easiest first.
        assert list(stage.pair_ids) == sorted(left, key=lambda i: -score[i])[:6]
        left = [i for i in left if i not in set(stage.pair_ids)]
    decisions = json.loads((folder / "curriculum.json").read_text())["ranked_again"]
    assert [(row["stage"], row["ranked_by"], row["pairs"]) for row in decisions] == [(2, "M_1", 12), (3, "M_2", 6)]
    whole = reproducible(folder)
    # The end of stage 1, where nothing is decided yet; within stage 2; the end of stage 2; within stage 3.
    found = sorted((folder / "checkpoints").glob("*.ckpt"), key=lambda path: int(path.stem.split("step=")[1]))
    for path, decided in zip(found, (1, 1, 2, 2, 3, 3), strict=True):
        state = torch.load(path, weights_only=True)["CurriculumDataModule"]
        assert state["decided"] == decided and len(state["decisions"]) == decided - 1
        if path in found[1:5]:
            run_of(folder, tiny_model_dir, sources, path, pacing=pacing)
            assert reproducible(folder) == whole
    with pytest.raises(ResumeError, match="data.ranked_by: previous -> None"):
        run_of(folder, tiny_model_dir, sources, found[2], ranked_by="first", pacing=pacing)


def test_sources_are_ordered_anew(tmp_path, tiny_model_dir, sources):
    class Turned(CurriculumDataModule):
        """From M_1 on the hard ones are the easy ones."""

        def pair_scores(self, logps):
            return -logps.gamma if self.is_ranked else logps.gamma

    args = {"partition": "by_source", "epochs_per_stage": {"a": 2, "*": 1}, "data_class": Turned}
    # Of whichever source comes second: the plan changes with the decision.
    args["stage_settings"] = {"2": StageSettings(lr=5e-4)}
    trainer, _ = run_of(tmp_path / "run", tiny_model_dir, sources, **args)
    names = [stage.name for stage in trainer.datamodule.stages()]
    first, _ = run_of(tmp_path / "first", tiny_model_dir, sources, **args | {"ranked_by": "first"})
    given = [stage.name for stage in first.datamodule.stages()]
    # Three stages: the second is the one that M_0 had put last.
    assert (names[0], names[1:]) == (given[0], given[:0:-1]) and sorted(given) == ["a", "b", "c"]
    decisions = json.loads((tmp_path / "run" / "curriculum.json").read_text())["ranked_again"]
    found = decisions[0]["accuracy"]
    assert list(found) == names[1:] and found[names[1]] >= found[names[2]]
    assert sorted(path.name for path in (tmp_path / "run" / "stages").iterdir()) == [
        f"0{n}-{name}" for n, name in enumerate(names, 1)
    ]
    # Four epochs, a's two wherever it stands.
    assert trainer.current_epoch == 4 and sum(stage.epochs for stage in trainer.datamodule.stages()) == 4
    whole = reproducible(tmp_path / "run")
    found = sorted((tmp_path / "run" / "checkpoints").glob("*.ckpt"), key=lambda p: int(p.stem.split("step=")[1]))
    end_of_first = 2 * trainer.datamodule.stages()[0].epochs
    for step in (end_of_first, end_of_first + 1):
        run_of(tmp_path / "run", tiny_model_dir, sources, found[step - 1], **args)
        assert reproducible(tmp_path / "run") == whole


def test_a_table_of_all_stages_is_found_again(tmp_path, tiny_model_dir, sources, caplog):
    folder = tmp_path / "run"
    run_of(folder, tiny_model_dir, sources, reference=CachedFixedReference())
    whole = reproducible(folder)
    last = sorted((folder / "checkpoints").glob("epoch=2-step=*.ckpt"))[0]
    caplog.clear()
    run_of(folder, tiny_model_dir, sources, last, reference=CachedFixedReference())
    assert reproducible(folder) == whole and "computed again" not in caplog.text


def test_forks(tmp_path, tiny_model_dir, sources):
    run_of(tmp_path / "run", tiny_model_dir, sources)

    class Forked(DPOLitModule):
        stage = 2

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.fork = Fork(str(tmp_path / "run"), type(self).stage)

    whole = reproducible(tmp_path / "run")
    run_of(tmp_path / "fork", tiny_model_dir, sources, module_class=Forked)
    # Stage 2 chooses the same pairs from M_1, so both end alike.
    assert reproducible(tmp_path / "fork") == whole[-4:]
    Forked.stage = 3
    with pytest.raises(ConfigurationError, match="`--from-stage` is 3 with `data.ranked_by: previous`, expected 2"):
        run_of(tmp_path / "late", tiny_model_dir, sources, module_class=Forked)
