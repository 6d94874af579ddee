"""Rank 6: a parsed config -> what the arithmetic of `estimate.py` needs. No weights are read, data only if it's there.

The config is read as plain keys, since classes that ask for GPUs can't be made where there are none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig

from sdpo_lightning.data.collate import PairTokenizer, PreferenceCollator
from sdpo_lightning.data.declaration import PreferenceSource
from sdpo_lightning.data.loader import PairStore
from sdpo_lightning.data.new_pairs import read_pair_sources
from sdpo_lightning.data.partitions import read_partition
from sdpo_lightning.data.passes import Batching, Passes
from sdpo_lightning.data.prepare import Preparation, SourceReport, hold_out, load_tokenizer, prepare_sources
from sdpo_lightning.data.stage_settings import largest_batch, read_stage_settings
from sdpo_lightning.data.staging import Staging
from sdpo_lightning.estimate_run import Load, Lora, Optimizer, ReferenceKind, Run, StageLoad, load_of
from sdpo_lightning.exactness import COLLATORS
from sdpo_lightning.shapes import model_shape
from sdpo_lightning.types import Chunk, ConfigurationError

# Bytes a trainable weight that the states take, by the optimizer's name. 8-bit: a byte a state, and fp32 scales a
# block of 256 (arXiv 2110.02861); such names are found by their end.
_STATES = {"Adam": 8.0, "AdamW": 8.0, "NAdam": 8.0, "RAdam": 8.0, "LAMB": 8.0, "Adagrad": 4.0, "RMSprop": 4.0}
_STATES |= {"Lion": 4.0, "SGD": 0.0, "Adafactor": 0.01}
_BLOCK = 1 + 4 / 256


def read_run(config: Mapping[str, Any], model_config: str | None = None) -> Run:
    """The settings of a run.

    Args:
        config: parsed groups `trainer`, `model` and `data`, as plain values.
        model_config: folder or file of the model's config instead of `model.model_name_or_path`.

    Raises:
        ConfigurationError: the model's config can't be read or sized, or a precision that can't be trained.
    """
    trainer, model, data = config["trainer"], config["model"], config["data"]
    cuda = _is_cuda(trainer.get("accelerator"))
    # What `fit` takes where nothing is given.
    precision = str(trainer.get("precision") or ("bf16-mixed" if cuda else "32-true"))
    ranks_a_node = _count_devices(trainer.get("devices"), cuda)
    ranks = ranks_a_node * int(trainer.get("num_nodes") or 1)
    lora = _lora(model.get("lora"))
    return Run(
        shape=model_shape(read_model_config(model_config or model["model_name_or_path"]), precision.startswith("bf16")),
        ranks=ranks,
        ranks_a_node=ranks_a_node,
        shards=_shards(trainer.get("strategy"), ranks, ranks_a_node),
        cuda=cuda,
        bf16=precision.startswith("bf16"),
        reference=_reference(model.get("reference"), lora),
        optimizer=_optimizer(model.get("optimizer"), cuda),
        recompute=int(model.get("gradient_checkpointing") or 0),
        offload=bool(model.get("offload_activations")),
        logits_budget_mb=float(model.get("logits_budget_mb", 256.0)),
        accumulate=int(trainer.get("accumulate_grad_batches") or 1),
        lora=lora,
        quantization=_quantization(model.get("quantization")),
        checkpoints=_checkpoints(trainer, sum(_epochs(data))),
        background_saves=any(arguments.get("writes") for arguments in _savers(trainer)),
        stages=len(_epochs(data)),
    )


def count_ranks(trainer: Mapping[str, Any]) -> int:
    """Processes of a run, by the parsed group `trainer`."""
    devices = _count_devices(trainer.get("devices"), _is_cuda(trainer.get("accelerator")))
    return devices * int(trainer.get("num_nodes") or 1)


def read_model_config(name_or_path: str) -> Any:
    """The transformers config of a model.

    Raises:
        ConfigurationError: there is none that can be read without running anybody's code.
    """
    try:
        return AutoConfig.from_pretrained(name_or_path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"`model.model_name_or_path`: no model config at {name_or_path!r}; give a folder with a config.json, or "
            f"one by `--model_config`: {str(error).splitlines()[0]}"
        ) from error


def _is_cuda(accelerator: Any) -> bool:
    return accelerator in ("gpu", "cuda") or (accelerator in (None, "auto") and torch.cuda.is_available())


def _count_devices(devices: Any, cuda: bool) -> int:
    if devices in (None, "auto", -1, "-1"):
        return max(1, torch.cuda.device_count()) if cuda else 1
    if isinstance(devices, str) and "," in devices:
        return len([part for part in devices.split(",") if part.strip()])
    return int(devices) if isinstance(devices, int | str) else len(devices)


def _class_of(value: Any) -> tuple[str, Mapping[str, Any]]:
    """Last part of a class path, and its arguments; of a plain word, the word."""
    if isinstance(value, Mapping):
        return str(value.get("class_path", "")).rsplit(".", 1)[-1], value.get("init_args") or {}
    return str(value or "").rsplit(".", 1)[-1], {}


def _shards(strategy: Any, ranks: int, ranks_a_node: int) -> int:
    name, arguments = _class_of(strategy)
    replicas = arguments.get("replicas", 1)
    if name == "fsdp2_hybrid" or replicas == "nodes":
        return ranks_a_node
    return ranks // int(replicas) if name in ("fsdp2", "FSDP2Strategy") else 1


def _lora(group: Any) -> Lora | None:
    if not group:
        return None
    values = group.get("init_args", group)
    targets = values.get("target_modules") or ()
    names = () if targets == "all-linear" else (targets,) if isinstance(targets, str) else tuple(targets)
    merged = bool(values.get("export_merged"))
    return Lora(int(values.get("r", 16)), names, bool(values.get("dora")), export_merged=merged)


def _quantization(value: Any) -> Any:
    if value not in (None, "nf4", "int8"):
        raise ConfigurationError(f"`model.quantization` is {value!r}, expected nf4, int8 or none")
    return value


def _reference(value: Any, lora: Lora | None) -> ReferenceKind:
    name = _class_of(value)[0]
    if "Cached" in name:
        return "cached"
    # An external one is a model of its own, also beside adapters.
    return "resident" if lora is None or "External" in name else "adapter"


def _optimizer(value: Any, cuda: bool) -> Optimizer:
    name, arguments = _class_of(value)
    # The default of the module is a fused AdamW.
    name = name if isinstance(value, Mapping) and name else "AdamW"
    plain = name.removeprefix("Paged").removesuffix("8bit")
    state = _STATES.get(plain, 8.0)
    if plain in ("SGD", "RMSprop") and arguments.get("momentum"):
        state += 4
    if arguments.get("amsgrad"):
        state += 4
    if name.endswith("8bit"):
        state = state / 4 * _BLOCK
    torch_own = isinstance(value, Mapping) and str(value.get("class_path", "")).startswith("torch.optim")
    # PyTorch's choice on CUDA unless `fused`: all weights at once, with one temporary each.
    at_once = cuda and torch_own and not arguments.get("fused") and arguments.get("foreach") is not False
    return Optimizer(name, state, 4.0 if at_once else 0.0, name.startswith("Paged"))


def _checkpoints(trainer: Mapping[str, Any], epochs: int) -> int:
    if trainer.get("enable_checkpointing") is False:
        return 0
    savers = _savers(trainer) or [{}]
    kept = [epochs if (top := a.get("save_top_k", 1)) == -1 else top + 1 + bool(a.get("save_last")) for a in savers]
    return sum(kept)


def _savers(trainer: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Arguments of each callback that saves checkpoints."""
    callbacks = trainer.get("callbacks") or []
    found = [_class_of(callback) for callback in (callbacks if isinstance(callbacks, list) else [callbacks])]
    return [arguments for name, arguments in found if name.endswith("Checkpoint")]


# ---- data


def _staging(data: Mapping[str, Any]) -> Staging:
    names = [source["name"] for source in data["sources"]]
    own = read_stage_settings(data.get("stage_settings"))
    return Staging(
        names,
        data.get("stages") or [[name] for name in names],
        read_partition(data["partition"]),
        data["order"],
        data["merge_ties"],
        data["epochs_per_stage"],
        own,
        data["seed"],
        made=[source.name for source in read_pair_sources(data.get("pair_sources"))],
    )


def _epochs(data: Mapping[str, Any]) -> list[int]:
    """Of each stage, in the order of the sources."""
    staging = _staging(data)
    return staging.epochs(staging.names())


def read_loads(config: Mapping[str, Any], run: Run) -> tuple[list[StageLoad], str]:
    """What each stage asks of a rank, and a line on where the lengths come from.

    Args:
        config: parsed groups `trainer`, `model` and `data`, as plain values.
        run: its settings.

    Raises:
        ConfigurationError: data that is there and wrong.
    """
    data = config["data"]
    collator = COLLATORS[data["layout"]](0, data["pad_to_multiple_of"])
    try:
        reports, store = _prepare(data, config["model"]["model_name_or_path"])
    except ConfigurationError as error:
        paths = [source.get("path") for source in data["sources"]]
        if all(path and Path(path).exists() for path in paths) and "no tokenizer" not in str(error):
            raise
        load = _assumed(data, collator)
        stages = [StageLoad(name, None, load, load) for name in _staging(data).names()]
        reason = str(error).split(";")[0]
        return stages, f"every pair is taken to be as long as `data.max_length` allows, {data['max_length']}: {reason}"
    keys = ("batch_size", "batch_tokens", "bucket_window", "pad_to_multiple_of", "shuffle", "seed")
    limit = config["trainer"].get("limit_train_batches")
    passes = Passes(
        store,
        collator,
        Batching(*(data[key] for key in keys)),
        rank=0,
        world_size=run.ranks,
        accumulate=run.accumulate,
        limit=1.0 if limit is None else limit,
    )
    chunks, own = _chunks(data, reports), _staging(data).settings(_staging(data).names())
    # Behind them come those whose pairs are yet to be made.
    each = zip(chunks, _epochs(data), own, strict=False)
    loads = [_measured(chunk, epochs, passes.under(settings), reports) for chunk, epochs, settings in each]
    made, longest = read_pair_sources(data.get("pair_sources")), _assumed(data, collator)
    loads += [StageLoad(source.name, source.num_pairs, longest, longest) for source in made]
    what = ", of pairs that are yet to be made `data.max_length`" if made else ""
    return loads, f"lengths are those of the data{what}"


def _prepare(data: Mapping[str, Any], model: str) -> tuple[dict[str, SourceReport], PairStore]:
    tokenizer = load_tokenizer(data.get("tokenizer") or model)
    tokenize = PairTokenizer(tokenizer, data["max_length"], data["on_long_prompt"])
    how = Preparation(tokenize, data["on_bad_row"], data["num_proc"])
    reports, parts = prepare_sources([PreferenceSource(**source) for source in data["sources"]], how)
    hold_out(reports, data["val_fraction"], data["seed"])
    return {report.name: report for report in reports}, PairStore(parts)


def _chunks(data: Mapping[str, Any], reports: Mapping[str, SourceReport]) -> list[Chunk]:
    """The chunks in the order of the sources; what a random cut takes is taken to be all."""
    names, groups = [name for name in _staging(data).names() if name not in _staging(data).made], _staging(data).groups
    if data["partition"] != "by_source":
        return [Chunk(name, [i for report in reports.values() for i in report.chunk_ids]) for name in names]
    ids = [[i for name in group for i in reports[name].chunk_ids] for group in groups]
    return [Chunk(name, part) for name, part in zip(names, ids, strict=True)]


def _measured(
    chunk: Chunk, epochs: int, passes: Passes, reports: Mapping[str, SourceReport]
) -> StageLoad:
    def largest(runs: Sequence[Sequence[int]]) -> Load:
        loads = [load_of(passes.store.lengths(run), passes.collator) for run in runs]
        # One that has the most of each comes close where the two differ.
        return Load(*(max(getattr(load, key) for load in loads) for key in ("tokens", "targets", "scores", "mask")))

    runs = [run for epoch in range(epochs) for run in passes.training(chunk, epoch).run_ids()]
    ids = list(chunk.pair_ids) + [i for report in reports.values() for i in report.val_ids]
    return StageLoad(chunk.name, len(chunk.pair_ids), largest(runs), largest(passes.longest_first(ids).run_ids()[:1]))


def _assumed(data: Mapping[str, Any], collator: PreferenceCollator) -> Load:
    """Of pairs as long as they may be, behind short prompts."""
    longest = data["max_length"]
    pair = np.array([[1], [longest - 1], [longest - 1]])
    count = largest_batch(read_stage_settings(data.get("stage_settings")), data["batch_size"])
    if data.get("batch_tokens") is not None:
        count = max(1, data["batch_tokens"] // int(collator.pair_tokens(pair)[0]))
    return load_of(np.repeat(pair, count, axis=1), collator)
