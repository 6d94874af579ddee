"""Settings of single stages: which one counts, and that a run with them is the chain of runs with each."""

from __future__ import annotations

import json
import re
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import adamw, assert_same_weights, fit, losses, made_sources, metrics, reproducible

from sdpo_lightning import CurriculumDataModule, DPOLitModule, PreferenceSource, StageSettings
from sdpo_lightning.cli import main
from sdpo_lightning.data.stage_settings import largest_batch, settings_of
from sdpo_lightning.types import ConfigurationError, ResumeError

pytestmark = pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")
FEW = settings(max_examples=60, deadline=None, derandomize=True)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return made_sources(tmp_path_factory.mktemp("sources"), {"a": 7, "b": 12})


# ---- which one counts


def test_name_before_place_before_star():
    given_settings = {
        "*": StageSettings(lr=1.0, beta=2.0, epochs=3),
        "2": StageSettings(lr=4.0, beta=5.0),
        "b": StageSettings(lr=6.0),
    }
    # b stands at place 2: lr from its name, beta from its place, epochs from "*".
    assert settings_of(given_settings, 2, "b") == StageSettings(lr=6.0, beta=5.0, epochs=3)
    assert settings_of(given_settings, 1, "b") == StageSettings(lr=6.0, beta=2.0, epochs=3)
    assert settings_of(given_settings, 2, "a") == StageSettings(lr=4.0, beta=5.0, epochs=3)
    assert settings_of(given_settings, 1, "a") == given_settings["*"]
    assert settings_of({}, 1, "a") == StageSettings()


@FEW
@given(st.lists(st.tuples(st.sampled_from(["a", "1", "*", "2", "b"]), st.floats(0.1, 9)), unique_by=lambda p: p[0]))
def test_the_order_of_the_keys_says_nothing(entries):
    forward = {key: StageSettings(beta=value) for key, value in entries}
    backward = dict(reversed(forward.items()))
    for index, name in ((1, "a"), (2, "a"), (1, "b"), (3, "c")):
        found = settings_of(forward, index, name)
        assert found == settings_of(backward, index, name)
        first = next((key for key in (name, str(index), "*") if key in forward), None)
        assert found.beta == (None if first is None else forward[first].beta)


def test_the_largest_batch():
    assert largest_batch({}, 4) == 4
    assert largest_batch({"a": StageSettings(batch_size=6), "*": StageSettings(lr=1.0)}, 4) == 6
    assert largest_batch({"a": StageSettings(batch_size=2)}, 4) == 4


@pytest.mark.parametrize(
    "own, more, text",
    [
        ({"llmbat": StageSettings(lr=1.0)}, {}, "no stage is called 'llmbat' (did you mean 'llmbar'?)"),
        ({"3": StageSettings(lr=1.0)}, {}, "no stage is called '3'"),
        ({"0": StageSettings(lr=1.0)}, {}, "no stage is called '0'"),
        ({"a": StageSettings(beta=0.0)}, {}, "`beta` is 0.0, expected above 0"),
        ({"*": StageSettings(label_smoothing=0.5)}, {}, "`label_smoothing` is 0.5, expected within [0, 0.5)"),
        ({"1": StageSettings(epochs=0)}, {}, "`epochs` is 0, expected at least 1"),
        ({"a": StageSettings(batch_size=2)}, {"batch_tokens": 64}, "no meaning beside `data.batch_tokens`"),
        ({"a": StageSettings(lr=1.0)}, {"partition": "pooled"}, "no stage is called 'a'"),
    ],
)
def test_what_is_refused_before_anything_is_read(own, more, text):
    named = [PreferenceSource(name, "/nowhere.jsonl") for name in ("a", "llmbar")]
    with pytest.raises(ConfigurationError, match=re.escape(text)):
        CurriculumDataModule(named, stage_settings=own, **more)


def test_a_name_that_is_a_place():
    with pytest.raises(ConfigurationError, match="is the name of a stage and a place"):
        CurriculumDataModule([PreferenceSource("1", "/nowhere.jsonl")], stage_settings={"1": StageSettings(lr=1.0)})


def test_merged_ties_have_names_of_their_own():
    named = [PreferenceSource(name, "/nowhere.jsonl") for name in ("a", "b")]
    own = {"a+b": StageSettings(lr=1.0)}
    CurriculumDataModule(named, stage_settings=own, merge_ties=True)
    with pytest.raises(ConfigurationError, match="no stage is called 'a\\+b'"):
        CurriculumDataModule(named, stage_settings=own)


# ---- the oracle

FIRST = {"lr": 3e-3, "beta": 0.3, "warmup_ratio": 0.0, "epochs": 2}
SECOND = {"lr": 5e-4, "label_smoothing": 0.1, "lr_scheduler": "cosine", "batch_size": 3}


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_run_with_them_is_the_chain_of_runs_with_each(tmp_path, tiny_model_dir, sources, shuffle):
    own = {"a": StageSettings(**FIRST), "2": StageSettings(**SECOND)}
    fit(tmp_path / "one", tiny_model_dir, sources, shuffle=shuffle, stage_settings=own)
    fit(
        tmp_path / "first", tiny_model_dir, sources[:1], shuffle=shuffle, epochs_per_stage=2,
        module_args={"optimizer": adamw(3e-3), "beta": 0.3, "warmup_ratio": 0.0},
    )
    m1 = tmp_path / "first" / "stages" / "01-a"
    fit(
        tmp_path / "second", m1, sources[1:], shuffle=shuffle, batch_size=3,
        module_args={"optimizer": adamw(5e-4), "label_smoothing": 0.1, "lr_scheduler": "cosine"},
    )
    assert_same_weights(tmp_path / "one" / "stages" / "01-a", m1)
    assert_same_weights(tmp_path / "one" / "stages" / "02-b", tmp_path / "second" / "stages" / "01-b")
    chained = losses(tmp_path / "first") + losses(tmp_path / "second")
    # 7 pairs by 2, twice; 12 pairs by 3.
    assert len(chained) == 2 * 4 + 4
    assert losses(tmp_path / "one") == chained
    rates = [float(row["train/lr"]) for row in metrics(tmp_path / "one")]
    # Linear from 3e-3 over 8 steps without a warm-up; then ceil(0.2 * 4) = 1 step of warm-up from 0 to 5e-4.
    assert rates[:9] == pytest.approx([3e-3 * (8 - step) / 8 for step in range(8)] + [0.0])
    assert rates[9] == pytest.approx(5e-4)
    # And it isn't the run without them.
    fit(tmp_path / "plain", tiny_model_dir, sources, shuffle=shuffle, epochs_per_stage={"a": 2, "*": 1})
    assert losses(tmp_path / "plain")[:8] != chained[:8]


def test_resumed_in_the_second_stage_it_is_the_whole_run(tmp_path, tiny_model_dir, sources):
    own = {"a": StageSettings(**FIRST), "b": StageSettings(**SECOND)}
    fit(tmp_path / "whole", tiny_model_dir, sources, stage_settings=own)
    # 8 steps of stage 1, 2 of the 4 of stage 2.
    fit(tmp_path / "cut", tiny_model_dir, sources, stage_settings=own, trainer_args={"max_steps": 10})
    [checkpoint] = (tmp_path / "cut").rglob("*step=10*.ckpt")
    other = {"a": StageSettings(**FIRST), "b": StageSettings(**SECOND | {"lr": 6e-4})}
    for wrong in (other, {}, {"a": StageSettings(**FIRST)}):
        with pytest.raises(ResumeError, match="data.stage_settings"):
            fit(tmp_path / "cut", tiny_model_dir, sources, ckpt_path=checkpoint, stage_settings=wrong)
    # The same ones by other keys are the same ones.
    same = {"1": StageSettings(**FIRST), "b": StageSettings(**SECOND)}
    fit(tmp_path / "cut", tiny_model_dir, sources, ckpt_path=checkpoint, stage_settings=same)
    assert_same_weights(tmp_path / "whole" / "stages" / "02-b", tmp_path / "cut" / "stages" / "02-b")
    assert reproducible(tmp_path / "whole") == reproducible(tmp_path / "cut")


# ---- the command line


@pytest.fixture
def words(tmp_path, tiny_model_dir, sources):
    listed = [{"name": source.name, "path": source.path} for source in sources]
    return [
        f"--trainer.default_root_dir={tmp_path / 'run'}",
        "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
        f"--model.model_name_or_path={tiny_model_dir}",
        f"--data.sources={json.dumps(listed)}",
        "--data.max_length=64",
        "--data.batch_size=2",
    ]


def test_check_shows_what_fit_does(tmp_path, words, capsys):
    own = "--data.stage_settings={'2': {epochs: 3, lr: 1e-4}, '*': {beta: 0.2}, a: {batch_size: 7}}"
    words = [*words, own, "--data.order=given"]
    main(["check", *words])
    lines = capsys.readouterr().out.splitlines()
    assert "stage 1 'a': 7 pairs, 1 epochs, 1 optimizer steps, beta 0.2, batch_size 7" in lines
    assert "stage 2 'b': 12 pairs, 3 epochs, 18 optimizer steps, lr 0.0001, beta 0.2" in lines
    main(["fit", *words])
    stages = json.loads((tmp_path / "run" / "curriculum.json").read_text())["stages"]
    assert [(row["steps"], row["settings"]) for row in stages] == [
        (1, {"beta": 0.2, "batch_size": 7}),
        (18, {"lr": 1e-4, "beta": 0.2}),
    ]


def test_passes_by_place_wait_for_the_order(tmp_path, words):
    main(["fit", *words, "--data.stage_settings={'1': {epochs: 3}, b: {epochs: 2}}"])
    stages = json.loads((tmp_path / "run" / "curriculum.json").read_text())["stages"]
    # b has 2 passes wherever it stands; a has 3 where it is first.
    expected = {"a": 3 if stages[0]["name"] == "a" else 1, "b": 2}
    assert {row["name"]: row["epochs"] for row in stages} == expected
    assert len(metrics(tmp_path / "run")) == sum(row["steps"] for row in stages)


def test_held_out_metrics_are_of_the_stage_of_the_weights(tmp_path, words, tiny_model_dir):
    words = [*words, "--data.order=given", "--data.val_fraction=0.3", "--data.stage_settings={b: {beta: 0.7}}"]
    main(["fit", *words, "--model.optimizer.init_args.lr=1e-3"])
    trained = float(metrics(tmp_path / "run")[-1]["val/b/rewards/margins"])
    checkpoint = sorted((tmp_path / "run").rglob("*.ckpt"))[-1]
    found = {}
    for name, own in (("same", {"b": StageSettings(beta=0.7)}), ("none", None)):
        listed = json.loads(words[4].partition("=")[2])
        data = CurriculumDataModule(
            [PreferenceSource(**row) for row in listed], order="given", batch_size=2, max_length=64, val_fraction=0.3,
            stage_settings=own,
        )
        trainer = pl.Trainer(
            default_root_dir=tmp_path / "run", accelerator="cpu", logger=False, enable_progress_bar=False
        )
        module = DPOLitModule(str(tiny_model_dir))
        rows = trainer.validate(module, data, ckpt_path=checkpoint, verbose=False)
        found[name] = next(row["val/b/rewards/margins"] for row in rows if "val/b/rewards/margins" in row)
    assert found["same"] == pytest.approx(trained, rel=1e-3) and abs(trained) > 1e-4
    # The rewards are beta times what they are: 0.1 for 0.7.
    assert found["none"] == pytest.approx(trained / 7, rel=1e-3)


def test_settings_reach_a_subclass_that_reads_beta(tmp_path, tiny_model_dir, sources):
    seen = []

    class Hinge(DPOLitModule):
        def preference_loss(self, policy, reference):
            seen.append(self.beta)
            return torch.relu(1 - self.beta * (policy.gamma - reference.gamma))

    fit(tmp_path, tiny_model_dir, sources, module_class=Hinge, stage_settings={"b": StageSettings(beta=0.7)})
    assert seen == [0.1] * 4 + [0.7] * 6


def test_the_snippets_of_the_docs_are_read(words, capsys):
    text = (Path(__file__).parent.parent / "docs" / "curriculum.md").read_text()
    snippets = [yaml.safe_load(part) for part in re.findall(r"```yaml\n(.*?)```", text, re.S)]
    assert len(snippets) == 11
    # The others are of trainer and model; see `test_stop_rule.py`.
    for snippet in (snippet for snippet in snippets if "data" in snippet):
        plain = {key: v if isinstance(v, str) else json.dumps(v) for key, v in snippet["data"].items()}
        values = [f"--data.{key}={value}" for key, value in plain.items()]
        with pytest.raises(SystemExit) as stop:
            main(["fit", *words, *values, "--print_config"])
        assert stop.value.code == 0
        printed = yaml.safe_load(capsys.readouterr().out)["data"]
        for key, value in snippet["data"].items():
            found = printed[key]
            if key == "stage_settings":
                found = {name: {k: v for k, v in row.items() if v is not None} for name, row in found.items()}
            assert found == value
