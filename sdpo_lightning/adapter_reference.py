"""Rank 4: the reference of a policy with adapters: its own base with a second, frozen adapter, megabytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from sdpo_lightning.adapters import (
    REFERENCE,
    TRAINED,
    LoraSettings,
    adapter_state,
    check_packages,
    read_reference_adapter_,
    reference_adapter_active,
    snapshot_adapter_,
)
from sdpo_lightning.backbone import CausalBackbone, adapter_digest, weights_digest
from sdpo_lightning.reference import CachedReference, ReferencePolicy, ResidentReference
from sdpo_lightning.sharding import own_part
from sdpo_lightning.types import (
    ConfigurationError,
    PairLogps,
    PreferenceBatch,
    QuantizationName,
    ReferenceInputs,
    Stage,
)


class FrozenAdapter(nn.Module):
    """A policy as it was at its last snapshot; runs as the policy does, and shares its weights.

    Its only parameters are the frozen adapter's: freezing or moving this leaves the policy alone.

    Args:
        policy: with adapters, on its device and perhaps sharded.
    """

    def __init__(self, policy: CausalBackbone) -> None:
        super().__init__()
        # In a tuple, so that it isn't a submodule.
        self._policy = (policy,)
        self.weights = nn.ParameterList(
            nn.Parameter(tensor, requires_grad=False) for tensor in self.adapter().values()
        )

    @contextmanager
    def in_use(self) -> Iterator[CausalBackbone]:
        """The policy, which is M_{t-1} in eval mode within this context."""
        [policy] = self._policy
        with reference_adapter_active(policy):
            yield policy

    def forward(self, batch: PreferenceBatch, collisions: bool = False) -> Tensor:
        """Log-probabilities `[N]` (float32, nats) of the completion tokens, or `[2, N]`, as the policy gives them."""
        with self.in_use() as policy:
            return policy(batch, collisions)

    def adapter(self) -> dict[str, Tensor]:
        """Weights of the frozen adapter under the names of an export; they share its memory."""
        return adapter_state(self._policy[0].model, REFERENCE)

    def digest(self) -> str:
        """Digest of base and frozen adapter, as `weights_digest` gives it for a policy."""
        return adapter_digest(self._policy[0], REFERENCE)


class AdapterReference(ReferencePolicy):
    """A frozen snapshot of the adapter in the policy itself: no second model, one forward a pair an epoch."""

    def __init__(self) -> None:
        self._model: FrozenAdapter | None = None

    def advance(self, policy: CausalBackbone, stage: Stage, inputs: ReferenceInputs) -> None:
        """Copy the trained adapter into the frozen one."""
        self.become_(policy)
        self._model = FrozenAdapter(policy)

    def restore(self, load_weights: Callable[[], nn.Module], stage: Stage, inputs: ReferenceInputs) -> None:
        """Read M_{t-1}'s adapter from its folder into the frozen one."""
        model = load_weights()
        assert isinstance(model, FrozenAdapter)
        self._model = model

    def weights(self) -> dict[str, Tensor]:
        """Weights of the frozen adapter by name, whole or this rank's shards; they share its memory."""
        assert self._model is not None, "the reference is asked before the stage began"
        return self._model.adapter()

    def become_(self, policy: CausalBackbone) -> None:
        """Copy the trained adapter into the frozen one, in place."""
        snapshot_adapter_(policy.model)

    def logps(self, batch: PreferenceBatch) -> PairLogps:
        """One no-grad forward of the policy with the frozen adapter."""
        assert self._model is not None, "the reference is asked before the stage began"
        with self._model.in_use() as policy:
            return self._compute_logps(policy, batch)

    def digest(self) -> str | None:
        """Digest of base and frozen adapter."""
        assert self._model is not None
        return self._model.digest()


class FirstAdapter:
    """The values that adapters begin with, on the CPU: M_0, whose exports would be the base's.

    Args:
        model: with adapters as they were made; each rank keeps its own part.
    """

    def __init__(self, model: nn.Module) -> None:
        self._values = {name: own_part(t).detach().cpu().clone() for name, t in adapter_state(model, TRAINED).items()}

    @torch.no_grad()
    def write_(self, model: nn.Module, adapter: str) -> None:
        """Give an adapter of the model these values, in place."""
        for name, tensor in adapter_state(model, adapter).items():
            own_part(tensor).copy_(self._values[name])


def frozen_adapter(policy: CausalBackbone, folder: Path | None, first: FirstAdapter) -> FrozenAdapter:
    """M_t of a run that goes on, in the frozen adapter.

    Args:
        policy: with adapters.
        folder: of M_t's adapter; None for M_0.
        first: M_0.

    Raises:
        ResumeError: the folder is damaged.
    """
    if folder is not None:
        read_reference_adapter_(policy.model, folder)
    else:
        first.write_(policy.model, REFERENCE)
    return FrozenAdapter(policy)


@contextmanager
def frozen_adapter_kept(policy: CausalBackbone) -> Iterator[None]:
    """Give the frozen adapter its values back, whatever is read into it within.

    Args:
        policy: with adapters.
    """
    before = {name: own_part(t).clone() for name, t in adapter_state(policy.model, REFERENCE).items()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, tensor in adapter_state(policy.model, REFERENCE).items():
                own_part(tensor).copy_(before[name])


def model_digest(model: nn.Module) -> str:
    """Digest of a model's weights, or of base and frozen adapter."""
    if isinstance(model, FrozenAdapter):
        return model.digest()
    assert isinstance(model, CausalBackbone)
    return weights_digest(model)


def check_adapters(
    lora: LoraSettings | None, quantization: QuantizationName | None, reference: ReferencePolicy
) -> None:
    """Refuse settings of `model.lora`, `model.quantization` and `model.reference` that don't go together.

    Raises:
        ConfigurationError: with the setting to change.
    """
    name = type(reference).__name__
    if lora is not None:
        lora.check()
    if lora is None and quantization is not None:
        raise ConfigurationError(
            f"`model.quantization` is {quantization!r}, and quantised weights can't be trained; add adapters with "
            "`model.lora.r`, or leave it out"
        )
    if lora is None and isinstance(reference, AdapterReference):
        raise ConfigurationError(
            f"`model.reference` is {name}, and there are no adapters; set `model.lora.r`, or leave it out"
        )
    if lora is not None and isinstance(reference, ResidentReference):
        raise ConfigurationError(
            f"`model.reference` is {name}, a second copy of frozen{' and quantised' if quantization else ''} weights "
            "that the adapters share anyway; with `model.lora` leave it out (AdapterReference) or use CachedReference, "
            "for M_0 throughout FixedAdapterReference or CachedFixedReference"
        )
    if quantization == "int8" and isinstance(reference, CachedReference):
        raise ConfigurationError(
            f"`model.reference` is {name} with `model.quantization: int8`, whose products round by what else is in the "
            "batch: cached logps would be off by 1e-3; leave `model.reference` out (AdapterReference), or use nf4"
        )
    if lora is not None and lora.export_merged and quantization is not None:
        raise ConfigurationError(
            f"`model.lora.export_merged` with `model.quantization: {quantization}`: adapters added to rounded weights "
            "and rounded again are another model; leave one of them out"
        )
    check_packages(lora, quantization)
