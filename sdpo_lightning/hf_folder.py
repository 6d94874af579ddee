"""Rank 3: a model as a Hugging Face folder that appears whole or not at all."""

from __future__ import annotations

import json
from contextlib import closing
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion

from sdpo_lightning.adapters import TRAINED, adapter_state, merged_state, write_adapter
from sdpo_lightning.backbone import CausalBackbone
from sdpo_lightning.bars import BARS
from sdpo_lightning.failpoints import failpoint
from sdpo_lightning.files import new_folder
from sdpo_lightning.ranks import from_first_rank
from sdpo_lightning.sharding import is_sharded, whole_tensors

_LEAST_FILE, _MOST_FILE = 2**24, 2**32


def save_hf(backbone: CausalBackbone, folder: Path, tokenizer: PreTrainedTokenizerBase, card: str = "") -> None:
    """Write a Hugging Face folder (safetensors, configs, tokenizer) that appears whole or not at all. A collective.

    Rank 0 writes. Weights keep the master dtype: a later reference must be these very numbers. Shards stream to rank
    0, which never holds more than one file of them. Of a model with adapters the folder holds the adapter alone, for
    `peft.PeftModel.from_pretrained`.

    Args:
        backbone: the model.
        folder: its place.
        tokenizer: goes with it.
        card: its README.md; none if empty. Of rank 0.

    Raises:
        OSError: what rank 0 met, on all ranks.
    """
    with new_folder(folder) as staging:
        if backbone.base_digest is not None:
            adapter = dict(whole_tensors(list(adapter_state(backbone.model, TRAINED).items())))
            from_first_rank(lambda: write_adapter(backbone.model, adapter, staging))
        elif not is_sharded(backbone):
            with closing(BARS.track([lambda: backbone.model.save_pretrained(staging)], _title(staging))) as writes:
                for write in writes:
                    from_first_rank(write)
        elif from_first_rank(lambda: _is_converted(backbone)):
            # Several of our weights make one of the file's, or the reverse: all are needed at once.
            named = backbone.model.state_dict(keep_vars=True).items()
            whole = {name: tensor for name, tensor in whole_tensors(list(named)) if not tensor.is_meta}
            from_first_rank(lambda: backbone.model.save_pretrained(staging, state_dict=whole))
        else:
            _stream(backbone, staging)
        failpoint("mid_export")
        from_first_rank(lambda: tokenizer.save_pretrained(staging))
        if card:
            from_first_rank(lambda: _write_card(staging, card))


def save_merged(backbone: CausalBackbone, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write a model with adapters as a Hugging Face folder without any. A collective; rank 0 writes."""
    state = merged_state(backbone.model)
    with new_folder(folder) as staging:
        from_first_rank(lambda: backbone.model.save_pretrained(staging, state_dict=state))
        from_first_rank(lambda: tokenizer.save_pretrained(staging))


def _write_card(staging: Path, card: str) -> None:
    (staging / "README.md").write_text(card, encoding="utf-8")


def _is_converted(backbone: CausalBackbone) -> bool:
    """Whether the file's weights are not one by one those of the model; only the rank that read it knows."""
    metas = {name: torch.empty_like(t, device="meta") for name, t in _distinct(backbone)}
    written = revert_weight_conversion(backbone.model, metas)
    return written.keys() != metas.keys() or any(written[name] is not tensor for name, tensor in metas.items())


def _distinct(backbone: CausalBackbone) -> list[tuple[str, Tensor]]:
    """Weights and persistent buffers by name, tied ones once."""
    found: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in backbone.model.state_dict(keep_vars=True).items():
        found.setdefault(id(tensor), (name, tensor))
    return list(found.values())


def _title(staging: Path) -> str:
    return f"writing {staging.name.removeprefix('.').removesuffix('.tmp')}"


def _stream(backbone: CausalBackbone, staging: Path) -> None:
    named = _distinct(backbone)
    # Configs only; the weights come one by one.
    from_first_rank(lambda: _write_configs(backbone, staging))
    files = _files([(name, tensor.numel() * tensor.element_size()) for name, tensor in named])
    tensors = whole_tensors(named)
    with closing(BARS.track(list(enumerate(files, 1)), _title(staging))) as parts:
        for number, names in parts:
            part = dict(next(tensors) for _ in names)
            path = staging / _file_name(number, len(files))
            from_first_rank(partial(save_file, part, path, metadata={"format": "pt"}))
    if len(files) > 1:
        index = {name: _file_name(number, len(files)) for number, names in enumerate(files, 1) for name in names}
        size = sum(tensor.numel() * tensor.element_size() for _, tensor in named)
        content = json.dumps({"metadata": {"total_size": size}, "weight_map": index}, indent=2)
        from_first_rank(lambda: (staging / "model.safetensors.index.json").write_text(content))


def _write_configs(backbone: CausalBackbone, staging: Path) -> None:
    backbone.model.save_pretrained(staging, state_dict={})
    (staging / "model.safetensors").unlink(missing_ok=True)


def _files(sizes: list[tuple[str, int]]) -> list[list[str]]:
    """Names a file: a twentieth of the weights within bounds; safetensors holds a file's bytes a second time."""
    most = min(max(sum(size for _, size in sizes) // 20, _LEAST_FILE), _MOST_FILE)
    files: list[list[str]] = [[]]
    held = 0
    for name, size in sizes:
        if files[-1] and held + size > most:
            files.append([])
            held = 0
        files[-1].append(name)
        held += size
    return files


def _file_name(number: int, of: int) -> str:
    return "model.safetensors" if of == 1 else f"model-{number:05d}-of-{of:05d}.safetensors"
