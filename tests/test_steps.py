"""What one optimizer step does beyond its loss: forwards, gradients, clipping."""

import pytest
import torch
from runs import fit, made_sources
from torch import nn

from sdpo_lightning import CachedReference, DPOLitModule


class Watched(DPOLitModule):
    """Counts forwards of the policy, and gradients that are held when one begins."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.forwards = {"train": 0, "score": 0}
        self.held = []
        self.before = self.after = None

    def compute_logps(self, model, batch):
        self.forwards["train" if torch.is_grad_enabled() else "score"] += 1
        if torch.is_grad_enabled():
            self.held.append(sum(p.grad is not None for p in model.parameters()))
        return super().compute_logps(model, batch)

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        self.before = [p.grad.clone() for p in self.policy.parameters()]
        super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
        self.after = [p.grad.clone() for p in self.policy.parameters()]


@pytest.fixture
def sources(tmp_path):
    return made_sources(tmp_path, {"a": 4, "b": 4})


def run(tmp_path, model_dir, sources, **trainer_args):
    return fit(
        tmp_path / "run",
        model_dir,
        sources,
        reference=CachedReference(),
        module_class=Watched,
        module_args={"optimizer": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True)},
        trainer_args=trainer_args,
    )[1]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_no_forward_but_the_reference_pass_and_the_steps(tmp_path, tiny_model_dir, sources, accumulate):
    module = run(tmp_path, tiny_model_dir, sources, accumulate_grad_batches=accumulate)
    # Two stages of 4 pairs in micro-batches of 2: each is scored twice by the reference pass, and trained on twice.
    assert module.forwards == {"score": 4, "train": 4}
    # Gradients stand there at the start of a forward only within an accumulation.
    weights = len(list(module.policy.parameters()))
    assert module.held == {1: [0, 0, 0, 0], 2: [0, weights, 0, weights]}[accumulate]


def norm(gradients):
    return torch.cat([g.flatten() for g in gradients]).norm().item()


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_clipping_by_norm_with_a_fused_optimizer(tmp_path, tiny_model_dir, sources, precision):
    module = run(tmp_path, tiny_model_dir, sources, gradient_clip_val=1e-3, precision=precision)
    assert norm(module.before) > 2e-3
    # torch's rule: g * c / (norm + 1e-6).
    factor = 1e-3 / (norm(module.before) + 1e-6)
    for before, after in zip(module.before, module.after, strict=True):
        torch.testing.assert_close(after, before * factor, atol=1e-9, rtol=1e-4)


def test_clipping_by_value(tmp_path, tiny_model_dir, sources):
    module = run(tmp_path, tiny_model_dir, sources, gradient_clip_val=1e-4, gradient_clip_algorithm="value")
    assert max(g.abs().max().item() for g in module.before) > 1e-4
    for before, after in zip(module.before, module.after, strict=True):
        assert torch.equal(after, before.clamp(-1e-4, 1e-4))


def test_no_clipping_is_no_change(tmp_path, tiny_model_dir, sources):
    module = run(tmp_path, tiny_model_dir, sources)
    for before, after in zip(module.before, module.after, strict=True):
        assert torch.equal(after, before)


def test_dropout_in_training_mode_does_not_fail_the_self_check(tmp_path, tiny_model_dir, sources):
    class Dropped(Watched):
        def load_weights(self, model_name_or_path):
            backbone = super().load_weights(model_name_or_path)
            embed = backbone.model.get_input_embeddings()
            # Dropout that no setting knows of.
            embed.register_forward_hook(lambda m, i, out: nn.functional.dropout(out, 0.5, m.training))
            return backbone

    module = fit(tmp_path / "run", tiny_model_dir, sources, reference=CachedReference(), module_class=Dropped)[1]
    # The reference pass as above, and one forward in eval mode at the first step of each stage.
    assert module.forwards == {"score": 4 + 2, "train": 4}
