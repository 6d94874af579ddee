"""The card of M_t, the lines that use it, and the opt-in push."""

import logging

import pytest
from helpers import make_rows, write_jsonl
from huggingface_hub import ModelCard
from runs import fit, metrics

from sdpo_lightning import PreferenceSource, StageCheckpoint, StageExport, export
from sdpo_lightning.card import CardFacts, CardSource, model_card, stage_metrics, use_lines
from sdpo_lightning.ledger import Ledger

FACTS = CardFacts(
    index=1,
    num_stages=2,
    stage="a",
    pairs=7,
    data_digest="d" * 64,
    base="org/sft",
    base_is_hub=True,
    base_digest="0" * 64,
    digest="1" * 64,
    reference="S",
    reference_digest="0" * 64,
    is_adapter=False,
    sources=[CardSource("a", "org/pairs", True), CardSource("b", "b.jsonl", False)],
    settings={"model.beta": 0.1},
    metrics={"val/a/rewards/accuracies": "0.5"},
    versions={"torch": "2"},
)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    paths = {name: write_jsonl(folder / f"{name}.jsonl", make_rows(8, 0, name)) for name in ("a", "b")}
    return [PreferenceSource(name, str(path)) for name, path in paths.items()]


def test_what_a_card_says():
    card = ModelCard(model_card(FACTS))
    expected = {"base_model": "org/sft", "datasets": ["org/pairs"], "library_name": "transformers"}
    assert expected.items() <= card.data.to_dict().items()
    for text in ("M_1 of 2", "`" + "d" * 64 + "`", "S, weights' sha256 `" + "0" * 64, "arXiv:2403.19270", "0.5000"):
        assert text in card.text
    assert "- `model.beta`: 0.1" in card.text
    assert "ended before its plan" not in card.text


def test_a_secret_is_hidden():
    leaking = model_card(CardFacts(**vars(FACTS) | {"settings": {"url": "https://me:hunter2secret@host/x"}}))
    assert "hunter2secret" not in leaking and "***" in leaking


def test_lines_of_use():
    assert use_lines("m", "s", False)[0] == "vllm serve m --dtype bfloat16"
    assert use_lines("x/m", "s", True) == [
        "vllm serve s --enable-lora --lora-modules m=x/m",
        "lm_eval --model hf --model_args pretrained=s,peft=x/m,dtype=bfloat16 --tasks arc_challenge",
    ]


def test_metrics_are_the_stage_s_last(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("step,stage/index,train/loss,val/a/loss,train/lr\n1,1,0.7,,1\n2,1,0.6,0.5,1\n3,1,0.4,,1\n4,2,0.1,0.1,1\n")
    assert stage_metrics(path, 1) == {"train/loss": "0.4", "val/a/loss": "0.5"}
    assert stage_metrics(tmp_path / "none.csv", 1) == {}


def test_cards_of_a_run(tmp_path, tiny_model_dir, sources, caplog):
    caplog.set_level(logging.INFO)
    fit(tmp_path / "run", tiny_model_dir, sources, val_fraction=0.25)
    ledger = Ledger.read(tmp_path / "run")
    last = {row["stage/index"]: row for row in metrics(tmp_path / "run")}
    for stage in ledger.stages:
        card = ModelCard.load(tmp_path / "run" / stage.output.folder / "README.md")
        loss = f"{float(last[str(stage.index)]['train/loss']):.4f}"
        for text in (stage.output.sha256, stage.reference.sha256, stage.data, loss):
            assert text in card.text
        assert f"| reference | {'S' if stage.index == 1 else 'M_1'}," in card.text
        # A path of the machine is nobody's business.
        assert str(tmp_path) not in card.text and str(tiny_model_dir) not in card.text
    assert sum("vllm serve" in record.getMessage() for record in caplog.records) == 1


def test_a_card_made_again_is_the_same(tmp_path, tiny_model_dir, sources):
    each = [StageCheckpoint(every_n_train_steps=1, save_top_k=-1)]
    fit(tmp_path / "run", tiny_model_dir, sources, callbacks=each, trainer_args={"max_steps": 5})
    card = tmp_path / "run" / "stages" / "01-a" / "README.md"
    written = card.read_bytes()
    # Of stage 1: M_1 is exported again.
    fit(tmp_path / "run", tiny_model_dir, sources, tmp_path / "run" / "checkpoints" / "epoch=0-step=2.ckpt")
    assert (tmp_path / "run" / "stale" / "01-a").is_dir()
    assert card.read_bytes() == written


class Hub:
    """Stands for `HfApi`."""

    calls: list = []

    def create_repo(self, name, private, exist_ok):
        self.calls.append((name, private))

    def upload_folder(self, repo_id, folder_path):
        self.calls.append((repo_id, folder_path.name))


class Unauthorized(Hub):
    """401."""

    def create_repo(self, name, private, exist_ok):
        raise OSError("401 Client Error: hf_abcdefghijklmnopqrstuvwx")


def test_a_push_is_private(tmp_path, tiny_model_dir, sources, monkeypatch):
    monkeypatch.setattr(Hub, "calls", [])
    monkeypatch.setattr(export, "HfApi", Hub)
    fit(tmp_path / "run", tiny_model_dir, sources, callbacks=[StageExport(push_to_hub="me/model")])
    names = ["me/model-01-a", "me/model-02-b"]
    assert Hub.calls == [call for name in names for call in ((name, True), (name, name[-4:]))]


def test_a_failing_push_ends_nothing(tmp_path, tiny_model_dir, sources, monkeypatch, caplog):
    monkeypatch.setattr(export, "HfApi", Unauthorized)
    fit(tmp_path / "run", tiny_model_dir, sources, callbacks=[StageExport(push_to_hub="me/model")])
    assert [stage.status for stage in Ledger.read(tmp_path / "run").stages] == ["done", "done"]
    assert sum("wasn't pushed to the hub: 401" in record.getMessage() for record in caplog.records) == 2


def test_nothing_is_pushed_unasked(tmp_path, tiny_model_dir, sources, monkeypatch):
    monkeypatch.setattr(Hub, "calls", [])
    monkeypatch.setattr(export, "HfApi", Hub)
    fit(tmp_path / "run", tiny_model_dir, sources)
    assert Hub.calls == []
