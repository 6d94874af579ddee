"""The third-party package under `examples/`: installed as it is, run by its own command."""

import json
import math
import shutil
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

import pytest
import torch
import yaml
from helpers import make_rows, write_jsonl
from runs import metrics

from sdpo_lightning import PairLogps

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "brevity_dpo"

pytestmark = pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The package where pip has put it, from a copy so that no build files come into the repository."""
    folder = tmp_path_factory.mktemp("example")
    shutil.copytree(EXAMPLE, folder / "source")
    words = ["install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target", str(folder / "site")]
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *words, str(folder / "source")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "site"


@pytest.fixture
def command(installed, monkeypatch):
    """The function behind the installed command."""
    monkeypatch.syspath_prepend(str(installed))
    [found] = [d for d in distributions(path=[str(installed)]) if d.metadata["Name"] == "brevity-dpo"]
    [entry] = found.entry_points
    assert entry.name == "brevity-dpo" and entry.group == "console_scripts"
    assert (installed / "bin" / "brevity-dpo").is_file()
    main = entry.load()
    assert sys.modules[main.__module__].__file__.startswith(str(installed))
    return main


def test_the_installed_command_trains(command, tmp_path, tiny_model_dir, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copy(EXAMPLE / "config.yaml", "config.yaml")
    rows = {name: make_rows(8, seed, name) for seed, name in enumerate(("easy", "hard"))}
    for name, table in rows.items():
        write_jsonl(tmp_path / f"{name}.jsonl", table)
    words = ["fit", "--config=config.yaml", f"--model.model_name_or_path={tiny_model_dir}", "--data.batch_size=8"]
    words += ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--data.shuffle=false"]
    monkeypatch.setattr(sys, "argv", ["brevity-dpo", *words])
    command()
    run = tmp_path / "runs" / "brevity"
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["model"]["alpha"] == 0.02 and config["data"]["difficulty"] == "brevity_dpo.difficulty.decided"
    assert len(list((run / "stages").iterdir())) == 2

    # One step a stage: its loss by hand, from the logps of M_{t-1} that the log holds as means over the 8 pairs.
    curriculum = json.loads((run / "curriculum.json").read_text())
    assert sorted(curriculum["order"]) == ["easy", "hard"]
    steps = metrics(run)
    assert [int(float(row["stage/index"])) for row in steps] == [1, 2]
    for row in steps:
        # The policy is M_{t-1} and the reference 0.9 of it: a reward is 0.1 of the logps, times beta.
        for side in ("chosen", "rejected"):
            expected = 0.1 * (1 - 0.9) * float(row[f"train/logps/{side}"])
            assert float(row[f"train/rewards/{side}"]) == pytest.approx(expected, abs=1e-4)
        assert math.isfinite(float(row["train/loss"]))

    # What the loss says of itself is compared on resume: a longer run with another alpha isn't the same run.
    monkeypatch.setattr(sys, "argv", ["brevity-dpo", *words, "--model.alpha=0.5", "--data.epochs_per_stage=2"])
    with pytest.raises(SystemExit) as stop:
        command()
    assert stop.value.code == 3
    assert "0.02" in (error := capsys.readouterr().err) and "0.5" in error and "alpha" in error


def test_loss_and_difficulty_by_hand(installed, monkeypatch):
    monkeypatch.syspath_prepend(str(installed))
    from brevity_dpo.difficulty import decided
    from brevity_dpo.loss import BrevityLoss

    lengths = torch.tensor([5, 2]), torch.tensor([3, 6])
    policy = PairLogps(torch.tensor([-4.0, -1.0]), torch.tensor([-7.0, -1.5]), *lengths)
    reference = PairLogps(torch.tensor([-5.0, -1.0]), torch.tensor([-6.0, -1.0]), *lengths)
    # gamma 3 and 0.5, of the reference 1 and 0; two tokens more, four fewer.
    expected = [math.log1p(math.exp(-(0.1 * 2 + 0.05 * 2))), math.log1p(math.exp(-(0.1 * 0.5 - 0.05 * 4)))]
    assert BrevityLoss(0.05)(policy, reference, 0.1).tolist() == pytest.approx(expected, abs=1e-6)
    # Half a nat is no opinion.
    scores = decided(policy)
    assert scores[0] == 3.0 and scores[1].isnan()
