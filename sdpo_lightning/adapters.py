"""Rank 1: low-rank adapters within a transformers model.

A model bears two adapters: `default` is trained, `reference` is frozen and holds M_{t-1}. Both are ordinary parameters
inside the decoder layers, so sharding and DDP treat them as any other; the base is shared.
LoRA: arXiv 2106.09685; DoRA: arXiv 2402.09353.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel
from transformers.utils.import_utils import is_bitsandbytes_available, is_peft_available

from sdpo_lightning.input_casts import share_input_casts
from sdpo_lightning.ranks import from_first_rank
from sdpo_lightning.types import ConfigurationError, QuantizationName, ResumeError

TRAINED, REFERENCE = "default", "reference"
# What `peft.PeftModel` puts before the names of the model.
_PREFIX = "base_model.model."
# Before the policy's names in the state dict of the Lightning module.
_POLICY = "policy."


@dataclass(frozen=True)
class LoraSettings:
    """Train low-rank adapters instead of the weights (the `[peft]` extra).

    Attributes:
        r: rank of the adapters.
        alpha: the adapter's product is scaled by alpha / r.
        dropout: on the adapters' inputs while training, whatever `model.disable_dropout` says of the model's own.
        target_modules: endings of the names of adapted modules, or `all-linear`: every linear layer but the head.
        dora: train the weights' magnitudes as well (DoRA).
        seed: of the adapters' first values, the same on all ranks and on resume.
        export_merged: also write each M_t with the adapters added to the weights, `stages/0t-<name>-merged`.
    """

    r: int = 16
    alpha: int = 32
    dropout: float = 0.0
    target_modules: list[str] | str = "all-linear"
    dora: bool = False
    seed: int = 0
    export_merged: bool = False

    def check(self) -> None:
        """Not done on creation: the command line would bury the message in its own.

        Raises:
            ConfigurationError: a number outside its range.
        """
        if self.r < 1:
            raise ConfigurationError(f"`model.lora.r` is {self.r}, expected 1 or more")
        if self.alpha <= 0:
            raise ConfigurationError(f"`model.lora.alpha` is {self.alpha}, expected above 0")
        if not 0 <= self.dropout < 1:
            raise ConfigurationError(f"`model.lora.dropout` is {self.dropout}, expected within [0, 1)")


def check_packages(lora: LoraSettings | None, quantization: QuantizationName | None) -> None:
    """Ask for what isn't installed, before anything is read.

    Raises:
        ConfigurationError: with what to install.
    """
    if lora is not None and not is_peft_available():
        raise ConfigurationError("`model.lora` needs peft, which isn't installed: pip install 'sdpo-lightning[peft]'")
    if quantization is not None and not is_bitsandbytes_available():
        raise ConfigurationError(
            f"`model.quantization: {quantization}` needs bitsandbytes, which isn't installed (it comes with this "
            "package on Linux): pip install bitsandbytes, or leave `model.quantization` out"
        )


# ---- adapters


def add_adapters(model: PreTrainedModel, settings: LoraSettings, base: str) -> None:
    """Freeze the weights and put both adapters into the model, in place; they begin equal, at a product of 0.

    Args:
        model: with its weights, perhaps quantised.
        settings: of the adapters.
        base: name or folder of the model, noted in exports.

    Raises:
        ConfigurationError: no module of the model is named by `model.lora.target_modules`.
    """
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=settings.target_modules,
        use_dora=settings.dora,
        base_model_name_or_path=base,
    )
    model.requires_grad_(False)
    # A generator of its own, on the CPU: the same first values on every rank and device, at any time.
    # DoRA reads the weights, which a skeleton doesn't have.
    device = "meta" if model.get_input_embeddings().weight.is_meta else "cpu"
    with torch.random.fork_rng(devices=[]), torch.device(device), warnings.catch_warnings():
        # Two adapters in one model are what we want.
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        # Only the CPU's: the generators of GPUs aren't forked, and dropout draws from them.
        torch.default_generator.manual_seed(settings.seed)
        try:
            inject_adapter_in_model(config, model, TRAINED)
            inject_adapter_in_model(config, model, REFERENCE)
        except ValueError as error:
            raise ConfigurationError(
                f"`model.lora.target_modules` is {settings.target_modules!r}: {str(error).splitlines()[0]}"
            ) from error
    for layer in _adapted(model):
        layer.set_adapter(TRAINED)
    # Their first halves take what the base takes.
    share_input_casts(model)
    if settings.export_merged and model.config.get_text_config().tie_word_embeddings:
        _refuse_adapted_ties(model)
    # A skeleton gets its values later.
    if not model.get_input_embeddings().weight.is_meta:
        snapshot_adapter_(model)


def _refuse_adapted_ties(model: PreTrainedModel) -> None:
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    if any(layer in ends for layer in _adapted(model)):
        raise ConfigurationError(
            "`model.lora.export_merged` with an adapter on the embedding or the head, which share their weight in this "
            "model and would no longer; leave them out of `model.lora.target_modules`"
        )


def _adapted(model: nn.Module) -> list[Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def adapter_state(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    """Weights of one adapter, under the names they bear in an exported folder; they share the model's memory."""
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    return {_PREFIX + name: tensor for name, tensor in state.items()}


@torch.no_grad()
def snapshot_adapter_(model: nn.Module) -> None:
    """Copy the trained adapter into the frozen one, in place and on each rank's own part."""
    trained, frozen = adapter_state(model, TRAINED), adapter_state(model, REFERENCE)
    torch._foreach_copy_([_local(t) for t in frozen.values()], [_local(trained[name]) for name in frozen])


def check_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Compare what leaves no trace in an exported adapter's weights with the model's adapters.

    Raises:
        ResumeError: another scale or kind: the folder's weights would be another model.
    """
    path = folder / "adapter_config.json"
    # Of PEFT, which is imported where it is needed only.
    own: Any = model.peft_config[TRAINED]
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ResumeError(f"{path} can't be read ({error}); restore that folder") from error
    expected = {"r": own.r, "lora_alpha": own.lora_alpha, "use_rslora": own.use_rslora, "use_dora": own.use_dora}
    differing = [f"{key}: {found.get(key)} -> {value}" for key, value in expected.items() if found.get(key) != value]
    if differing:
        raise ResumeError(f"`model.lora` isn't that of {folder}, saved -> given: {'; '.join(differing)}")


@torch.no_grad()
def adopt_reference_adapter_(model: nn.Module) -> None:
    """Copy the frozen adapter into the trained one, in place and on each rank's own part."""
    trained, frozen = adapter_state(model, TRAINED), adapter_state(model, REFERENCE)
    torch._foreach_copy_([_local(t) for t in trained.values()], [_local(frozen[name]) for name in trained])


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@contextmanager
def reference_adapter_active(model: nn.Module) -> Iterator[None]:
    """Within, the model is M_{t-1}: the frozen adapter, in eval mode."""
    layers, was_training = _adapted(model), model.training
    _switch(layers, REFERENCE)
    model.eval()
    try:
        yield
    finally:
        _switch(layers, TRAINED)
        model.train(was_training)


def _switch(layers: list[Any], adapter: str) -> None:
    for layer in layers:
        # `set_adapter` would also freeze the trained adapter, in the middle of an accumulation.
        layer._active_adapter = [adapter]


# ---- files


def write_adapter(model: PreTrainedModel, adapter: dict[str, Tensor], folder: Path) -> None:
    """Write the trained adapter as `peft.PeftModel.from_pretrained` reads it.

    Args:
        model: with adapters.
        adapter: its `adapter_state`, whole.
        folder: to write into.
    """
    tensors = {name: t.detach().cpu().contiguous() for name, t in adapter.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    model.peft_config[TRAINED].save_pretrained(folder)


@torch.no_grad()
def read_reference_adapter_(model: nn.Module, folder: Path) -> None:
    """Read an exported adapter into the frozen one, in place.

    Args:
        model: with adapters of the same shape.
        folder: written by `write_adapter`.

    Raises:
        ResumeError: the file is absent, damaged or of other shapes.
    """
    path = folder / "adapter_model.safetensors"
    frozen = adapter_state(model, REFERENCE)
    try:
        found = from_first_rank(lambda: load_file(path))
        if {name: t.shape for name, t in found.items()} != {name: t.shape for name, t in frozen.items()}:
            raise ValueError("its names or shapes aren't those of `model.lora`")
        for name, tensor in frozen.items():
            tensor.copy_(_sharded_like(tensor, found[name]))
    except (OSError, ValueError, SafetensorError) as error:
        raise ResumeError(
            f"{path}: {str(error).splitlines()[0]}; restore that folder or start a new run"
        ) from error


def _sharded_like(tensor: Tensor, whole: Tensor) -> Tensor:
    if not isinstance(tensor, DTensor):
        return whole
    return distribute_tensor(whole.to(tensor.device), tensor.device_mesh, tensor.placements)


@torch.no_grad()
def merged_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """Weights of the plain model with the trained adapter added, on the CPU; the model stays as it is, bit for bit."""
    merged, adapted = {}, set(_adapted(model))
    for name, layer in model.named_modules():
        if layer in adapted:
            base = layer.get_base_layer()
            kept = base.weight.data
            layer.merge(safe_merge=True, adapter_names=[TRAINED])
            merged[f"{name}.weight"] = base.weight.detach().cpu().clone()
            layer.unmerge()
            # Adding and subtracting again would leave rounding behind.
            base.weight.data = kept
    state = {}
    for name, tensor in model.state_dict().items():
        if ".lora_" in name:
            continue
        plain = name.replace(".base_layer.", ".")
        state[plain] = merged.get(plain, tensor)
    return state


# ---- checkpoints


def into_checkpoint_(
    checkpoint: dict[str, Any], policy: nn.Module, lora: LoraSettings | None, quantization: QuantizationName | None
) -> None:
    """Note the settings in a checkpoint, and take the frozen weights out of it.

    Args:
        checkpoint: of a module that holds the policy under `policy`, changed in place.
        policy: perhaps with adapters.
        lora: settings of the adapters; None keeps all weights.
        quantization: of the frozen weights.
    """
    checkpoint["adapters"] = _settings_record(lora, quantization)
    if lora is not None:
        trained, state = _trained_names(policy), checkpoint["state_dict"]
        checkpoint["state_dict"] = {n: v for n, v in state.items() if not n.startswith(_POLICY) or n in trained}


def check_checkpoint(
    checkpoint: dict[str, Any], policy: nn.Module, lora: LoraSettings | None, quantization: QuantizationName | None
) -> None:
    """Compare the settings, some of which leave no trace in the weights, and the adapters' names.

    Without the base a checkpoint can't be loaded strictly; of the adapters it must hold all and no more.

    Raises:
        ResumeError: they differ.
    """
    found, expected = checkpoint.get("adapters"), _settings_record(lora, quantization)
    if found != expected:
        raise ResumeError(
            f"`model.lora` and `model.quantization` are {expected}, the checkpoint's run had {found}; resume with "
            "the settings of the run"
        )
    if lora is None:
        return
    held, trained = {n for n in checkpoint["state_dict"] if n.startswith(_POLICY)}, _trained_names(policy)
    if held != trained:
        raise ResumeError(
            f"`ckpt_path`: the checkpoint holds {len(held)} weights of adapters, the model has {len(trained)}, and "
            f"{len(held ^ trained)} are on one side only; it is damaged, or of another model"
        )


def _settings_record(lora: LoraSettings | None, quantization: QuantizationName | None) -> dict[str, Any] | None:
    if lora is None:
        return None
    kept = asdict(lora) | {"quantization": quantization}
    # It changes no number.
    del kept["export_merged"]
    return kept


def _trained_names(policy: nn.Module) -> set[str]:
    return {_POLICY + name for name, parameter in policy.named_parameters() if parameter.requires_grad}
