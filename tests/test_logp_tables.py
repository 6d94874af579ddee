"""Cached logps: what their key hangs on, and that a table of other numbers is never taken."""

from dataclasses import replace
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from helpers import make_rows, write_jsonl
from runs import fit
from safetensors import safe_open

from sdpo_lightning import CachedReference, CurriculumDataModule, DPOLitModule, PreferenceSource
from sdpo_lightning.logp_tables import _Rows
from sdpo_lightning.reference import cache_key
from sdpo_lightning.types import ReferenceInputs

INPUTS = ReferenceInputs([], lambda: "rows", "weights", Path("folder"), "32-true SharedPrefixCollator")


@pytest.mark.parametrize(
    "change",
    [
        {"policy_digest": "other"},
        {"rows_digest": lambda: "other"},
        {"numerics": "bf16-mixed SharedPrefixCollator"},
        {"numerics": "32-true PaddedCollator"},
    ],
)
def test_weights_rows_and_numerics_are_in_the_key(change):
    assert cache_key(replace(INPUTS, **change)) != cache_key(INPUTS)


def test_places_are_not_in_the_key():
    assert cache_key(replace(INPUTS, folder=Path("elsewhere"), batches=[1])) == cache_key(INPUTS)


def test_a_pass_of_many_batches_keeps_each_row():
    """Uneven batches, some without a real pair, beyond the first room of 4,096 rows and its first doubling."""
    counts = [0, 1, 4095, 2, 0, 4094, 3, 900]
    ids = torch.arange(sum(counts)).split(counts)
    rows = _Rows()
    for part in ids:
        rows.add([part, part.float() / 3])
    found, thirds = rows.columns()
    assert torch.equal(found, torch.arange(9095)) and torch.equal(thirds, torch.arange(9095).float() / 3)
    assert (found.dtype, thirds.dtype) == (torch.int64, torch.float32)


class OwnLogps(DPOLitModule):
    """Counts a completion half."""

    def compute_logps(self, model, batch):
        logps = super().compute_logps(model, batch)
        return replace(logps, chosen=0.5 * logps.chosen, rejected=0.5 * logps.rejected)


def _key(path: Path) -> str:
    with safe_open(path, framework="pt") as handle:
        return handle.metadata()["key"]


def test_validation_with_other_numbers_makes_its_own_table(tmp_path, tiny_model_dir):
    source = PreferenceSource("a", str(write_jsonl(tmp_path / "a.jsonl", make_rows(12, 0, "a"))))
    data = {"order": "given", "batch_size": 2, "max_length": 64, "val_fraction": 0.4}
    trainer, _ = fit(tmp_path / "run", tiny_model_dir, [source], reference=CachedReference(), **data)
    checkpoint = trainer.checkpoint_callback.best_model_path
    table, keys = tmp_path / "run" / "references" / "evaluation" / "01.safetensors", []
    # The same again finds the table; another precision, layout or function doesn't.
    for module_class, precision, layout in (
        (DPOLitModule, "32-true", "shared_prefix"),
        (DPOLitModule, "32-true", "shared_prefix"),
        (DPOLitModule, "bf16-mixed", "shared_prefix"),
        (DPOLitModule, "32-true", "padded"),
        (OwnLogps, "32-true", "shared_prefix"),
    ):
        again = pl.Trainer(
            default_root_dir=tmp_path / "run", accelerator="cpu", logger=False, precision=precision,
            enable_progress_bar=False,
        )  # fmt: skip
        module = module_class(str(tiny_model_dir), reference=CachedReference())
        again.validate(module, CurriculumDataModule([source], layout=layout, **data), checkpoint, verbose=False)
        keys.append(_key(table))
    assert keys[0] == keys[1] and len(set(keys)) == 4
