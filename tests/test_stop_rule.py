"""A stage ends by what its validations say, and what comes is as at a planned end."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from helpers import make_rows, write_jsonl
from runs import adamw, assert_same_weights, fit, losses, metrics, reproducible

from sdpo_lightning import (
    CachedReference,
    DPOLitModule,
    Fork,
    PreferenceSource,
    ResidentReference,
    StageCheckpoint,
    StageTransition,
    StopRule,
)
from sdpo_lightning.cli import main
from sdpo_lightning.data.endings import StageEnd, last_epoch, pairs_trained, with_ends
from sdpo_lightning.ledger import Ledger
from sdpo_lightning.stop_rule import StopState, is_better, judge, monitored
from sdpo_lightning.types import ConfigurationError, ResumeError, Stage

pytestmark = pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")

# No loss falls by 100 nats: the first validation of a stage is its best, and the n-th after it ends the stage.
NEVER = 100.0


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    found = []
    for seed, (name, count) in enumerate((("a", 10), ("b", 14))):
        path = write_jsonl(folder / f"{name}.jsonl", make_rows(count, seed, name))
        held_out = write_jsonl(folder / f"{name}-val.jsonl", make_rows(3 + seed, 9 + seed, f"{name}-val"))
        found.append(PreferenceSource(name, str(path), val_path=str(held_out)))
    return found


DATA = {"on_val_overlap": "warn"}


def run(run_dir, model_dir, sources, stop, every=1, callbacks=(), ckpt_path=None, accumulate=1, **more):
    """10 and 14 pairs by 2: 5 and 7 micro-batches a pass."""
    trainer_args = {"val_check_interval": every, "accumulate_grad_batches": accumulate}
    trainer_args |= more.pop("trainer_args", {})
    transition = StageTransition(stop=stop)
    return fit(
        run_dir, model_dir, sources, ckpt_path, callbacks=[transition, *callbacks], trainer_args=trainer_args,
        **DATA | more,
    )


def steps_of(run_dir) -> dict[str, int]:
    found: dict[str, int] = {}
    for row in metrics(run_dir):
        found[row["stage/index"]] = found.get(row["stage/index"], 0) + 1
    return found


# ---- the arithmetic


def test_patience_counts_validations_without_improvement():
    rule, state, seen = StopRule(patience=2, min_delta=0.1), StopState(), []
    # 1.0 is the first; 0.95 is better by 0.05 only; 0.8 by 0.2; 0.75 by 0.05; 0.71 by 0.09 of 0.8: two in a row.
    for value in (1.0, 0.95, 0.8, 0.75, 0.71):
        state, reason = judge(rule, state, value, None)
        seen.append((state.best, state.waited, bool(reason)))
    assert seen == [(1.0, 0, False), (1.0, 1, False), (0.8, 0, False), (0.8, 1, False), (0.8, 2, True)]


def test_the_other_direction_and_what_is_no_number():
    assert is_better(0.6, 0.5, "max") and not is_better(0.5, 0.5, "max") and not is_better(0.6, 0.5, "max", 0.1)
    assert is_better(0.4, 0.5, "min") and not is_better(0.5, 0.5, "min")
    assert not any(is_better(value, None, mode) for value in (math.nan, math.inf) for mode in ("min", "max"))
    state, reason = judge(StopRule(patience=1), StopState(), math.nan, None)
    assert state == StopState(None, 1) and "no finite value" in reason


def test_the_bound_on_kl_needs_no_patience():
    rule = StopRule(patience=3, max_kl=0.5)
    assert judge(rule, StopState(1.0, 0), 0.9, 0.5) == (StopState(0.9, 0), "")
    state, reason = judge(rule, StopState(1.0, 0), 0.9, 0.51)
    assert state == StopState(0.9, 0) and "KL 0.51" in reason and "above 0.5" in reason
    assert "KL nan" in judge(StopRule(max_kl=0.5), StopState(), None, math.nan)[1]


def test_a_stage_of_two_sources_is_judged_by_the_mean_over_its_held_out_pairs():
    logged = {"val/a/loss": 0.4, "val/b/loss": 0.8, "val/c/loss": 9.0, "mine": 5.0}
    # (3 * 0.4 + 1 * 0.8) / 4 = 0.5.
    assert monitored("val/{source}/loss", {"a": 3, "b": 1}, logged, "here") == pytest.approx(0.5)
    assert monitored("mine", {"a": 3}, logged, "here") == 5.0
    with pytest.raises(ConfigurationError, match="here: there is no val/a/lost after a validation"):
        monitored("val/{source}/lost", {"a": 3}, logged, "here")


@pytest.mark.parametrize(
    "given, text",
    [
        ({}, "neither `patience` nor `max_kl`"),
        ({"patience": 0}, "`patience` is 0"),
        ({"patience": 1, "min_delta": -0.1}, "`min_delta` is -0.1"),
        ({"max_kl": 0.0}, "`max_kl` is 0.0"),
        ({"patience": 1, "mode": "auto"}, "`mode` is 'auto'"),
    ],
)
def test_rules_that_are_refused(given, text):
    with pytest.raises(ConfigurationError, match=text):
        StopRule(**given)


def test_later_stages_move_up_where_one_has_ended():
    plan = [Stage(1, "a", [1, 2], (2, 2, 2), 0), Stage(2, "b", [3, 4], (3,), 3), Stage(3, "c", [5], (1, 1), 4)]
    ends = {1: StageEnd((2, 1), 3, "why")}
    found = with_ends(plan, ends)
    assert [(stage.first_epoch, stage.epochs, stage.num_steps) for stage in found] == [(0, 2, 3), (2, 1, 3), (3, 2, 2)]
    assert last_epoch(plan) == 6 and last_epoch(found) == 5
    # 3 of a; b once; c twice.
    assert pairs_trained(found, ends) == 3 + 2 + 2
    assert StageEnd.of_row(json.loads(json.dumps(ends[1].row()))) == ends[1]
    assert with_ends(plan, {}) == plan or [s.epoch_steps for s in with_ends(plan, {})] == [s.epoch_steps for s in plan]


# ---- runs


def test_each_stage_ends_where_its_rule_fires(tmp_path, tiny_model_dir, sources, caplog):
    caplog.set_level("INFO")
    rule = StopRule(patience=2, min_delta=NEVER)
    trainer, _ = run(tmp_path, tiny_model_dir, sources, rule)
    # Validations after each step; the second one after the first of its stage is after step 3.
    assert steps_of(tmp_path) == {"1": 3, "2": 3} and trainer.global_step == 6
    # What the time left is counted by.
    assert sum(stage.num_steps for stage in trainer.datamodule.stages()) == 6 and trainer.max_epochs == 2
    ledger = Ledger.read(tmp_path)
    assert [(stage.status, stage.steps, stage.end.epoch_steps, stage.end.pairs) for stage in ledger.stages] == [
        ("done", 3, (3,), 6), ("done", 6, (3,), 6)
    ]
    assert "val/{source}/loss is no better than" in ledger.stages[0].end.reason
    card = (tmp_path / "stages" / "01-a" / "README.md").read_text()
    assert f"| ended before its plan | after 3 steps, 6 pairs: {ledger.stages[0].end.reason} |" in card
    assert sorted(path.name for path in (tmp_path / "stages").iterdir()) == ["01-a", "02-b"]
    stages = json.loads((tmp_path / "curriculum.json").read_text())["stages"]
    assert [stage["steps"] for stage in stages] == [3, 3]
    assert "stage 1 'a' ends after 3 of 5 steps" in caplog.text and "stopped inside" not in caplog.text
    # The rate of stage 1 falls as planned over 5 steps, after ceil(0.2 * 5) = 1 of warm-up; stage 2 begins anew.
    rates = [float(row["train/lr"]) for row in metrics(tmp_path)]
    assert rates == pytest.approx([0.0, 1e-3, 1e-3 * 3 / 4, 0.0, 1e-3 / 2, 1e-3])
    # A rerun finds it finished.
    [checkpoint] = (tmp_path / "checkpoints").glob("*.ckpt")
    again, _ = run(tmp_path, tiny_model_dir, sources, rule, ckpt_path=checkpoint)
    assert again.global_step == 6 and "already complete" in caplog.text


def test_it_is_the_chain_of_runs_of_the_recorded_steps(tmp_path, tiny_model_dir, sources):
    args = {"lr_scheduler": "constant", "warmup_ratio": 0.0}
    run(tmp_path / "one", tiny_model_dir, sources, StopRule(patience=2, min_delta=NEVER), module_args=args)
    recorded = [sum(stage.end.epoch_steps) for stage in Ledger.read(tmp_path / "one").stages]
    assert recorded == [3, 3]
    start, chained = tiny_model_dir, []
    for index, (source, steps) in enumerate(zip(sources, recorded, strict=True), 1):
        # Only so many of its batches: no rule, no validation within.
        run_dir, limit = tmp_path / f"chain-{index}", {"limit_train_batches": steps}
        fit(run_dir, start, [source], module_args=args, trainer_args=limit, **DATA)
        start = run_dir / "stages" / f"01-{source.name}"
        chained += losses(run_dir)
        assert_same_weights(tmp_path / "one" / "stages" / f"0{index}-{source.name}", start)
    assert losses(tmp_path / "one") == chained and len(chained) == 6


@pytest.mark.parametrize(
    "reference, accumulate", [pytest.param(ResidentReference, 1, marks=pytest.mark.slow), (CachedReference, 2)]
)
def test_every_checkpoint_over_a_stop(tmp_path, tiny_model_dir, sources, reference, accumulate):
    rule, whole = StopRule(patience=1, min_delta=NEVER), tmp_path / "whole"

    def start(folder, checkpoint=None):
        every = StageCheckpoint(every_n_train_steps=1, save_top_k=-1)
        ends = StageCheckpoint(every_n_epochs=1, save_top_k=-1, filename="end-{epoch}-{step}")
        return run(
            folder, tiny_model_dir, sources, rule, every=2, callbacks=[every, ends], ckpt_path=checkpoint,
            accumulate=accumulate, reference=reference(), epochs_per_stage={"a": 2, "*": 1},
        )[0]

    trainer = start(whole)
    # Validations after micro-batches 2 and 4: 4 of 5 in pass 1 of a; 4 of 7 of b.
    assert steps_of(whole) == {"1": 4 // accumulate, "2": 4 // accumulate}
    assert [stage.end.epoch_steps for stage in Ledger.read(whole).stages] == [(4 // accumulate,)] * 2
    checkpoints = sorted((whole / "checkpoints").glob("*.ckpt"))
    assert len(checkpoints) >= trainer.global_step
    for checkpoint in checkpoints:
        resumed = tmp_path / f"from-{checkpoint.stem}"
        shutil.copytree(whole, resumed, ignore=shutil.ignore_patterns("checkpoints"))
        start(resumed, checkpoint)
        for folder in ("01-a", "02-b"):
            assert_same_weights(whole / "stages" / folder, resumed / "stages" / folder)
        assert reproducible(resumed) == reproducible(whole), checkpoint.name
        assert Ledger.read(resumed).stages == Ledger.read(whole).stages
        assert (resumed / "curriculum.json").read_text() == (whole / "curriculum.json").read_text()
        shutil.rmtree(resumed)


def test_a_validation_between_the_micro_batches_of_a_step_ends_the_stage_with_that_step(
    tmp_path, tiny_model_dir, sources
):
    """5 micro-batches of a pass over a, by 2, are 3 steps; validations after the third and, of b, the sixth."""
    rule = StopRule(patience=1, min_delta=NEVER)
    data = {"epochs_per_stage": {"a": 3, "*": 1}}
    trainer, _ = run(tmp_path / "one", tiny_model_dir, sources, rule, every=3, accumulate=2, **data)
    ends = [stage.end for stage in Ledger.read(tmp_path / "one").stages]
    # The second validation of a is after micro-batch 3 of pass 2, between those of its step 2, which ends with the
    # fourth: 3 + 2 steps, 10 + 4 * 2 pairs. Of b it is after micro-batch 6, with step 3: 12 pairs.
    assert [(end.epoch_steps, end.pairs) for end in ends] == [((3, 2), 18), ((3,), 12)]
    assert trainer.global_step == 8 and steps_of(tmp_path / "one") == {"1": 5, "2": 3}
    assert float(metrics(tmp_path / "one")[-1]["train/pairs_seen"]) == 18 + 12


def test_the_bound_on_kl_ends_a_stage(tmp_path, tiny_model_dir, sources):
    """The estimate, by hand from the logps that `predict` gives, is above the bound where the stage ended."""
    args = {"module_args": {"optimizer": adamw(1e-2), "lr_scheduler": "constant", "warmup_ratio": 0.0}}
    trainer, module = run(tmp_path, tiny_model_dir, sources[:1], StopRule(max_kl=0.5), **args)
    steps = Ledger.read(tmp_path).stages[0].end.epoch_steps
    assert 1 <= steps[0] < 5 and "above 0.5" in Ledger.read(tmp_path).stages[0].end.reason
    data, distances = trainer.datamodule, []
    for batch in data.val_dataloader()[0]:
        policy, reference = module.score(module.policy, batch), module.reference.logps(batch)
        for ours, theirs in ((policy.chosen, reference.chosen), (policy.rejected, reference.rejected)):
            distances += [d for d, w in zip(((ours - theirs) ** 2 / 2).tolist(), batch.weights, strict=True) if w > 0]
    # 3 held-out pairs, two completions each.
    kl = sum(distances) / 6
    assert len(distances) == 6 and kl > 0.5
    assert f"KL {kl:.3g}" in Ledger.read(tmp_path).stages[0].end.reason.replace(f"{kl:.4g}", f"{kl:.3g}")


def test_an_end_by_max_steps_is_no_end_of_the_stage(tmp_path, tiny_model_dir, sources, caplog):
    rule = StopRule(patience=2, min_delta=NEVER)
    run(tmp_path / "whole", tiny_model_dir, sources, rule)
    cut = tmp_path / "cut"
    # Step 2 of 3 of stage 1, then step 2 of stage 2.
    for steps, statuses in ((2, ["open"]), (5, ["done", "open"])):
        checkpoint = next((cut / "checkpoints").glob("*.ckpt"), None) if cut.exists() else None
        limit = {"max_steps": steps}
        run(cut, tiny_model_dir, sources, rule, ckpt_path=checkpoint, trainer_args=limit)
        assert [stage.status for stage in Ledger.read(cut).stages] == statuses
        assert len(list(cut.glob("stages/*"))) == len(statuses) - 1
        assert f"stopped inside stage {len(statuses)}" in caplog.text
    [checkpoint] = (cut / "checkpoints").glob("*.ckpt")
    assert torch.load(checkpoint, weights_only=True)["CurriculumDataModule"]["ends"].keys() == {1}
    for other in (None, StopRule(patience=3, min_delta=NEVER)):
        with pytest.raises(ResumeError, match="StageTransition.stop"):
            run(cut, tiny_model_dir, sources, other, ckpt_path=checkpoint)
    run(cut, tiny_model_dir, sources, rule, ckpt_path=checkpoint)
    assert reproducible(cut) == reproducible(tmp_path / "whole")
    assert Ledger.read(cut).stages == Ledger.read(tmp_path / "whole").stages
    for folder in ("01-a", "02-b"):
        assert_same_weights(tmp_path / "whole" / "stages" / folder, cut / "stages" / folder)


def test_a_fork_from_a_run_with_a_stop(tmp_path, tiny_model_dir, sources):
    rule, parent = StopRule(patience=2, min_delta=NEVER), tmp_path / "parent"
    run(parent, tiny_model_dir, sources, rule)

    def forked(*args, **kwargs):
        module = DPOLitModule(*args, **kwargs)
        module.fork = Fork(str(parent), 2)
        return module

    trainer, _ = run(tmp_path / "fork", tiny_model_dir, sources, rule, module_class=forked)
    assert_same_weights(parent / "stages" / "02-b", tmp_path / "fork" / "stages" / "02-b")
    # Steps, pairs and all go on from the parent's 3 steps, not from the 5 that were planned.
    later = [row for row in reproducible(parent) if row["stage/index"] == "2"]
    assert reproducible(tmp_path / "fork") == later and later[0]["step"] == "4" and trainer.global_step == 6
    ours, theirs = Ledger.read(tmp_path / "fork"), Ledger.read(parent)
    assert [stage.end for stage in ours.stages] == [stage.end for stage in theirs.stages]
    # Without a rule stage 2 of the fork runs to its plan's end: 7 steps after those 3.
    trainer, _ = run(tmp_path / "plain", tiny_model_dir, sources, None, module_class=forked)
    assert trainer.global_step == 3 + 7 and Ledger.read(tmp_path / "plain").stages[1].end is None


@pytest.mark.parametrize(
    "change, text",
    [
        ({"trainer_args": {"limit_val_batches": 0}}, "there are none: set `data.val_fraction`"),
        ({"every": 1.0}, "the only one is at its end: set `trainer.val_check_interval`"),
        ({"every": "00:00:01:00"}, "where a stage ends would depend on the machine"),
        ({"stop": StopRule(monitor="val_loss", patience=1)}, "there is no val_loss after a validation; logged are"),
    ],
)
def test_what_is_refused(tmp_path, tiny_model_dir, sources, change, text):
    stop = change.get("stop", StopRule(patience=1))
    more = {key: value for key, value in change.items() if key != "stop"}
    with pytest.raises(ConfigurationError, match=text):
        run(tmp_path, tiny_model_dir, sources, stop, **more)


def test_a_stage_without_held_out_pairs_is_refused(tmp_path, tiny_model_dir, sources):
    bare = [sources[0], PreferenceSource("bare", sources[1].path)]
    with pytest.raises(ConfigurationError, match="held-out pairs of stage 'bare', which has none"):
        run(tmp_path, tiny_model_dir, bare, StopRule(patience=1))
    assert not (tmp_path / "stages").exists()


# ---- the command line


@pytest.fixture
def words(tmp_path, tiny_model_dir, sources):
    listed = [{"name": source.name, "path": source.path, "val_path": source.val_path} for source in sources]
    return [
        f"--trainer.default_root_dir={tmp_path / 'run'}", "--trainer.accelerator=cpu", "--data.order=given",
        "--trainer.enable_progress_bar=false", f"--model.model_name_or_path={tiny_model_dir}",
        f"--data.sources={json.dumps(listed)}", "--data.max_length=64", "--data.batch_size=2",
        "--data.on_val_overlap=warn", "--trainer.val_check_interval=1",
    ]


def transition(stop=None, stage_weights=None):
    arguments = {"stop": stop, "stage_weights": stage_weights}
    return "--trainer.callbacks+=" + json.dumps(
        {"class_path": "sdpo_lightning.StageTransition", "init_args": {k: v for k, v in arguments.items() if v}}
    )


def test_check_says_how_each_stage_is_judged_and_fit_does_so(tmp_path, words, capsys):
    samples = '--trainer.callbacks+={"class_path": "sdpo_lightning.StageSamples", "init_args": {"prompts": []}}'
    best = {"class_path": "sdpo_lightning.BestOfStage", "init_args": {"monitor": "val/b/loss"}}
    given = transition({"patience": 2, "min_delta": 100.0, "max_kl": 50}, best)
    main(["check", *words, given])
    lines = capsys.readouterr().out.splitlines()
    judged = "is no better by more than 100 in 2 validations (min) or KL to the reference on held-out completions is"
    for index, name in ((1, "a"), (2, "b")):
        assert f"stage {index} {name!r}: ends before its plan where val/{name}/loss {judged} above 50" in lines
        assert f"stage {index} {name!r}: M_{index} is its weights with the lowest val/b/loss" in lines
    main(["fit", *words, given, samples])
    assert [stage.end.epoch_steps for stage in Ledger.read(tmp_path / "run").stages] == [(3,), (3,)]


@pytest.mark.parametrize(
    "stop, more, text",
    [
        ({"patience": 0}, [], "`patience` is 0, expected at least 1"),
        ({"patience": 1}, ["--trainer.val_check_interval=1.0"], "set `trainer.val_check_interval`"),
        ({"patience": 1}, ["--trainer.limit_val_batches=0"], "there are none"),
    ],
)
def test_check_finds_what_fit_would_refuse(words, stop, more, text, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["check", *words, transition(stop), *more])
    assert ended.value.code == 2
    assert text in capsys.readouterr().err


def test_the_snippets_of_the_docs_are_read(tmp_path, words, capsys):
    text = (Path(__file__).parent.parent / "docs" / "curriculum.md").read_text()
    snippets = [yaml.safe_load(part) for part in re.findall(r"```yaml\n(.*?)```", text, re.S)]
    own = [snippet for snippet in snippets if "data" not in snippet]
    assert len(own) == 3
    for number, snippet in enumerate(own):
        # Its sources are called otherwise.
        path = tmp_path / f"{number}.yaml"
        path.write_text(yaml.safe_dump(snippet).replace("pandalm", "b"))
        main(["check", f"--config={path}", *words])
        lines = capsys.readouterr().out.splitlines()
        said = (
            "stage 2 'b': loss HingeLoss",
            "stage 1 'a': ends before its plan where val/a/loss is no better by more than 0.001 in 3 validations",
            "stage 1 'a': M_1 is its weights with the highest val/a/rewards/accuracies",
        )[number]
        assert any(line.startswith(said) for line in lines), lines
