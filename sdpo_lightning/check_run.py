"""Rank 8: all that can be known of a run before weights load, as findings. The verb `check` prints them."""

from __future__ import annotations

import inspect
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from sdpo_lightning.adapters import LoraSettings
from sdpo_lightning.check_report import pair_lines, source_lines, stage_lines
from sdpo_lightning.check_stages import judged_lines, loss_lines
from sdpo_lightning.checks import check_links, check_vocabulary
from sdpo_lightning.data.collate import PairTokenizer
from sdpo_lightning.data.datamodule import CurriculumDataModule
from sdpo_lightning.data.declaration import PreferenceSource
from sdpo_lightning.data.findings import Finding
from sdpo_lightning.data.loader import PairStore
from sdpo_lightning.data.new_pairs import read_pair_sources
from sdpo_lightning.data.overlap import read_evaluation
from sdpo_lightning.data.pacing import read_pacing
from sdpo_lightning.data.pair_generators import read_pair_generator
from sdpo_lightning.data.partitions import read_partition
from sdpo_lightning.data.passes import Passes, plan_stages
from sdpo_lightning.data.prepare import Preparation, SourceReport, hold_out, load_tokenizer, prepare_sources
from sdpo_lightning.data.rows import row_number
from sdpo_lightning.data.sources import prompt_texts
from sdpo_lightning.data.stage_settings import read_stage_settings
from sdpo_lightning.data.survey import survey
from sdpo_lightning.estimate import GIB
from sdpo_lightning.estimate_inputs import count_ranks, read_model_config, read_run
from sdpo_lightning.estimate_report import disk_bytes
from sdpo_lightning.exactness import COLLATORS
from sdpo_lightning.module import DPOLitModule
from sdpo_lightning.start import fork_to_begin
from sdpo_lightning.types import ConfigurationError, ResumeError, Stage

Result = TypeVar("Result")
Config = Mapping[str, Any]

_KNOWN_PACKAGES = ("sdpo_lightning", "lightning", "torch", "transformers", "bitsandbytes")
_MODEL_NUMBERS = ("beta", "label_smoothing", "warmup_ratio", "lr_scheduler", "quantization")
_PRECISIONS = (None, 32, "32", "32-true", "bf16-mixed")


def review(
    config: Config, show: int = 0, own_model: bool = False, benchmarks: Sequence[str] = ()
) -> list[Finding]:
    """Look at everything, and go on after what is wrong as far as that makes sense.

    Args:
        config: parsed groups `trainer`, `model` and `data` of `fit`, as plain values.
        show: so many pairs of each source are shown as text.
        own_model: a module that reads its own kind of weights; its config isn't looked for.
        benchmarks: files of evaluation sets, in which no training prompt should stand.

    Returns:
        What was found, in the order of a run.
    """
    found = [*_foreign(config)]
    groups: dict[str, Any] = {group: _arguments(config[group]) for group in ("trainer", "model", "data")}
    config = groups | {key: config.get(key) for key in ("ckpt_path", "model_config", "fork", "from_stage")}
    # An own class may take fewer settings, and has ours for the others.
    config["data"] = {key: p.default for key, p in _settings().items() if p.default is not p.empty} | config["data"]
    found += _paths(config)
    if not config["model"].get("model_name_or_path"):
        return [*found, Finding("info", "without `model.model_name_or_path` the data can't be looked at")]
    module = _tried(found, lambda: _data_module(config["data"]))
    _tried(found, lambda: _check_model(config))
    model = config["model"]["model_name_or_path"]
    if not own_model:
        _tried(found, lambda: read_model_config(config["model_config"] or model))
    tokenizer = _tried(found, lambda: load_tokenizer(config["data"].get("tokenizer") or model))
    if tokenizer is not None:
        _tried(found, lambda: check_vocabulary(tokenizer, model))
    if module is None or tokenizer is None or (prepared := _prepare(found, module, tokenizer)) is None:
        return [*found, *_disk(config, None)]
    found += _describe(config, module, tokenizer, *prepared, show)
    for path in benchmarks:
        found += _overlap(found, path, module.sources)
    return [*found, *_disk(config, sum(report.pairs + report.val_pairs for report in prepared[0]))]


def _arguments(group: Config) -> dict[str, Any]:
    """Of a group, also where it names a class of its own."""
    return dict(group.get("init_args") or {}) if "class_path" in group else dict(group)


def _tried(found: list[Finding], make: Callable[[], Result]) -> Result | None:
    try:
        return make()
    except (ConfigurationError, ResumeError) as error:
        found.append(Finding("error", " ".join(str(error).split())))
        return None


def _foreign(config: Config) -> Iterator[Finding]:
    function = str(_arguments(config["data"]).get("difficulty"))
    if "." in function and function.partition(".")[0] not in _KNOWN_PACKAGES:
        text = f"`data.difficulty` names the function {function!r}: its code will run; make sure that you know it"
        yield Finding("warning", text)
    for source in _arguments(config["data"]).get("pair_sources") or []:
        if scorer := _arguments(source).get("scorer"):
            text = f"`data.pair_sources` names the function {scorer!r}: its code will run; make sure that you know it"
            yield Finding("warning", text)
    for key, path in _class_paths(config, ""):
        if path.partition(".")[0] not in _KNOWN_PACKAGES:
            yield Finding("warning", f"`{key}` names the class {path!r}: its code will run; make sure that you know it")


def _class_paths(value: Any, key: str) -> Iterator[tuple[str, str]]:
    """All class paths of a config and where they stand."""
    if isinstance(value, Mapping):
        if isinstance(value.get("class_path"), str):
            yield key, value["class_path"]
        for name, inner in value.items():
            yield from _class_paths(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from _class_paths(inner, f"{key}[{number}]")


def _paths(config: Config) -> list[Finding]:
    root, checkpoint = config["trainer"].get("default_root_dir"), config.get("ckpt_path")
    if root is None:
        text = "`trainer.default_root_dir` is missing: the folder for all that the run leaves"
        return [Finding("error", text)]
    found: list[Finding] = []
    _tried(found, lambda: check_links(Path(root)))
    if not os.access(_existing(root), os.W_OK):
        found.append(Finding("error", f"`trainer.default_root_dir`: {str(_existing(root))!r} can't be written to"))
    if checkpoint is not None and not Path(checkpoint).exists():
        found.append(Finding("error", f"`ckpt_path`: there is no {checkpoint!r}"))
    fork = _tried(found, lambda: fork_to_begin(config.get("fork"), config.get("from_stage"), Path(root)))
    if fork is not None:
        _tried(found, lambda: fork.check(Path(root)))
    stages = Path(root) / "stages"
    if checkpoint is None and fork is None and stages.is_dir() and any(stages.iterdir()):
        found.append(Finding("warning", f"{stages} holds the models of an earlier run"))
    return found


def _existing(root: str) -> Path:
    path = Path(root).absolute()
    return next(folder for folder in (path, *path.parents) if folder.exists())


def _settings() -> Mapping[str, inspect.Parameter]:
    return inspect.signature(CurriculumDataModule).parameters


def _data_module(data: Config) -> CurriculumDataModule:
    """Ours, whichever class the run has: for the checks that it makes."""
    given = {key: value for key, value in data.items() if key in _settings()}
    given["sources"] = [PreferenceSource(**source) for source in data["sources"]]
    given["partition"] = read_partition(data["partition"])
    given["pacing"] = read_pacing(data.get("pacing"))
    given["pair_sources"] = read_pair_sources(data["pair_sources"])
    given["pair_generator"] = read_pair_generator(data.get("pair_generator"))
    return CurriculumDataModule(**given | {"stage_settings": read_stage_settings(data["stage_settings"])})


def _check_model(config: Config) -> None:
    model, precision = config["model"], config["trainer"].get("precision")
    if precision not in _PRECISIONS:
        raise ConfigurationError(f"`trainer.precision` is {precision!r}, expected one of {_PRECISIONS[-2:]}")
    lora = model.get("lora")
    given = {key: model[key] for key in _MODEL_NUMBERS if model.get(key) is not None}
    DPOLitModule(model["model_name_or_path"], lora=LoraSettings(**_arguments(lora)) if lora else None, **given)


Prepared = tuple[list[SourceReport], list[Dataset]]


def _prepare(
    found: list[Finding], module: CurriculumDataModule, tokenizer: PreTrainedTokenizerBase
) -> Prepared | None:
    tokenize = _tried(found, lambda: PairTokenizer(tokenizer, module.max_length, module.on_long_prompt))
    if tokenize is None:
        return None
    how = Preparation(tokenize, module.on_bad_row, module.num_proc, stages=module.staging.names())
    before = len(found)
    prepared = _tried(found, lambda: prepare_sources(module.sources, how))
    if prepared is None:
        # The first error ended it; each source has its own to tell.
        del found[before:]
        for source in module.sources:
            _tried(found, partial(prepare_sources, [source], how))
        return None
    if len(_tried_hold_out(found, module, prepared[0])):
        return None
    return prepared


def _tried_hold_out(
    found: list[Finding], module: CurriculumDataModule, reports: Sequence[SourceReport]
) -> list[Finding]:
    errors: list[Finding] = []
    _tried(errors, lambda: hold_out(reports, module.val_fraction, module.seed))
    found += errors
    return errors


def _describe(
    config: Config,
    module: CurriculumDataModule,
    tokenizer: PreTrainedTokenizerBase,
    reports: Sequence[SourceReport],
    parts: Sequence[Dataset],
    show: int,
) -> list[Finding]:
    store, found = PairStore(parts), []
    for report in reports:
        found += source_lines(report, store, report.dropped, report.marks)
        for pair_id, pair in zip(report.train_ids[:show], store.get(report.train_ids[:show]), strict=True):
            lines = pair_lines(tokenizer, f"source {report.name!r}, row {row_number(pair_id)}:", pair)
            found.append(Finding("info", "\n".join(lines)))
    found += survey(parts, reports, module.on_val_overlap)
    stages = _tried(found, lambda: _stages(config, module, reports, store))
    ordered = not module.staging.needs_ranking
    if stages is None:
        return found
    found += stage_lines(stages, ordered or len(stages) == 1)
    found += judged_lines(config["trainer"], module.staging, stages, reports)
    return found + loss_lines(config["model"], module.staging, stages)


def _overlap(found: list[Finding], path: str, sources: Sequence[PreferenceSource]) -> list[Finding]:
    """Training prompts that stand in an evaluation set."""
    texts = _tried(found, lambda: read_evaluation(path))
    if texts is None:
        return []
    lines = []
    for index, source in enumerate(sources):
        overlap = texts.find(prompt_texts(source, index))
        for rows, what in ((overlap.exact, "stand in"), (overlap.partial, "share 13 words in a row with")):
            if rows:
                listed = ", ".join(map(str, rows[:5])) + (", ..." if len(rows) > 5 else "")
                text = f"source {source.name!r}: {len(rows)} prompts {what} {path!r}, rows {listed}; leave them out"
                lines.append(Finding("warning", text))
    return lines or [Finding("info", f"no training prompt stands in {path!r}")]


def _stages(
    config: Config, module: CurriculumDataModule, reports: Sequence[SourceReport], store: PairStore
) -> list[Stage]:
    trainer, limit = config["trainer"], config["trainer"].get("limit_train_batches")
    ids = {report.name: report.chunk_ids for report in reports}
    scores = module.staging.row_scores(store.numbers, {report.name: report.train_ids for report in reports})
    module.made.check_files()
    chunks = module.staging.cut(module.staging.groups, ids, scores) + module.made.chunks()
    passes = Passes(
        store,
        # Where the model needs another layout and micro-batches go by tokens, the steps may be more.
        COLLATORS[module.layout](0, module.batching.pad_to_multiple_of),
        module.batching,
        rank=0,
        world_size=count_ranks(trainer),
        accumulate=int(trainer.get("accumulate_grad_batches") or 1),
        limit=1.0 if limit is None else limit,
    )
    return plan_stages(chunks, module.staging, passes)


def _disk(config: Config, pairs: int | None) -> list[Finding]:
    """What the run would leave, where the sizes of its model are known, and whether there is room."""
    root = config["trainer"].get("default_root_dir")
    try:
        run = read_run(config, config["model_config"])
    except ConfigurationError as error:
        return [Finding("info", f"disk: not known ({str(error).split(';')[0]})")]
    if root is None:
        return []
    needed, free = sum(disk_bytes(replace(run, pairs=pairs)).values()), shutil.disk_usage(_existing(root)).free
    text = f"disk: the run will leave about {needed / GIB:.2f} GiB, {free / GIB:.2f} GiB are free at {root!r}"
    if needed <= free:
        return [Finding("info", text)]
    return [Finding("error", f"{text}; save fewer checkpoints or set another `trainer.default_root_dir`")]
