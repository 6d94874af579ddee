"""What several pairs share, on two gloo processes: BCO's mean reward, and the router's loss under shards."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import free_port, make_rows, write_jsonl
from runs import fit, losses, weights
from test_layouts import COMMON
from transformers import AutoConfig, AutoModelForCausalLM

from sdpo_lightning import PreferenceSource
from sdpo_lightning.batch_objectives import BCOShiftedLoss

TESTS = Path(__file__).resolve().parent
SCRIPT = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
from runs import fit
from sdpo_lightning import PreferenceSource
from sdpo_lightning.batch_objectives import BCOShiftedLoss

if __name__ == "__main__":
    _, tests, run_dir, model_dir, strategy, loss, path = sys.argv
    trainer, module = fit(
        Path(run_dir),
        model_dir,
        [PreferenceSource("a", path)],
        trainer_args={"devices": 2, "strategy": strategy},
        module_args={"loss": BCOShiftedLoss()} if loss == "bco" else {},
        batch_size=1,
    )
    state = {} if module.loss is None else module.loss.state_dict()
    Path(run_dir, f"state-{trainer.global_rank}.json").write_text(json.dumps(state))
"""


def two_ranks(tmp_path, name, model_dir, strategy, loss, path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    words = [sys.executable, str(script), str(TESTS), str(tmp_path / name), str(model_dir), strategy, loss, str(path)]
    environment = os.environ | {"MASTER_PORT": free_port(), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    return weights(tmp_path / name / "stages" / "01-a")


def assert_near(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=1e-5)


@pytest.mark.slow
def test_the_mean_reward_is_that_of_all_ranks(tmp_path, tiny_model_dir):
    path = write_jsonl(tmp_path / "a.jsonl", make_rows(7, 0, "a"))
    ours = two_ranks(tmp_path, "two", tiny_model_dir, "ddp", "bco", path)
    source = PreferenceSource("a", str(path))
    _, module = fit(tmp_path / "one", tiny_model_dir, [source], module_args={"loss": BCOShiftedLoss()}, batch_size=2)
    assert_near(ours, weights(tmp_path / "one" / "stages" / "01-a"))
    total, count = module.loss.state_dict()["sum_and_count"]
    # 7 pairs and two rewards each; the eighth is one rank's filler.
    assert count == 14 and abs(total) > 1e-3
    for rank in range(2):
        found = json.loads((tmp_path / "two" / f"state-{rank}.json").read_text())["sum_and_count"]
        assert found == pytest.approx([total, 14], abs=1e-4)


@pytest.mark.slow
def test_the_routers_loss_under_shards_is_that_of_whole_copies(tmp_path, tiny_tokenizer):
    torch.manual_seed(3)
    mixture = {"num_local_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.5}
    config = AutoConfig.for_model("mixtral", **(COMMON | mixture | {"vocab_size": len(tiny_tokenizer)}))
    AutoModelForCausalLM.from_config(config).float().save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    path = write_jsonl(tmp_path / "a.jsonl", make_rows(6, 0, "a"))
    copies = two_ranks(tmp_path, "ddp", tmp_path / "model", "ddp", "none", path)
    shards = two_ranks(tmp_path, "fsdp2", tmp_path / "model", "fsdp2", "none", path)
    assert_near(shards, copies)
    found = losses(tmp_path / "fsdp2")
    # ln 2, and half of about two experts a token.
    assert 0.693 + 0.7 < found[0] < 0.693 + 2
    assert found == pytest.approx(losses(tmp_path / "ddp"), abs=1e-4)
