"""Fixtures: the shared folder, a tiny tokenizer, a tiny model."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import shutil
from collections.abc import Iterator
from pathlib import Path

import datasets
import pytest
import torch
from helpers import WORDS
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sdpo_lightning.ranks import leave_group
from sdpo_lightning.report_command import draw_run

torch.set_num_threads(1)

TEMPLATE = (
    "{% for m in messages %}<start> {{ m['role'] }} {{ m['content'] }} <eos> {% endfor %}"
    "{% if add_generation_prompt %}<start> assistant {% endif %}"
)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory) -> None:
    """Neither fill the user's cache nor find anything in it, in the processes that tests start either."""
    folder = str(tmp_path_factory.mktemp("datasets-cache"))
    os.environ["HF_DATASETS_CACHE"] = folder
    datasets.config.HF_DATASETS_CACHE = Path(folder)


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch) -> None:
    """Drawing takes a second or two, and hundreds of runs end here. Tests of the PNGs ask for `pictures`."""
    monkeypatch.setattr("sdpo_lightning.report_callback.draw_run", lambda run: [])


@pytest.fixture
def pictures(no_pictures, monkeypatch) -> None:
    """What a run's end does."""
    monkeypatch.setattr("sdpo_lightning.report_callback.draw_run", draw_run)


# By these Lightning would take a process that a test starts for one that somebody else has launched.
_OF_A_RANK = ("LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def no_rank_left_behind() -> Iterator[None]:
    """A run of one sharded rank leaves a process group and variables in its own process."""
    before = {name: os.environ.get(name) for name in _OF_A_RANK}
    yield
    leave_group()
    for name, value in before.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and the small model."""
    root = Path(__file__).resolve().parent.parent
    folder = Path(os.environ.get("SDPO_SHARED", root / ".." / "shared")).resolve()
    if not (folder / "data").is_dir():
        pytest.skip(f"no shared folder at {folder}; set SDPO_SHARED")
    return folder


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Words w0 ... w59, roles and special tokens; pad and eos differ."""
    words = ["<pad>", "<eos>", "<unk>", "<start>", "user", "assistant", "system", *WORDS]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=["<start>"],
    )
    wrapped.chat_template = TEMPLATE
    return wrapped


@pytest.fixture(scope="session")
def tiny_model_dir(tiny_tokenizer, tmp_path_factory) -> Path:
    """A seeded random Llama with untied embeddings and its tokenizer, fp32."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=512,
        pad_token_id=tiny_tokenizer.pad_token_id,
        eos_token_id=tiny_tokenizer.eos_token_id,
        tie_word_embeddings=False,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def ending_model_dir(tiny_model_dir, tiny_tokenizer, tmp_path_factory) -> Path:
    """The tiny model, which also ends an answer at the words w20 ... w59: most are whole within six tokens."""
    folder = shutil.copytree(tiny_model_dir, tmp_path_factory.mktemp("ending") / "tiny")
    ends = [tiny_tokenizer.eos_token_id, *tiny_tokenizer.convert_tokens_to_ids(WORDS[20:])]
    GenerationConfig(eos_token_id=ends, pad_token_id=tiny_tokenizer.pad_token_id).save_pretrained(folder)
    return folder
