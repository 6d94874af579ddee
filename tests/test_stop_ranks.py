"""Stop rules on two gloo ranks, sharded or not: both end a stage at the step at which one process does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import make_rows, write_jsonl
from runs import weights
from stop_script import scenarios, sources, start

from sdpo_lightning.ledger import Ledger

TESTS = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def out(tmp_path_factory, tiny_model_dir):
    folder = tmp_path_factory.mktemp("ranks")
    for seed, name in enumerate("ab"):
        write_jsonl(folder / f"{name}.jsonl", make_rows(12, seed, name))
        write_jsonl(folder / f"{name}-val.jsonl", make_rows(4, seed + 9, f"{name}-val"))
    script = [str(TESTS / "stop_script.py"), str(folder), str(tiny_model_dir)]
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *script]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, capture_output=True, text=True, cwd=folder, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", list(scenarios()))
def test_two_ranks_end_where_one_process_does(out, tmp_path, tiny_model_dir, name):
    start(tmp_path, str(tiny_model_dir), sources(out), scenarios()[name][1], 2)
    ours, theirs = Ledger.read(out / name).stages, Ledger.read(tmp_path).stages
    assert [stage.steps for stage in ours] == [stage.steps for stage in theirs]
    for our, their in zip(ours, theirs, strict=True):
        assert our.end.epoch_steps == their.end.epoch_steps and our.end.pairs == their.end.pairs
        assert sum(our.end.epoch_steps) < 6
    if name == "own":
        # Rank 0 logs 1, 0, 1 in stage 1, and 2, 3 in stage 2: no better after steps 3 and 5. Best were steps 2 and 4.
        assert [stage.steps for stage in ours] == [3, 5]
    for folder in ("01-a", "02-b"):
        left, right = (weights(root / "stages" / folder) for root in (out / name, tmp_path))
        for key, tensor in left.items():
            torch.testing.assert_close(tensor, right[key], rtol=0, atol=1e-4)
