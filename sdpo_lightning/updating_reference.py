"""Rank 5: references that follow the policy within a stage, after its optimizer steps.

At the start of a stage they are M_{t-1}, as every reference of stepwise DPO. What they become afterwards is no M_t, so
a checkpoint holds it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sdpo_lightning.adapter_reference import AdapterReference, FrozenAdapter
from sdpo_lightning.backbone import CausalBackbone, copy_weights_
from sdpo_lightning.divergences import k2_sums
from sdpo_lightning.ranks import from_every_rank
from sdpo_lightning.reference import ReferencePolicy, ResidentReference
from sdpo_lightning.sharding import is_sharded, own_part, shard_pairs
from sdpo_lightning.types import ConfigurationError, PairLogps, PreferenceBatch, ReferenceInputs, RunFacts, Stage

_STEPS = "steps"
_WEIGHTS = "weights."


class FollowingReference(ReferencePolicy):
    """A reference that may change after each optimizer step; a subclass says when and how.

    It is held as a second model, or with `model.lora` as a second, frozen adapter. Its weights (of a sharded model each
    rank's part) are in every checkpoint, from the first change of a stage to the stage's end.

    Args:
        offload: keep the second model's weights in the memory of the CPU between forward passes.
    """

    def __init__(self, offload: bool = False) -> None:
        self.offload = offload
        self._held: ResidentReference | AdapterReference | None = None
        # Optimizer steps of this stage.
        self._steps = 0
        self._moved = False
        # What a checkpoint held, until `restore`; None where none was read.
        self._saved: dict[str, Tensor] | None = None

    @property
    def held(self) -> ResidentReference | AdapterReference:
        """What holds the weights: `weights()` to write into, `become_(policy)` to be the policy."""
        assert self._held is not None, "the reference is asked before the stage began"
        return self._held

    @abstractmethod
    def follow(self, policy: CausalBackbone, step: int) -> bool:
        """Change what `self.held` holds, or leave it.

        Args:
            policy: as the step left it.
            step: optimizer steps of the stage so far, from 1.

        Returns:
            Whether it changed.
        """

    def check(self, run: RunFacts) -> None:
        """Refuse to park what isn't there.

        Raises:
            ConfigurationError: with what to use.
        """
        if run.adapters and self.offload:
            raise ConfigurationError(
                f"`model.reference` is {type(self).__name__} with `offload: true` and `model.lora`, where it is an "
                "adapter in the policy and no second model; leave `offload` out"
            )

    def advance(self, policy: CausalBackbone, stage: Stage, inputs: ReferenceInputs) -> None:
        """Become M_{t-1}, and count from here."""
        if self._held is None:
            self._hold(ResidentReference(self.offload) if policy.base_digest is None else AdapterReference())
        self.held.advance(policy, stage, inputs)
        self._steps, self._moved = 0, False

    def _hold(self, held: ResidentReference | AdapterReference) -> None:
        held.prepare(self._compute_logps)
        self._held = held

    def stay(self, stage: Stage, inputs: ReferenceInputs) -> None:
        """Refuse: what it is has no name by which a fork or a ledger could find it again."""
        raise ConfigurationError(
            f"a {type(self).__name__} can't stay behind at stage {stage.index}: it is none of the run's models; use "
            "`model.reference: FixedReference`, or a `should_advance` that is true"
        )

    def logps(self, batch: PreferenceBatch) -> PairLogps:
        """One no-grad forward."""
        return self.held.logps(batch)

    def digest(self) -> str | None:
        """Digest of the weights, of the base's too where they are an adapter."""
        return self.held.digest()

    def models(self) -> Sequence[nn.Module]:
        """The second model, once it is there; an adapter lies in the policy."""
        return [] if self._held is None else self._held.models()

    def after_step(self, policy: CausalBackbone) -> None:
        """Follow."""
        self._steps += 1
        if self.follow(policy, self._steps):
            self._moved = True

    def state_dict(self) -> dict[str, Tensor]:
        """Steps of the stage, and the weights once they are no M_t: shards where the model is cut."""
        if self._held is None:
            # Lightning may save before the first stage begins.
            return dict(self._saved or {})
        state = {_STEPS: torch.tensor(self._steps)}
        if self._moved:
            state |= {_WEIGHTS + name: tensor for name, tensor in self.held.weights().items()}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Keep what a checkpoint held until `restore`."""
        self._saved = dict(state)

    @torch.no_grad()
    def restore(self, load_weights: Callable[[], nn.Module], stage: Stage, inputs: ReferenceInputs) -> None:
        """Reload M_{t-1}, then write into it what the checkpoint held, or where none was read what it is itself."""
        read, self._saved = self._saved, None
        # `validate` on a module that has trained; an adapter is read into the place where it is held.
        saved = {name: t.clone() for name, t in self.state_dict().items()} if read is None else read
        began = load_weights()
        if isinstance(began, FrozenAdapter):
            adapter = AdapterReference()
            adapter.restore(lambda: began, stage, inputs)
            self._hold(adapter)
        else:
            assert isinstance(began, CausalBackbone)
            resident = ResidentReference(self.offload)
            resident.restore(lambda: began, stage, inputs)
            self._hold(resident)
        self._steps = int(saved.get(_STEPS, torch.tensor(0)))
        weights = {name.removeprefix(_WEIGHTS): t for name, t in saved.items() if name.startswith(_WEIGHTS)}
        self._moved = bool(weights)
        if weights:
            ours = self.held.weights()
            assert ours.keys() == weights.keys(), "the checkpoint's reference is another architecture"
            for name, tensor in ours.items():
                own_part(tensor).copy_(own_part(weights[name]))


class UpdatingReference(FollowingReference):
    """TR-DPO (arXiv 2404.09656): every n optimizer steps the reference moves towards the policy.

    reference <- mix * policy + (1 - mix) * reference, weight by weight. `mix: 1` is the paper's hard update
    (the reference becomes the policy), a smaller one its soft update; `every_n_steps: 1` with a small `mix` is an
    exponential moving average of the policy with decay 1 - mix.

    With `model.lora` the reference is an adapter, and only the hard update is offered. The soft one of the weights
    W + s B A is mix * B_p A_p + (1 - mix) * B_r A_r, of up to twice the adapters' rank, and mixing A and B is another.

    Args:
        every_n_steps: optimizer steps of a stage between two updates; the count begins anew with each stage.
        mix: weight of the policy, in (0, 1].
        offload: keep its weights in the memory of the CPU between forward passes; not with `model.lora`.

    Raises:
        ConfigurationError: a number outside its range.
    """

    def __init__(self, every_n_steps: int, mix: float = 1.0, offload: bool = False) -> None:
        super().__init__(offload)
        if every_n_steps < 1:
            raise ConfigurationError(
                f"`every_n_steps` of UpdatingReference is {every_n_steps}, expected 1 or more"
            )
        if not 0 < mix <= 1:
            raise ConfigurationError(f"`mix` of UpdatingReference is {mix}, expected within (0, 1]")
        self.every_n_steps = every_n_steps
        self.mix = mix

    def check(self, run: RunFacts) -> None:
        """Refuse a soft update of adapters.

        Raises:
            ConfigurationError: with what to use.
        """
        super().check(run)
        if run.adapters and self.mix != 1:
            raise ConfigurationError(
                f"`model.reference` is UpdatingReference with `mix: {self.mix}` and `model.lora`: the mean of two "
                "adapters' products B A has up to twice their rank, and isn't the product of the means of B and A; "
                "use `mix: 1`, or train all weights (leave `model.lora` out)"
            )

    def settings(self) -> dict[str, Any]:
        """Its two numbers."""
        text = f"{self.mix} * policy + {1 - self.mix} * reference every {self.every_n_steps} steps"
        return {"model.reference": f"M_{{t-1}}, then {text}"}

    def follow(self, policy: CausalBackbone, step: int) -> bool:
        """Every n steps."""
        if step % self.every_n_steps:
            return False
        if self.mix == 1:
            self.held.become_(policy)
        else:
            assert isinstance(self.held, ResidentReference), "`check` refuses adapters"
            mix_weights_(self.held.model, policy, self.mix)
        return True


class KLBoundReference(FollowingReference):
    """The reference becomes the policy after an optimizer step whose estimated KL to it passes a bound.

    The estimate of a step is the mean over its 2B completions y, chosen and rejected, of all ranks and micro-batches,
    of (log pi(y | x) - log pi_ref(y | x))^2 / 2, summed logps, in nats: Schulman's k2
    (http://joschu.net/blog/kl-approx.html). Two things to know: the completions are the data's and not drawn from the
    policy, so this is a distance on the data rather than KL(pi || pi_ref); and the logps are those of the step's own
    forward pass, so pi is the policy before that step. No forward pass is made for it.

    Args:
        max_kl: the bound, nats a completion.
        offload: keep its weights in the memory of the CPU between forward passes; not with `model.lora`.

    Raises:
        ConfigurationError: a bound that isn't above 0.
    """

    def __init__(self, max_kl: float, offload: bool = False) -> None:
        super().__init__(offload)
        if max_kl <= 0:
            raise ConfigurationError(f"`max_kl` of KLBoundReference is {max_kl}, expected above 0")
        self.max_kl = max_kl
        # (sum, completions) of each micro-batch of the step.
        self._observed: list[Tensor] = []

    def settings(self) -> dict[str, Any]:
        """Its bound."""
        return {"model.reference": f"M_{{t-1}}, then the policy where KL passes {self.max_kl}"}

    def advance(self, policy: CausalBackbone, stage: Stage, inputs: ReferenceInputs) -> None:
        """Become M_{t-1}, and forget what an interrupted step has left."""
        super().advance(policy, stage, inputs)
        self._observed.clear()

    def restore(self, load_weights: Callable[[], nn.Module], stage: Stage, inputs: ReferenceInputs) -> None:
        """Be what the checkpoint held, and forget what an interrupted step has left."""
        super().restore(load_weights, stage, inputs)
        self._observed.clear()

    def observe(self, batch: PreferenceBatch, policy: PairLogps, reference: PairLogps) -> None:
        """Add up a micro-batch, in float64 and without waiting for the device."""
        self._observed.append(k2_sums(batch.weights, policy, reference))

    def follow(self, policy: CausalBackbone, step: int) -> bool:
        """Where the bound is passed; all ranks add the same numbers in the same order."""
        sums = torch.stack(self._observed).sum(0).tolist() if self._observed else [0.0, 0.0]
        self._observed.clear()
        total, count = (sum(column) for column in zip(*from_every_rank(sums), strict=True))
        if not count:
            raise ConfigurationError(
                "KLBoundReference saw no logps in a step: `training_step` must set `last_logps`, as ours does"
            )
        if total / count <= self.max_kl:
            return False
        self.held.become_(policy)
        return True


@torch.no_grad()
def mix_weights_(target: nn.Module, source: nn.Module, mix: float) -> None:
    """target <- mix * source + (1 - mix) * target, parameter by parameter; buffers are copied.

    Sharded ones are mixed shard by shard, without communication.

    Args:
        target: changed in place, perhaps on another device.
        source: of the same names and shapes, cut alike.
        mix: in (0, 1]; at 1 a copy, bit for bit.
    """
    if mix == 1:
        copy_weights_(target, source)
        return
    if is_sharded(target) or is_sharded(source):
        pairs = shard_pairs(target, source)
    else:
        theirs = dict(source.named_parameters())
        pairs = [(parameter, theirs[name]) for name, parameter in target.named_parameters()]
    for mine, other in pairs:
        mine.lerp_(other.to(mine.device), mix)
    buffers = dict(source.named_buffers())
    for name, buffer in target.named_buffers():
        buffer.copy_(buffers[name])
