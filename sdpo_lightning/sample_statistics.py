"""Rank 6: how far the policy has moved by its own answers: KL to the reference and to S, entropy, length."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn

from sdpo_lightning.adapter_reference import frozen_adapter_kept
from sdpo_lightning.casts import CASTS
from sdpo_lightning.completion_logps import SummedLogps
from sdpo_lightning.data.collate import TokenizedPair
from sdpo_lightning.data.pair_lists import data_of
from sdpo_lightning.files import MetricsFile
from sdpo_lightning.random_states import random_states_kept
from sdpo_lightning.ranks import from_every_rank
from sdpo_lightning.reference import is_sft
from sdpo_lightning.run_parts import StageModule, run_dir, stage_module
from sdpo_lightning.run_state import leaves_files
from sdpo_lightning.sampling import (
    Answer,
    Message,
    Scored,
    chosen_prompts,
    draw_answers,
    end_tokens,
    sample_statistics,
    uniforms,
)
from sdpo_lightning.strategy import sharding_of
from sdpo_lightning.types import ConfigurationError, PairLogps, PreferenceBatch

log = logging.getLogger(__name__)

FILE_NAME = "sample_statistics.csv"
COLUMNS = (
    "samples/kl_reference",
    "samples/kl_reference_standard_error",
    "samples/kl_sft",
    "samples/kl_sft_standard_error",
    "samples/entropy",
    "samples/answer_length",
    "samples/ended",
    "samples/answers",
)

# Of a batch of B pairs of answers.
Logps = Callable[[PreferenceBatch], PairLogps]


class SampleStatistics(pl.Callback):
    """Every n optimizer steps: draws answers from the policy, and logs what `sample_statistics` says of them.

    Leaves `sample_statistics.csv`; loggers get `samples/...`. Answers depend on seed, step and prompt alone, not on the
    run's random states or on the number of ranks (but for rounding), and training is the same bit for bit without it.

    The policy is as the step left it. S, where the reference isn't it, and the M_t of a cached reference are read from
    the disk for each measurement and let go of: for that moment one more model is in memory (with adapters, none).

    Args:
        every_n_steps: optimizer steps of the run between two measurements.
        prompts: texts, or lists of messages; None takes held-out prompts of all sources by turns (without any, of the
            training pairs).
        num_prompts: how many are taken where none are given.
        answers_per_prompt: of each measurement, an even number: two make a batch's pair.
        max_new_tokens: most tokens of an answer; a KL is that of so many tokens.
        seed: of the answers.

    Raises:
        ConfigurationError: a number outside its range.
    """

    def __init__(
        self,
        every_n_steps: int,
        prompts: list[str | list[Message]] | None = None,
        num_prompts: int = 16,
        answers_per_prompt: int = 2,
        max_new_tokens: int = 128,
        seed: int = 0,
    ) -> None:
        numbers = {"every_n_steps": every_n_steps, "num_prompts": num_prompts, "max_new_tokens": max_new_tokens}
        for name, value in numbers.items():
            if value < 1:
                raise ConfigurationError(f"`{name}` of SampleStatistics is {value}, expected 1 or more")
        if answers_per_prompt < 2 or answers_per_prompt % 2:
            raise ConfigurationError(
                f"`answers_per_prompt` of SampleStatistics is {answers_per_prompt}, expected 2, 4, 6, ..."
            )
        if prompts == []:
            raise ConfigurationError("`prompts` of SampleStatistics is empty; name some, or leave it out")
        self.every_n_steps = every_n_steps
        self.prompts = prompts
        self.num_prompts = num_prompts
        self.answers_per_prompt = answers_per_prompt
        self.max_new_tokens = max_new_tokens
        self.seed = seed
        self._step = 0
        self._file: MetricsFile | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse what it can't measure, before any weights are loaded.

        Raises:
            ConfigurationError: sharded weights, or logps that aren't plain sums.
        """
        pl_module = stage_module(pl_module)
        if stage != "fit":
            return
        if sharding_of(trainer.strategy) is not None:
            raise ConfigurationError(
                "SampleStatistics with sharded weights, on which `generate` doesn't run; leave it out of "
                "`trainer.callbacks`, or use `trainer.strategy: ddp` or one device"
            )
        own = type(pl_module).compute_logps.__qualname__ != "DPOLitModule.compute_logps"
        logps = pl_module.logps
        if own or not isinstance(logps, SummedLogps) or logps.ld_alpha < 1:
            name = "an overridden `compute_logps`" if own else f"`model.logps: {logps}`"
            raise ConfigurationError(
                f"SampleStatistics with {name}: a KL needs the plain sum over an answer's tokens; leave it out of "
                "`trainer.callbacks`"
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open the file; a resumed run drops the rows beyond its checkpoint."""
        pl_module = stage_module(pl_module)
        self._step = trainer.global_step
        if trainer.is_global_zero and leaves_files(trainer):
            columns = ["step", "stage/index", *COLUMNS]
            self._file = MetricsFile(run_dir(trainer) / FILE_NAME, columns, trainer.global_step)
        if not pl_module.reference.scores_any_pair and pl_module.reference.settings()["model.reference"] == "external":
            log.info("SampleStatistics: no KL to the reference, which is another model's table of logps")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure after every n-th step."""
        pl_module = stage_module(pl_module)
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        if self._step % self.every_n_steps:
            return
        values = {f"samples/{name}": value for name, value in self.measure(trainer, pl_module).items()}
        if self._file is not None:
            self._file.append({"step": self._step, "stage/index": pl_module.stage_under_way.index, **values})
        # For other callbacks. Loggers get it whatever `log_every_n_steps` is.
        pl_module.log_dict(values, logger=False, rank_zero_only=False)
        for logger in trainer.loggers:
            logger.log_metrics(values, step=self._step)

    def measure(self, trainer: pl.Trainer, pl_module: StageModule) -> dict[str, float]:
        """Draw answers and score them; equal on all ranks. A collective."""
        policy, modes = pl_module.trained, pl_module.trained.training
        with random_states_kept(), torch.no_grad():
            policy.eval()
            try:
                rows = self._scored(trainer, pl_module)
            finally:
                policy.train(modes)
        return sample_statistics([row for part in from_every_rank(rows) for row in part])

    def _scored(self, trainer: pl.Trainer, pl_module: StageModule) -> list[Scored]:
        drawn = self._draw(trainer, pl_module)
        scored = [self._logps(batch, lambda b: pl_module.score(pl_module.trained, b)) for batch, _ in drawn]
        references: list[list[float]] | None = None
        with _reference_logps(pl_module, trainer) as reference:
            if reference is not None:
                references = [self._logps(batch, reference) for batch, _ in drawn]
        if references is not None and is_sft(pl_module.reference, pl_module.record.reference):
            sft = references
        else:
            with _read(pl_module, lambda: pl_module.read_model(None)) as model:
                sft = [self._logps(batch, lambda b: pl_module.score(model, b)) for batch, _ in drawn]
        rows: list[Scored] = []
        for number, (_, answers) in enumerate(drawn):
            known: Sequence[float | None] = [None] * len(answers) if references is None else references[number]
            rows += map(Scored, answers, scored[number], known, sft[number])
        return rows

    def _draw(self, trainer: pl.Trainer, pl_module: StageModule) -> list[tuple[PreferenceBatch, list[Answer]]]:
        """This rank's share: batches of pairs, and their answers: first the chosen sides, then the rejected ones."""
        data, model = data_of(trainer), pl_module.trained.model
        prompts = [ids for _, ids in chosen_prompts(data, self.prompts, self.num_prompts)]
        pairs = [ids for ids in prompts for _ in range(self.answers_per_prompt // 2)]
        own = list(range(len(pairs)))[trainer.global_rank :: trainer.world_size]
        ends, size = end_tokens(model, data.tokenizer), data.batching.batch_size
        drawn = []
        for start in range(0, len(own), size):
            part = own[start : start + size]
            rows = [2 * n for n in part] + [2 * n + 1 for n in part]
            numbers = torch.stack([uniforms(self.seed, trainer.global_step, row, self.max_new_tokens) for row in rows])
            with trainer.precision_plugin.forward_context():
                answers = draw_answers(model, [pairs[n // 2] for n in rows], numbers, ends, data.pad_token_id)
            sides = zip(part, answers[: len(part)], answers[len(part) :], strict=True)
            tokenized = [TokenizedPair(pairs[n], first.ids, second.ids) for n, first, second in sides]
            # Ids that no table holds.
            ids = [-1 - n for n in part]
            batch = data.collator(ids, tokenized, [1.0] * len(part), len(part)).to(pl_module.device)
            drawn.append((batch, answers))
        return drawn

    @staticmethod
    def _logps(batch: PreferenceBatch, logps: Logps) -> list[float]:
        with CASTS.held():
            pairs = logps(batch)
        return torch.cat([pairs.chosen, pairs.rejected]).double().tolist()


@contextmanager
def _reference_logps(pl_module: StageModule, trainer: pl.Trainer) -> Iterator[Logps | None]:
    """What scores by the reference: itself, or the M_t that it has cached logps of; None for another model's."""
    if pl_module.reference.scores_any_pair:
        yield pl_module.reference.logps
    elif pl_module.record.reference < 0:
        yield None
    else:
        with _read(pl_module, lambda: pl_module.load_reference_weights(run_dir(trainer))) as model:
            yield lambda batch: pl_module.score(model, batch)


@contextmanager
def _read(pl_module: StageModule, read: Callable[[], nn.Module]) -> Iterator[nn.Module]:
    """A model for a moment; with adapters it takes the place of the frozen one."""
    with nullcontext() if pl_module.lora is None else frozen_adapter_kept(pl_module.trained):
        model = read().requires_grad_(False).eval()
        try:
            yield model
        finally:
            del model
            gc.collect()
            torch.cuda.empty_cache()
