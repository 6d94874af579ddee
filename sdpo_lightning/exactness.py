"""Rank 3: is our path from ids to logps exact for this model? One pair against the plain forward."""

from __future__ import annotations

import torch

from sdpo_lightning.backbone import CausalBackbone
from sdpo_lightning.data.collate import PreferenceCollator, TokenizedPair
from sdpo_lightning.logprobs import gather_logps, pair_logps
from sdpo_lightning.types import ConfigurationError


@torch.no_grad()
def check_layout(backbone: CausalBackbone, tolerance: float = 1e-4) -> float:
    """Compare completion logps of one short pair with those from the model's own full logits.

    Args:
        backbone: on its device, weights loaded.
        tolerance: largest allowed difference of a summed logp, relative to max(1, |logp|).

    Returns:
        The largest relative difference.

    Raises:
        ConfigurationError: the model does more to its logits than its config says.
    """
    device = next(backbone.parameters()).device
    was_training = backbone.training
    backbone.eval()
    try:
        difference = max(_difference(backbone, device, cut) for cut in (2, 5))
    finally:
        backbone.train(was_training)
    if difference > tolerance:
        raise ConfigurationError(
            f"{type(backbone.model).__name__}: logps from its head differ from its own logits by "
            f"{difference:.1e} (allowed {tolerance:.0e}); this architecture is not supported"
        )
    return difference


def _difference(backbone: CausalBackbone, device: torch.device, cut: int) -> float:
    vocab = backbone.model.config.get_text_config().vocab_size
    ids = [(7 * i + 3) % vocab for i in range(12)]
    pair = TokenizedPair(ids[:cut], ids[cut:8], ids[cut + 1 :])
    batch = PreferenceCollator(0)([0], [pair], [1.0], 1).to(device)
    ours = pair_logps(backbone(batch), batch)
    logits = backbone.model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
    ).logits.flatten(0, 1)
    plain = pair_logps(gather_logps(logits[batch.source_index], batch.target_ids), batch)
    pairs = ((ours.chosen, plain.chosen), (ours.rejected, plain.rejected))
    return max(((a - b).abs() / b.abs().clamp(min=1)).max().item() for a, b in pairs)
