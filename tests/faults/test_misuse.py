"""Case 36: subclasses that forget or add something get an error that says so."""

from __future__ import annotations

import pytest
import torch
from helpers import make_rows, write_jsonl
from runs import fit

from sdpo_lightning import DPOLitModule, PreferenceSource
from sdpo_lightning.types import ConfigurationError


@pytest.fixture
def sources(tmp_path):
    paths = {name: write_jsonl(tmp_path / f"{name}.jsonl", make_rows(6, 0, name)) for name in ("a", "b")}
    return [PreferenceSource(name, str(path)) for name, path in paths.items()]


class ForgetsToSave(DPOLitModule):
    """Drops `super()`."""

    def on_save_checkpoint(self, checkpoint):
        checkpoint["mine"] = 1


class ForgetsToLoad(DPOLitModule):
    """Drops `super()`."""

    def on_load_checkpoint(self, checkpoint):
        self.mine = checkpoint["epoch"]


class TrainsTheReference(DPOLitModule):
    """From stage 2 on the optimizer has the reference too."""

    def trainable(self):
        extra = self.reference._model
        return [*self.parameters(), *(extra.parameters() if extra is not None else [])]


def test_a_dropped_super_on_save(tmp_path, tiny_model_dir, sources):
    with pytest.raises(ConfigurationError, match="`on_save_checkpoint` must call `super"):
        fit(tmp_path / "run", tiny_model_dir, sources, module_class=ForgetsToSave)


def test_a_dropped_super_on_load(tmp_path, tiny_model_dir, sources):
    fit(tmp_path / "run", tiny_model_dir, sources, trainer_args={"max_steps": 2})
    checkpoint = tmp_path / "run" / "checkpoints" / "stopped-step=2.ckpt"
    with pytest.raises(ConfigurationError, match="`on_load_checkpoint` must call `super"):
        fit(tmp_path / "run", tiny_model_dir, sources, ckpt_path=checkpoint, module_class=ForgetsToLoad)


def test_an_optimizer_with_the_reference(tmp_path, tiny_model_dir, sources):
    with pytest.raises(ConfigurationError, match="tensors that aren't parameters of the module"):
        fit(tmp_path / "run", tiny_model_dir, sources, module_class=TrainsTheReference)


def test_the_reference_is_frozen_in_eval_mode_and_nowhere_in_the_optimizer(tmp_path, tiny_model_dir, sources):
    trainer, module = fit(tmp_path / "run", tiny_model_dir, sources)
    reference = module.reference._model
    assert not reference.training and not any(p.requires_grad for p in reference.parameters())
    stepped = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert not stepped & {id(p) for p in reference.parameters()}
    # And the policy isn't it.
    pairs = zip(module.policy.parameters(), reference.parameters(), strict=True)
    assert any(not torch.equal(ours, theirs) for ours, theirs in pairs)
