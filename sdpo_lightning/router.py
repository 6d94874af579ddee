"""Rank 1: the load-balancing loss of a mixture of experts, which transformers adds behind a head that we don't run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sdpo_lightning.types import ConfigurationError, PreferenceBatch


def load_balancing_loss(router_logits: Sequence[Tensor], top_k: int, real: Tensor) -> Tensor:
    """E * sum over experts of (share of the tokens sent to it) * (mean probability of it), over all layers.

    Fedus et al. 2021 (Switch Transformer, arXiv 2101.03961, Eqs. 4 to 6), with k experts a token as in transformers.

    Args:
        router_logits: of each layer `[P, E]`, for P positions and E experts.
        top_k: experts that a token is sent to.
        real: `[P]` bool, False for padding, which isn't counted.

    Returns:
        A scalar; k where all experts are used alike.
    """
    experts = router_logits[0].shape[-1]
    sent = probability = torch.zeros((), device=real.device)
    for logits in router_logits:
        probabilities = F.softmax(logits.reshape(-1, experts).float(), dim=-1)
        chosen = F.one_hot(probabilities.topk(top_k).indices, experts).sum(1)
        sent = sent + (chosen * real[:, None]).sum(0)
        probability = probability + (probabilities * real[:, None]).sum(0)
    positions = len(router_logits) * real.sum()
    return experts * ((sent / positions) * (probability / positions)).sum()


def real_positions(batch: PreferenceBatch) -> Tensor:
    """`[R * L]` bool: what isn't padding. In a packed row that comes last."""
    if batch.attention_mask is not None:
        return batch.attention_mask.flatten() > 0
    return torch.arange(batch.input_ids.numel(), device=batch.input_ids.device) < batch.num_tokens


class RouterLoss:
    """Of one model: its coefficient, and the loss of its last forward pass with gradients.

    Args:
        config: values of the model's config.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._declared = float(config.get("router_aux_loss_coef") or 0.0)
        self._is_mixture = "output_router_logits" in config
        self._top_k: int | None = config.get("num_experts_per_tok")
        self.coefficient = 0.0
        self._loss: Tensor | float = 0.0

    def set_coefficient(self, given: float | None) -> None:
        """Choose the weight of the loss.

        Args:
            given: `model.router_aux_loss`; None is the one of the model's config, 0 where it has none.

        Raises:
            ConfigurationError: the model isn't a mixture of experts that gives its router's logits.
        """
        if given and not self._is_mixture:
            raise ConfigurationError(
                f"`model.router_aux_loss` is {given}, and the model is no mixture of experts that gives the logits "
                "of its router; leave it out"
            )
        declared = self._declared if self._is_mixture else 0.0
        self.coefficient = declared if given is None else given

    def arguments(self) -> dict[str, bool]:
        """What the model's body is called with: router logits cost memory, and only training uses them."""
        return {"output_router_logits": True} if self._wanted() else {}

    def _wanted(self) -> bool:
        return self.coefficient != 0.0 and torch.is_grad_enabled()

    def keep(self, router_logits: Sequence[Tensor] | None, batch: PreferenceBatch) -> None:
        """Note the loss of a forward pass, where it is wanted.

        Args:
            router_logits: of each layer, `[R * L, E]`.
            batch: of the pass.

        Raises:
            ConfigurationError: the model's body gives none.
        """
        if not self._wanted():
            return
        if not router_logits:
            raise ConfigurationError(
                "the model's config has `router_aux_loss_coef`, and its body gives no router logits; set "
                "`model.router_aux_loss: 0`"
            )
        assert self._top_k is not None, "a mixture of experts without `num_experts_per_tok`"
        self._loss = self.coefficient * load_balancing_loss(router_logits, self._top_k, real_positions(batch))

    def take(self) -> Tensor | float:
        """The loss times its coefficient, once; 0 where there is none."""
        loss, self._loss = self._loss, 0.0
        return loss
