"""Rank 5: what a Trainer must not be told, checked before any weights are loaded."""

from __future__ import annotations

import logging
import uuid
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import nn
from transformers import AutoConfig, PreTrainedTokenizerBase

from sdpo_lightning.data.pair_lists import data_of
from sdpo_lightning.files import FOLDERS
from sdpo_lightning.ranks import from_every_rank, from_first_rank
from sdpo_lightning.run_parts import StageModule, callbacks_of, is_try, val_check_is_timed
from sdpo_lightning.strategy import FSDP2Strategy
from sdpo_lightning.types import ConfigurationError, ResumeError

log = logging.getLogger(__name__)

_PRECISIONS = ("32-true", "bf16-mixed")


def check_trainer(trainer: pl.Trainer) -> None:
    """Refuse Trainer settings that would cut or mix the stages.

    Raises:
        ConfigurationError: with the setting to change.
    """
    if trainer.overfit_batches > 0:  # type: ignore[attr-defined]
        raise ConfigurationError(
            "`trainer.overfit_batches` would train every stage on the same batches; use `limit` of `data.sources`"
        )
    if str(trainer.precision) not in _PRECISIONS:
        raise ConfigurationError(
            f"`trainer.precision` is {trainer.precision!r}, expected one of {_PRECISIONS}: pure low-precision weights "
            "can't take the small steps of DPO. bf16-mixed computes in bf16 and keeps fp32 master weights"
        )
    if any(isinstance(callback, GradientAccumulationScheduler) for callback in callbacks_of(trainer)):
        raise ConfigurationError(
            "GradientAccumulationScheduler would change the steps of a stage while it runs; use "
            "`trainer.accumulate_grad_batches`"
        )
    # Of an interval of time Lightning sets no other.
    interval = None if val_check_is_timed(trainer) else trainer.val_check_interval
    validates = data_of(trainer).val_names and trainer.limit_val_batches and not is_try(trainer)
    if isinstance(interval, int) and validates and trainer.limit_train_batches:
        shortest = data_of(trainer).shortest_epoch()
        if interval > shortest and trainer.check_val_every_n_epoch is not None:
            raise ConfigurationError(
                f"`trainer.val_check_interval` is {interval} batches, but the shortest stage may have only "
                f"{shortest}; use at most {shortest}, or a share such as 0.5"
            )


def check_strategy(trainer: pl.Trainer, pl_module: StageModule) -> None:
    """Refuse what can't be sharded, before any weights are loaded.

    Raises:
        ConfigurationError: with the setting to change.
    """
    strategy, name = trainer.strategy, type(trainer.strategy).__name__
    # Exact about subclasses: DeepSpeed's strategy is one of DDP's.
    if type(strategy) not in (DDPStrategy, SingleDeviceStrategy, FSDP2Strategy):
        raise ConfigurationError(
            f"`trainer.strategy` is {name}, which doesn't know of the reference; use `fsdp2`, `fsdp2_hybrid`, `ddp` or "
            "one device"
        )
    if not isinstance(strategy, FSDP2Strategy):
        return
    if pl_module.quantization is not None:
        raise ConfigurationError(
            f"`model.quantization: {pl_module.quantization}` with {name}: packed weights can't be cut into shards; use "
            "`trainer.strategy: ddp` or leave `model.quantization` out"
        )
    if pl_module.lora is not None and pl_module.lora.export_merged:
        raise ConfigurationError(
            f"`model.lora.export_merged` with {name}: no rank holds the weights to add the adapter to; leave it out "
            "and merge the exported adapters with peft"
        )
    probe = pl_module.make_optimizer([nn.Parameter(torch.zeros(2, 2))])
    if type(probe).__module__.partition(".")[0] == "bitsandbytes":
        raise ConfigurationError(
            f"`model.optimizer` is bitsandbytes' {type(probe).__name__}, whose kernels mix shards with plain tensors; "
            f"use torch.optim.AdamW with {name}, or `trainer.strategy: ddp` or one device with this one"
        )


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, model_name_or_path: str) -> None:
    """Refuse a tokenizer with ids beyond the model's embedding: a GPU would stop at one without a word of sense.

    Args:
        tokenizer: of the data.
        model_name_or_path: of a model; what has no readable config is left to the one who loads it.

    Raises:
        ConfigurationError: with both sizes. An embedding with more rows, padded ones, is fine.
    """
    try:
        config = AutoConfig.from_pretrained(model_name_or_path, trust_remote_code=False)
    except (OSError, ValueError):
        return
    rows = config.get_text_config().to_dict().get("vocab_size")
    needed = max(tokenizer.get_vocab().values()) + 1
    if isinstance(rows, int) and needed > rows:
        raise ConfigurationError(
            f"the tokenizer has ids up to {needed - 1}, but {model_name_or_path!r} has {rows} embeddings, expected at "
            f"least {needed}; use the model's own tokenizer (`data.tokenizer`), or give the model larger embeddings"
        )


def check_links(root: Path) -> None:
    """Refuse links by which a run would write outside its directory.

    Args:
        root: `trainer.default_root_dir`.

    Raises:
        ConfigurationError: with the link.
    """
    for name in (*FOLDERS, "stale"):
        path = root / name
        if path.is_symlink() and not path.resolve().is_relative_to(root.resolve()):
            raise ConfigurationError(
                f"{path} is a link to {path.resolve()}, expected a folder within the run directory; remove it or set "
                "another `trainer.default_root_dir`"
            )


def check_disks(trainer: pl.Trainer) -> None:
    """On several nodes: find out whether they share the run directory. A collective.

    Raises:
        ConfigurationError: they don't, and a checkpoint would lie in pieces on several disks.
    """
    if trainer.num_nodes == 1:
        return
    token = Path(trainer.default_root_dir) / f".shared-{from_first_rank(lambda: uuid.uuid4().hex)}"
    from_first_rank(lambda: _touch(token))
    shared = trainer.strategy.reduce_boolean_decision(token.exists(), all=True)
    from_first_rank(token.unlink)
    if shared:
        return
    if isinstance(trainer.strategy, FSDP2Strategy):
        raise ConfigurationError(
            f"`trainer.default_root_dir` is {trainer.default_root_dir!r}, which the {trainer.num_nodes} nodes don't "
            "share: each would keep its own part of a checkpoint. Use a shared file system, or `trainer.strategy: ddp`"
        )
    log.warning(
        "%s isn't shared by the %d nodes: models, tables and checkpoints stay on the first; to go on with this run, "
        "copy that directory to every node",
        trainer.default_root_dir,
        trainer.num_nodes,
    )


def check_start(pl_module: StageModule) -> None:
    """All ranks go on from the same checkpoint, or none does. A collective.

    Raises:
        ResumeError: some found another one, or none, on their disk.
    """
    found = from_every_rank(pl_module.goes_on_from)
    if len(set(found)) > 1:
        rank = next(rank for rank, path in enumerate(found) if path != found[0])
        raise ResumeError(
            f"rank 0 goes on from {found[0]}, rank {rank} from {found[rank] or 'nothing'}: copy the run directory of "
            "the first node to the same place on every node, or use a shared file system"
        )


def _touch(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def check_optimizers(trainer: pl.Trainer, pl_module: StageModule) -> None:
    """Refuse to train what isn't the module's, such as the reference.

    Raises:
        ConfigurationError: saying how many tensors.
    """
    own = {id(parameter) for parameter in pl_module.parameters()}
    stepped = [p for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]]
    foreign = sum(id(parameter) not in own for parameter in stepped)
    if foreign:
        raise ConfigurationError(
            f"`configure_optimizers` gives the optimizer {foreign} tensors that aren't parameters of the module, "
            "perhaps the reference's; use `self.trainable()`"
        )


def check_run_dir(trainer: pl.Trainer, pl_module: StageModule) -> None:
    """Refuse to train a new run into the folder of an earlier one, or from a module that has trained.

    Raises:
        ConfigurationError: with the setting to change.
    """
    if trainer.ckpt_path is not None or is_try(trainer) or not trainer.limit_train_batches:
        return
    if pl_module.record.entered:
        raise ConfigurationError("this module has trained already; make a new one, or give `ckpt_path` to go on")
    stages = Path(trainer.default_root_dir) / "stages"
    # Of a fork, what an earlier start left has been looked at.
    if pl_module.fork is None and from_first_rank(lambda: stages.exists() and any(stages.iterdir())):
        raise ConfigurationError(
            f"{stages} holds the models of an earlier run; set another `trainer.default_root_dir`, or `ckpt_path` "
            "to go on with that run"
        )
