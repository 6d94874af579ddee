"""Two nodes of one gloo rank each, with a disk each or a shared one: what one process gives, or a refusal up front."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import free_port, make_rows, write_jsonl
from runs import adamw, fit, losses, weights

from sdpo_lightning import CachedReference, PreferenceSource, ResidentReference
from sdpo_lightning.data.partitions import Quantiles

TESTS = Path(__file__).resolve().parent
REFERENCES = {"ResidentReference": ResidentReference, "CachedReference": CachedReference}


@pytest.fixture
def nodes(tmp_path, tiny_model_dir) -> list[Path]:
    """Two folders that stand for two machines' disks, each with the model and the data."""
    folders = [tmp_path / "node0", tmp_path / "node1"]
    for folder in folders:
        folder.mkdir()
        shutil.copytree(tiny_model_dir, folder / "model")
        for seed, name in enumerate("ab"):
            write_jsonl(folder / f"{name}.jsonl", make_rows(9, seed, name))
    return folders


def _start(nodes: list[Path], run: str, strategy: str, reference: str, *options: str) -> list[tuple[int, str]]:
    """Exit code and errors of both nodes."""
    port = free_port()
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path]), "OMP_NUM_THREADS": "1"}
    started = []
    for rank, folder in enumerate(nodes):
        words = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--node-rank={rank}"]
        words += ["--nproc-per-node=1", "--master-addr=127.0.0.1", f"--master-port={port}"]
        words += [str(TESTS / "node_script.py"), run, strategy, reference, *options]
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(words, cwd=folder, env=environment, **pipes))
    ended = []
    for process in started:
        _, errors = process.communicate(timeout=240)
        ended.append((process.returncode, errors))
    return ended


def _one(tmp_path: Path, nodes: list[Path], reference: str) -> Path:
    sources = [PreferenceSource(name, str(nodes[0] / f"{name}.jsonl")) for name in "ab"]
    data = {"batch_size": 2, "order": "easy_to_hard", "val_fraction": 0.2}
    fit(tmp_path / "one", nodes[0] / "model", sources, reference=REFERENCES[reference](), **data)
    return tmp_path / "one"


def _assert_equal(run: Path, one: Path, stages: int = 2) -> None:
    folders = sorted(path.name for path in (one / "stages").iterdir())
    assert len(folders) == stages and folders == sorted(path.name for path in (run / "stages").iterdir())
    for folder in folders:
        ours, theirs = weights(run / "stages" / folder), weights(one / "stages" / folder)
        for name, tensor in ours.items():
            torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=1e-5)
    assert losses(run) == pytest.approx(losses(one), abs=1e-4)


@pytest.mark.parametrize("reference", list(REFERENCES))
def test_ddp_on_two_disks_equals_one_process(tmp_path, nodes, reference):
    for code, errors in _start(nodes, "run", "ddp", reference):
        assert code == 0, errors[-2000:]
        assert "isn't shared by the 2 nodes" in errors
    first = nodes[0] / "run"
    _assert_equal(first, _one(tmp_path, nodes, reference))
    assert (first / "references" / "m0.safetensors").exists() and list((first / "checkpoints").iterdir())
    # Nothing that the first has is needed on the second, and none of it is there.
    assert not (nodes[1] / "run" / "stages").exists() and not (nodes[1] / "run" / "references").exists()


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_shared_disk_is_found(tmp_path, nodes, strategy):
    shared = tmp_path / "shared"
    shared.mkdir()
    for folder in nodes:
        (folder / "run").symlink_to(shared)
    for code, errors in _start(nodes, "run", strategy, "ResidentReference"):
        assert code == 0, errors[-2000:]
        assert "isn't shared" not in errors
    _assert_equal(shared, _one(tmp_path, nodes, "ResidentReference"))
    assert not list(shared.glob(".shared-*"))


def test_shards_on_two_disks_are_refused_up_front(nodes):
    for code, errors in _start(nodes, "run", "fsdp2", "ResidentReference"):
        assert code == 1
        assert "which the 2 nodes don't share" in errors and "`trainer.strategy: ddp`" in errors
    assert not (nodes[0] / "run" / "checkpoints").exists()


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_both_ranks_take_the_pairs_that_the_last_model_chose(tmp_path, nodes, strategy):
    shared = tmp_path / "shared"
    shared.mkdir()
    for folder in nodes:
        (folder / "run").symlink_to(shared)
    partition = {"class_path": "sdpo_lightning.data.partitions.Quantiles", "init_args": {"stages": 3}}
    options = [f"--data.partition={json.dumps(partition)}", "--data.ranked_by=previous"]
    options += ["--model.optimizer.weight_decay=0.01", "--trainer.log_every_n_steps=1"]
    for code, errors in _start(nodes, "run", strategy, "ResidentReference", *options):
        assert code == 0, errors[-2000:]
    sources = [PreferenceSource(name, str(nodes[0] / f"{name}.jsonl")) for name in "ab"]
    data = {"batch_size": 2, "order": "easy_to_hard", "val_fraction": 0.2}
    data |= {"partition": Quantiles(3), "ranked_by": "previous"}
    module = {"optimizer": adamw(1e-3, 0.01), "warmup_ratio": 0.1}
    fit(tmp_path / "one", nodes[0] / "model", sources, module_args=module, **data)
    _assert_equal(shared, tmp_path / "one", 3)
    ours, theirs = (json.loads((run / "ledger.json").read_text())["stages"] for run in (shared, tmp_path / "one"))
    # The digests of the pairs that each stage trained on, in the order of M_{t-1}'s scores.
    assert [stage["data"] for stage in ours] == [stage["data"] for stage in theirs]


@pytest.mark.slow
def test_ddp_on_two_disks_goes_on_once_the_run_is_on_both(nodes):
    whole = _start(nodes, "whole", "ddp", "ResidentReference", "--trainer.log_every_n_steps=1")
    # 7 training pairs a source by 2: stage 2 has steps 5 to 8.
    stopped = _start(nodes, "run", "ddp", "ResidentReference", "--trainer.max_steps=6")
    assert [code for code, _ in whole + stopped] == [0] * 4, stopped
    for code, errors in _start(nodes, "run", "ddp", "ResidentReference", "--trainer.log_every_n_steps=1"):
        # torchrun's own code; the command's is 3.
        assert code == 1
        assert "rank 1 from nothing: copy the run directory of the first node" in errors
    shutil.rmtree(nodes[1] / "run", ignore_errors=True)
    shutil.copytree(nodes[0] / "run", nodes[1] / "run")
    for code, errors in _start(nodes, "run", "ddp", "ResidentReference", "--trainer.log_every_n_steps=1"):
        assert code == 0, errors[-2000:]
    run, other = nodes[0] / "run", nodes[0] / "whole"
    assert losses(run) == losses(other) and len(losses(run)) == 8
    last = sorted(path.name for path in (other / "stages").iterdir())[-1]
    assert last.startswith("02-")
    for name, tensor in weights(run / "stages" / last).items():
        assert torch.equal(tensor, weights(other / "stages" / last)[name])


@pytest.mark.slow
def test_rows_that_the_first_node_makes_come_to_every_disk(nodes, ending_model_dir):
    prompts = [{"prompt": f"w{n} w{n + 7} w{n + 3}"} for n in range(24)]
    for folder in nodes:
        shutil.rmtree(folder / "model")
        shutil.copytree(ending_model_dir, folder / "model")
        write_jsonl(folder / "prompts.jsonl", prompts)
    given = {"name": "new", "num_pairs": 4, "prompts": "prompts.jsonl", "scorer": "made_script.by_words"}
    made = {"class_path": "sdpo_lightning.SampledPairs", "init_args": given | {"max_new_tokens": 6}}
    # What an earlier try left on the second disk isn't taken.
    write_jsonl(nodes[1] / "run" / "new_pairs" / "03-new.jsonl", [{"prompt": "w1", "chosen": "w2", "rejected": "w3"}])
    options = [f"--data.pair_sources={json.dumps([made])}", "--trainer.log_every_n_steps=1"]
    for code, errors in _start(nodes, "run", "ddp", "ResidentReference", *options):
        assert code == 0, errors[-2000:]
    rows, others = ((folder / "run" / "new_pairs" / "03-new.jsonl").read_bytes() for folder in nodes)
    assert rows == others and rows.count(b"\n") >= 4
    assert (nodes[1] / "run" / "stale" / "03-new.jsonl").exists() and not (nodes[1] / "run" / "stages").exists()
    # 7 / 2 a source, 4 / 2.
    assert len(losses(nodes[0] / "run")) == 4 + 4 + 2
