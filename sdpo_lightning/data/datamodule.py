"""Rank 6: sources -> stages; the loader of the current stage.

The walk: `setup` reads and tokenises the sources (no weights so far) -> the transition callback scores them
by M_0 and calls `rank` -> `partition` makes chunks -> `stages` -> each epoch `train_dataloader` gives the
loader of its stage. The order is state of the checkpoint: a resumed run never ranks again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal

import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from sdpo_lightning.checkpoint import settle_all
from sdpo_lightning.data.collate import LongPromptRule, PaddedCollator, PairTokenizer, PreferenceCollator
from sdpo_lightning.data.curriculum import check_numbers, stage_of_epoch
from sdpo_lightning.data.declaration import PreferenceSource
from sdpo_lightning.data.difficulty import check_difficulty, find_difficulty
from sdpo_lightning.data.endings import StageEnd, with_ends
from sdpo_lightning.data.loader import PairStore, StageLoader
from sdpo_lightning.data.made_pairs import MadePairs
from sdpo_lightning.data.new_pairs import PairSource
from sdpo_lightning.data.pacing import Pacing
from sdpo_lightning.data.pair_generators import PairGenerator
from sdpo_lightning.data.pair_lists import PairLists
from sdpo_lightning.data.partitions import Partition
from sdpo_lightning.data.passes import Batching, Passes, plan_stages
from sdpo_lightning.data.plan import ChangedRowsRule, DataPlan, row_hashes
from sdpo_lightning.data.prepare import Preparation, SourceReport, hold_out, load_tokenizer, prepare_sources
from sdpo_lightning.data.ranked_again import check_ranked_by, rank_again
from sdpo_lightning.data.ranking import order_of_length, rank_sources
from sdpo_lightning.data.reordering import score_by_id
from sdpo_lightning.data.stage_settings import check_stage_settings, largest_batch
from sdpo_lightning.data.staging import OrderName, PartitionName, RankedBy, Staging
from sdpo_lightning.data.survey import OverlapRule, act_on, survey
from sdpo_lightning.data.tokenizing import check_processes
from sdpo_lightning.exactness import COLLATORS, LayoutName
from sdpo_lightning.ranks import from_first_rank, side_by_side
from sdpo_lightning.run_parts import stage_module
from sdpo_lightning.types import Chunk, LogpTable, PairLogps, Stage, StageSettings


class CurriculumDataModule(PairLists):
    """Preference sources as the stages of stepwise DPO (arXiv 2403.19270, section 3.2).

    Args:
        sources: the preference data sets, each a file, a folder or a hub name.
        partition: `by_source`: one chunk a source; `pooled`: all pairs as one shuffled chunk, the paper's
            DPO baseline; `random`: all pairs pooled and cut at random into the sizes of `by_source` (Table 3);
            or one of `data/partitions.py`, or your own `Partition`.
        order: `easy_to_hard` by M_0's reward accuracy, `given`, or `reversed` (hard to easy).
        stages: lists of source names that train together; default: each source is a stage.
        merge_ties: sources closer than two standard errors share a stage.
        difficulty: score of a pair: `sum_logps`, the paper's gamma; `mean_logps` per token; `length_matched`, gamma
            of the pairs of like length; `residual`, gamma less what length explains; or the path of a function.
        difficulty_reference: folder of another model: pairs are scored by M_0's rewards against it.
        rank_sample: rank by so many pairs of each source, drawn by `seed`.
        ranked_by: `first`: M_0 orders all stages; `previous`: before each stage M_{t-1} those that are left.
        pacing: how the pool grows from which a stage's first pass is drawn, one of `data/pacing.py`; none: all at once.
        epochs_per_stage: passes over a chunk, or a map of stage name -> passes ("*" for the others).
        stage_settings: learning rate, beta, ... of single stages: by name, else by place ("2"), else by "*".
        batch_size: pairs per rank and micro-batch; ignored where `batch_tokens` is given.
        batch_tokens: most tokens that the model runs on per rank and micro-batch; a pair beyond it stands alone.
        bucket_window: optimizer steps among which pairs of like length are brought together; 0 is off.
        pad_to_multiple_of: rows are rounded up to such a length, so that matmuls see few shapes; 1 is exact.
        max_length: most tokens of prompt + completion.
        layout: `shared_prefix`, `packed` or `padded`; where one isn't exact for the model, the next is taken.
        shuffle: shuffle the pairs of a stage anew each epoch.
        seed: of shuffling, pooling and splitting.
        on_bad_row: `drop` and count, or `error`.
        on_long_prompt: of prompts that leave no room for a completion: `drop` and count, `truncate_left` or `error`.
        on_changed_rows: of rows of a stage that has begun, when a run goes on: `error`, or `accept` and record it.
        on_val_overlap: of prompts that are both trained on and held out: `error` or `warn`.
        val_fraction: share of each source's pairs held out, split by prompt; `val_path` of a source wins.
        tokenizer: folder or hub name; default: the model's.
        num_proc: processes that tokenise a large source; default: by its rows and the CPUs. 1 is this one.
        pair_sources: a stage each, behind all others, whose pairs M_{t-1} helps to make just before it.
        pair_generator: what samples for them; none: the policy in memory, by transformers.

    Raises:
        ConfigurationError: names, shares and numbers that don't fit together.
    """

    _row_hashes: dict[str, Tensor] | None = None
    _planned: tuple[list[Chunk], Any, list[Stage]] | None = None
    _layout_before: str | None = None
    # With `ranked_by: previous` so many stages have their pairs for good; and what was decided by M_{t-1}.
    _decided: int = 0
    _decisions: Sequence[dict[str, Any]] = ()
    _row_scores: Mapping[str, Tensor] = MappingProxyType({})

    def __init__(
        self,
        sources: list[PreferenceSource],
        partition: PartitionName | Partition = "by_source",
        order: OrderName = "easy_to_hard",
        stages: list[list[str]] | None = None,
        merge_ties: bool = False,
        difficulty: str = "sum_logps",
        difficulty_reference: str | None = None,
        rank_sample: int | None = None,
        epochs_per_stage: int | dict[str, int] = 1,
        stage_settings: dict[str, StageSettings] | None = None,
        batch_size: int = 4,
        batch_tokens: int | None = None,
        bucket_window: int = 0,
        pad_to_multiple_of: int = 64,
        max_length: int = 1024,
        layout: LayoutName = "shared_prefix",
        shuffle: bool = True,
        seed: int = 0,
        on_bad_row: Literal["drop", "error"] = "drop",
        on_long_prompt: LongPromptRule = "drop",
        on_changed_rows: ChangedRowsRule = "error",
        on_val_overlap: OverlapRule = "error",
        val_fraction: float = 0.0,
        tokenizer: str | None = None,
        num_proc: int | None = None,
        ranked_by: RankedBy = "first",
        pacing: Pacing | None = None,
        pair_sources: list[PairSource] | None = None,
        pair_generator: PairGenerator | None = None,
    ) -> None:
        names, by_tokens = [source.name for source in sources], batch_tokens is not None
        self.made: MadePairs = MadePairs(pair_sources or [], names, by_tokens, on_changed_rows, pair_generator)
        super().__init__(sources, rank_sample, seed, self.made.names)
        groups, own = stages or [[name] for name in names], stage_settings or {}
        passes = (merge_ties, epochs_per_stage, own, seed, pacing is not None, ranked_by, self.made.names)
        self.staging = Staging(names, groups, partition, order, *passes)
        check_stage_settings(own, self.staging.names(), names if merge_ties else [], by_tokens)
        self.difficulty, self.difficulty_reference = difficulty, difficulty_reference
        rows = (batch_size, batch_tokens, bucket_window, pad_to_multiple_of, shuffle, seed, pacing)
        self.batching: Batching = Batching(*rows)
        self.max_length, self.val_fraction = max_length, val_fraction
        self.layout: LayoutName = layout
        self.on_long_prompt: LongPromptRule = on_long_prompt
        self.on_changed_rows: ChangedRowsRule = on_changed_rows
        self.on_val_overlap: OverlapRule = on_val_overlap
        self.tokenizer_name, self.num_proc, self.on_bad_row = tokenizer, num_proc, on_bad_row
        self.source_order: list[str] = []
        # What was accepted against the rules, in words: for ledger and cards.
        self.accepted: list[str] = []
        # Index of a stage -> where a stop rule ended it; see `take_ends`.
        self.ends: dict[int, StageEnd] = {}
        check_difficulty(difficulty)
        check_processes(num_proc)
        check_numbers(batch_size, val_fraction, rank_sample)
        check_ranked_by(ranked_by, difficulty_reference)

    # ---- sources -> tokenised pairs

    def setup(self, stage: str | None = None) -> None:
        """Read, check and tokenise all sources, once. No weights are loaded before this is done."""
        if self.reports:
            return
        trainer = self.trainer
        assert trainer is not None, "`setup` runs within a Trainer"
        find_difficulty(self.difficulty)
        self.made.check(trainer)
        model = stage_module(trainer.lightning_module).model_name_or_path
        self.tokenizer = side_by_side(lambda: load_tokenizer(self.tokenizer_name or model))
        tokenize = PairTokenizer(self.tokenizer, self.max_length, self.on_long_prompt)
        place = (trainer.node_rank, trainer.local_rank, trainer.num_devices)
        self._how = how = Preparation(tokenize, self.on_bad_row, self.num_proc, *place, self.staging.names())
        reports, parts = prepare_sources(self.sources, how)
        hold_out(reports, self.val_fraction, self.seed)
        if stage == "fit":
            act_on(from_first_rank(lambda: survey(parts, reports, self.on_val_overlap)))
        self.reports: dict[str, SourceReport] = {report.name: report for report in reports}
        self.store = PairStore(parts)
        self._row_scores = self.staging.row_scores(self.store.numbers, self.source_ids())
        self.pad_token_id = 0 if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id
        # Until the model is there to say whether `layout` is exact for it.
        self.collator: PreferenceCollator = PaddedCollator(self.pad_token_id, self.batching.pad_to_multiple_of)

    # ---- pair scores -> chunks -> stages

    def pair_scores(self, logps: PairLogps) -> Tensor:
        """Score `[B]` of each pair, higher = easier; above 0 counts as right, NaN not at all. Override to redefine it.

        Asked once, for the ranked pairs of all sources together, source after source.
        """
        return find_difficulty(self.difficulty)(logps)

    def rank(self, m0: LogpTable | None, reference: LogpTable | None = None) -> None:
        """Decide the chunks.

        Args:
            m0: logps of M_0 for the ranked pairs; None where no order is asked for.
            reference: of `difficulty_reference`, for the same pairs.
        """
        scores: Mapping[str, Tensor] = {}
        if m0 is not None:
            scores = rank_sources(list(self.reports.values()), self.ranked_ids(), self.pair_scores, m0, reference)
        scores = self._row_scores or scores
        by_id = score_by_id(self.source_ids(), scores) if self.staging.pacing else {}
        self._chunks = self.staging.paced(self.partition(scores), by_id) + self.made.chunks()
        self._decided = 1

    def partition(self, scores: Mapping[str, Tensor]) -> list[Chunk]:
        """Cut the pairs into chunks, easiest first. Override to cut otherwise.

        Args:
            scores: source name -> `[P]` scores of its P ranked training pairs; empty if order is `given`. Those of the
                rows where the partition goes by them.
        """
        groups = self.staging.in_order(scores)
        self.source_order = [name for group in groups for name in group]
        return self.staging.cut(groups, self.chunk_ids(), scores)

    def stages(self) -> list[Stage]:
        """The plan, once `rank` or a checkpoint has decided the chunks."""
        assert self._chunks is not None, "the plan is read before it is made"
        passes = self._passes(self.collator)
        # `rank` changes the limit. As text too, because 1 is a number of batches and 1.0 is all of them.
        key = (passes, repr(passes.limit))
        # Thousands of ids are not compared at each batch.
        if self._planned is None or self._planned[0] is not self._chunks or self._planned[1] != key:
            passes.check_layout(self._layout_before)
            passes.log_long_pairs([i for chunk in self._chunks for i in chunk.pair_ids])
            planned = plan_stages(self._chunks, self.staging, passes)
            self._planned = self._chunks, key, with_ends(planned, self.ends)
        return self._planned[2]

    def end_stage(self, stage: Stage, batches: int, reason: str) -> None:
        """End a stage after so many micro-batches of the current epoch; the plan follows."""
        assert self.trainer is not None
        passes, epoch = self._passes(self.collator).under(stage.settings), self.trainer.current_epoch
        self.take_ends(self.ends | {stage.index: passes.end(stage, epoch - stage.first_epoch, batches, reason)})

    def take_ends(self, ends: Mapping[int, StageEnd]) -> None:
        """Where stages have ended before their plan did."""
        self.ends, self._planned = dict(ends), None

    def shortest_epoch(self) -> int:
        """Micro-batches a rank of the shortest chunk, before the chunks are decided: at least so many."""
        # A layout that this one has to give way to takes more.
        largest = StageSettings(batch_size=largest_batch(self.staging.stage_settings, self.batching.batch_size))
        collator = COLLATORS[self.layout](self.pad_token_id, self.batching.pad_to_multiple_of)
        passes = self._passes(collator).under(largest)
        pools = self.staging.pools(self.chunk_ids()) + [([], len(chunk.pair_ids)) for chunk in self.made.chunks()]
        return min(passes.fewest_batches(pool, size) for pool, size in pools)

    def curriculum(self) -> dict[str, Any]:
        """What `curriculum.json` holds: the order, the sources and the stages."""
        return {
            "order": self.source_order,
            "length_order": order_of_length(list(self.reports.values())),
            "sources": [report.row() for report in self.reports.values()],
            "stages": [stage.row() for stage in self.stages()],
        } | ({"ranked_again": list(self._decisions)} if self._decisions else {})

    # ---- loaders

    def train_dataloader(self) -> StageLoader:
        """The loader of the Trainer's current epoch."""
        assert self.trainer is not None
        stage = stage_of_epoch(self.stages(), self.trainer.current_epoch)
        if self.staging.ranked_by == "previous" and stage.index > self._decided:
            assert self._chunks is not None
            self._chunks, decision = rank_again(self.trainer, self._chunks, stage.index)
            self._decided, self._decisions = stage.index, [*self._decisions, decision]
            stage = self.stages()[stage.index - 1]
        self.made.provide(self.trainer, self.stages(), stage, self._how, settle_all)
        epoch = self.trainer.current_epoch - stage.first_epoch
        return self._passes(self.collator).under(stage.settings).training(stage, epoch)

    def val_dataloader(self) -> list[StageLoader]:
        """One loader a source that has held-out pairs, in the order of `val_names`."""
        passes = self._passes(self.collator)
        return [passes.loader(self.reports[name].val_ids) for name in self.val_names]

    def test_dataloader(self) -> list[StageLoader]:
        """The held-out pairs."""
        return self.val_dataloader()

    def predict_dataloader(self) -> StageLoader:
        """Every kept pair once, training pairs of all sources first."""
        return self._passes(self.collator).loader(self.train_ids() + self.val_ids())

    def batches(self, pair_ids: list[int]) -> StageLoader:
        """Each of the pairs once, the longest first, this rank's share."""
        return self._passes(self.collator).longest_first(pair_ids)

    def _passes(self, collator: PreferenceCollator) -> Passes:
        assert self.trainer is not None
        weights = {index: source.weight for index, source in enumerate(self.sources)}
        return Passes.of(self.trainer, self.store, collator, self.batching, weights)

    # ---- state

    def state_dict(self) -> dict[str, Any]:
        """The decided chunks and the scores behind them, as plain values and tensors."""
        chunks, plan = self._chunks or [], self.plan()
        assert self.trainer is not None
        entered = stage_module(self.trainer.lightning_module).record.entered
        return {
            "plan": plan.values(),
            "rows": dict(plan.rows),
            "accepted": list(self.accepted),
            "ends": {index: end.row() for index, end in self.ends.items()},
            "made": self.made.begun([chunk.name for chunk in chunks[:entered]]),
            "entered": entered,
            "layout": type(self.collator).__name__,
            "source_order": list(self.source_order),
            "decided": self._decided,
            "decisions": list(self._decisions),
            "chunk_names": [chunk.name for chunk in chunks],
            "chunk_ids": [torch.tensor(chunk.pair_ids) for chunk in chunks],
            "scores": {name: report.scores() for name, report in self.reports.items()},
        }

    def plan(self) -> DataPlan:
        """All that decides which pair a step sees."""
        if self._row_hashes is None:
            self._row_hashes = {name: row_hashes(self.store, report) for name, report in self.reports.items()}
        passes = self._passes(self.collator)
        settings = passes.settings() | {
            "data.on_long_prompt": self.on_long_prompt,
            "data.pair_sources": self.made.settings(),
            **self.staging.plan([chunk.name for chunk in self._chunks or ()], passes.world_size),
        }
        own = type(self).partition is CurriculumDataModule.partition and not self.made.sources
        by_group = own and self.staging.is_by_source
        rule, groups = self.on_changed_rows, self.staging.groups
        return DataPlan(self._row_hashes, settings, groups, by_group, rule, self.accepted)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the chunks of a checkpoint: nothing is ranked again.

        Raises:
            ResumeError: a setting or the data isn't what the checkpoint's run had.
        """
        names, ids = state_dict["chunk_names"], state_dict["chunk_ids"]
        self._chunks = [Chunk(name, part.tolist()) for name, part in zip(names, ids, strict=True)]
        self.source_order = list(state_dict["source_order"])
        self._decided, self._decisions = state_dict.get("decided", 0), list(state_dict.get("decisions", []))
        self.take_ends({index: StageEnd.of_row(row) for index, row in state_dict.get("ends", {}).items()})
        self.made.go_on(state_dict.get("made", {}))
        if self.trainer is not None and self.trainer.state.fn == TrainerFn.FITTING:
            self._layout_before = state_dict["layout"]
            self._chunks = self.plan().go_on(state_dict, self._chunks, self.reports)
            self.source_order += [name for name in self.reports if name not in self.source_order]
        for name, row in state_dict["scores"].items():
            if name in self.reports:
                self.reports[name].take_scores(row)
