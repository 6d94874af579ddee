"""A pool that grows within a stage: every pair exactly once, none before its time, and in runs that resume exactly."""

from __future__ import annotations

import math

import pytest
import torch
import yaml
from datasets import Dataset
from helpers import make_rows, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import fit, reproducible

from sdpo_lightning import CurriculumDataModule, PreferenceSource, StageCheckpoint
from sdpo_lightning.cli import main
from sdpo_lightning.data.collate import PackedCollator, PaddedCollator
from sdpo_lightning.data.loader import PairStore, epoch_order, paced_order
from sdpo_lightning.data.pacing import Pacing, RootCompetence, paced_places, pool_sizes, read_pacing
from sdpo_lightning.data.partitions import ByColumn, Quantiles
from sdpo_lightning.data.passes import Batching, Passes
from sdpo_lightning.data.reordering import easiest_first, score_by_id
from sdpo_lightning.types import Chunk, ConfigurationError, ResumeError

FEW = settings(max_examples=80, deadline=None, derandomize=True)
SHARES = st.sampled_from([0.01, 0.1, 0.5, 0.99, 1.0])


class Sluggish(Pacing):
    """Asks for less than there must be: the pool grows by one pair a draw, and the order is that of difficulty."""

    def competence(self, progress: float) -> float:
        return 0.0

    def settings(self):
        return {"class": "Sluggish"}


def test_the_numbers_of_the_paper():
    # Root competence (arXiv 1903.09848) with c0 = 0.6, T = 1: at t = 0.36, sqrt(0.36 * 0.64 + 0.36) = sqrt(0.5904).
    assert RootCompetence(0.6).competence(0.36) == pytest.approx(math.sqrt(0.5904))
    # With T = 0.5 the pool is whole after half of the pass.
    assert RootCompetence(0.6, 0.5).competence(0.5) == 1.0 and RootCompetence(0.6, 0.5).competence(0.9) == 1.0
    # c0 = 0.5 of 4 pairs: sqrt(t * 0.75 + 0.25) at 1/4, 2/4, 3/4 and 1 is 0.661, 0.791, 0.901 and 1.
    assert pool_sizes(4, RootCompetence(0.5)) == [3, 4, 4, 4]
    # c0 = 0.25 of 8: roots of 0.180, 0.297, 0.414, 0.531, ... are 0.424, 0.545, 0.643, 0.729, 0.805, 0.874, 0.939, 1.
    assert pool_sizes(8, RootCompetence(0.25)) == [4, 5, 6, 6, 7, 7, 8, 8]


@FEW
@given(st.integers(0, 60), SHARES, SHARES, st.integers(0, 5))
def test_every_pair_once_and_none_before_its_time(total, start, until, seed):
    pacing = RootCompetence(start, until)
    sizes = pool_sizes(total, pacing)
    order = paced_places(total, pacing, torch.Generator().manual_seed(seed))
    assert sorted(order) == list(range(total))
    assert sizes == sorted(sizes) and all(size > draw for draw, size in enumerate(sizes))
    for draw, place in enumerate(order):
        assert place < sizes[draw]
        # The easiest c(t) of P, rounded up. At (k + 1) / P root competence is at least (k + 1) / P, so that is enough.
        competence = min(1.0, math.sqrt((draw + 1) / total * (1 - start**2) / until + start**2))
        assert sizes[draw] in (math.ceil(competence * total), draw + 1)
    assert order == paced_places(total, pacing, torch.Generator().manual_seed(seed))


def test_a_full_pool_is_a_shuffle_and_a_sluggish_one_the_order_of_difficulty():
    # With c0 = 1 all orders of three pairs come, about equally often: 600 / 6 = 100, five standard errors are 46.
    counts: dict[tuple[int, ...], int] = {}
    for seed in range(600):
        order = tuple(paced_places(3, RootCompetence(1.0), torch.Generator().manual_seed(seed)))
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 6 and all(54 <= count <= 146 for count in counts.values())
    assert paced_places(7, Sluggish(), torch.Generator().manual_seed(0)) == list(range(7))


def store_of(total: int) -> PairStore:
    lengths = [[1] * (1 + i % 5) for i in range(total)]
    columns = {name: lengths for name in ("prompt_ids", "chosen_ids", "rejected_ids")}
    return PairStore([Dataset.from_dict({"pair_id": list(range(total)), **columns})])


@FEW
@given(st.integers(1, 30), st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.sampled_from([None, 12]))
def test_ranks_and_token_limits_share_one_order(total, world, accumulate, batch, tokens):
    batching = Batching(batch, tokens, 0, 1, True, 3, RootCompetence(0.2))
    chunk, store = Chunk("c", list(range(total))), store_of(total)
    order = paced_order(chunk.pair_ids, RootCompetence(0.2), 3, "c")
    layout = PaddedCollator(0, 1) if tokens is None else PackedCollator(0, 1)
    seen: list[list[list[int]]] = []
    for rank in range(world):
        passes = Passes(store, layout, batching, rank, world, accumulate, 1.0)
        loader = passes.training(chunk, 0)
        # What the plan counts is what the pass takes.
        assert passes.epoch_steps(chunk, 2)[0] == loader.num_steps
        assert [i for run in loader.run_ids() for i in run] == order
        seen.append([micro.pair_id[micro.weights > 0].tolist() for micro in loader])
    # Micro-batch k of rank r is run k * world + r: read across the ranks, they give the order back.
    assert [i for step in zip(*seen, strict=True) for run in step for i in run] == order
    later = [i for run in passes.training(chunk, 1).run_ids() for i in run]
    assert later == epoch_order(chunk.pair_ids, 3, "c", 1)


@FEW
@given(st.lists(st.sampled_from([0.0, 1.0, -2.0]), max_size=8), st.booleans())
def test_easiest_first_keeps_every_pair(values, hardest_first):
    ids = [n // 2 for n in range(2 * len(values))]
    scores = dict(enumerate(values))
    found = easiest_first(ids, scores, "x", hardest_first)
    assert sorted(found) == ids
    assert [scores[i] for i in found] == sorted((scores[i] for i in ids), reverse=not hardest_first)


def test_pairs_without_a_score():
    ids = {"a": [1, 2, 3], "b": [7]}
    scores = score_by_id(ids, {"a": torch.tensor([0.5, torch.nan]), "b": torch.tensor([2.0])})
    assert scores == {1: 0.5, 7: 2.0}
    with pytest.raises(ConfigurationError, match="2 of 3 pairs have no score, expected one each for `data.pacing`"):
        easiest_first([1, 2, 3], scores, "`data.pacing`")


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: RootCompetence(0.0), "`start` of RootCompetence is 0.0, expected within"),
        (lambda: RootCompetence(0.1, 1.5), "`until` of RootCompetence is 1.5"),
        (lambda: Batching(2, None, 4, 1, True, 0, RootCompetence()), "`data.bucket_window` is 4 with `data.pacing`"),
        (lambda: Batching(2, None, 0, 1, False, 0, RootCompetence()), "`data.shuffle` is false with `data.pacing`"),
    ],
)
def test_what_is_refused(make, text):
    with pytest.raises(ConfigurationError, match=text):
        make()


def test_plain_values():
    path = "sdpo_lightning.data.pacing.RootCompetence"
    assert read_pacing({"class_path": path, "init_args": {"start": 0.3}}) == RootCompetence(0.3)
    assert read_pacing(None) is None and read_pacing({"class_path": "somewhere.Else"}) is None


# ---- in a run


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder, found = tmp_path_factory.mktemp("sources"), []
    for name in "ab":
        rows = [row | {"gap": n % 4} for n, row in enumerate(make_rows(9, 0, name))]
        path = str(write_jsonl(folder / f"{name}.jsonl", rows))
        found.append(PreferenceSource(name, path, columns={"pair_score": "gap"}))
    return found


class Watched(CurriculumDataModule):
    """Notes the ids of each pass."""

    def train_dataloader(self):
        loader = super().train_dataloader()
        self.passes = [*getattr(self, "passes", []), [i for run in loader.run_ids() for i in run]]
        return loader


@pytest.mark.parametrize(
    ("partition", "more"),
    [("by_source", {}), (ByColumn(2), {"batch_tokens": 64}), (Quantiles(2), {"order": "reversed"})],
    ids=["by_source", "by_column", "reversed"],
)
def test_a_run_resumes_exactly(tmp_path, tiny_model_dir, sources, partition, more):
    pacing = RootCompetence(0.25)

    def run(ckpt_path=None, **others):
        each = StageCheckpoint(every_n_train_steps=1, save_top_k=-1)
        args = {"epochs_per_stage": 2, "partition": partition, "pacing": pacing} | more | others
        return fit(tmp_path / "run", tiny_model_dir, sources, ckpt_path, callbacks=[each], data_class=Watched, **args)

    trainer, module = run()
    data = trainer.datamodule
    if isinstance(partition, ByColumn):
        numbers = data.store.numbers(data.train_ids())
        score = dict(zip(data.train_ids(), numbers.pair_score.tolist(), strict=True))
    else:
        table = module.m0_logps
        score = dict(zip(table.pair_id.tolist(), (table.chosen - table.rejected).tolist(), strict=True))
    sign = 1 if more.get("order") == "reversed" else -1
    for stage in data.stages():
        first, second = data.passes[stage.first_epoch : stage.first_epoch + 2]
        assert sorted(first) == sorted(second) == sorted(stage.pair_ids)
        difficulty = sorted(sign * score[i] for i in first)
        for draw, size in enumerate(pool_sizes(len(first), pacing)):
            assert sign * score[first[draw]] <= difficulty[size - 1]
    whole = reproducible(tmp_path / "run")
    middle = sorted((tmp_path / "run" / "checkpoints").glob("epoch=2-step=*.ckpt"))[0]
    run(middle)
    assert reproducible(tmp_path / "run") == whole
    with pytest.raises(ResumeError, match="data.pacing: .*'start': 0.25.* -> .*'start': 0.5"):
        run(middle, pacing=RootCompetence(0.5))
    with pytest.raises(ResumeError, match="data.pacing: .* -> None"):
        run(middle, pacing=None)


def test_the_command_line_knows_both(tmp_path, tiny_model_dir, sources, capsys):
    listed = [{"name": s.name, "path": s.path, "columns": s.columns} for s in sources]
    plain = {"trainer": {"default_root_dir": str(tmp_path / "run"), "accelerator": "cpu", "enable_progress_bar": False}}
    plain["model"] = {"model_name_or_path": str(tiny_model_dir)}
    partition = {"class_path": "sdpo_lightning.data.partitions.WithinPrompts", "init_args": {"stages": 1}}
    pacing = {"class_path": "sdpo_lightning.data.pacing.RootCompetence", "init_args": {"start": 0.5}}
    plain["data"] = {"sources": listed, "partition": partition, "pacing": pacing, "max_length": 64, "batch_size": 9}
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(plain))
    main(["check", f"--config={config}"])
    said = capsys.readouterr().out
    # One stage of 2 x 9 pairs by 9; nobody's order is waited for.
    assert "stage 1 'pair-1': 18 pairs, 1 epochs, 2 optimizer steps" in said and "M_0's to decide" not in said
    with pytest.raises(SystemExit) as stop:
        main(["check", f"--config={config}", "--data.bucket_window=2"])
    assert stop.value.code == 2
    partition["init_args"]["stages"] = 2
    config.write_text(yaml.safe_dump(plain))
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(["check", f"--config={config}"])
    # No prompt of these has two pairs.
    assert stop.value.code == 2 and "`stages` of WithinPrompts is 2" in capsys.readouterr().err
