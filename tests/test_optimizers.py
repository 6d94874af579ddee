"""8-bit optimizers: states really are 8 bits, they survive a resume and a stage boundary, and ranks agree."""

import json
import os
import subprocess
import sys
from pathlib import Path

import bitsandbytes
import lightning.pytorch as pl
import pytest
import torch
import yaml
from helpers import free_port
from runs import assert_same_weights, fit, losses, made_sources, weights

from sdpo_lightning import PreferenceSource, StageCheckpoint
from sdpo_lightning.cli import main

TESTS = Path(__file__).resolve().parent
KINDS = ["AdamW8bit", "PagedAdamW8bit"]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory, tiny_tokenizer) -> Path:
    """Matrices of 4096 elements and more, and norms of fewer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("model") / "wide"
    torch.manual_seed(5)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    config = LlamaConfig(vocab_size=len(tiny_tokenizer), initializer_range=0.1, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> list[PreferenceSource]:
    return made_sources(tmp_path_factory.mktemp("sources"), {"a": 8, "b": 8})


class States(pl.Callback):
    """Dtype of the first moment by size of the weight, and how many steps each stage's optimizer has taken."""

    def __init__(self) -> None:
        self.dtypes: set[tuple[bool, torch.dtype]] = set()
        self.steps: list[int] = []

    def on_train_batch_end(self, trainer, *_):
        [optimizer] = trainer.optimizers
        state = optimizer.state
        self.dtypes |= {(p.numel() >= 4096, state[p]["state1"].dtype) for p in state}
        self.steps.append(next(iter(state.values()))["step"])


@pytest.mark.parametrize("kind", KINDS)
def test_states_are_8_bits_and_fresh_in_each_stage(tmp_path, model_dir, sources, kind):
    states, make = States(), getattr(bitsandbytes.optim, kind)
    fit(
        tmp_path, model_dir, sources, callbacks=[states],
        module_args={"optimizer": lambda params: make(params, lr=1e-3), "warmup_ratio": 0.0},
    )  # fmt: skip
    assert states.dtypes == {(True, torch.uint8), (False, torch.float32)}
    # 8 pairs by 2.
    assert states.steps == [1, 2, 3, 4, 1, 2, 3, 4]


def _adamw8bit(params):
    return bitsandbytes.optim.AdamW8bit(params, lr=1e-3, weight_decay=0.1)


def _adamw(params):
    return torch.optim.AdamW(params, lr=1e-3, weight_decay=0.1)


def test_8_bits_train_as_32_do_within_their_rounding(tmp_path, model_dir, sources):
    for name, make in (("eight", _adamw8bit), ("full", _adamw)):
        fit(tmp_path / name, model_dir, sources, module_args={"optimizer": make, "warmup_ratio": 0.0})
    start = weights(model_dir)
    moved = [
        torch.cat([(end[name] - start[name]).flatten() for name in sorted(start)])
        for end in (weights(tmp_path / run / "stages" / "02-b") for run in ("eight", "full"))
    ]
    assert 0 < (moved[0] - moved[1]).norm() / moved[1].norm() < 0.2
    assert losses(tmp_path / "eight") == pytest.approx(losses(tmp_path / "full"), abs=0.02)


def test_8_bit_states_resume_bit_for_bit(tmp_path, model_dir, sources):
    arguments = {"optimizer": _adamw8bit, "warmup_ratio": 0.0}
    every = StageCheckpoint(every_n_train_steps=1, save_top_k=-1)
    fit(tmp_path, model_dir, sources, callbacks=[every], module_args=arguments)
    whole = tmp_path / "whole-02-b"
    (tmp_path / "stages" / "02-b").rename(whole)
    checkpoint = tmp_path / "checkpoints" / "epoch=1-step=6.ckpt"
    fit(tmp_path, model_dir, sources, ckpt_path=checkpoint, module_args=arguments)
    assert_same_weights(tmp_path / "stages" / "02-b", whole)


SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
from runs import fit
from test_optimizers import _adamw8bit
from sdpo_lightning import PreferenceSource

if __name__ == "__main__":
    _, tests, run_dir, model_dir, *paths = sys.argv
    sources = [PreferenceSource(Path(path).stem, path) for path in paths]
    module = {"optimizer": _adamw8bit, "warmup_ratio": 0.0}
    trainer = {"devices": 2, "strategy": "ddp"}
    fit(Path(run_dir), model_dir, sources, module_args=module, trainer_args=trainer, batch_size=1)
"""


@pytest.mark.slow
def test_two_ddp_ranks_match_one_process(tmp_path, model_dir, sources):
    (tmp_path / "script.py").write_text(SCRIPT)
    words = [sys.executable, "script.py", str(TESTS), str(tmp_path / "two"), str(model_dir), *(s.path for s in sources)]
    environment = os.environ | {"MASTER_PORT": free_port(), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    arguments = {"optimizer": _adamw8bit, "warmup_ratio": 0.0}
    fit(tmp_path / "one", model_dir, sources, module_args=arguments, batch_size=2)
    ours, theirs = (weights(tmp_path / run / "stages" / "02-b") for run in ("two", "one"))
    start = weights(model_dir)
    for name, tensor in ours.items():
        # A gradient that differs in its last digit may fall into the next of 256 codes.
        assert (tensor - theirs[name]).norm() <= 0.05 * (theirs[name] - start[name]).norm()
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_by_class_path(tmp_path, model_dir, sources, kind):
    config = {
        "trainer": {"default_root_dir": str(tmp_path / "run"), "accelerator": "cpu", "enable_progress_bar": False},
        "model": {
            "model_name_or_path": str(model_dir),
            "optimizer": {"class_path": f"bitsandbytes.optim.{kind}", "init_args": {"lr": 1e-3}},
        },
        "data": {"sources": [{"name": s.name, "path": s.path} for s in sources], "order": "given", "max_length": 64},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    main(["fit", "--config", str(tmp_path / "config.yaml")])
    stages = json.loads((tmp_path / "run" / "summary.json").read_text())["stages"]
    # 8 pairs by 4.
    assert [stage["steps"] for stage in stages] == [2, 2]
    assert weights(tmp_path / "run" / "stages" / "02-b").keys() == weights(model_dir).keys()
