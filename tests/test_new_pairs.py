"""Stages whose pairs M_{t-1} makes just before them: rows by hand, the walk, resume, refusals."""

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from helpers import WORDS, make_rows, write_jsonl
from runs import assert_same_weights, fit, losses
from transformers import AutoModelForCausalLM

from sdpo_lightning import CachedReference, PairSource, PreferenceSource, SampledPairs, StageCheckpoint
from sdpo_lightning.backbone import load_policy, weights_digest
from sdpo_lightning.cli import main
from sdpo_lightning.data.made_pairs import MadePairs
from sdpo_lightning.data.new_pairs import DeclaredPairs, read_pair_sources, read_prompts
from sdpo_lightning.fixed_reference import CachedFixedReference
from sdpo_lightning.generation import Answer, Generator, Sampling
from sdpo_lightning.generation_transformers import TransformersGenerator
from sdpo_lightning.types import ConfigurationError, ResumeError

PROMPTS = [f"w{n} w{n + 7} w{n + 3}" for n in range(24)]


def by_words(prompt, answers):
    """More words are better; the name of the module is the test's."""
    return [float(len(answer.split())) for answer in answers]


def all_equal(prompt, answers):
    return [1.0] * len(answers)


def not_numbers(prompt, answers):
    return [math.nan] * len(answers)


class Said(Generator):
    """Gives what it was told to, prompt by prompt."""

    model_name = "said"

    def __init__(self, told: list[list[Answer]]):
        self.told, self.asked = told, []

    def generate(self, prompts, sampling: Sampling):
        self.asked.append((list(prompts), sampling))
        return [self.told.pop(0) for _ in prompts]


def answers(*texts: str) -> list[Answer]:
    """`~` marks one that was cut off."""
    return [Answer(text.removeprefix("~"), not text.startswith("~")) for text in texts]


def sampled(prompts: Path, **given) -> SampledPairs:
    default = {"name": "new", "num_pairs": 4, "prompts": str(prompts), "scorer": "test_new_pairs.by_words"}
    return SampledPairs(**default | {"answers": 4, "max_new_tokens": 6} | given)


# ---- rows


def test_best_against_worst_and_what_gives_no_pair(tmp_path):
    prompts = write_jsonl(tmp_path / "p.jsonl", [{"prompt": text} for text in ("a", "b", "c", "d", "e")])
    told = [
        answers(" one", " one two three", " one two"),
        answers(" one", " two", " three"),
        answers(" one", "~ one two", "~ one two three"),
        answers(" one two", " one", "~ one two three four"),
        answers("  ", " one", " one two"),
    ]
    generator = Said(told)
    source = sampled(prompts, prompts_at_once=2, seed=3)
    assert list(source.pairs(generator, 2)) == [
        {"prompt": "a", "chosen": " one two three", "rejected": " one", "scores": [3.0, 1.0]},
        "tie",
        "fewer than two whole answers",
        {"prompt": "d", "chosen": " one two", "rejected": " one", "scores": [2.0, 1.0]},
        {"prompt": "e", "chosen": " one two", "rejected": " one", "scores": [2.0, 1.0]},
    ]
    assert [prompts for prompts, _ in generator.asked] == [["a", "b"], ["c", "d"], ["e"]]
    # 3 x 1,000,003 + 2 x 10,007 and the place of the first prompt.
    assert [sampling.seed for _, sampling in generator.asked] == [3020023, 3020025, 3020027]
    gap = sampled(prompts, min_gap=2.0)
    rows = list(gap.pairs(Said([answers(" one two", " one")] + [answers(" a b c", " a")] * 4), 2))
    assert [row if isinstance(row, str) else row["scores"] for row in rows] == ["below min_gap"] + [[3.0, 1.0]] * 4


def test_dialogues_give_messages_and_nothing_is_sampled_beyond_what_is_asked_for(tmp_path):
    dialogue = [{"role": "user", "content": "q"}]
    prompts = write_jsonl(tmp_path / "p.jsonl", [{"prompt": dialogue}] * 6)
    generator = Said([answers("yes indeed", "no")] * 6)
    tries = sampled(prompts, prompts_at_once=2).pairs(generator, 1)
    assert next(tries)["chosen"] == [{"role": "assistant", "content": "yes indeed"}] and len(generator.asked) == 1


def test_prompts_and_scorers_that_cannot_be_used_are_named(tmp_path):
    for bad in ({"text": "a"}, {"prompt": ""}, {"prompt": []}, {"prompt": [{"role": "assistant", "content": "a"}]}):
        with pytest.raises(ConfigurationError, match="line 2"):
            read_prompts(write_jsonl(tmp_path / "p.jsonl", [{"prompt": "a"}, bad]))
    prompts = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "a"}])
    for path, said in (("no.such_function", "No module"), ("by_words", "module.function")):
        with pytest.raises(ConfigurationError, match=said):
            next(sampled(prompts, scorer=path).pairs(Said([]), 1))
    with pytest.raises(ConfigurationError, match=r"\[nan, nan\]"):
        next(sampled(prompts, scorer="test_new_pairs.not_numbers").pairs(Said([answers("a", "b c")]), 1))
    with pytest.raises(ConfigurationError, match="`answers` 1"):
        sampled(prompts, answers=1)


# ---- in a run


@pytest.fixture
def model_dir(ending_model_dir) -> Path:
    return ending_model_dir


@pytest.fixture
def prompts(tmp_path) -> Path:
    return write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": text} for text in PROMPTS])


@pytest.fixture
def sources(tmp_path) -> list[PreferenceSource]:
    return [PreferenceSource("a", str(write_jsonl(tmp_path / "a.jsonl", make_rows(6, 0))))]


def rows_of(run: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (run / "new_pairs" / f"{name}.jsonl").read_text().splitlines()]


def test_a_stage_trains_on_pairs_that_the_model_before_it_made(tmp_path, model_dir, tiny_tokenizer, sources, prompts):
    made = [sampled(prompts, name="first"), sampled(prompts, name="second", num_pairs=3, seed=1)]
    run = tmp_path / "run"
    fit(run, model_dir, sources, pair_sources=made, epochs_per_stage={"first": 2, "*": 1})
    ledger = json.loads((run / "ledger.json").read_text())
    assert [(stage["name"], stage["pairs"]) for stage in ledger["stages"]] == [("a", 6), ("first", 4), ("second", 3)]
    # 6 / 2 + 2 x 4 / 2 + 2 steps; ln 2 at the first step of each stage: the reference is the policy.
    found = losses(run)
    assert len(found) == 3 + 4 + 2
    assert [found[n] for n in (0, 3, 7)] == pytest.approx([math.log(2)] * 3, abs=1e-6)
    # The rows of stage 2 are those that M_1 from the disk gives outside of any run, and of stage 3 those of M_2.
    for number, source in enumerate(made, 2):
        folder = next(run.glob(f"stages/{number - 1:02d}-*"))
        generator = TransformersGenerator(
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), tiny_tokenizer
        )
        again = [row for row in source.pairs(generator, number) if not isinstance(row, str)]
        rows = rows_of(run, f"{number:02d}-{source.name}")
        assert rows == again[: len(rows)] and len(rows) >= source.num_pairs
        note = json.loads((run / "new_pairs" / f"{number:02d}-{source.name}.json").read_text())
        assert note["made_with"]["weights_sha256"] == ledger["stages"][number - 2]["output"]["sha256"]
        assert all(len(row["chosen"].split()) > len(row["rejected"].split()) for row in rows)
    card = next(run.glob("stages/02-*")) / "README.md"
    assert "first (`made with the model before`)" in card.read_text()


def test_making_pairs_changes_no_bit_of_other_training(tmp_path, model_dir, sources, prompts):
    """The rows, given beforehand as a file, train the same model: random states are untouched, and so is the order."""
    fit(tmp_path / "made", model_dir, sources, pair_sources=[sampled(prompts)])
    path = write_jsonl(tmp_path / "new.jsonl", rows_of(tmp_path / "made", "02-new")[:4])
    fit(tmp_path / "given", model_dir, [*sources, PreferenceSource("new", str(path))])
    assert losses(tmp_path / "made") == losses(tmp_path / "given")
    assert_same_weights(tmp_path / "made" / "stages" / "02-new", tmp_path / "given" / "stages" / "02-new")


@pytest.mark.parametrize(
    "reference", [None, pytest.param(CachedReference(), marks=pytest.mark.slow)], ids=["resident", "cached"]
)
def test_every_checkpoint_goes_on_to_the_same_weights(tmp_path, model_dir, sources, prompts, reference, monkeypatch):
    made = [sampled(prompts), sampled(prompts, name="last", num_pairs=2)]
    whole = tmp_path / "whole"
    given = {"pair_sources": made, "reference": reference}
    every = StageCheckpoint(every_n_train_steps=1, save_top_k=-1, filename="{step}")
    fit(whole, model_dir, sources, callbacks=[every], **given)
    checkpoints = sorted(whole.glob("checkpoints/*.ckpt"), key=lambda path: int(path.stem.removeprefix("step=")))
    # 3 + 2 + 1 steps; 3 and 5 are ends of stages, before the pairs of the next one are made.
    assert [path.stem for path in checkpoints] == [f"step={n}" for n in range(1, 7)]
    asked = []
    inner = SampledPairs.pairs
    monkeypatch.setattr(SampledPairs, "pairs", lambda self, g, t: asked.append(t) or inner(self, g, t))
    # Step 3: what was made for M_1 is there and is taken. Step 4 is within stage 2. Step 5: likewise for M_2.
    for step in (3, 4, 5):
        run = shutil.copytree(whole, tmp_path / f"from-{step}")
        fit(run, model_dir, sources, ckpt_path=run / "checkpoints" / f"step={step}.ckpt", **given)
        assert_same_weights(whole / "stages" / "03-last", run / "stages" / "03-last")
    assert asked == []
    # Without the files stage 2 is made again from step 3 on, bit for bit.
    run = shutil.copytree(whole, tmp_path / "again")
    shutil.rmtree(run / "new_pairs")
    fit(run, model_dir, sources, ckpt_path=run / "checkpoints" / "step=3.ckpt", **given)
    assert asked == [2, 3] and rows_of(run, "02-new") == rows_of(whole, "02-new")
    assert_same_weights(whole / "stages" / "03-last", run / "stages" / "03-last")


def test_a_stage_that_has_begun_takes_no_other_rows(tmp_path, model_dir, sources, prompts):
    run, made = tmp_path / "run", [sampled(prompts)]
    every = StageCheckpoint(every_n_train_steps=1, save_top_k=-1, filename="{step}")
    fit(run, model_dir, sources, callbacks=[every], pair_sources=made)
    within = run / "checkpoints" / "step=4.ckpt"
    path = run / "new_pairs" / "02-new.jsonl"
    rows = rows_of(run, "02-new")
    write_jsonl(path, [rows[0] | {"chosen": " w5 w5 w5 w5"}, *rows[1:]])
    with pytest.raises(ResumeError, match="isn't what stage 2 began with"):
        fit(run, model_dir, sources, ckpt_path=within, pair_sources=made)
    path.unlink()
    with pytest.raises(ResumeError, match="is gone"):
        fit(run, model_dir, sources, ckpt_path=within, pair_sources=made)
    write_jsonl(path, rows)
    for other in ([sampled(prompts, temperature=0.5)], [sampled(prompts, num_pairs=3)], None):
        with pytest.raises(ResumeError, match="data.pair_sources"):
            fit(run, model_dir, sources, ckpt_path=within, pair_sources=other)
    # From the end of stage 1 what doesn't fit M_1 any more is set aside, not taken.
    write_jsonl(path, [rows[0] | {"chosen": " w5 w5 w5 w5"}, *rows[1:]])
    fit(run, model_dir, sources, ckpt_path=run / "checkpoints" / "step=3.ckpt", pair_sources=made)
    assert rows_of(run, "02-new") == rows and (run / "stale" / "02-new.jsonl").exists()


def test_too_few_pairs_are_an_error_or_counted_repeats(tmp_path, model_dir, sources, prompts, caplog):
    short = write_jsonl(tmp_path / "short.jsonl", [{"prompt": text} for text in PROMPTS[:4]])
    with pytest.raises(ConfigurationError, match=r"'new' has \d of the 9 pairs that `num_pairs` declares") as caught:
        fit(tmp_path / "run", model_dir, sources, pair_sources=[sampled(short, num_pairs=9)])
    assert "on_few: repeat" in str(caught.value)
    # The same run goes on with the rows that are there, repeated: nothing is sampled twice.
    checkpoint = next((tmp_path / "run" / "checkpoints").glob("*.ckpt"))
    rows = rows_of(tmp_path / "run", "02-new")
    trainer, _ = fit(
        tmp_path / "run",
        model_dir,
        sources,
        ckpt_path=checkpoint,
        pair_sources=[sampled(short, num_pairs=9, on_few="repeat")],
    )
    assert rows_of(tmp_path / "run", "02-new") == rows and 0 < len(rows) < 9
    pairs = trainer.datamodule.store.get(trainer.datamodule.stages()[1].pair_ids)
    texts = [pair.text() for pair in pairs]
    assert (
        len(texts) == 9 and len(set(texts)) == len(rows) and texts[: len(rows)] == texts[len(rows) : 2 * len(rows)][:9]
    )
    with pytest.raises(ConfigurationError, match=r"0 of the 2 pairs.*[1-4] tie"):
        nothing = sampled(short, num_pairs=2, scorer="test_new_pairs.all_equal", on_few="repeat")
        fit(tmp_path / "none", model_dir, sources, pair_sources=[nothing])


@dataclass(frozen=True)
class Drawn(PairSource):
    """A user's own source: rows that a data file could hold, some of which can't be trained on."""

    name: str
    num_pairs: int

    def pairs(self, generator: Generator, stage_index: int) -> Iterator[dict | str]:
        for number in range(10):
            word = WORDS[number]
            same = number % 3 == 0
            yield {"prompt": f"{word} w1", "chosen": f" {word}", "rejected": f" {word}" if same else " w9"}


def test_rows_that_cannot_be_trained_on_are_made_up_for(tmp_path, model_dir, sources, caplog):
    run = tmp_path / "run"
    trainer, module = fit(run, model_dir, sources, pair_sources=[Drawn("own", 5)])
    # Of w0 ... w9 every third is twice the same answer, and dropped: w1 w2 w4 w5 w7 are the first five.
    assert [row["prompt"].split()[0] for row in rows_of(run, "02-own")] == [f"w{n}" for n in range(8)]
    assert "rows dropped: 3 identical" in caplog.text
    data = trainer.datamodule
    pairs = data.store.get(data.stages()[1].pair_ids)
    assert [data.tokenizer.decode(pair.prompt_ids).split()[0] for pair in pairs] == ["w1", "w2", "w4", "w5", "w7"]
    assert data.source_of(data.stages()[1].pair_ids[0]) == "own"
    assert weights_digest(load_policy(str(run / "stages" / "02-own"))) == module.record.digests[2]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"batch_tokens": 64}, "batch_tokens"),
        ({"on_changed_rows": "accept"}, "on_changed_rows"),
        ({"pair_sources": [Drawn("a", 2)]}, "unique names"),
        ({"pair_sources": [Drawn("own", 0)]}, "num_pairs"),
        ({"pair_sources": [Drawn("../up", 1)]}, "expected letters"),
        ({"reference": CachedFixedReference()}, "don't exist yet"),
    ],
)
def test_what_needs_the_pairs_beforehand_is_refused(given, said, tmp_path, model_dir, sources):
    with pytest.raises(ConfigurationError, match=said):
        fit(tmp_path / "run", model_dir, sources, **({"pair_sources": [Drawn("own", 2)]} | given))
    assert not list((tmp_path / "run").glob("stages/*"))


# ---- on the command line


def run_config(folder: Path, model_dir: Path, source: PreferenceSource, prompts: Path, run: str = "run") -> dict:
    """Of `fit` on one source and one stage of made pairs."""
    return {
        "model": {"model_name_or_path": str(model_dir), "lora": None},
        "data": {
            "sources": [{"name": "a", "path": source.path}],
            "order": "given",
            "batch_size": 2,
            "max_length": 64,
            "epochs_per_stage": {"new": 2, "*": 1},
            "pair_sources": [
                {
                    "class_path": "sdpo_lightning.SampledPairs",
                    "init_args": {
                        "name": "new",
                        "num_pairs": 4,
                        "prompts": str(prompts),
                        "scorer": "test_new_pairs.by_words",
                        "max_new_tokens": 6,
                    },
                }
            ],
        },
        "trainer": {
            "default_root_dir": str(folder / run),
            "accelerator": "cpu",
            "enable_progress_bar": False,
            "callbacks": [{"class_path": "sdpo_lightning.StageSamples", "init_args": {"max_new_tokens": 2}}],
        },
    }


def test_the_verbs_know_of_stages_whose_pairs_are_made(tmp_path, model_dir, sources, prompts, capsys):
    config = run_config(tmp_path, model_dir, sources[0], prompts)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    main(["check", "--config", str(tmp_path / "run.yaml")])
    said = capsys.readouterr().out
    # 4 pairs by 2, twice.
    assert "stage 2 'new': 4 pairs, 2 epochs, 4 optimizer steps" in said
    assert "the function 'test_new_pairs.by_words': its code will run" in said and "0 errors" in said
    main(["estimate", "--config", str(tmp_path / "run.yaml")])
    assert "of pairs that are yet to be made `data.max_length`" in capsys.readouterr().out
    main(["fit", "--config", str(tmp_path / "run.yaml")])
    assert len(losses(tmp_path / "run")) == 3 + 4
    main(["fit", "--config", str(tmp_path / "run.yaml")])
    assert len(losses(tmp_path / "run")) == 3 + 4
    config["data"]["pair_sources"][0]["init_args"]["prompts"] = str(tmp_path / "none.jsonl")
    config["trainer"]["default_root_dir"] = str(tmp_path / "other")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    for verb in ("check", "fit"):
        with pytest.raises(SystemExit) as caught:
            main([verb, "--config", str(tmp_path / "run.yaml")])
        assert caught.value.code == 2 and "none.jsonl" in capsys.readouterr().err


def test_places_are_known_before_the_pairs_are():
    made = MadePairs([Drawn("own", 2)], ["a"], by_tokens=False, on_changed_rows="error")
    assert made.chunks()[0].pair_ids == [1 << 40, (1 << 40) + 1]
    own = {"class_path": "mine.Source", "init_args": {"name": "x", "num_pairs": 3, "other": 1}}
    assert read_pair_sources([own]) == [DeclaredPairs("x", 3)] and read_pair_sources(None) == []
    with pytest.raises(ConfigurationError, match="mine.Source has no `name`"):
        read_pair_sources([{"class_path": "mine.Source"}])


@pytest.mark.slow
@pytest.mark.parametrize("place", ["after_new_pairs:1", "after_open:2", "before_checkpoint:2"])
def test_a_run_that_is_killed_around_the_making_ends_as_if_nothing_had_happened(
    place, tmp_path, model_dir, sources, prompts
):
    for run in ("whole", "killed"):
        config = run_config(tmp_path, model_dir, sources[0], prompts, run)
        (tmp_path / f"{run}.yaml").write_text(yaml.safe_dump(config))
    main(["fit", "--config", str(tmp_path / "whole.yaml")])
    paths = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "sdpo_lightning", "fit", "--config", str(tmp_path / "killed.yaml")]
    for failpoint, code in ((place, 137), ("", 0)):
        environment = os.environ | {"PYTHONPATH": paths, "SDPO_FAILPOINT": failpoint}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == code, done.stderr
    assert_same_weights(tmp_path / "whole" / "stages" / "02-new", tmp_path / "killed" / "stages" / "02-new")
    assert losses(tmp_path / "whole") == losses(tmp_path / "killed")
    assert rows_of(tmp_path / "whole", "02-new") == rows_of(tmp_path / "killed", "02-new")
