"""Answers drawn from the policy: KL to the reference and to S, entropy, length."""

from __future__ import annotations

import csv
import itertools
import math
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import assert_same_weights, fit, made_sources, reproducible
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sdpo_lightning import (
    AdapterReference,
    CachedExternalReference,
    CachedFixedReference,
    CachedReference,
    FixedReference,
    LoraSettings,
    PreferenceSource,
    ResidentReference,
    SampleStatistics,
    StageCheckpoint,
    UpdatingReference,
)
from sdpo_lightning.completion_logps import SummedLogps
from sdpo_lightning.report_data import read_run
from sdpo_lightning.report_figures import drawn_charts
from sdpo_lightning.sampling import (
    Answer,
    DrawByUniforms,
    Scored,
    draw_answers,
    sample_statistics,
    uniforms,
)
from sdpo_lightning.types import ConfigurationError

TESTS = Path(__file__).resolve().parent
ARGS = {"order": "easy_to_hard", "val_fraction": 0.3}


def small(every_n_steps: int = 2, **more) -> SampleStatistics:
    return SampleStatistics(every_n_steps, **{"num_prompts": 3, "max_new_tokens": 5} | more)


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> list[PreferenceSource]:
    return made_sources(tmp_path_factory.mktemp("sources"), {"a": 8, "b": 8})


@pytest.fixture(scope="module")
def dropout_model_dir(tiny_model_dir, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dropout") / "model"
    shutil.copytree(tiny_model_dir, folder)
    config = (folder / "config.json").read_text()
    assert '"attention_dropout": 0.0' in config
    (folder / "config.json").write_text(config.replace('"attention_dropout": 0.0', '"attention_dropout": 0.2'))
    return folder


def rows_of(run: Path) -> list[dict[str, str]]:
    with (run / "sample_statistics.csv").open(newline="") as handle:
        return list(csv.DictReader(handle))


def test_means_by_hand():
    first, second = Answer([5, 6, 1], 0.5, True), Answer([7], 2.5, False)
    # log pi - log ref: 1 and 4; log pi - log S: 2 and -2.
    rows = [Scored(first, -3.0, -4.0, -5.0), Scored(second, -1.0, -5.0, 1.0)]
    found = sample_statistics(rows)
    assert found["kl_reference"] == 2.5
    # Deviations of 1.5: variance 4.5, of a mean of two 2.25.
    assert found["kl_reference_standard_error"] == 1.5
    assert (found["kl_sft"], found["kl_sft_standard_error"]) == (0.0, 2.0)
    # Three tokens of 0.5 and one of 2.5.
    assert found["entropy"] == pytest.approx(4.0 / 4)
    assert (found["answer_length"], found["ended"], found["answers"]) == (2.0, 0.5, 2.0)
    unknown = sample_statistics([Scored(first, -3.0, None, -5.0)])
    assert "kl_reference" not in unknown and unknown["kl_sft"] == 2.0
    assert "kl_sft_standard_error" not in unknown


def test_a_token_is_drawn_by_the_inverse_of_its_distribution():
    # Chances .5, 0, .25, .25: their sums are .5, .5, .75, 1.
    scores = torch.tensor([0.5, 0.0, 0.25, 0.25]).log().expand(5, 4)
    draw = DrawByUniforms(torch.tensor([[0.0], [0.499], [0.501], [0.751], [1 - 2**-53]], dtype=torch.float64))
    assert draw(None, scores).argmax(-1).tolist() == [0, 0, 2, 3, 3]
    # .5 log 2 + 2 * .25 log 4 = 1.5 log 2; a chance of 0 adds nothing.
    assert draw.entropies[0].tolist() == pytest.approx([1.5 * math.log(2)] * 5)


def test_uniforms_are_a_function_of_their_place():
    before = torch.get_rng_state()
    assert torch.equal(uniforms(0, 4, 1, 6), uniforms(0, 4, 1, 6))
    assert torch.equal(uniforms(0, 4, 1, 6)[:3], uniforms(0, 4, 1, 3))
    others = [uniforms(1, 4, 1, 6), uniforms(0, 5, 1, 6), uniforms(0, 4, 2, 6)]
    assert not any(torch.equal(other, uniforms(0, 4, 1, 6)) for other in others)
    assert torch.equal(before, torch.get_rng_state())


def plain_logps(model, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """Log-distributions `[T, V]` over each token of an answer, by a plain forward pass."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + answer])).logits[0].double()
    return logits[len(prompt) - 1 : -1].log_softmax(-1)


def summed(model, prompt: list[int], answer: list[int]) -> float:
    return plain_logps(model, prompt, answer).gather(1, torch.tensor(answer)[:, None]).sum().item()


def test_the_mean_is_the_kl_of_all_answers_of_two_tokens(tiny_model_dir):
    # Generation settings that would bend the distribution, were they not left out.
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32).eval()
    model.generation_config.update(repetition_penalty=5.0, temperature=0.1, top_k=1)
    other = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        other.lm_head.weight.add_(0.1 * torch.randn_like(other.lm_head.weight))
    prompt, end = [8, 9, 10], 1

    def both(ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            batch = torch.tensor([prompt + ids])
            return tuple(m(batch).logits[0, -1].double().log_softmax(-1) for m in (model, other))

    # KL(first) + E KL(second | first); an answer that ends at once has no second token.
    p, q = both([])
    exact = (p.exp() * (p - q)).sum().item()
    for token in range(len(p)):
        if token != end:
            p2, q2 = both([token])
            exact += p[token].exp().item() * (p2.exp() * (p2 - q2)).sum().item()
    numbers = torch.stack([uniforms(3, 0, row, 2) for row in range(1000)])
    answers = draw_answers(model, [prompt] * 1000, numbers, [end], 0)
    assert {len(a.ids) for a in answers} == {1, 2} and all(a.ended == (a.ids[-1] == end) for a in answers)
    assert model.generation_config.top_k == 1
    drawn = {tuple(a.ids) for a in answers}
    scores = {ids: (summed(model, prompt, [*ids]), summed(other, prompt, [*ids])) for ids in drawn}
    rows = [Scored(a, scores[tuple(a.ids)][0], None, scores[tuple(a.ids)][1]) for a in answers]
    found = sample_statistics(rows)
    assert abs(found["kl_sft"] - exact) < 3 * found["kl_sft_standard_error"] < 0.5 * exact
    # The entropy of an answer is that of the plain distributions at its places.
    for answer in answers[:5]:
        logps = plain_logps(model, prompt, answer.ids)
        expected = -(logps.exp() * logps).sum(-1).mean().item()
        assert answer.entropy == pytest.approx(expected, abs=1e-4)


class Watched(SampleStatistics):
    """Keeps what was drawn and the policy's weights of that moment."""

    def __init__(self, folder: Path) -> None:
        super().__init__(2, num_prompts=3, max_new_tokens=5)
        self.folder, self.seen = folder, []

    def _draw(self, trainer, pl_module):
        drawn = super()._draw(trainer, pl_module)
        step = trainer.global_step
        save_file({k: v.clone() for k, v in pl_module.policy.model.state_dict().items()}, self.folder / f"{step}")
        prompts = [ids for batch, _ in drawn for ids in batch.pair_id.tolist()]
        assert prompts == [-1, -2, -3]
        self.seen.append((step, pl_module.stage.index, [a for _, answers in drawn for a in answers]))
        return drawn


@pytest.mark.parametrize(
    "reference",
    [
        CachedReference,
        pytest.param(ResidentReference, marks=pytest.mark.slow),
        pytest.param(CachedFixedReference, marks=pytest.mark.slow),
    ],
)
def test_the_log_agrees_with_plain_models(tmp_path, tiny_model_dir, tiny_tokenizer, sources, reference):
    kept = tmp_path / "kept"
    kept.mkdir()
    watched = Watched(kept)
    trainer, _ = fit(tmp_path / "run", tiny_model_dir, sources, None, reference(), [watched], batch_size=3, **ARGS)
    data = trainer.datamodule
    lists = [report.val_ids for report in data.reports.values()]
    ids = [lists[0][0], lists[1][0], lists[0][1]]
    prompts = [pair.prompt_ids for pair in data.store.get(ids)]
    rows = {int(row["step"]): row for row in rows_of(tmp_path / "run")}
    assert list(rows) == [step for step, _, _ in watched.seen] and {stage for _, stage, _ in watched.seen} == {1, 2}
    sft = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32).eval()
    folders = [tiny_model_dir, *sorted((tmp_path / "run" / "stages").iterdir())]
    for step, stage, answers in watched.seen:
        policy = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32).eval()
        policy.load_state_dict(load_file(kept / f"{step}"))
        index = 0 if reference is CachedFixedReference else stage - 1
        before = AutoModelForCausalLM.from_pretrained(folders[index], dtype=torch.float32).eval()
        # A batch of three pairs: the first answers to all prompts, then the second ones.
        given = [(prompts[n % 3], a) for n, a in enumerate(answers)]
        own, ref, first = ([summed(m, p, a.ids) for p, a in given] for m in (policy, before, sft))
        row = rows[step]
        for key, others in (("kl_reference", ref), ("kl_sft", first)):
            differences = np.array(own) - np.array(others)
            assert float(row[f"samples/{key}"]) == pytest.approx(differences.mean(), abs=1e-4)
            error = differences.std(ddof=1) / math.sqrt(6)
            assert float(row[f"samples/{key}_standard_error"]) == pytest.approx(error, abs=1e-4)
        assert float(row["samples/answer_length"]) == pytest.approx(sum(len(a.ids) for a in answers) / 6)
        assert (float(row["samples/answers"]), int(row["stage/index"])) == (6.0, stage)
        assert any(abs(x - y) > 1e-3 for x, y in zip(own, first, strict=True))


@pytest.mark.parametrize("reference", [CachedReference, pytest.param(ResidentReference, marks=pytest.mark.slow)])
def test_training_is_the_same_bit_for_bit_without_it(tmp_path, dropout_model_dir, sources, reference):
    states, settings = [], {"module_args": {"disable_dropout": False}, **ARGS}

    class Measures(SampleStatistics):
        def measure(self, trainer, pl_module):
            def all_states():
                return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()

            before = all_states(), pl_module.policy.training
            values = super().measure(trainer, pl_module)
            states.append(before == (all_states(), pl_module.policy.training))
            return values

    callback = Measures(1, num_prompts=2, max_new_tokens=3)
    trainer, _ = fit(tmp_path / "with", dropout_model_dir, sources, None, reference(), [callback], **settings)
    fit(tmp_path / "without", dropout_model_dir, sources, None, reference(), **settings)
    assert states == [True] * trainer.global_step
    assert reproducible(tmp_path / "with") == reproducible(tmp_path / "without")
    for folder in (tmp_path / "with" / "stages").iterdir():
        assert_same_weights(folder, tmp_path / "without" / "stages" / folder.name)


def test_a_resumed_run_leaves_the_same(tmp_path, tiny_model_dir, sources):
    def run(folder: Path, ckpt_path: Path | None = None):
        saves = StageCheckpoint(every_n_train_steps=1, save_top_k=-1)
        return fit(folder, tiny_model_dir, sources, ckpt_path, UpdatingReference(2), [small(), saves], **ARGS)[0]

    whole = tmp_path / "whole"
    steps = run(whole).global_step
    assert [int(row["step"]) for row in rows_of(whole)] == list(range(2, steps + 1, 2)) and steps >= 6
    for step in (3, steps - 1):
        copy = tmp_path / f"from-{step}"
        shutil.copytree(whole, copy)
        run(copy, next((copy / "checkpoints").glob(f"*step={step}.ckpt")))
        assert rows_of(copy) == rows_of(whole), step


@pytest.mark.parametrize("reference", [AdapterReference, pytest.param(CachedReference, marks=pytest.mark.slow)])
def test_adapters(tmp_path, tiny_model_dir, sources, reference):
    """S is the base: the frozen adapter is lent for it, and has its values back afterwards."""
    settings = {"module_args": {"lora": LoraSettings(r=4)}, **ARGS}
    fit(tmp_path / "with", tiny_model_dir, sources, None, reference(), [small(1)], **settings)
    fit(tmp_path / "without", tiny_model_dir, sources, None, reference(), **settings)
    assert reproducible(tmp_path / "with") == reproducible(tmp_path / "without")
    rows = rows_of(tmp_path / "with")
    by_stage = {t: [row for row in rows if row["stage/index"] == t] for t in "12"}
    # M_0 is the reference of stage 1.
    assert all(row["samples/kl_reference"] == row["samples/kl_sft"] for row in by_stage["1"])
    assert all(row["samples/kl_reference"] != row["samples/kl_sft"] for row in by_stage["2"])


@pytest.mark.slow
def test_a_moved_reference_is_not_taken_for_s(tmp_path, tiny_model_dir, sources):
    fit(tmp_path, tiny_model_dir, sources, None, UpdatingReference(1), [small(1)], **ARGS)
    first, second, third = rows_of(tmp_path)[:3]
    # The first step has a learning rate of 0, so the reference is S until the update after the second one.
    for row in (first, second):
        assert float(row["samples/kl_reference"]) == pytest.approx(float(row["samples/kl_sft"]), abs=1e-5)
    assert third["stage/index"] == "1"
    assert abs(float(third["samples/kl_reference"]) - float(third["samples/kl_sft"])) > 1e-4


def test_a_fixed_reference_is_s_and_the_report_shows_it(tmp_path, tiny_model_dir, sources):
    fit(tmp_path, tiny_model_dir, sources, None, FixedReference(), [small(1)], **ARGS)
    rows = rows_of(tmp_path)
    assert all(row["samples/kl_reference"] == row["samples/kl_sft"] for row in rows)
    [kl, entropy, length] = drawn_charts(read_run(tmp_path))
    assert [line.name for line in kl.series] == ["to the reference", "to S"]
    for chart, column in ((kl, "kl_reference"), (entropy, "entropy"), (length, "answer_length")):
        expected = tuple((float(row["step"]), float(row[f"samples/{column}"])) for row in rows)
        assert chart.series[0].points == expected and len(expected) == 6
    assert kl.series[1].errors == tuple(float(row["samples/kl_sft_standard_error"]) for row in rows)
    page = (tmp_path / "report.html").read_text()
    assert "Answers drawn from the policy" in page and 'id="entropy"' in page


def test_another_models_table_gives_no_kl(tmp_path, tiny_model_dir, sources, caplog):
    reference = CachedExternalReference(str(tiny_model_dir))
    caplog.set_level("INFO")
    fit(tmp_path, tiny_model_dir, sources, None, reference, [small()], **ARGS)
    assert all(row["samples/kl_reference"] == "" and row["samples/kl_sft"] for row in rows_of(tmp_path))
    assert "no KL to the reference" in caplog.text


def test_what_it_cannot_measure_is_refused(tmp_path, tiny_model_dir, sources):
    for wrong in (
        lambda: SampleStatistics(0),
        lambda: SampleStatistics(1, answers_per_prompt=3),
        lambda: SampleStatistics(1, prompts=[]),
    ):
        with pytest.raises(ConfigurationError, match="SampleStatistics"):
            wrong()
    with pytest.raises(ConfigurationError, match="ld_alpha=0.5.*plain sum.*`trainer.callbacks`"):
        fit(tmp_path, tiny_model_dir, sources, callbacks=[small()], module_args={"logps": SummedLogps(0.5)})
    with pytest.raises(ConfigurationError, match="SampleStatistics with sharded weights.*`trainer.callbacks`"):
        arguments = {"strategy": "fsdp2", "devices": 1}
        fit(tmp_path, tiny_model_dir, sources, callbacks=[small()], trainer_args=arguments)


@pytest.mark.slow
def test_two_ranks_equal_one(tmp_path, tiny_model_dir, sources):
    script = [str(TESTS / "sample_script.py"), str(tmp_path / "two"), str(tiny_model_dir), *(s.path for s in sources)]
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *script]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    fit(tmp_path / "one", tiny_model_dir, sources, callbacks=[small()], batch_size=2)
    for ours, theirs in itertools.zip_longest(rows_of(tmp_path / "two"), rows_of(tmp_path / "one")):
        for key, value in theirs.items():
            assert float(ours[key]) == pytest.approx(float(value), abs=1e-3), key
