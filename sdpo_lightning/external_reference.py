"""Rank 6: a reference that is no model of the run (arXiv 2403.19270, Table 1), in memory or as two floats a pair."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from sdpo_lightning.backbone import CausalBackbone, state_digest, weights_digest
from sdpo_lightning.checks import check_vocabulary
from sdpo_lightning.data.prepare import load_tokenizer
from sdpo_lightning.logp_tables import cache_key, known_logps, read_table, score_pairs, table_model, write_table
from sdpo_lightning.ranks import from_first_rank
from sdpo_lightning.reference import ReferencePolicy
from sdpo_lightning.types import (
    ConfigurationError,
    ExternalInputs,
    ExternalModel,
    LogpTable,
    PairLogps,
    PreferenceBatch,
    QuantizationName,
    ReferenceInputs,
    RunFacts,
    Stage,
)

log = logging.getLogger(__name__)


class OutsideReference(ReferencePolicy):
    """What references have in common that no stage moves.

    Args:
        model_name_or_path: a Hugging Face folder or hub name with safetensors weights.
        quantization: of its weights while it scores: `nf4` or `int8`.
    """

    starts_at_policy = False

    def __init__(self, model_name_or_path: str, quantization: QuantizationName | None = None) -> None:
        self.model_name_or_path = model_name_or_path
        self.quantization: QuantizationName | None = quantization

    def model_index(self, stage: Stage) -> int:
        """No M_t."""
        return -1

    def settings(self) -> dict[str, Any]:
        """That it is external; which model it is the digest says, wherever it lies."""
        return {"model.reference": "external", "model.reference.quantization": self.quantization}

    def advance(self, policy: CausalBackbone, stage: Stage, inputs: ReferenceInputs) -> None:
        """Nothing: it doesn't move."""

    def stay(self, stage: Stage, inputs: ReferenceInputs) -> None:
        """Nothing: it doesn't move."""

    def restore(
        self, load_weights: Callable[[], CausalBackbone], stage: Stage, inputs: ReferenceInputs
    ) -> None:
        """Nothing: it was there before the policy."""

    def _named(self, digest: str) -> ExternalModel:
        path = Path(self.model_name_or_path)
        return ExternalModel(str(path.absolute()) if path.is_dir() else self.model_name_or_path, digest)


class ExternalReference(OutsideReference):
    """Another model in memory: one forward a pair an epoch. It must have the policy's tokenizer.

    Args:
        model_name_or_path: a Hugging Face folder or hub name with safetensors weights.
        quantization: of its weights: `nf4` or `int8`; then each rank holds it whole.
        offload: keep its weights in the memory of the CPU between forward passes.
    """

    def __init__(
        self, model_name_or_path: str, quantization: QuantizationName | None = None, offload: bool = False
    ) -> None:
        super().__init__(model_name_or_path, quantization)
        self.offload = offload
        self._model: CausalBackbone | None = None

    def check(self, run: RunFacts) -> None:
        """Refuse another tokenizer's model.

        Raises:
            ConfigurationError: with what to use.
        """
        check_same_tokens(run.tokenizer, self.model_name_or_path)

    def before_policy(self, inputs: ExternalInputs) -> ExternalModel:
        """Load it."""
        model = inputs.load(self.model_name_or_path, self.quantization)
        assert isinstance(model, CausalBackbone)
        self._model = (model.parked() if self.offload else model).eval()
        return self._named(_digest(self._model, self.quantization))

    def logps(self, batch: PreferenceBatch) -> PairLogps:
        """One no-grad forward."""
        assert self._model is not None, "the reference is asked before it was loaded"
        return self._compute_logps(self._model, batch)

    def digest(self) -> str:
        """Digest of its weights."""
        assert self._model is not None
        return _digest(self._model, self.quantization)

    def models(self) -> Sequence[nn.Module]:
        """The external model. Of a quantised one the scales stay where they are."""
        return [] if self._model is None else [self._model]


class CachedExternalReference(OutsideReference):
    """Another model that scores all pairs of all stages once, before the policy is loaded, and is then let go.

    So the two are never in memory together. The table lies in `references/external-<key>.safetensors`, whose key is of
    rows, tokenizer and numerics; a resumed run reads it and doesn't load the model.

    With a tokenizer of its own the same text is scored: messages rendered by its own chat template, and each answer
    ended by its own token once. Logps are summed over its tokens, so they answer for the same text as the policy's;
    single tokens and lengths of the two don't correspond, and the lengths that a loss is given are the policy's.

    Args:
        model_name_or_path: a Hugging Face folder or hub name with safetensors weights.
        tokenizer: folder or hub name, with its chat template; None: the policy's ids are its own.
        max_length: most of its own tokens of prompt + completion; a longer pair is an error. None: any number.
        quantization: of its weights while it scores: `nf4` or `int8`.
    """

    scores_any_pair = False

    def __init__(
        self,
        model_name_or_path: str,
        tokenizer: str | None = None,
        max_length: int | None = None,
        quantization: QuantizationName | None = None,
    ) -> None:
        super().__init__(model_name_or_path, quantization)
        self.tokenizer = tokenizer
        self.max_length = max_length
        self._table: LogpTable | None = None
        if max_length is not None and tokenizer is None:
            raise ConfigurationError(
                f"`max_length` of CachedExternalReference is {max_length} without a `tokenizer` of its own; leave it "
                "out, or give both"
            )

    def settings(self) -> dict[str, Any]:
        """With its tokenizer."""
        return super().settings() | {"model.reference.tokenizer": self.tokenizer}

    def check(self, run: RunFacts) -> None:
        """Refuse another tokenizer that isn't named, and with a named one what can't be compared.

        Raises:
            ConfigurationError: with the setting to change.
        """
        if self.tokenizer is None:
            return check_same_tokens(run.tokenizer, self.model_name_or_path)
        check_vocabulary(load_tokenizer(self.tokenizer), self.model_name_or_path)
        if run.needs_own_lengths:
            raise ConfigurationError(
                "`model.reference` has a tokenizer of its own, whose tokens and lengths aren't the policy's, and the "
                "run's loss or `compute_logps` needs logps of tokens or per token; use summed logps, or a reference "
                "with the policy's tokenizer"
            )
        if run.rows_cut:
            listed = ", ".join(f"{count} of {name!r}" for name, count in run.rows_cut.items())
            raise ConfigurationError(
                f"`data.max_length` cuts {listed} pairs for the policy, and a reference with a tokenizer of its own "
                "would score the whole text; raise `data.max_length`, or leave these pairs out of `data.sources`"
            )

    def before_policy(self, inputs: ExternalInputs) -> ExternalModel:
        """Find the table, or load the model, score all pairs and let it go."""
        pairs = inputs.pairs(self.tokenizer, self.max_length)
        name = self._named("").name
        key = cache_key(replace(pairs, numerics=f"{pairs.numerics} {name} {self.quantization}"))
        # By its key: a run that is refused later doesn't write over another one's table.
        path = pairs.folder / f"external-{key[:16]}.safetensors"
        self._table = from_first_rank(lambda: read_table(path, key))
        if self._table is None:
            batches = iter(pairs.batches)
            model = inputs.load(self.model_name_or_path, self.quantization)
            assert isinstance(model, CausalBackbone)
            digest = _digest(model, self.quantization)
            log.info("scoring all pairs by %s", name)
            table = score_pairs(model, batches, inputs.score, title="logps of the external reference")
            del model
            gc.collect()
            torch.cuda.empty_cache()
            from_first_rank(lambda: write_table(path, table, key, digest))
            self._table = table
        return self._named(from_first_rank(lambda: table_model(path)))

    def logps(self, batch: PreferenceBatch) -> PairLogps:
        """Look the pairs up."""
        assert self._table is not None, "the reference is asked before it was scored"
        return known_logps(self._table, batch)


def check_same_tokens(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Make sure that a model understands the ids of the data.

    Args:
        tokenizer: of the data.
        name: of the model, in whose folder its own tokenizer lies.

    Raises:
        ConfigurationError: a token of the data's is none of its own, or has another id there.
    """
    try:
        theirs = load_tokenizer(name).get_vocab()
    except ConfigurationError as error:
        raise ConfigurationError(
            f"`model.reference`: no tokenizer at {name!r} to compare with the policy's; put its files there, or name "
            "it as `tokenizer` of a CachedExternalReference"
        ) from error
    ours = tokenizer.get_vocab()
    differing = sorted(token for token, number in ours.items() if theirs.get(token) != number)
    if differing:
        first = differing[0]
        raise ConfigurationError(
            f"`model.reference`: {len(differing)} of the policy's {len(ours)} tokens have other ids or none in the "
            f"tokenizer of {name!r} ({first!r}: {ours[first]} -> {theirs.get(first)}), so it can't score the policy's "
            f"ids; use CachedExternalReference with `tokenizer: {name}`, which scores the same text"
        )


def _digest(model: CausalBackbone, quantization: QuantizationName | None) -> str:
    # The scales of quantised weights are no parameters.
    return weights_digest(model) if quantization is None else state_digest(model)
