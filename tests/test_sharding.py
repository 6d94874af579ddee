"""FSDP2 on gloo processes: what one process gives, with the stage swap costing no communication.

One `torchrun` a number of ranks runs all its scenarios (`sharded_script.py`); the tests look at what they left.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import bitsandbytes
import pytest
import torch
from helpers import make_rows, write_jsonl
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from runs import assert_same_weights, fit, losses, metrics, reproducible, weights
from safetensors.torch import load_file
from sharded_script import CLIPPED, DATA, sources
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from benchmarks import communication
from sdpo_lightning import (
    AdapterReference,
    CachedReference,
    DPOLitModule,
    FSDP2Strategy,
    LoraSettings,
    PreferenceSource,
    ResidentReference,
)
from sdpo_lightning.types import ConfigurationError

TESTS = Path(__file__).resolve().parent
ADAPTER = "adapter_model.safetensors"
TWO = (
    "resident forked tied cached offloaded experts bf16 lora lora_bf16 lora_whole lora_resumed whole resumed dora "
    "dora_ddp rank_limited frozen_on_one other_adapters checkpointed"
).split()


@pytest.fixture(scope="module")
def out(tmp_path_factory, tiny_model_dir, tiny_tokenizer) -> Path:
    """Data, models, and the runs on 2, then 1, then 2, then 4 ranks."""
    folder = tmp_path_factory.mktemp("sharded")
    for seed, name in enumerate("ab"):
        write_jsonl(folder / f"{name}.jsonl", make_rows(9, seed, name))
    _tied_and_experts(tiny_model_dir, tiny_tokenizer, folder)
    _torchrun(folder, 2, TWO)
    _torchrun(folder, 1, ["whole_alone", "resumed_alone"])
    _torchrun(folder, 2, ["resumed_from_alone", "resumed_otherwise"])
    _torchrun(folder, 4, ["hybrid"])
    return folder


def _tied_and_experts(model_dir: Path, tokenizer, folder: Path) -> None:
    model = folder / "model"
    model.symlink_to(model_dir)
    config = LlamaForCausalLM.from_pretrained(model_dir).config
    config.tie_word_embeddings = True
    torch.manual_seed(11)
    LlamaForCausalLM(config).save_pretrained(f"{model}-tied")
    kept = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    sizes = {key: value for key, value in config.to_dict().items() if key in kept}
    experts = MixtralConfig(**sizes, num_key_value_heads=4, num_local_experts=2, num_experts_per_tok=2)
    MixtralForCausalLM(experts).save_pretrained(f"{model}-experts")
    for kind in ("tied", "experts"):
        tokenizer.save_pretrained(f"{model}-{kind}")


def _torchrun(folder: Path, ranks: int, scenarios: list[str]) -> None:
    _start(folder, ranks, [str(TESTS / "sharded_script.py"), str(folder), str(folder / "model"), *scenarios])


def _start(folder: Path, ranks: int, script: list[str], **variables: str) -> None:
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *script]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path]), "OMP_NUM_THREADS": "1"}
    environment |= variables
    done = subprocess.run(words, capture_output=True, text=True, cwd=folder, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]


def _facts(out: Path, scenario: str) -> dict:
    facts = json.loads((out / scenario / "facts.json").read_text())
    assert "error" not in facts, facts["trace"]
    return facts


def _assert_close(ours: Path, theirs: Path, tolerance: float) -> None:
    folders = sorted(path.name for path in (theirs / "stages").iterdir())
    assert len(folders) == 2 and folders == sorted(path.name for path in (ours / "stages").iterdir())
    for folder in folders:
        mine, other = weights(ours / "stages" / folder), weights(theirs / "stages" / folder)
        assert mine.keys() == other.keys()
        for name, tensor in mine.items():
            torch.testing.assert_close(tensor, other[name], rtol=0, atol=tolerance)
    assert losses(ours) == pytest.approx(losses(theirs), abs=10 * tolerance)


@pytest.mark.parametrize(
    "scenario, model, reference",
    [
        ("resident", "model", ResidentReference),
        ("tied", "model-tied", ResidentReference),
        ("cached", "model", CachedReference),
        ("offloaded", "model", ResidentReference),
        ("checkpointed", "model", ResidentReference),
        ("hybrid", "model", ResidentReference),
    ],
)
def test_shards_equal_one_process(out, scenario, model, reference, tmp_path):
    _facts(out, scenario)
    data = DATA | {"batch_size": 4 if scenario == "hybrid" else 2}
    fit(tmp_path, out / model, sources(out), reference=reference(), trainer_args=CLIPPED, **data)
    _assert_close(out / scenario, tmp_path, 1e-5)
    rows = [metrics(run) for run in (out / scenario, tmp_path)]
    for sharded, one in zip(*rows, strict=True):
        for key in ("train/grad_norm", "train/gamma", "val/a/loss", "val/b/gamma", "val/a/pairs", "train/pairs_seen"):
            assert sharded[key] == one[key] == "" or float(sharded[key]) == pytest.approx(float(one[key]), abs=1e-4)


@pytest.mark.parametrize("scenario", ["resident", "tied", "hybrid"])
def test_a_swap_moves_nothing_between_ranks(out, scenario):
    facts = _facts(out, scenario)
    # Stage 1 cuts the reference, stage 2 swaps.
    assert facts["collectives"] == [0, 0]
    assert facts["sharded"] == facts["equal"] == [True, True]
    first = {}
    for row in metrics(out / scenario):
        first.setdefault(row["stage/index"], float(row["train/loss"]))
    assert first == {"1": pytest.approx(math.log(2), abs=1e-6), "2": pytest.approx(math.log(2), abs=1e-6)}


def test_the_swap_came_behind_a_validation(out):
    # Once at the end of each stage.
    assert _facts(out, "resident")["validated"] == 2


def test_a_fork_of_a_sharded_run(out):
    _facts(out, "forked")
    [last] = (out / "forked" / "stages").iterdir()
    assert_same_weights(last, out / "resident" / "stages" / last.name)
    later = [row for row in reproducible(out / "resident") if row["stage/index"] == "2"]
    assert reproducible(out / "forked") == later and len(later) > 1


def test_replicas_of_shards(out):
    assert _facts(out, "hybrid")["mesh"] == [2, 2]


def test_bf16_computes_in_bf16_and_keeps_fp32_masters(out, tmp_path):
    facts = _facts(out, "bf16")
    assert facts == {"computed": ["torch.bfloat16"], "master": ["torch.float32"]}
    fit(tmp_path, out / "model", sources(out), **(DATA | {"batch_size": 2}))
    sharded, fp32 = losses(out / "bf16"), losses(tmp_path)
    assert sharded[0] == pytest.approx(math.log(2), abs=1e-6)
    # Off by rounding, and not by more: bf16 has 8 bits.
    assert sharded != fp32 and sharded == pytest.approx(fp32, abs=0.02)


def test_a_model_whose_file_has_other_weights_is_exported_so(out, tmp_path):
    _facts(out, "experts")
    fit(tmp_path, out / "model-experts", sources(out), **(DATA | {"batch_size": 2}))
    _assert_close(out / "experts", tmp_path, 1e-5)
    assert any(".w1." in name for name in weights(out / "experts" / "stages" / "01-a"))
    loaded = AutoModelForCausalLM.from_pretrained(out / "experts" / "stages" / "02-b", output_loading_info=True)[1]
    assert not loaded["missing_keys"] and not loaded["unexpected_keys"]


def test_resume_on_the_same_ranks_is_bit_for_bit(out):
    _facts(out, "whole"), _facts(out, "resumed")
    for folder in ("01-a", "02-b"):
        if (out / "resumed" / "stages" / folder).exists():
            assert_same_weights(out / "resumed" / "stages" / folder, out / "whole" / "stages" / folder)
    assert (out / "resumed" / "stages" / "02-b").exists()


@pytest.mark.parametrize(
    "scenario, origin", [("resumed", "whole"), ("resumed_alone", "whole"), ("resumed_from_alone", "whole_alone")]
)
def test_resume_on_other_ranks_sees_each_remaining_pair_once(out, scenario, origin):
    before, after = _facts(out, origin)["pairs"], _facts(out, scenario)["pairs"]
    # 9 pairs a source by 2: 5 + 5 steps; 7 are done, so 3 steps with 2 + 2 + 1 pairs are left.
    assert [len({step for step, _ in pairs}) for pairs in (before, after)] == [10, 3]
    assert after == [pair for pair in before if pair[0] >= 7] and len(after) == 5
    _assert_last_stage_close(out / scenario, out / origin)


def _assert_last_stage_close(ours: Path, theirs: Path) -> None:
    mine, other = weights(ours / "stages" / "02-b"), weights(theirs / "stages" / "02-b")
    for name, tensor in mine.items():
        torch.testing.assert_close(tensor, other[name], rtol=0, atol=1e-5)


def test_resume_with_another_global_batch_is_refused_with_the_numbers(out):
    error = json.loads((out / "resumed_otherwise" / "facts.json").read_text())["error"]
    assert error.startswith("ResumeError") and "data.batch_size x processes: 2 -> 8" in error


def test_sharded_adapters_equal_one_process(out, tmp_path):
    assert _facts(out, "lora") == {"sharded": True}
    fit(
        tmp_path, out / "model", sources(out), reference=AdapterReference(), module_args={"lora": LoraSettings(r=4)},
        trainer_args=CLIPPED, **(DATA | {"batch_size": 2}),
    )  # fmt: skip
    for folder in ("01-a", "02-b") if (tmp_path / "stages" / "01-a").exists() else ("01-b", "02-a"):
        ours, theirs = (load_file(run / "stages" / folder / ADAPTER) for run in (out / "lora", tmp_path))
        assert ours.keys() == theirs.keys() and len(ours) == 2 * 2 * 7
        for name, tensor in ours.items():
            torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=1e-4)
    assert losses(out / "lora") == pytest.approx(losses(tmp_path), abs=1e-4)


@pytest.mark.parametrize("scenario", ["dora", "dora_ddp"])
def test_dora_on_ranks_equals_one_process(out, tmp_path, scenario):
    _facts(out, scenario)
    fit(
        tmp_path, out / "model", sources(out), reference=AdapterReference(),
        module_args={"lora": LoraSettings(r=4, dora=True)}, **(DATA | {"batch_size": 2}),
    )  # fmt: skip
    assert losses(out / scenario) == pytest.approx(losses(tmp_path), abs=1e-4)


def test_a_cached_reference_with_some_pairs_known_equals_one_process(out, tmp_path):
    _facts(out, "rank_limited")
    data = DATA | {"batch_size": 2, "rank_sample": 4}
    fit(tmp_path, out / "model", sources(out), reference=CachedReference(), **data)
    _assert_close(out / "rank_limited", tmp_path, 1e-5)


@pytest.mark.parametrize(
    "scenario, error",
    [
        ("frozen_on_one", "ConfigurationError: `load_skeleton` doesn't make the model of `load_weights`"),
        ("other_adapters", "ResumeError: `model.lora` and `model.quantization` are"),
    ],
)
def test_what_ranks_would_hang_or_crash_on_is_refused(out, scenario, error):
    assert json.loads((out / scenario / "facts.json").read_text())["error"].startswith(error)


def test_each_node_a_replica_by_name():
    assert StrategyRegistry.get("fsdp2_hybrid")._replicas == "nodes"
    assert StrategyRegistry.get("fsdp2")._replicas == 1


def test_frozen_weights_are_stored_in_bf16_beside_fp32_adapters(out, tmp_path):
    assert _facts(out, "lora_bf16")["kinds"] == [
        [False, "torch.bfloat16"],
        [False, "torch.float32"],
        [True, "torch.float32"],
    ]
    first = {}
    for row in metrics(out / "lora_bf16"):
        first.setdefault(row["stage/index"], float(row["train/loss"]))
    assert list(first.values()) == pytest.approx([math.log(2)] * 2, abs=1e-6)


def test_sharded_adapters_resume_bit_for_bit(out):
    _facts(out, "lora_whole"), _facts(out, "lora_resumed")
    ours, theirs = (load_file(out / run / "stages" / "02-b" / ADAPTER) for run in ("lora_resumed", "lora_whole"))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert losses(out / "lora_resumed") == losses(out / "lora_whole")[-3:]


class ReadsNoWeights(DPOLitModule):
    """The refusals come before."""

    def load_weights(self, model_name_or_path):
        raise AssertionError("weights were loaded")


@pytest.mark.parametrize(
    "strategy, module, message",
    [
        (lambda: ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1), {}, "use `fsdp2`"),
        (FSDP2Strategy, {"optimizer": bitsandbytes.optim.AdamW8bit}, "AdamW8bit.*`trainer.strategy: ddp`"),
        (FSDP2Strategy, {"quantization": "nf4", "lora": LoraSettings()}, "`model.quantization: nf4` with FSDP2"),
        (FSDP2Strategy, {"lora": LoraSettings(export_merged=True)}, "`model.lora.export_merged` with FSDP2Strategy"),
        (lambda: FSDP2Strategy(replicas=2), {}, "1 ranks don't divide into 2 replicas"),
    ],
)
def test_what_shards_cannot_do_is_refused_before_weights_load(tmp_path, tiny_model_dir, strategy, module, message):
    path = write_jsonl(tmp_path / "a.jsonl", make_rows(9, 0, "a"))
    given = module | ({"reference": AdapterReference()} if "lora" in module else {})
    reference = given.pop("reference", None)
    with pytest.raises(ConfigurationError, match=message):
        fit(
            tmp_path / "run", tiny_model_dir, [PreferenceSource("a", str(path))], reference=reference,
            module_class=ReadsNoWeights, module_args=given, trainer_args={"strategy": strategy(), "devices": 1},
        )  # fmt: skip


def test_a_node_holds_little_more_than_one_copy_while_a_model_is_read_and_exported(tmp_path, tiny_tokenizer):
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=2000, hidden_size=512, intermediate_size=1408, num_hidden_layers=32, num_attention_heads=8
        )
    )
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    # Weights of real models are large enough for the allocator to give their memory back; these need to be told.
    _start(tmp_path, 2, [str(TESTS / "memory_script.py"), str(tmp_path), str(tmp_path / "model")],
           MALLOC_MMAP_THRESHOLD_="65536")  # fmt: skip
    facts = json.loads((tmp_path / "memory.json").read_text())
    # 32 layers of 4 * 512^2 + 3 * 512 * 1408 + 2 * 512, two ends of 2000 * 512, a norm of 512: 104.8M weights.
    assert facts["copy"] == 4 * (32 * (4 * 512**2 + 3 * 512 * 1408 + 2 * 512) + 2 * 2000 * 512 + 512)
    # Anonymous memory of both ranks, with the shards, which on a GPU would lie there; above it, one copy stays.
    assert 1.0 <= facts["loading"][0] / facts["copy"] <= 1.2
    assert facts["exporting"][0] / facts["copy"] <= 0.2
    read = LlamaForCausalLM.from_pretrained(tmp_path / "exported").state_dict()
    assert len(list((tmp_path / "exported").glob("model-*.safetensors"))) > 10
    assert all(torch.equal(tensor, read[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_bytes_moved_are_those_of_the_formula(ranks):
    for dtype, phases in communication.measure(ranks).items():
        weights_of_all = communication.LAYERS * (4 * 64**2 + 3 * 64 * 128 + 2 * 64) + 2 * 256 * 64 + 64
        width = {"fp32": 4, "bf16": 2}[dtype]
        assert phases["stage swap"] == phases["reference, first cut"] == {}
        assert phases["reference, forward"] == {"all_gather": width * weights_of_all}
        step = {"all_gather": 2 * width * weights_of_all, "reduce_scatter": 4 * weights_of_all}
        assert phases["policy, step"] == phases["policy, step with checkpointing"] == step
        assert phases == communication.expected(width)
