"""Rank 5: stages whose pairs M_{t-1} helps to make: made once, kept in the run directory, found there again.

`new_pairs/0t-NAME.jsonl` has the rows, `.json` beside it what they were made with. A checkpoint of stage t or later has
the digest of the tokenised pairs, and takes nothing else. Of several ranks the first makes the rows, and what only it
can know it tells the others; then each reads the file.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning.pytorch as pl
from datasets import Dataset, concatenate_datasets

from sdpo_lightning.backbone import weights_digest
from sdpo_lightning.data.declaration import PreferenceSource
from sdpo_lightning.data.loader import PairStore
from sdpo_lightning.data.model_before import model_before
from sdpo_lightning.data.new_pairs import PairSource
from sdpo_lightning.data.pair_generators import PairGenerator
from sdpo_lightning.data.pair_lists import data_of
from sdpo_lightning.data.prepare import Preparation, build_source
from sdpo_lightning.failpoints import failpoint
from sdpo_lightning.files import file_digest, write_json
from sdpo_lightning.generation import Generator
from sdpo_lightning.ledger import set_aside
from sdpo_lightning.publishing import write_text
from sdpo_lightning.random_states import random_states_kept
from sdpo_lightning.ranks import from_every_rank, from_first_rank, is_first, side_by_side, together
from sdpo_lightning.run_parts import stage_module
from sdpo_lightning.stopping import STOP
from sdpo_lightning.strategy import sharding_of
from sdpo_lightning.types import Chunk, ConfigurationError, ResumeError, Stage

log = logging.getLogger(__name__)


class MadePairs:
    """The stages of `data.pair_sources`.

    Args:
        sources: a stage each, behind all others.
        taken: names of the sources that are read, whose number is the first place of these in pair ids.
        by_tokens: whether `data.batch_tokens` is given.
        on_changed_rows: of the data module.
        generator: what samples; None is the policy itself.

    Attributes:
        digests: stage name -> digest of the tokenised pairs, of the stages that have been provided.

    Raises:
        ConfigurationError: names or numbers that don't fit, or settings that need to know the pairs beforehand.
    """

    def __init__(
        self,
        sources: Sequence[PairSource],
        taken: Sequence[str],
        by_tokens: bool,
        on_changed_rows: str,
        generator: PairGenerator | None = None,
    ) -> None:
        self.sources = list(sources)
        self.generator = generator
        self._first = len(taken)
        self.digests: dict[str, str] = {}
        self._expected: dict[str, str] = {}
        for source in self.sources:
            # The rules for names are those of a source.
            PreferenceSource(source.name, "made")
            if source.num_pairs < 1:
                raise ConfigurationError(f"`num_pairs` of {source.name!r} is {source.num_pairs}, expected at least 1")
        if twice := [name for name, count in Counter([*taken, *self.names]).items() if count > 1]:
            raise ConfigurationError(f"`data.pair_sources` and `data.sources` need unique names, found {twice} twice")
        if self.sources and (by_tokens or on_changed_rows == "accept"):
            raise ConfigurationError(
                "`data.pair_sources` with `data.batch_tokens` or `data.on_changed_rows: accept`: the steps of a plan "
                "can't be counted in tokens of pairs that don't exist yet, and what was made isn't made again"
            )

    @property
    def names(self) -> list[str]:
        """Of the stages."""
        return [source.name for source in self.sources]

    def name_of(self, index: int) -> str:
        """The stage of a place in pair ids."""
        return self.sources[index - self._first].name

    def chunks(self) -> list[Chunk]:
        """Of the declared sizes; the ids are known before the pairs are."""
        return [
            Chunk(source.name, list(range(index << 40, (index << 40) + source.num_pairs)))
            for index, source in enumerate(self.sources, self._first)
        ]

    def settings(self) -> list[dict[str, Any]] | None:
        """What a resumed run must agree on; None where there are none, as in runs of before."""
        return [source.settings() for source in self.sources] or None

    def check(self, trainer: pl.Trainer) -> None:
        """Refuse what would end the run later.

        Raises:
            ConfigurationError: sources whose files aren't there, or a generator that isn't there or can't read M_{t-1}.
        """
        self.check_files()
        if not self.sources or self.generator is None:
            return
        module = trainer.lightning_module
        if module.quantization is not None or (module.lora is not None and sharding_of(trainer.strategy) is not None):
            what = "`model.quantization`" if module.quantization is not None else "`model.lora` and sharded weights"
            raise ConfigurationError(
                f"`data.pair_generator` with {what}: adapters can't be merged into M_{{t-1}} for it; leave "
                "`data.pair_generator` out, and transformers sample"
            )
        from_first_rank(self.generator.check)

    def check_files(self) -> None:
        """What of it can be seen without a Trainer.

        Raises:
            ConfigurationError: sources whose files aren't there, or a generator for none.
        """
        if self.generator is not None and not self.sources:
            raise ConfigurationError("`data.pair_generator` without `data.pair_sources`: leave it out")
        self.settings()

    def begun(self, names: Sequence[str]) -> dict[str, str]:
        """The digests of stages that have begun.

        Args:
            names: of all stages that have.
        """
        return {name: digest for name, digest in self.digests.items() if name in names}

    def go_on(self, digests: Mapping[str, str]) -> None:
        """Take nothing but these pairs for the stages that a checkpoint has begun."""
        self._expected = dict(digests)

    def provide(
        self,
        trainer: pl.Trainer,
        stages: Sequence[Stage],
        current: Stage,
        how: Preparation,
        settle: Callable[[pl.Trainer], None],
    ) -> None:
        """Have the pairs of all stages up to this one in the store. The policy is M_{t-1} when stage t's are made.

        A collective.

        Args:
            trainer: of the run.
            stages: the plan.
            current: the stage about to begin, or under way.
            how: tokenizer and limits.
            settle: called before the model is written or set aside: a save in the background may be reading it.

        Raises:
            ConfigurationError: too few rows.
            ResumeError: the rows of a stage that has begun aren't those that it began with.
        """
        store: PairStore = data_of(trainer).store
        for index, source in enumerate(self.sources, self._first):
            stage = next(stage for stage in stages if stage.name == source.name)
            if stage.index > current.index or source.name in self.digests:
                continue
            path = Path(trainer.default_root_dir) / "new_pairs" / f"{stage.folder_name}.jsonl"
            making = _Making(source, index, path, replace(how, num_proc=1, on_bad_row="drop"))
            expected = self._expected.get(source.name)
            if expected is None:
                making.make_or_find(trainer, stage.index, self.generator, settle)
            elif not from_first_rank(path.exists):
                raise ResumeError(f"{path} is gone, with the pairs that stage {stage.index} began with; restore it")
            making.bring_to_nodes(trainer)
            store.add([side_by_side(making.declared_pairs)])
            digest = store.digest(list(stage.pair_ids))
            if expected is not None and digest != expected:
                raise ResumeError(
                    f"{path}, or the tokenizer or `data.max_length`, isn't what stage {stage.index} began with: its "
                    f"pairs have sha {digest[:12]}, the checkpoint's {expected[:12]}; restore the file"
                )
            self.digests[source.name] = digest


class _Making:
    """The rows of one stage on the disk, and what can be trained on of them."""

    def __init__(self, source: PairSource, index: int, path: Path, how: Preparation) -> None:
        self._source, self._index, self._path, self._how = source, index, path, how
        self._note = path.with_suffix(".json")

    def make_or_find(
        self,
        trainer: pl.Trainer,
        stage_index: int,
        chosen: PairGenerator | None,
        settle: Callable[[pl.Trainer], None],
    ) -> None:
        """Leave rows that M_{t-1} has made by these settings, unless they are there. A collective."""
        name, root = f"M_{stage_index - 1}", Path(trainer.default_root_dir)
        made_with = {
            "model": name,
            "weights_sha256": weights_digest(stage_module(trainer.lightning_module).trained),
            "settings": self._source.settings(),
            "max_length": self._how.tokenize.max_length,
            # Notes of before have none.
            **({} if chosen is None else {"generator": chosen.settings()}),
        }
        if from_first_rank(lambda: self._finds(root, made_with, stage_index)):
            return
        settle(trainer)
        log.info("stage %d %r: %s makes %d pairs", stage_index, self._source.name, name, self._wanted)
        folder = self._path.with_name(f".{self._path.stem}.model.tmp")
        with model_before(trainer, data_of(trainer).tokenizer, name, folder, chosen) as answering:
            make = (lambda: self._make(answering, stage_index, made_with)) if is_first() else None
            together(make, lambda: STOP.hear_of(from_every_rank(STOP.signal)))

    def _finds(self, root: Path, made_with: Mapping[str, Any], stage_index: int) -> bool:
        """Whether the rows are there; others are moved away."""
        if self._path.exists() and self._note.exists():
            note = json.loads(self._note.read_text())
            if note["made_with"] == made_with and note["file_sha256"] == file_digest(self._path):
                log.info("stage %d %r: rows of %s are there", stage_index, self._source.name, self._path)
                return True
            log.warning("%s was made with other weights or settings: moved to stale/", self._path)
        for path in (self._path, self._note):
            set_aside(root, path)
        return False

    def _make(
        self,
        answering: Callable[[], AbstractContextManager[Generator]],
        stage_index: int,
        made_with: Mapping[str, Any],
    ) -> None:
        # A run that goes on finds the rows, and draws nothing: neither may a scorer of this one shift what follows.
        with random_states_kept(), answering() as generator:
            rows, reasons = self._take(generator, stage_index)
        self._write(rows)
        failpoint("after_new_pairs")
        note = {"rows": len(rows), "none": dict(reasons), "made_with": made_with}
        write_json(self._note, note | {"file_sha256": file_digest(self._path)})
        if reasons:
            log.warning("stage %d %r: no pair from %s", stage_index, self._source.name, _listed(reasons))

    def bring_to_nodes(self, trainer: pl.Trainer) -> None:
        """Have the first node's files on every node that doesn't share its disk. A collective."""
        if trainer.num_nodes == 1:
            return
        for path in (self._path, self._note):
            digest = from_first_rank(partial(_digest_if_there, path))
            lacks = digest is not None and _digest_if_there(path) != digest
            if not any(from_every_rank(lacks)):
                continue
            content = from_first_rank(path.read_bytes)
            writes = lacks and trainer.local_rank == 0
            together(partial(_take_over, trainer, path, content) if writes else None)

    @property
    def _wanted(self) -> int:
        return self._source.num_pairs

    def _take(self, generator: Generator, stage_index: int) -> tuple[list[dict[str, Any]], Counter[str]]:
        """Rows until enough of them can be trained on, or there are no more; and counted reasons for none."""
        rows: list[dict[str, Any]] = []
        reasons: Counter[str] = Counter()
        tries = self._source.pairs(generator, stage_index)
        usable = 0
        while usable < self._wanted:
            before = len(rows)
            for given in tries:
                STOP.leave_if_asked()
                if isinstance(given, str):
                    reasons[given] += 1
                    continue
                rows.append(given)
                if len(rows) - before == self._wanted - usable:
                    break
            if len(rows) == before:
                break
            self._write(rows)
            usable = len(self._tokenised()[0])
        return rows, reasons

    def _write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        write_text(self._path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

    def _tokenised(self) -> tuple[list[dict[str, Any]], Any, dict[str, int]]:
        """What can be trained on, its columns, and dropped rows by reason."""
        if not self._path.stat().st_size:
            return [], None, {}
        with TemporaryDirectory() as folder:
            source = PreferenceSource(self._source.name, str(self._path))
            content = build_source(self._index, source, self._how, Path(folder))
            part = concatenate_datasets([Dataset.from_file(str(Path(folder) / name)) for name in content["parts"][0]])
            return part.to_list(), part.features, content["dropped"]

    def declared_pairs(self) -> Dataset:
        """As many as declared, under the declared ids.

        Raises:
            ConfigurationError: there are fewer, and they are not to be repeated.
        """
        rows, features, dropped = self._tokenised()
        wanted, found = self._wanted, len(rows)
        if dropped:
            log.warning("%s: rows dropped: %s", self._path, _listed(dropped))
        if found < wanted:
            text = f"{self._source.name!r} has {found} of the {wanted} pairs that `num_pairs` declares"
            if not found or self._source.on_few == "error":
                reasons = json.loads(self._note.read_text())["none"]
                raise ConfigurationError(
                    f"{text}; no pair from: {_listed(Counter(reasons) + Counter(dropped))}. Give more prompts, fewer "
                    "`num_pairs`, or `on_few: repeat`"
                )
            log.warning("%s: %d of them are repeats", text, wanted - found)
        ids = range(self._index << 40, (self._index << 40) + wanted)
        renumbered = [row | {"pair_id": i} for row, i in zip(islice(cycle(rows), wanted), ids, strict=True)]
        return Dataset.from_list(renumbered, features=features)


def _take_over(trainer: pl.Trainer, path: Path, content: bytes) -> None:
    set_aside(Path(trainer.default_root_dir), path)
    write_text(path, content.decode())
    log.info("%s is a copy of the first node's", path)


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items())) or "nothing"


def _digest_if_there(path: Path) -> str | None:
    return file_digest(path) if path.exists() else None
