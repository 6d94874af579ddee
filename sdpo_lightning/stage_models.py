"""Rank 6: callbacks that look at S and at every M_t once, as soon as it is there: they score, sample and tell.

M_{t-1} is the policy at the first batch of stage t, whether the run has just left stage t-1 or was resumed there, so
nothing has to be read again. Neither touches a random state nor a weight.
"""

from __future__ import annotations

import json
import logging
from abc import ABC, abstractmethod
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from transformers import GenerationConfig, GenerationMixin

from sdpo_lightning.attention import packed_rows
from sdpo_lightning.casts import CASTS
from sdpo_lightning.data.curriculum import stage_of_epoch
from sdpo_lightning.data.pair_lists import data_of
from sdpo_lightning.files import write_json
from sdpo_lightning.likelihood import LikelihoodGuard
from sdpo_lightning.logp_tables import read_table, score_pairs, write_table
from sdpo_lightning.logs import MetricsLog
from sdpo_lightning.matrix import matrix_rows, merged
from sdpo_lightning.ranks import from_first_rank
from sdpo_lightning.run_parts import StageModule, callbacks_of, run_dir, stage_module
from sdpo_lightning.run_state import has_last_model, is_complete, leaves_files
from sdpo_lightning.sampling import Message, chosen_prompts, end_tokens, left_padded, until_end
from sdpo_lightning.scoring import numerics
from sdpo_lightning.stage_lines import stage_line, stage_table, stage_title
from sdpo_lightning.strategy import sharding_of
from sdpo_lightning.terminal import print_table, shown_bar
from sdpo_lightning.types import ConfigurationError, LogpTable

log = logging.getLogger(__name__)


class StageModels(pl.Callback, ABC):
    """Calls `look_at` with t = 0 before stage 1, and with t after stage t."""

    # Of the run directory: {"rows": [...]}, each row with its `model`.
    file_name: str

    @abstractmethod
    def look_at(self, trainer: pl.Trainer, pl_module: StageModule, index: int) -> None:
        """The policy is M_index. All ranks call it."""

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """On the first batch of stage t: M_{t-1}."""
        pl_module = stage_module(pl_module)
        if batch_idx or not leaves_files(trainer):
            return
        stage = stage_of_epoch(data_of(trainer).stages(), trainer.current_epoch)
        if trainer.current_epoch == stage.first_epoch:
            self.look_at(trainer, pl_module, stage.index - 1)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """M_T, if the plan is complete."""
        pl_module = stage_module(pl_module)
        if leaves_files(trainer) and is_complete(trainer) and trainer.is_last_batch:
            self.look_at(trainer, pl_module, len(data_of(trainer).stages()))

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """M_T of a run that had ended before it was looked at."""
        pl_module = stage_module(pl_module)
        if not has_last_model(trainer, pl_module):
            return
        last = len(data_of(trainer).stages())
        if from_first_rank(lambda: all(row["model"] != last for row in self.rows(trainer))):
            self.look_at(trainer, pl_module, last)

    def rows(self, trainer: pl.Trainer) -> list[dict[str, Any]]:
        """What stands in the file."""
        path = run_dir(trainer) / self.file_name
        return json.loads(path.read_text())["rows"] if path.exists() else []

    def write(self, trainer: pl.Trainer, rows: list[dict[str, Any]]) -> None:
        """Put the rows of a model into the file."""
        write_json(run_dir(trainer) / self.file_name, {"rows": merged(self.rows(trainer), rows)})


class StageEvaluation(StageModels):
    """Scores the held-out pairs of all sources by every model; leaves `matrix.json`.

    Costs a pass over them a stage. Their logps are kept in `references/held-out-0t.safetensors`, for a resumed run.

    Args:
        pairs_per_source: at most so many of each source; None is all, 0 switches it off.

    Raises:
        ConfigurationError: a negative number.
    """

    file_name = "matrix.json"

    def __init__(self, pairs_per_source: int | None = None) -> None:
        if pairs_per_source is not None and pairs_per_source < 0:
            raise ConfigurationError(f"`pairs_per_source` of StageEvaluation is {pairs_per_source}, expected 0 or more")
        self.pairs_per_source = pairs_per_source
        self._key: tuple[list[int], str] | None = None

    def look_at(self, trainer: pl.Trainer, pl_module: StageModule, index: int) -> None:
        """Score by M_index, and write its rows."""
        reports = data_of(trainer).reports.values()
        ids = [i for report in reports for i in report.val_ids[: self.pairs_per_source]]
        if not ids or not trainer.limit_val_batches:
            return
        # The ranking has scored them.
        known = pl_module.m0_logps if index == 0 else None
        batches, title = data_of(trainer).batches(ids), f"held-out pairs by M_{index}"
        table = score_pairs(pl_module.trained, batches, pl_module.score, known, title)
        from_first_rank(lambda: self._write_table(trainer, pl_module, index, ids, table))

    def _write_table(
        self, trainer: pl.Trainer, pl_module: StageModule, index: int, ids: list[int], table: LogpTable
    ) -> None:
        if self._key is None or self._key[0] != ids:
            self._key = ids, f"{data_of(trainer).store.digest(ids)} {numerics(trainer, pl_module)}"
        key = self._key[1]
        write_table(_table_path(trainer, index), table, key)
        m0, before = (read_table(_table_path(trainer, t), key) if index else None for t in (0, index - 1))
        rows = matrix_rows(index, table, data_of(trainer).source_of, m0, before)
        self.write(trainer, rows)
        guards = [callback for callback in callbacks_of(trainer) if isinstance(callback, LikelihoodGuard)]
        if index and guards:
            stage = data_of(trainer).stages()[index - 1]
            m0_rows = [row for row in self.rows(trainer) if row["model"] == 0]
            guards[0].judge_held_out(pl_module, stage, rows, m0_rows)


def _table_path(trainer: pl.Trainer, index: int) -> Path:
    return run_dir(trainer) / "references" / f"held-out-{index:02d}.safetensors"


class StageSamples(StageModels):
    """Has S and every M_t answer the same prompts, greedily; leaves `samples.json`. Not with sharded weights.

    Args:
        prompts: texts, or lists of messages; None takes a few held-out prompts (without any, of the training pairs),
            `[]` switches it off.
        max_new_tokens: most tokens of an answer.

    Raises:
        ConfigurationError: fewer than one token.
    """

    file_name = "samples.json"
    default_count = 3

    def __init__(self, prompts: list[str | list[Message]] | None = None, max_new_tokens: int = 64) -> None:
        if max_new_tokens < 1:
            raise ConfigurationError(f"`max_new_tokens` of StageSamples is {max_new_tokens}, expected 1 or more")
        self.prompts = prompts
        self.max_new_tokens = max_new_tokens

    def look_at(self, trainer: pl.Trainer, pl_module: StageModule, index: int) -> None:
        """Generate by M_index on rank 0. What goes wrong there is only a warning: it is no part of training."""
        if sharding_of(trainer.strategy) is not None:
            if index == 0 and self.prompts != []:
                log.info("no sample answers: `generate` doesn't run on sharded weights")
            return
        if not trainer.is_global_zero:
            return
        try:
            prompts = chosen_prompts(data_of(trainer), self.prompts, self.default_count)
            if prompts:
                self.write(trainer, self._rows(trainer, pl_module, index, prompts))
        except (RuntimeError, ValueError, TypeError, AttributeError, KeyError, OSError) as error:
            log.warning("no sample answers of M_%d: %s", index, error)

    def _rows(
        self,
        trainer: pl.Trainer,
        pl_module: StageModule,
        index: int,
        prompts: list[tuple[str | None, list[int]]],
    ) -> list[dict[str, Any]]:
        tokenizer = data_of(trainer).tokenizer
        rows = []
        for (source, ids), answer in zip(prompts, self._answers(trainer, pl_module, prompts), strict=True):
            texts = tokenizer.decode(ids), tokenizer.decode(answer, skip_special_tokens=True)
            rows.append(
                {"model": index, "source": source, "prompt": texts[0], "answer": texts[1], "tokens": len(answer)}
            )
        return rows

    def _answers(
        self, trainer: pl.Trainer, pl_module: StageModule, prompts: list[tuple[str | None, list[int]]]
    ) -> list[list[int]]:
        policy, data = pl_module.trained, data_of(trainer)
        model, pad = policy.model, data.pad_token_id
        rows, mask = left_padded([ids for _, ids in prompts], pad, pl_module.device)
        ends = end_tokens(model, data.tokenizer)
        settings = GenerationConfig(
            max_new_tokens=self.max_new_tokens, do_sample=False, use_cache=True, eos_token_id=ends, pad_token_id=pad
        )
        if not isinstance(model, GenerationMixin):
            raise TypeError(f"{type(model).__name__} has no `generate`")
        was_training = policy.training
        policy.eval()
        try:
            in_precision = trainer.precision_plugin.forward_context()
            with torch.no_grad(), packed_rows(False), in_precision, CASTS.generating():
                found = model.generate(input_ids=rows, attention_mask=mask, generation_config=settings)
        finally:
            policy.train(was_training)
        return [until_end(answer, set(ends)) for answer in found[:, rows.shape[1] :].tolist()]


class StageTable(StageModels):
    """Says at each stage's end what it did: a table where a bar is shown, else one line `stage_end {...}` in JSON."""

    # Read only.
    file_name = StageEvaluation.file_name

    def look_at(self, trainer: pl.Trainer, pl_module: StageModule, index: int) -> None:
        """After stage t = `index`, on rank 0. The held-out pairs are what `StageEvaluation` has just measured."""
        record = pl_module.record
        if not trainer.is_global_zero or index == 0 or index not in record.folders:
            return
        logs = next(callback for callback in callbacks_of(trainer) if isinstance(callback, MetricsLog))
        summary = asdict(logs.summaries[index]) if index in logs.summaries else {}
        rows = [row for row in self.rows(trainer) if row["model"] == index]
        count, place = len(data_of(trainer).stages()), (record.folders[index], record.digests[index])
        bar = shown_bar(trainer)
        if bar is None:
            log.info("%s", stage_line(index, count, summary, rows, *place))
        else:
            print_table(bar, stage_title(index, count, summary, *place), *stage_table(rows))

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Nothing: what had ended before was said then."""
