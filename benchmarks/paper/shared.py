"""The same rows on real pairs with a small model, for mechanics: two sources at 1 : 5, no true preference is known.

The data and the model are read from the folder that `SDPO_SHARED` names (default `../shared`).
"""

from __future__ import annotations

import os
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.paper.evaluation import kl_of_answers, load, sample
from benchmarks.paper.rows import Inputs, Settings, make_rows
from benchmarks.paper.units import fit, quiet, read_run
from sdpo_lightning import CurriculumDataModule, PreferenceSource
from sdpo_lightning.files import write_json

ROWS = ("dpo", "fixed", "sdpo", "target_s", "tr_dpo")
# The dataclass counts T and the steps by its pairs; the rows' are cut by `limit`.
SETTINGS = Settings(lr=1e-4, epochs=1, batch_size=4, pairs={"hh_harmless": 50, "llmbar": 10}, held_out=0)
_HELD_OUT, _MAX_LENGTH, _ANSWER_TOKENS, _PROMPTS = 0.2, 192, 16, 8


def run_shared(work: Path, path: Path) -> dict[str, Any]:
    """Train the rows and write what they left.

    Args:
        work: folder of the runs, which are kept nowhere.
        path: JSON file.

    Raises:
        FileNotFoundError: there is no such data.
    """
    shared = Path(os.environ.get("SDPO_SHARED", "../shared"))
    if not (shared / "model").exists():
        raise FileNotFoundError(f"no model in {shared / 'model'}; SDPO_SHARED names the folder of `data` and `model`")
    sources = [
        PreferenceSource(name, str(shared / "data" / f"{name}.jsonl.gz"), limit=count)
        for name, count in SETTINGS.pairs.items()
    ]
    work.mkdir(parents=True, exist_ok=True)
    inputs, found = Inputs(shared / "model", shared / "model"), {}
    for name in ROWS:
        with quiet(), TemporaryDirectory(dir=work) as folder:
            row = make_rows(SETTINGS)[name]
            data = fit(row, SETTINGS, inputs, sources, 0, Path(folder), _MAX_LENGTH, _HELD_OUT)
            run = read_run(Path(folder))
            last = sorted(Path(folder).glob("stages/0*"))[-1]
            run["kl"] = _kl(last, inputs.sft, data)
        found[name] = {key: run[key] for key in ("order", "stages", "steps", "pairs", "gamma_ref", "accuracy", "kl")}
        print(name, found[name]["kl"], flush=True)
    write_json(path, {"rows": found, "max_length": _MAX_LENGTH, "lr": SETTINGS.lr, "torch": torch.__version__})
    return found


def _kl(model: Path, sft: Path, data: CurriculumDataModule) -> float:
    """KL(M_T to S) by one answer to each of a few held-out prompts, nats an answer of at most 16 tokens."""
    (policy, tokenizer), (other, _) = load(model), load(sft)
    values = []
    for pair in data.store.get(data.val_ids()[:_PROMPTS]):
        prompt = torch.tensor([pair.prompt_ids])
        answer = sample(policy, prompt, tokenizer.eos_token_id, 0, _ANSWER_TOKENS)
        values += kl_of_answers(policy, other, prompt, answer, tokenizer.eos_token_id).tolist()
    return fmean(values)
