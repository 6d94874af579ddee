"""The ranking of real sources by the small real model, against plain transformers and the known order."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sdpo_lightning.cli import main
from sdpo_lightning.data.sources import PreferenceSource, load_source

pytestmark = pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")
MAX_LENGTH = 512


@torch.no_grad()
def plain_gamma(model, tokenizer, row) -> float | None:
    """logp(chosen) - logp(rejected) from the full logits of single sequences; None where the pair is dropped."""
    if isinstance(row["prompt"], str):
        prompt = tokenizer(row["prompt"])["input_ids"]
        sides = [tokenizer(row["prompt"] + row[k] + tokenizer.eos_token)["input_ids"] for k in ("chosen", "rejected")]
    else:
        apply = tokenizer.apply_chat_template
        prompt = apply(row["prompt"], add_generation_prompt=True, return_dict=False)
        sides = [apply(row["prompt"] + row[k], return_dict=False) for k in ("chosen", "rejected")]
    start = min(next((i for i, (a, b) in enumerate(zip(prompt, s)) if a != b), len(prompt)) for s in sides)  # noqa: B905
    sides = [side[:MAX_LENGTH] for side in sides]
    if start >= MAX_LENGTH or sides[0] == sides[1]:
        return None
    sums = []
    for side in sides:
        ids = torch.tensor([side])
        logps = model(input_ids=ids).logits[0, :-1].float().log_softmax(-1)
        sums.append(logps.gather(1, ids[0, 1:, None])[start - 1 :].sum().item())
    return sums[0] - sums[1]


def rank(run_dir, shared, sources, max_length):
    main(
        [
            "rank",
            f"--trainer.default_root_dir={run_dir}",
            "--trainer.accelerator=cpu",
            f"--model.model_name_or_path={shared / 'model'}",
            f"--data.sources={json.dumps(sources)}",
            f"--data.max_length={max_length}",
        ]
    )
    return json.loads((run_dir / "curriculum.json").read_text())


def source(shared, name, limit=None):
    return {"name": name, "path": str(shared / "data" / f"{name}.jsonl.gz"), "limit": limit}


def test_scores_equal_plain_transformers(tmp_path, shared):
    limits = {"alpaca_eval_strong": 12, "pandalm": 24, "llmbar": 24, "hh_harmless": 24}
    curriculum = rank(tmp_path, shared, [source(shared, *item) for item in limits.items()], MAX_LENGTH)
    model = AutoModelForCausalLM.from_pretrained(shared / "model", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(shared / "model")
    expected = {}
    for found in curriculum["sources"]:
        spec = PreferenceSource(**source(shared, found["name"], limits[found["name"]]))
        gammas = [plain_gamma(model, tokenizer, row) for row in load_source(spec).rows]
        kept = [gamma for gamma in gammas if gamma is not None]
        wins = sum(gamma > 0 for gamma in kept) / len(kept)
        error = (wins * (1 - wins) / (len(kept) - 1)) ** 0.5
        assert found["pairs"] == len(kept)
        assert found["reward_accuracy"] == pytest.approx(wins)
        assert found["standard_error"] == pytest.approx(error)
        expected[found["name"]] = wins
    assert curriculum["order"] == sorted(limits, key=lambda name: -expected[name])
    assert curriculum["order"][-1] == "alpaca_eval_strong"


@pytest.mark.slow
def test_order_of_the_real_sources(tmp_path, shared):
    limits = {
        "alpaca_eval_strong": 300,
        "alpaca_eval_weak": 300,
        "pandalm": None,
        "hh_harmless": 300,
        "llmbar": None,
    }
    curriculum = rank(tmp_path, shared, [source(shared, *item) for item in limits.items()], 1024)
    order = curriculum["order"]
    # Neighbours in a set are closer than two standard errors.
    assert set(order[:2]) == {"llmbar", "hh_harmless"}
    assert set(order[2:4]) == {"pandalm", "alpaca_eval_weak"}
    assert order[4] == "alpaca_eval_strong"
    found = {row["name"]: row for row in curriculum["sources"]}
    # The two sources that were scored whole, and that no rule for long prompts touches.
    assert found["llmbar"]["reward_accuracy"] == pytest.approx(0.639, abs=5e-4)
    assert found["llmbar"]["mean_logps_accuracy"] == pytest.approx(0.562, abs=5e-4)
    assert found["pandalm"]["reward_accuracy"] == pytest.approx(0.334, abs=5e-4)
    assert found["pandalm"]["mean_logps_accuracy"] == pytest.approx(0.583, abs=5e-4)
