"""Rank 1: what a transformers model is given so that it computes the same with less work and memory."""

from __future__ import annotations

from torch import nn

from sdpo_lightning.input_casts import share_input_casts
from sdpo_lightning.last_layer import narrow_last_layer
from sdpo_lightning.norms import keep_less_in_norms


def save_work(model: nn.Module) -> None:
    """Share casts, keep less in norms, and leave out of the last layer what isn't read, where these apply.

    Args:
        model: a causal LM; its weights and their names stay. A second call changes nothing.
    """
    share_input_casts(model)
    keep_less_in_norms(model)
    narrow_last_layer(model)
