"""Rank 3: which layout is exact for this model? Two pairs against the model's plain forward."""

from __future__ import annotations

import logging
from typing import Literal

import torch
from torch import Tensor

from sdpo_lightning.backbone import CausalBackbone
from sdpo_lightning.data.collate import (
    PackedCollator,
    PaddedCollator,
    PreferenceCollator,
    SharedPrefixCollator,
    TokenizedPair,
)
from sdpo_lightning.logprobs import gather_logps, pair_logps
from sdpo_lightning.norms import own_norms
from sdpo_lightning.types import ConfigurationError

log = logging.getLogger(__name__)

LayoutName = Literal["shared_prefix", "packed", "padded"]

COLLATORS: dict[LayoutName, type[PreferenceCollator]] = {
    "shared_prefix": SharedPrefixCollator,
    "packed": PackedCollator,
    "padded": PaddedCollator,
}

_FALLBACKS: dict[LayoutName, tuple[LayoutName, ...]] = {
    "shared_prefix": ("shared_prefix", "packed", "padded"),
    "packed": ("packed", "padded"),
    "padded": ("padded",),
}
# State runs along the row, or positions are read off it: one pair too short to show it may still look right.
_ROWS_APART = {
    "recurrent state": (
        "mamba", "mamba2", "falcon_mamba", "falcon_h1", "jamba", "bamba", "zamba", "zamba2", "recurrent_gemma",
        "rwkv", "xlstm", "lfm2", "lfm2_moe", "qwen3_next", "nemotron_h", "granitemoehybrid", "minimax", "kimi_linear",
    ),
    "ALiBi": ("bloom", "mpt", "falcon"),
    "prefix attention": ("prophetnet", "xlnet", "t5gemma"),
}  # fmt: skip


def choose_layout(
    backbone: CausalBackbone, wanted: LayoutName, pad_token_id: int, pad_to_multiple_of: int = 1
) -> PreferenceCollator:
    """The wanted layout if it is exact for this model, else the next that is, with a line that says why.

    Args:
        backbone: on its device, weights loaded.
        wanted: `data.layout`.
        pad_token_id: of the collator.
        pad_to_multiple_of: of the row lengths of the collator.

    Raises:
        ConfigurationError: not even padded rows give the model's own logps.
    """
    return COLLATORS[exact_layout(backbone, wanted, pad_to_multiple_of)](pad_token_id, pad_to_multiple_of)


def exact_layout(backbone: CausalBackbone, wanted: LayoutName, pad_to_multiple_of: int = 1) -> LayoutName:
    """Name of the layout that `choose_layout` takes.

    Args:
        backbone: whole, not cut: its plain forward is what layouts are compared with.
        wanted: `data.layout`.
        pad_to_multiple_of: of the row lengths.

    Raises:
        ConfigurationError: not even padded rows give the model's own logps.
    """
    problem = ""
    for name in _FALLBACKS[wanted]:
        collator = COLLATORS[name](0, pad_to_multiple_of)
        problem = layout_problem(backbone, collator, backbone.layout_tolerance)
        if not problem:
            log.info("layout: %s", name)
            return name
        log.warning("layout %s isn't exact for %s: %s", name, type(backbone.model).__name__, problem)
    raise ConfigurationError(f"{type(backbone.model).__name__} is not supported: {problem}")


@torch.no_grad()
def layout_problem(backbone: CausalBackbone, collator: PreferenceCollator, tolerance: float = 1e-4) -> str:
    """Why a layout isn't exact for a model; empty if it is.

    Args:
        backbone: on its device, weights loaded.
        collator: the layout.
        tolerance: largest allowed difference of a summed logp in fp32, relative to max(1, |logp|).
    """
    kind = backbone.model.config.get_text_config().model_type
    if not isinstance(collator, PaddedCollator):
        for reason, kinds in _ROWS_APART.items():
            if kind in kinds:
                return f"{kind} has {reason}"
    was_training = backbone.training
    backbone.eval()
    try:
        difference = _difference(backbone, collator)
    except (ValueError, TypeError, RuntimeError, IndexError, KeyError, AttributeError) as error:
        return (str(error).splitlines() or [type(error).__name__])[0]
    finally:
        backbone.train(was_training)
    return "" if difference <= tolerance else f"logps differ by {difference:.1e}, allowed {tolerance:.0e}"


def _difference(backbone: CausalBackbone, collator: PreferenceCollator) -> float:
    """The largest relative difference of two pairs' summed logps; NaN if one of them is."""
    device = next(backbone.parameters()).device
    vocab = backbone.model.config.get_text_config().vocab_size
    ids = [(7 * i + 3) % vocab for i in range(24)]
    # The sequences of a side are of one length, so that the plain forward takes them together without padding.
    pairs = [TokenizedPair(ids[:2], ids[2:8], ids[8:]), TokenizedPair(ids[3:9], ids[10:12], ids[12:])]
    batch = collator([0, 1], pairs, [1.0, 1.0], 2).to(device)
    ours = pair_logps(backbone(batch), batch)
    found = []
    for logps, completions in (
        (ours.chosen, [pair.chosen_ids for pair in pairs]),
        (ours.rejected, [pair.rejected_ids for pair in pairs]),
    ):
        plain = _plain_logps(backbone, [pair.prompt_ids for pair in pairs], completions, device)
        found.append((logps - plain).abs() / plain.abs().clamp(min=1))
    return torch.cat(found).max().item()


def _plain_logps(
    backbone: CausalBackbone, prompts: list[list[int]], completions: list[list[int]], device: torch.device
) -> Tensor:
    """Summed logps `[B]` of the completions, by the model as it comes."""
    ids = torch.tensor([prompt + completion for prompt, completion in zip(prompts, completions, strict=True)])
    ids = ids.to(device)
    with own_norms():
        logits = backbone.model(input_ids=ids, use_cache=False).logits
    sums = []
    for row, prompt in enumerate(prompts):
        sums.append(gather_logps(logits[row, len(prompt) - 1 : -1], ids[row, len(prompt) :]).sum())
    return torch.stack(sums)
