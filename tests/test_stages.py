"""The oracle: one run of T stages == T chained single-stage runs, and the first loss of each stage is ln 2."""

import json
import math
from unittest import mock

import lightning.pytorch as pl
import pytest
import torch
from helpers import make_rows, write_jsonl
from lightning.pytorch.callbacks import timer
from runs import assert_same_weights, fit, losses, metrics, weights
from transformers import AutoModelForCausalLM, AutoTokenizer

from sdpo_lightning import CachedReference, PreferenceSource, ResidentReference, StageTransition
from sdpo_lightning.types import SelfCheckError


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    found = []
    for seed, (name, count) in enumerate((("a", 7), ("b", 12), ("c", 5))):
        path = folder / f"{name}.jsonl"
        write_jsonl(path, make_rows(count, seed, name))
        found.append(PreferenceSource(name, str(path)))
    return found


@pytest.mark.parametrize("shuffle", [False, True])
def test_one_run_equals_chained_runs_bit_for_bit(tmp_path, tiny_model_dir, sources, shuffle):
    epochs = {"b": 2, "*": 1}
    fit(tmp_path / "one", tiny_model_dir, sources, shuffle=shuffle, epochs_per_stage=epochs)
    start, chained = tiny_model_dir, []
    for index, source in enumerate(sources, 1):
        run_dir = tmp_path / f"chain-{index}"
        fit(run_dir, start, [source], shuffle=shuffle, epochs_per_stage=epochs.get(source.name, 1))
        start = run_dir / "stages" / f"01-{source.name}"
        chained += losses(run_dir)
        assert_same_weights(tmp_path / "one" / "stages" / f"0{index}-{source.name}", start)
    # 7, 12 and 5 pairs by 2: 4 + 2 * 6 + 3 steps.
    assert len(chained) == 19
    assert losses(tmp_path / "one") == chained


@pytest.mark.parametrize("reference, tolerance", [(ResidentReference, 1e-6), (CachedReference, 1e-5)])
def test_first_loss_of_each_stage_is_ln2(tmp_path, tiny_model_dir, sources, reference, tolerance):
    fit(tmp_path, tiny_model_dir, sources, reference=reference())
    first = {}
    for row in metrics(tmp_path):
        first.setdefault(row["stage/index"], float(row["train/loss"]))
    assert list(first) == ["1", "2", "3"]
    for loss in first.values():
        assert loss == pytest.approx(math.log(2), abs=tolerance)


@pytest.mark.parametrize("reference, tolerance", [(ResidentReference, 1e-6), (CachedReference, 1e-2)])
def test_bf16_mixed_starts_at_ln2_and_keeps_fp32_weights(tmp_path, tiny_model_dir, sources, reference, tolerance):
    _, module = fit(
        tmp_path, tiny_model_dir, sources, reference=reference(), trainer_args={"precision": "bf16-mixed"}
    )
    first = {}
    for row in metrics(tmp_path):
        first.setdefault(row["stage/index"], float(row["train/loss"]))
    assert list(first.values()) == pytest.approx([math.log(2)] * 3, abs=tolerance)
    assert {p.dtype for p in module.policy.parameters()} == {torch.float32}
    assert {t.dtype for t in weights(tmp_path / "stages" / "03-c").values()} == {torch.float32}


def test_cached_and_resident_losses_agree(tmp_path, tiny_model_dir, sources):
    for name, reference in (("cached", CachedReference()), ("resident", ResidentReference())):
        fit(tmp_path / name, tiny_model_dir, sources, reference=reference)
    cached, resident = losses(tmp_path / "cached"), losses(tmp_path / "resident")
    assert len(cached) == len(resident) == 4 + 6 + 3
    # Not all ln 2, or this would compare constants.
    assert max(abs(loss - math.log(2)) for loss in resident) > 1e-3
    assert cached == pytest.approx(resident, abs=1e-5)


class StaysBehind(ResidentReference):
    """Forgets to advance after stage 1."""

    def advance(self, policy, stage, inputs):
        if stage.index == 1:
            super().advance(policy, stage, inputs)


class StaysBehindWithoutDigest(StaysBehind):
    """As above, and no digest gives it away: the logps must."""

    def digest(self):
        return None


@pytest.mark.parametrize("reference", [StaysBehind, StaysBehindWithoutDigest])
def test_self_check_stops_a_stale_reference(tmp_path, tiny_model_dir, sources, reference):
    # 5e-7 is the smallest learning rate of the shipped configs.
    arguments = {"optimizer": _shipped_optimizer, "warmup_ratio": 0.0, "lr_scheduler": "constant"}
    with pytest.raises(SelfCheckError, match="stage 2"):
        fit(tmp_path, tiny_model_dir, sources, reference=reference(), module_args=arguments)
    assert not (tmp_path / "stages" / "02-b").exists()


def _shipped_optimizer(params):
    return torch.optim.AdamW(params, lr=5e-7, weight_decay=0.0)


class LoadsSftTwice(StageTransition):
    """Between export and self-check, S lands in the policy; the reference then copies it."""

    def should_advance(self, trainer, stage):
        model = trainer.lightning_module
        s = model.load_weights(model.model_name_or_path)
        model.policy.load_state_dict(s.state_dict())
        return True


def test_self_check_notices_s_in_policy_and_reference(tmp_path, tiny_model_dir, sources):
    with pytest.raises(SelfCheckError, match="the policy is not M_1"):
        fit(tmp_path, tiny_model_dir, sources, callbacks=[LoadsSftTwice()])


def test_what_a_run_leaves(tmp_path, tiny_model_dir, sources):
    trainer, _ = fit(tmp_path, tiny_model_dir, sources, order="easy_to_hard", val_fraction=0.2)
    curriculum = json.loads((tmp_path / "curriculum.json").read_text())
    order = curriculum["order"]
    assert sorted(order) == ["a", "b", "c"]
    accuracy = {s["name"]: s["reward_accuracy"] for s in curriculum["sources"]}
    assert [accuracy[n] for n in order] == sorted(accuracy.values(), reverse=True)
    assert [stage["index"] for stage in curriculum["stages"]] == [1, 2, 3]
    for index, name in enumerate(order, 1):
        folder = tmp_path / "stages" / f"0{index}-{name}"
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert model.config.model_type == "llama"
        assert AutoTokenizer.from_pretrained(folder).chat_template is not None
        assert (folder / "generation_config.json").exists()
    rows = metrics(tmp_path)
    assert len(rows) == trainer.global_step
    assert float(rows[-1]["train/rewards_m0/margins"]) != 0.0
    # The last step of each stage carries the held-out metrics of its validation.
    validated = [row for row in rows if row["val/a/rewards/accuracies"]]
    assert [row["stage/index"] for row in validated] == ["1", "2", "3"]
    summary = json.loads((tmp_path / "summary.json").read_text())["stages"]
    assert [stage["steps"] for stage in summary] == [stage["steps"] for stage in curriculum["stages"]]
    assert summary[0]["loss_first"] == pytest.approx(math.log(2), abs=1e-6)
    assert list((tmp_path / "checkpoints").glob("*.ckpt"))


class StopsAtSix(pl.Callback):
    """Stops at optimizer step 6, as EarlyStopping does."""

    def on_train_batch_end(self, trainer, *_):
        trainer.should_stop = trainer.global_step >= 6


class JumpsAtSix(pl.Callback):
    """Lets an hour pass at optimizer step 6."""

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 6:
            real = timer.time.monotonic
            self.patch = mock.patch.object(timer.time, "monotonic", lambda: real() + 3600)
            self.patch.start()

    def on_train_end(self, *_):
        self.patch.stop()


@pytest.mark.parametrize(
    "callbacks, arguments",
    [
        ([], {"max_steps": 6}),
        ([JumpsAtSix()], {"max_time": {"minutes": 50}}),
        ([StopsAtSix()], {}),
    ],
    ids=["max_steps", "max_time", "early_stopping"],
)
def test_a_stop_inside_a_stage_exports_nothing_for_it(
    tmp_path, tiny_model_dir, sources, callbacks, arguments, caplog
):
    trainer, _ = fit(tmp_path, tiny_model_dir, sources, callbacks=callbacks, trainer_args=arguments)
    # Stage 1 has 4 steps, so step 6 lies in stage 2.
    assert 6 <= trainer.global_step <= 7
    assert sorted(path.name for path in (tmp_path / "stages").glob("*")) == ["01-a"]
    assert f"inside stage 2 'b' at step {trainer.global_step}" in caplog.text
