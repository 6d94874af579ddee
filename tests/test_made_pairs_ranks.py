"""Pairs made by M_{t-1} on two gloo ranks, whole or sharded: the rows and weights of one process, and errors on all."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import make_rows, write_jsonl
from made_script import FromFolder, sampled, train
from runs import losses, weights

from sdpo_lightning import AdapterReference, LoraSettings

TESTS = Path(__file__).resolve().parent
STAND_IN = TESTS / "vllm_stand_in"
SCENARIOS = "ddp fsdp2 fsdp2_resumed fsdp2_lora ddp_vllm fsdp2_vllm too_few scorer_fails stopped".split()


@pytest.fixture(scope="module")
def out(tmp_path_factory, ending_model_dir) -> Path:
    """Data, and the runs of two ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    write_jsonl(folder / "a.jsonl", make_rows(6, 0))
    write_jsonl(folder / "prompts.jsonl", [{"prompt": f"w{n} w{n + 7} w{n + 3}"} for n in range(24)])
    script = [str(TESTS / "made_script.py"), str(folder), str(ending_model_dir), *SCENARIOS]
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *script]
    paths = os.pathsep.join([str(TESTS), str(STAND_IN), *sys.path])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, capture_output=True, text=True, cwd=folder, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def said(out: Path, scenario: str) -> list[str]:
    """What each rank met."""
    return [(out / f"{scenario}-{rank}.txt").read_text() for rank in range(2)]


def assert_close(ours: Path, theirs: Path, stage: str) -> None:
    left, right = (weights(run / "stages" / stage) for run in (ours, theirs))
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        torch.testing.assert_close(tensor, right[name], rtol=0, atol=1e-5)


def test_two_ranks_make_the_rows_of_one_process(out, tmp_path, ending_model_dir):
    train(out, str(ending_model_dir), tmp_path, None, [sampled(out), sampled(out, name="last", num_pairs=2, seed=1)])
    for scenario in ("ddp", "fsdp2"):
        assert said(out, scenario) == ["done", "done"]
        run = out / scenario
        for stage in ("02-new", "03-last"):
            name = f"new_pairs/{stage}.jsonl"
            assert (run / name).read_bytes() == (tmp_path / name).read_bytes()
            assert_close(run, tmp_path, stage)
        # 6 / 2 + 4 / 2 + 2 / 2 steps.
        assert losses(run) == pytest.approx(losses(tmp_path), abs=1e-4) and len(losses(run)) == 6
        # The folder that M_{t-1} was read from is gone.
        assert sorted(path.name for path in (run / "new_pairs").iterdir()) == [
            f"{stage}.{end}" for stage in ("02-new", "03-last") for end in ("json", "jsonl")
        ]


def test_a_resumed_run_takes_the_rows_that_are_there(out):
    assert said(out, "fsdp2_resumed") == ["done", "done"]
    assert not (out / "fsdp2" / "stale" / "02-new.jsonl").exists()


def test_adapters_of_shards_answer_as_in_one_process(out, tmp_path, ending_model_dir):
    assert said(out, "fsdp2_lora") == ["done", "done"]
    given = {"module_args": {"lora": LoraSettings(r=4)}, "reference": AdapterReference()}
    train(out, str(ending_model_dir), tmp_path, None, [sampled(out)], **given)
    name = "new_pairs/02-new.jsonl"
    assert (out / "fsdp2_lora" / name).read_bytes() == (tmp_path / name).read_bytes()


def test_a_process_answers_from_the_folder_of_all_ranks(out, tmp_path, ending_model_dir):
    """The stand-in for vLLM answers by transformers, from what it finds in the folder: the rows of M_1 itself."""
    for scenario in ("ddp_vllm", "fsdp2_vllm"):
        assert said(out, scenario) == ["done", "done"]
        rows = (out / scenario / "new_pairs" / "02-new.jsonl").read_bytes()
        assert rows == (out / "ddp" / "new_pairs" / "02-new.jsonl").read_bytes()
        note = json.loads((out / scenario / "new_pairs" / "02-new.json").read_text())
        assert note["made_with"]["generator"]["class"].endswith("VLLMPairGenerator")
        assert_close(out / scenario, out / "ddp", "02-new")
    # Both ranks had shards of policy and reference, and none while the process answered.
    assert [(out / f"held-{rank}.txt").read_text() for rank in range(2)] == ["True 0", "True 0"]


def test_an_error_of_the_first_rank_ends_all_alike(out):
    for scenario, words in (("too_few", "of the 90 pairs that `num_pairs` declares"), ("scorer_fails", "no reward")):
        first, second = said(out, scenario)
        assert first == second and words in first


def test_a_signal_of_one_rank_ends_the_making_on_all(out):
    # 128 + SIGTERM.
    assert said(out, "stopped") == ["SystemExit: 143", "SystemExit: 143"]


def test_a_generator_of_the_runs_choice_in_one_process_changes_no_bit(out, tmp_path, ending_model_dir):
    """With weights and states set aside and back: the same rows, and the same bits of training."""
    for run, given in (("live", {}), ("folder", {"pair_generator": FromFolder()})):
        train(out, str(ending_model_dir), tmp_path / run, None, [sampled(out)], **given)
    assert losses(tmp_path / "live") == losses(tmp_path / "folder")
    left, right = (weights(tmp_path / run / "stages" / "02-new") for run in ("live", "folder"))
    assert all(torch.equal(tensor, right[name]) for name, tensor in left.items())
