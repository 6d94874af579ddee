"""Cases 20 to 30 and 33: bad input ends in a counted drop or in exit 2 before any weights are loaded.

Through the command line unless a case asks for a property. See INPUT.md.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import make_rows, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import losses
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sdpo_lightning import DPOLitModule
from sdpo_lightning.cli import main
from sdpo_lightning.data.collate import PairTokenizer, TokenizedPair
from sdpo_lightning.logprobs import gather_logps
from sdpo_lightning.losses import dpo_loss
from sdpo_lightning.types import ConfigurationError, PairLogps

pytestmark = pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")
RULES = ("drop", "truncate_left", "error")
FEW = settings(max_examples=150, deadline=None, derandomize=True)


def row(prompt="w3 w4", chosen=" w5 w6", rejected=" w7") -> dict:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def chat_row(chosen="w1", rejected="w2", prompt="w5") -> dict:
    turns = {"prompt": ("user", prompt), "chosen": ("assistant", chosen), "rejected": ("assistant", rejected)}
    return {key: [{"role": role, "content": content}] for key, (role, content) in turns.items()}


class Place:
    """A folder with sources, and the commands over them."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model, self.sources = folder, model, []

    def source(self, name: str, rows: list[dict] | bytes, **more) -> Path:
        path = self.folder / f"{name}.jsonl"
        path.write_bytes(rows) if isinstance(rows, bytes) else write_jsonl(path, rows)
        self.sources.append({"name": name, "path": str(path), **more})
        return path

    def words(self, *more: str) -> list[str]:
        return [
            f"--trainer.default_root_dir={self.run}",
            "--trainer.accelerator=cpu",
            "--trainer.enable_progress_bar=false",
            f"--model.model_name_or_path={self.model}",
            f"--data.sources={json.dumps(self.sources)}",
            "--data.max_length=64",
            "--data.order=given",
            *more,
        ]

    @property
    def run(self) -> Path:
        return self.folder / "run"

    def reports(self) -> list[dict]:
        return json.loads((self.run / "curriculum.json").read_text())["sources"]


@pytest.fixture
def place(tmp_path, tiny_model_dir) -> Place:
    return Place(tmp_path, tiny_model_dir)


@pytest.fixture
def refused(capsys, monkeypatch):
    """Run `check` and `fit`, expect the code of both before weights load, and give what they say."""

    def load_weights(self, path):
        raise AssertionError("weights are loaded before the input is checked")

    def expect(place: Place, *more: str, code: int = 2) -> tuple[str, str]:
        said = []
        with monkeypatch.context() as patched:
            patched.setattr(DPOLitModule, "load_weights", load_weights)
            for verb in ("check", "fit"):
                with pytest.raises(SystemExit) as stop:
                    main([verb, *place.words(*more)])
                assert stop.value.code == code, verb
                lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
                assert lines, verb
                said.append("\n".join(lines))
        assert "Traceback" not in "".join(said)
        return said[0], said[1]

    return expect


def checked(place: Place, capsys, *more: str) -> str:
    """What `check` prints where nothing is wrong."""
    capsys.readouterr()
    main(["check", *place.words(*more)])
    printed = capsys.readouterr()
    assert "error:" not in printed.err
    return printed.out


# ---- 20: empty, null, wrong type; files that can't be read

BAD_ROWS = {
    "empty_chosen": [row(chosen=""), row(chosen=" ")],
    "empty_rejected": [row(rejected="\n")],
    "empty_prompt": [row(prompt=" ")],
    "missing_chosen": [row(chosen=None), {"prompt": "w1", "rejected": "w2"}],
    "wrong_type": [row(chosen=["w1"]), row(rejected=3), row(prompt={"a": 1})],
    "not_an_object": [[1, 2]],
    "other_form": [chat_row()],
}


def test_20_bad_rows_are_dropped_by_reason_with_file_and_row(place, capsys, caplog):
    good = make_rows(8, 1)
    bad = [one for rows in BAD_ROWS.values() for one in rows]
    path = place.source("a", [*good, *bad])
    said = checked(place, capsys)
    assert f"{len(good) + len(bad)} rows, 8 pairs to train on" in said
    caplog.clear()
    caplog.set_level("INFO", logger="sdpo_lightning")
    main(["fit", *place.words()])
    # `fit` says it in the same words: counts, shares, reasons, lengths.
    logged = [record.getMessage() for record in caplog.records if record.levelname == "INFO"]
    told = [line for line in logged if line.startswith("source 'a': ") and ("rows," in line or "p50/p95/max" in line)]
    assert len(told) == 2 and all(line in said for line in told)
    [report] = place.reports()
    assert report["pairs"] == 8
    assert report["dropped"] == {reason: len(rows) for reason, rows in BAD_ROWS.items()}
    # Line 9 is the first bad one.
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert any(str(path) in text and "2 empty_chosen (first at 9)" in text for text in warned)
    assert "warning: source 'a'" in said


def test_20_chat_rows_with_wrong_turns_are_dropped(place, capsys):
    extra = chat_row()
    extra["chosen"].append({"role": "user", "content": "w9"})
    empty = chat_row()
    empty["rejected"] = []
    place.source("a", [chat_row(), extra, empty, chat_row(chosen=None)])
    said = checked(place, capsys)
    assert "1 pairs to train on" in said and "1 empty_rejected" in said
    assert "1 wrong_roles" in said and "1 wrong_type" in said


def test_20_strict_runs_stop_at_the_first_bad_row(place, refused):
    path = place.source("a", [row(), row(chosen="")])
    for said in refused(place, "--data.on_bad_row=error"):
        assert f"{path}:2: empty_chosen" in said


@pytest.mark.parametrize(
    "content, expected",
    [
        (b'{"prompt": "\xff"}\n', "UTF-8"),
        (gzip.compress(b"{}" * 99, mtime=0), "invalid_json"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git-LFS"),
        (json.dumps({"prompt": "w1", "chosen": "w2"}).encode(), "unknown column 'rejected'"),
        (b"", "empty"),
    ],
)
def test_20_files_that_cannot_be_read_are_refused(place, refused, content, expected):
    place.source("a", content)
    for said in refused(place):
        assert (expected if content[:1] != b"\x1f" else "source 'a'") in said


def test_20_check_names_every_source_that_is_wrong(place, refused):
    place.source("a", b"")
    place.source("b", [row(chosen="")])
    said, _ = refused(place)
    assert "source 'a'" in said and "source 'b'" in said


# ---- 21: nothing to prefer


def test_21_identical_answers_never_reach_the_loss(place, capsys):
    prompt = " ".join(["w1"] * 61)
    rows = [
        row(),
        row(chosen=" w5", rejected=" w5"),
        # They differ behind the limit only, and by what the tokenizer doesn't see.
        row(prompt, " w5 w6 w7 w8", " w5 w6 w7 w9"),
        row(chosen=" w5  w6", rejected=" w5 w6"),
    ]
    place.source("a", rows)
    assert "4 rows, 1 pairs to train on, 0 held out, 3 dropped (75.0 %): 3 identical" in checked(place, capsys)
    main(["fit", *place.words()])
    [report] = place.reports()
    assert (report["pairs"], report["dropped"]) == (1, {"identical": 3})


# ---- 22: repeats, contradictions, overlap


def test_22_repeats_and_contradictions_are_counted(place, capsys):
    one, two, three = make_rows(3, 5)
    swapped = {"prompt": one["prompt"], "chosen": one["rejected"], "rejected": one["chosen"]}
    place.source("a", [one, one, two, swapped])
    place.source("b", [two, three, swapped])
    said = checked(place, capsys)
    assert "warning: source 'a': 1 of 4 pairs repeat others of it" in said
    assert "warning: source 'a': 1 pairs stand there both ways round" in said
    assert "warning: sources 'a' and 'b' share 2 pairs" in said
    assert "warning: sources 'a' and 'b' contradict each other in 1 pairs" in said
    assert "0 errors, 4 warnings" in said


def test_22_fit_says_the_same(place, caplog):
    one, two = make_rows(2, 5)
    place.source("a", [one, one, two])
    main(["fit", *place.words()])
    assert any("repeat others of it" in record.getMessage() for record in caplog.records)


def test_22_overlap_of_training_and_validation_is_an_error(place, refused, capsys, tmp_path):
    rows = make_rows(6, 5)
    # Another answer to a prompt that is trained on, held out by another source.
    held = write_jsonl(tmp_path / "held.jsonl", [row(rows[2]["prompt"]), row("w9 w9")])
    place.source("a", rows)
    place.source("b", make_rows(4, 6, "b"), val_path=str(held))
    for said in refused(place):
        assert "1 prompts are both trained on and held out (held out by 'b' and trained on in 'a')" in said
        assert "`data.on_val_overlap: warn`" in said
    assert not place.run.exists()
    assert "warning: 1 prompts are both" in checked(place, capsys, "--data.on_val_overlap=warn")
    main(["fit", *place.words("--data.on_val_overlap=warn")])
    assert len(list((place.run / "stages").iterdir())) == 2


def test_22_a_held_out_share_never_overlaps(place, capsys):
    place.source("a", [*make_rows(9, 5), *make_rows(9, 5)])
    place.source("b", make_rows(9, 5))
    assert "both trained on and held out" not in checked(place, capsys, "--data.val_fraction=0.3")


# ---- 23, 24: long prompts, no completions


@pytest.mark.parametrize("length", [64, 128])
def test_23_long_prompts_follow_the_rule(place, refused, capsys, length):
    prompt = " ".join(f"w{n % 50}" for n in range(length))
    place.source("a", [*make_rows(3, 2), row(prompt, " w1 w2 w3", " w4")])
    assert "1 dropped (25.0 %): 1 prompt_too_long" in checked(place, capsys)
    for said in refused(place, "--data.on_long_prompt=error"):
        assert "row 4: prompt_too_long (`data.on_long_prompt: error`)" in said
    words = ["--data.on_long_prompt=truncate_left", "--show=4"]
    said = checked(place, capsys, *words)
    assert "1 pairs (25.0 %) with their prompt cut from the left" in said
    # 64 less the longer completion: three words and EOS.
    kept = " ".join(prompt.split()[-60:])
    assert f"prompt (60 tokens): {kept!r}" in said
    assert "chosen (4 tokens): >>w1 w2 w3 <eos><<" in said and "rejected (2 tokens): >>w4 <eos><<" in said
    main(["fit", *place.words(words[0])])
    [report] = place.reports()
    assert (report["pairs"], report["dropped"], report["marks"]) == (4, {}, {"prompt_cut": 1})


def test_23_another_rule_is_another_plan_on_resume(place, capsys):
    place.source("a", make_rows(8, 2))
    main(["fit", *place.words("--trainer.max_steps=1")])
    [checkpoint] = (place.run / "checkpoints").glob("*.ckpt")
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(["fit", *place.words(f"--ckpt_path={checkpoint}", "--data.on_long_prompt=truncate_left")])
    assert stop.value.code == 3
    assert "data.on_long_prompt: drop -> truncate_left" in capsys.readouterr().err


texts = st.lists(st.integers(3, 12).map(lambda n: f"w{n}"), min_size=1, max_size=12).map(" ".join)


@FEW
@given(text=st.tuples(texts, texts, texts), limit=st.integers(1, 8), rule=st.sampled_from(RULES), chat=st.booleans())
def test_24_every_kept_side_has_a_completion_and_the_same_prompt(tiny_tokenizer, text, limit, rule, chat):
    prompt, chosen, rejected = text
    if limit < 2:
        with pytest.raises(ConfigurationError, match="`data.max_length`"):
            PairTokenizer(tiny_tokenizer, limit, rule)
        return
    given = chat_row(chosen, rejected, prompt) if chat else row(prompt, f" {chosen}", f" {rejected}")
    pair = PairTokenizer(tiny_tokenizer, limit, rule)(*given.values())
    if isinstance(pair, str):
        # A long prompt loses its pair under the other rules only.
        allowed = {"identical"} if rule == "truncate_left" else {"identical", "prompt_too_long"}
        assert pair in allowed
        return
    whole = PairTokenizer(tiny_tokenizer, 1000)(*given.values())
    assert isinstance(whole, TokenizedPair)
    assert pair.prompt_ids and pair.chosen_ids and pair.rejected_ids
    assert len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids)) <= limit
    assert whole.prompt_ids[-len(pair.prompt_ids) :] == pair.prompt_ids
    for cut, full in ((pair.chosen_ids, whole.chosen_ids), (pair.rejected_ids, whole.rejected_ids)):
        assert full[: len(cut)] == cut
        if rule == "truncate_left":
            assert len(cut) >= min(len(full), limit // 2)
    marks = {"prompt_cut": len(pair.prompt_ids) < len(whole.prompt_ids)}
    marks["completion_cut"] = (len(pair.chosen_ids), len(pair.rejected_ids)) != (
        len(whole.chosen_ids),
        len(whole.rejected_ids),
    )
    assert set(pair.marks) == {mark for mark, holds in marks.items() if holds}


# ---- 25: an empty stage


def test_25_a_stage_without_pairs_is_refused(place, refused):
    place.source("a", make_rows(4, 1))
    place.source("x", [row(" ".join(["w1"] * 70))] * 40)
    for said in refused(place):
        assert "stage 2 'x', source 'x': 0 of 40 pairs left (40 prompt_too_long)" in said


def test_25_the_stage_is_named_where_sources_make_stages(place, refused):
    for name in ("a", "b"):
        place.source(name, make_rows(4, 1))
    long, same = row(" ".join(["w1"] * 70)), row("w1", " w2", " w2")
    place.source("x", [long] * 3 + [same] * 2)
    for words, stage in (
        (["--data.stages=[[b],[a,x]]"], "stage 2 'a+x', "),
        (["--data.partition=pooled"], ""),
        (["--data.partition=random"], ""),
    ):
        for said in refused(place, *words):
            assert f"error: {stage}source 'x': 0 of 5 pairs left (2 identical, 3 prompt_too_long)" in said


# ---- 26, 27, 28, 29: tokenizers


def with_tokenizer(model: Path, folder: Path, **attributes) -> Path:
    """A copy of the model whose tokenizer differs."""
    shutil.copytree(model, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for name, value in attributes.items():
        setattr(tokenizer, name, value)
    for file in folder.glob("*template*"):
        file.unlink()
    tokenizer.save_pretrained(folder)
    return folder


def test_26_padding_goes_by_masks_whatever_the_pad_token(place, tmp_path):
    place.source("a", make_rows(8, 1))
    found = []
    model = place.model
    for name, pad in (("own", "<pad>"), ("none", None), ("eos", "<eos>")):
        place.model, place.folder = with_tokenizer(model, tmp_path / name, pad_token=pad), tmp_path / name
        words = ["--data.layout=padded", "--data.pad_to_multiple_of=16", "--model.warmup_ratio=0"]
        main(["fit", *place.words(*words, "--model.optimizer.lr=1e-2")])
        found.append(losses(place.run))
        config = json.loads((place.run / "stages" / "01-a" / "config.json").read_text())
        assert config["vocab_size"] == 67
    assert found[0] == found[1] == found[2] and len(found[0]) == 2
    assert found[0][1] != found[0][0]


@pytest.mark.parametrize("pad", ["<eos>", None])
def test_26_eos_is_scored_once_per_answer(place, tmp_path, capsys, pad):
    place.source("a", [row(chosen=" w5 <eos>", rejected=" w7")])
    place.model = with_tokenizer(place.model, tmp_path / "model", pad_token=pad)
    said = checked(place, capsys, "--show=1")
    assert "chosen (2 tokens): >>w5 <eos><<" in said and "rejected (2 tokens): >>w7 <eos><<" in said


def test_26_no_eos_is_refused(place, refused, tmp_path):
    place.source("a", make_rows(4, 1))
    place.model = with_tokenizer(place.model, tmp_path / "model", eos_token=None)
    for said in refused(place):
        assert "no EOS token" in said and "`data.tokenizer`" in said


def test_27_chat_without_a_template_is_refused(place, refused, tmp_path):
    place.source("a", [chat_row()])
    place.model = with_tokenizer(place.model, tmp_path / "model", chat_template=None)
    for said in refused(place):
        assert "no chat template" in said


def test_27_another_template_on_resume_is_refused(place, tmp_path, tiny_tokenizer, capsys):
    place.source("a", [chat_row(prompt=f"w{n}") for n in range(8)])
    main(["fit", *place.words("--trainer.max_steps=1")])
    [checkpoint] = (place.run / "checkpoints").glob("*.ckpt")
    edited = tiny_tokenizer.chat_template.replace("<start> {{", "<start> w9 {{")
    changed = with_tokenizer(place.model, tmp_path / "changed", chat_template=edited)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(["fit", *place.words(f"--ckpt_path={checkpoint}", f"--data.tokenizer={changed}")])
    assert stop.value.code == 3
    assert "tokenised rows" in capsys.readouterr().err


def test_28_a_tokenizer_beyond_the_embedding_is_refused(place, refused, tmp_path):
    place.source("a", make_rows(4, 1))
    tokenizer = AutoTokenizer.from_pretrained(place.model)
    tokenizer.add_tokens(["w60", "w61"])
    tokenizer.save_pretrained(tmp_path / "larger")
    for said in refused(place, f"--data.tokenizer={tmp_path / 'larger'}"):
        assert "ids up to 68" in said and "67 embeddings, expected at least 69" in said


def small_model(folder: Path, tokenizer: PreTrainedTokenizerFast, vocab_size: int) -> Path:
    torch.manual_seed(1)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_28_a_padded_embedding_is_fine(place, tmp_path, tiny_tokenizer, capsys):
    place.source("a", make_rows(4, 1))
    place.model = small_model(tmp_path / "padded", tiny_tokenizer, 128)
    checked(place, capsys)
    main(["fit", *place.words()])
    assert json.loads((place.run / "stages/01-a/config.json").read_text())["vocab_size"] == 128


def test_29_a_prompt_that_merges_with_its_answer_is_counted(place, tmp_path, capsys):
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["</s>"], initial_alphabet=alphabet)
    core.train_from_iterator(["the cat sat", "another cat, another hat"] * 20, trainer)
    place.model = small_model(tmp_path / "bpe", PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>"), 300)
    place.source("a", [row("the anoth", "er cat", "er hat"), row("the cat", " sat", " hat")])
    said = checked(place, capsys, "--show=1")
    assert "1 pairs (50.0 %) whose prompt's last token merges with the completion" in said
    # The token that holds the end of the prompt is scored, on both sides.
    assert "prompt (1 tokens): 'the'" in said
    assert ">> another cat</s><<" in said and ">> another hat</s><<" in said
    main(["fit", *place.words()])
    assert place.reports()[0]["marks"] == {"prompt_merged": 1}


# ---- 30: extreme numbers


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    values=st.lists(st.floats(-1e4, 0, width=32), min_size=4, max_size=4),
    beta=st.sampled_from([0.01, 0.1, 1.0, 10.0]),
    smoothing=st.sampled_from([0.0, 0.1]),
)
def test_30_the_loss_of_extreme_logps_is_that_of_fp64(values, beta, smoothing):
    def loss(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        policy = torch.tensor(values[:2], dtype=dtype, requires_grad=True)
        fixed = torch.tensor(values[2:], dtype=dtype)
        one = torch.ones(1, dtype=torch.long)
        sides = [PairLogps(logps[:1], logps[1:], one, one) for logps in (policy, fixed)]
        value = dpo_loss(*sides, beta, smoothing)
        value.sum().backward()
        return value.detach(), policy.grad

    (single, gradient), (double, exact) = loss(torch.float32), loss(torch.float64)
    assert single.isfinite().all() and gradient.isfinite().all()
    # Logps near 1e4 have an fp32 grid of 1e-3, and beta stretches it.
    torch.testing.assert_close(single.double(), double, rtol=1e-5, atol=beta * 4e-3)
    torch.testing.assert_close(gradient.double(), exact, rtol=1e-2, atol=beta * beta * 4e-3 + 1e-6)


def test_30_eight_thousand_tokens_in_bf16_are_summed_in_fp32():
    torch.manual_seed(0)
    logits = (30 * torch.randn(8192, 50)).bfloat16()
    targets = torch.randint(0, 50, (8192,))
    logps = gather_logps(logits, targets)
    exact = logits.double().log_softmax(-1).gather(1, targets[:, None])[:, 0]
    assert logps.dtype == torch.float32
    assert exact.sum() < -1e5
    torch.testing.assert_close(logps.double().sum(), exact.sum(), rtol=1e-5, atol=0)
    torch.testing.assert_close(logps.sum().double(), exact.sum(), rtol=1e-5, atol=0)


# ---- 33: the hub


def test_33_offline_a_model_in_the_cache_works_and_others_are_refused(place, tmp_path):
    place.source("a", make_rows(4, 1))
    cached = tmp_path / "hub" / "hub" / "models--org--tiny"
    shutil.copytree(place.model, cached / "snapshots" / ("0" * 40))
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0" * 40)
    environment = os.environ | {"HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_HUB_CACHE", None)
    for model, verb, code in (("org/tiny", "fit", 0), ("org/none", "check", 2)):
        place.model = model
        command = [sys.executable, "-m", "sdpo_lightning", verb, *place.words()]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
    assert "error: no tokenizer at 'org/none'" in done.stderr
    assert (place.run / "stages" / "01-a").is_dir()
