"""The loss of every optimizer step equals that of T chained TRL `DPOTrainer` runs on the same rows."""

import gzip
import json

import pytest
import torch
from helpers import make_rows, write_jsonl
from runs import fit, losses

from sdpo_lightning import PreferenceSource

trl = pytest.importorskip("trl")

from datasets import Dataset  # noqa: E402
from torch.utils.data import SequentialSampler  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

LR = 1e-4


class InOrder(trl.DPOTrainer):
    """TRL without shuffling, so that both sides see the same rows at each step."""

    def _get_train_sampler(self, dataset=None):
        return SequentialSampler(dataset if dataset is not None else self.train_dataset)


def chained_trl(folder, model_dir, tables, max_length, batch_size):
    """T runs, each starting from the previous one's model as policy and, loaded again, as reference."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    found, start = [], model_dir
    for index, rows in enumerate(tables):
        config = trl.DPOConfig(
            output_dir=str(folder / str(index)),
            per_device_train_batch_size=batch_size,
            learning_rate=LR,
            lr_scheduler_type="linear",
            warmup_steps=0,
            num_train_epochs=1,
            max_length=max_length,
            max_grad_norm=0.0,
            weight_decay=0.0,
            beta=0.1,
            bf16=False,
            optim="adamw_torch",
            adam_beta2=0.999,
            gradient_checkpointing=False,
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
        )
        model, reference = (AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32) for _ in range(2))
        trainer = InOrder(model, reference, config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
        trainer.train()
        found += [row["loss"] for row in trainer.state.log_history if "loss" in row]
        start = folder / f"m{index}"
        trainer.model.save_pretrained(start)
    return found


def compare(tmp_path, model_dir, tables, max_length, batch_size):
    sources = []
    for name, rows in tables.items():
        sources.append(PreferenceSource(name, str(write_jsonl(tmp_path / f"{name}.jsonl", rows))))
    arguments = {
        "optimizer": lambda params: torch.optim.AdamW(params, lr=LR, weight_decay=0.0),
        "warmup_ratio": 0.0,
        "lr_scheduler": "linear",
    }
    fit(
        tmp_path / "ours",
        model_dir,
        sources,
        module_args=arguments,
        shuffle=False,
        max_length=max_length,
        batch_size=batch_size,
    )
    ours = losses(tmp_path / "ours")
    theirs = chained_trl(tmp_path / "trl", model_dir, list(tables.values()), max_length, batch_size)
    assert len(ours) == len(theirs)
    assert ours[:10] == pytest.approx(theirs[:10], abs=1e-4)
    assert ours == pytest.approx(theirs, abs=1e-3)
    # A run that learns nothing would agree as well.
    assert max(ours) - min(ours) > 1e-3
    return ours


def messages(row):
    return {
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "chosen": [{"role": "assistant", "content": row["chosen"].strip()}],
        "rejected": [{"role": "assistant", "content": row["rejected"].strip()}],
    }


def test_tiny_model_string_and_conversational_with_truncation(tmp_path, tiny_model_dir):
    tables = {
        "strings": make_rows(21, 0, "strings"),
        "chats": [messages(row) for row in make_rows(18, 1, "chats")],
        "more": make_rows(16, 2, "more"),
    }
    # 13 tokens cut many completions, and no prompt of at most 7 words and 5 tokens of template.
    ours = compare(tmp_path, tiny_model_dir, tables, max_length=13, batch_size=3)
    assert len(ours) == 7 + 6 + 6


def real_rows(path, count):
    with gzip.open(path, "rt") as handle:
        return [json.loads(next(handle)) for _ in range(count)]


@pytest.mark.parametrize("pairs", [12, pytest.param(40, marks=pytest.mark.slow)])
def test_real_model_and_data(tmp_path, shared, pairs):
    names = ("pandalm", "hh_harmless", "alpaca_eval_weak")
    tables = {name: real_rows(shared / "data" / f"{name}.jsonl.gz", 48) for name in names}
    for name, rows in tables.items():
        tables[name] = [row for row in rows if row["chosen"] != row["rejected"]][:pairs]
    compare(tmp_path, shared / "model", tables, max_length=192, batch_size=2)
