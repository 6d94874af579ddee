"""The guard of the paper's section 4.4: a reference that was trained on the pairs it scores is noticed."""

import json
import math
import random

import pytest
import torch
from helpers import WORDS, write_jsonl
from runs import adamw, fit

from sdpo_lightning import PreferenceSource, ResidentReference
from sdpo_lightning.contamination import compare, gamma_change
from sdpo_lightning.types import PairLogps


def _rows(count: int, seed: int) -> list[dict]:
    """Answers between which nothing decides but memory."""
    generator = random.Random(seed)
    before = {"prompt": "", "chosen": " ", "rejected": " "}
    return [{key: b + " ".join(generator.choices(WORDS, k=6)) for key, b in before.items()} for _ in range(count)]


class Fixed(ResidentReference):
    """An external model, whatever the policy."""

    starts_at_policy = False

    def __init__(self, folder) -> None:
        super().__init__()
        self.folder = folder

    def advance(self, policy, stage, inputs):
        from sdpo_lightning.backbone import load_policy

        self._model = load_policy(str(self.folder)).requires_grad_(False).eval()


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_model_dir):
    """S -> M_1 by source a -> M_2 by source b, with a learning rate at which pairs are memorised."""
    folder = tmp_path_factory.mktemp("guard")
    paths = [write_jsonl(folder / f"{name}.jsonl", _rows(60, seed)) for seed, name in enumerate("ab")]
    sources = [PreferenceSource(path.stem, str(path)) for path in paths]
    run = folder / "run"
    fit(
        run, tiny_model_dir, sources, module_args={"optimizer": adamw(lr=5e-3, weight_decay=0.0)},
        batch_size=4, val_fraction=0.4, epochs_per_stage=6,
    )  # fmt: skip
    return sources, run


def _scored_by(tmp_path, model_dir, sources, reference) -> list[dict]:
    fit(
        tmp_path, model_dir, [sources[1]], reference=reference, module_args={"optimizer": adamw(lr=1e-5)},
        batch_size=4, val_fraction=0.4, order="easy_to_hard",
    )  # fmt: skip
    return json.loads((tmp_path / "contamination.json").read_text())["findings"]


def test_m2_as_reference_of_the_pairs_it_was_trained_on_warns(tmp_path, tiny_model_dir, trained, caplog):
    sources, run = trained
    [finding] = _scored_by(tmp_path, tiny_model_dir, sources, Fixed(run / "stages" / "02-b"))
    assert finding["is_memorised"] and finding["source"] == "b"
    assert finding["train"] - finding["held_out"] > 3 * finding["standard_error"] > 0
    assert "has probably been trained on them" in caplog.text
    # 60 pairs with distinct prompts, 0.4 of them held out.
    assert sum(finding["pairs"]) == 60 and 15 <= finding["pairs"][1] <= 33


def test_m1_as_reference_does_not_warn(tmp_path, tiny_model_dir, trained, caplog):
    sources, run = trained
    [finding] = _scored_by(tmp_path, tiny_model_dir, sources, Fixed(run / "stages" / "01-a"))
    assert not finding["is_memorised"] and finding["standard_error"] > 0
    assert "has probably been trained" not in caplog.text


def test_stage_1_against_s_has_no_change(tmp_path, tiny_model_dir, trained):
    sources, _ = trained
    [finding] = _scored_by(tmp_path, tiny_model_dir, sources, ResidentReference())
    # The reference is S: up to rounding nothing has changed, and nothing stands out.
    assert abs(finding["train"]) < 1e-5 and abs(finding["held_out"]) < 1e-5 and not finding["is_memorised"]


def test_change_of_gamma_is_per_token():
    lengths = torch.tensor([2.0]), torch.tensor([5.0])
    reference = PairLogps(torch.tensor([-6.0]), torch.tensor([-20.0]), *lengths)
    sft = PairLogps(torch.tensor([-8.0]), torch.tensor([-15.0]), *lengths)
    # (-6 + 8) / 2 - (-20 + 15) / 5 = 1 + 1.
    assert gamma_change(reference, sft).tolist() == [2.0]


def test_the_comparison_is_that_of_two_means():
    train, held_out = torch.tensor([1.0, 2.0, 3.0, 4.0]).double(), torch.tensor([0.0, 1.0]).double()
    sums = [torch.stack([torch.ones_like(v), v, v**2]).sum(1) for v in (train, held_out)]
    finding = compare(2, "a", *sums)
    assert (finding.train, finding.held_out, finding.pairs) == (2.5, 0.5, (4, 2))
    # Variances 5 / 3 and 1 / 2 over 4 and 2 pairs.
    assert finding.standard_error == pytest.approx(math.sqrt(5 / 3 / 4 + 0.5 / 2))
    assert not finding.is_memorised
    assert compare(2, "a", sums[0], torch.tensor([1.0, 0.0, 0.0]).double()) is None
