"""Two gloo processes give what one gives on the same global batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import free_port, make_rows, write_jsonl
from runs import fit, metrics, weights

from sdpo_lightning import CachedReference, PreferenceSource, ResidentReference

TESTS = Path(__file__).resolve().parent
SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
from runs import fit
from sdpo_lightning import CachedReference, PreferenceSource, ResidentReference

if __name__ == "__main__":
    _, tests, run_dir, model_dir, reference, *paths = sys.argv
    sources = [PreferenceSource(Path(path).stem, path) for path in paths]
    reference = {"CachedReference": CachedReference, "ResidentReference": ResidentReference}[reference]()
    arguments = {"devices": 2, "strategy": "ddp"}
    data = {"batch_size": 1, "order": "easy_to_hard", "val_fraction": 0.2}
    fit(Path(run_dir), model_dir, sources, reference=reference, trainer_args=arguments, **data)
"""


@pytest.mark.parametrize("reference", [ResidentReference, pytest.param(CachedReference, marks=pytest.mark.slow)])
def test_two_ranks_equal_one(tmp_path, tiny_model_dir, reference):
    paths = [write_jsonl(tmp_path / f"{name}.jsonl", make_rows(9, seed, name)) for seed, name in enumerate("ab")]
    (tmp_path / "script.py").write_text(SCRIPT)
    words = [sys.executable, "script.py", str(TESTS), str(tmp_path / "two"), str(tiny_model_dir), reference.__name__]
    environment = os.environ | {"MASTER_PORT": free_port(), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [*words, *map(str, paths)], capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=240
    )
    assert done.returncode == 0, done.stderr[-2000:]
    sources = [PreferenceSource(path.stem, str(path)) for path in paths]
    data = {"batch_size": 2, "order": "easy_to_hard", "val_fraction": 0.2}
    fit(tmp_path / "one", tiny_model_dir, sources, reference=reference(), **data)
    folders = sorted(path.name for path in (tmp_path / "one" / "stages").iterdir())
    assert len(folders) == 2
    for folder in folders:
        ours, theirs = (weights(tmp_path / run / "stages" / folder) for run in ("two", "one"))
        for name, tensor in ours.items():
            torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=1e-5)
    rows = [metrics(tmp_path / run) for run in ("two", "one")]
    assert len(rows[0]) == len(rows[1]) > 4
    # 7 training pairs a source by 2: the last step has one pair, and one rank a filler.
    assert float(rows[0][-1]["train/pairs_seen"]) == 14
    for two, one in zip(*rows, strict=True):
        for key in ("train/loss", "train/gamma", "train/logps/chosen", "val/a/loss", "val/a/gamma", "val/a/pairs"):
            assert two[key] == one[key] == "" or float(two[key]) == pytest.approx(float(one[key]), abs=1e-4)
