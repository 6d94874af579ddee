"""Rank 5: the rows of all sources in the ids of another tokenizer, under the same pair ids.

Text is what both models share: each renders the same messages by its own template, and ends an answer its own way.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import datasets
import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from sdpo_lightning.data.cache import fingerprints
from sdpo_lightning.data.collate import PairTokenizer, TokenizedPair
from sdpo_lightning.data.declaration import PreferenceSource
from sdpo_lightning.data.loader import PairStore, StageLoader
from sdpo_lightning.data.messages import Text, unpack
from sdpo_lightning.data.rows import VAL_FIRST_ROW
from sdpo_lightning.data.sources import read_source
from sdpo_lightning.data.tables import TableWriter
from sdpo_lightning.types import ConfigurationError, PreferenceBatch

log = logging.getLogger(__name__)

# Nothing is ever cut here: what is too long is refused.
_NO_LIMIT = 2**31
_IDS = datasets.List(datasets.Value("int32"))
_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids", "chosen_unscored", "rejected_unscored")
_FEATURES = datasets.Features({"pair_id": datasets.Value("int64")} | dict.fromkeys(_COLUMNS, _IDS))


@dataclass(frozen=True, eq=False)
class ForeignRows:
    """Which rows another tokenizer is to take, and how.

    Attributes:
        sources: in the order of `data.sources`.
        on_bad_row: `data.on_bad_row`.
        tokenizer: the other one.
        name: what it was read from, for messages.
        max_length: most tokens of prompt + completion; None: any number.
        end_of_turn: text of the policy's EOS token, which may end an answer of a string row; the other tokenizer
            writes its own instead.
    """

    sources: Sequence[PreferenceSource]
    on_bad_row: Literal["drop", "error"]
    tokenizer: PreTrainedTokenizerBase
    name: str
    max_length: int | None
    end_of_turn: str

    def digest(self, pair_ids: Sequence[int]) -> str:
        """sha256 over all that decides the ids of these pairs; reads the files, and tokenises nothing."""
        prints = fingerprints(self.sources, PairTokenizer(self.tokenizer, _NO_LIMIT), self.on_bad_row)
        parts = [item.key for item in prints] + [self.end_of_turn, hashlib.sha256(str(pair_ids).encode()).hexdigest()]
        return hashlib.sha256(str(parts).encode()).hexdigest()

    def store(self, pair_ids: Sequence[int]) -> PairStore:
        """Tokenise these pairs, in memory.

        Raises:
            ConfigurationError: one is beyond `max_length`, or can't be tokenised at all: the policy would train on a
                pair whose text the reference hasn't seen.
        """
        wanted, lost = set(pair_ids), Counter[str]()
        writer = TableWriter(_FEATURES)
        log.info("tokenising %d pairs by %s", len(pair_ids), self.name)
        for pair_id, pair in self._pairs(wanted):
            if isinstance(pair, str):
                lost[pair] += 1
            elif self.max_length is not None and _longest(pair) > self.max_length:
                lost[f"longer than its `max_length` of {self.max_length}"] += 1
            else:
                unscored = ([n for run in runs for n in run] for runs in (pair.chosen_unscored, pair.rejected_unscored))
                writer.add((pair_id, pair.prompt_ids, pair.chosen_ids, pair.rejected_ids, *unscored))
        if lost:
            listed = ", ".join(f"{count} {reason}" for reason, count in sorted(lost.items()))
            raise ConfigurationError(
                f"`model.reference`: {lost.total()} of the {len(pair_ids)} pairs that are trained on or held out can't "
                f"be scored whole with the tokenizer {self.name!r}: {listed}; raise "
                "`model.reference.init_args.max_length`, or leave these pairs out of `data.sources`"
            )
        return PairStore([writer.finish()])

    def _pairs(self, wanted: set[int]) -> Iterator[tuple[int, TokenizedPair | str]]:
        for index, source in enumerate(self.sources):
            for path, first_row in ((None, 0), (source.val_path, VAL_FIRST_ROW))[: 1 + (source.val_path is not None)]:
                read = read_source(source, index, path, self.on_bad_row, first_row)
                if read.conversational and self.tokenizer.chat_template is None:
                    raise ConfigurationError(
                        f"`model.reference`: source {source.name!r} is conversational, but the tokenizer {self.name!r} "
                        "has no chat template; give it one, or use another `tokenizer`"
                    )
                plain = PairTokenizer(self.tokenizer, _NO_LIMIT)
                tokenize = plain.with_variables(source.chat_template_kwargs)
                packed = "extras" in read.rows.column_names
                for row in read.rows:
                    if row["pair_id"] in wanted:
                        sides = ("prompt", "chosen", "rejected")
                        prompt, chosen, rejected = (unpack(row[side]) if packed else row[side] for side in sides)
                        extras = row["extras"] if packed else ""
                        yield row["pair_id"], tokenize(prompt, self._open(chosen), self._open(rejected), extras)

    def _open(self, completion: Text) -> Text:
        """Without the policy's end: the other tokenizer adds its own, so each side has one."""
        return completion.removesuffix(self.end_of_turn) if isinstance(completion, str) else completion


def _longest(pair: TokenizedPair) -> int:
    return len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids))


@dataclass(frozen=True, eq=False)
class WithLengthsOf:
    """Batches of another tokenizer that count the policy's tokens: no metric divides by foreign lengths.

    Attributes:
        batches: of the other tokenizer.
        own: the policy's pairs.
    """

    batches: StageLoader
    own: PairStore

    def __iter__(self) -> Iterator[PreferenceBatch]:
        for batch in self.batches:
            lengths = self.own.lengths(batch.pair_id.tolist())[1:]
            yield replace(batch, completion_lengths=torch.from_numpy(np.ascontiguousarray(lengths)).reshape(-1))
