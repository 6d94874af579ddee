"""References on two gloo ranks, sharded or not: what one process gives on the same global batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import make_rows, write_jsonl
from reference_script import scenarios, sources
from runs import fit, losses
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaForCausalLM

TESTS = Path(__file__).resolve().parent
NAMES = list(scenarios("", ""))


@pytest.fixture(scope="module")
def other(tiny_model_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("other") / "model"
    torch.manual_seed(99)
    LlamaForCausalLM(LlamaForCausalLM.from_pretrained(tiny_model_dir).config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def out(tmp_path_factory, tiny_model_dir, other):
    folder = tmp_path_factory.mktemp("ranks")
    for seed, name in enumerate("ab"):
        write_jsonl(folder / f"{name}.jsonl", make_rows(10, seed, name))
    script = [str(TESTS / "reference_script.py"), str(folder), str(tiny_model_dir), str(other)]
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *script]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, capture_output=True, text=True, cwd=folder, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_equal_one_process(out, tmp_path, tiny_model_dir, other, name):
    _, make, module_args = scenarios(str(tiny_model_dir), str(other))[name]
    data = {"batch_size": 2, "val_fraction": 0.2}
    fit(tmp_path, tiny_model_dir, sources(out), None, make(), module_args=module_args, **data)
    ours, theirs = losses(out / name), losses(tmp_path)
    assert len(ours) == 8 and ours == pytest.approx(theirs, abs=1e-4)
    assert max(abs(loss - theirs[0]) for loss in theirs) > 1e-3
    [path] = (out / name / "stages" / "02-b").glob("*.safetensors")
    expected = load_file(tmp_path / "stages" / "02-b" / path.name)
    for key, tensor in load_file(path).items():
        torch.testing.assert_close(tensor, expected[key], rtol=0, atol=1e-4)
