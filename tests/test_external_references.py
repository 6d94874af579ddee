"""A reference that is another model, with the policy's tokenizer or its own: values by hand, resumes, refusals."""

import gc
import json
import shutil
import weakref

import pytest
import torch
from helpers import make_rows, write_jsonl
from runs import assert_same_weights, fit, losses, reproducible
from safetensors.torch import load_file
from templates import tokenizer_of
from test_references import LN2, LORA, check_every_checkpoint, dpo, first_losses, forked, logps_of, sequence_logps
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sdpo_lightning import (
    CachedExternalReference,
    CachedReference,
    DPOLitModule,
    ExternalReference,
    PairLogps,
    PreferenceSource,
)
from sdpo_lightning.cli import main
from sdpo_lightning.data.collate import PairTokenizer
from sdpo_lightning.data.foreign import ForeignRows
from sdpo_lightning.ledger import Ledger
from sdpo_lightning.types import ConfigurationError, ResumeError, SelfCheckError

COUNTS = {"a": 5, "b": 7}
FOREIGN_TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}:{{ m['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant:{% endif %}"
)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    paths = {n: write_jsonl(folder / f"{n}.jsonl", make_rows(c, i, n)) for i, (n, c) in enumerate(COUNTS.items())}
    return [PreferenceSource(name, str(path)) for name, path in paths.items()]


@pytest.fixture(scope="module")
def other(tiny_model_dir, tmp_path_factory):
    """Another model with the policy's tokenizer."""
    folder = tmp_path_factory.mktemp("other") / "model"
    torch.manual_seed(99)
    LlamaForCausalLM(LlamaForCausalLM.from_pretrained(tiny_model_dir).config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """A model that reads characters, with a template and an end of turn of its own."""
    folder = tmp_path_factory.mktemp("foreign") / "model"
    words = ["<end>", "<s>", "<unk>", "<pad>", *"abcdefghijklmnopqrstuvwxyz0123456789 :<>"]
    core = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = Split(Regex("."), "isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<end>", bos_token="<s>", unk_token="<unk>", pad_token="<pad>"
    )
    tokenizer.chat_template = FOREIGN_TEMPLATE
    torch.manual_seed(5)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = LlamaConfig(vocab_size=len(words), initializer_range=0.3, tie_word_embeddings=False, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def table(run_dir):
    """`[P, 2]` logps by pair id."""
    [path] = (run_dir / "references").glob("external-*")
    found = load_file(path)
    return found["pair_id"], torch.stack([found["chosen"], found["rejected"]], 1)


# ---- the policy's tokenizer


def test_it_is_the_other_model_in_every_stage_by_value(tmp_path, tiny_model_dir, other, sources):
    fit(tmp_path, tiny_model_dir, sources, reference=ExternalReference(str(other)), shuffle=False)
    found = first_losses(tmp_path)
    for index, (name, policy) in enumerate((("a", tiny_model_dir), ("b", tmp_path / "stages" / "01-a"))):
        rows = make_rows(COUNTS[name], index, name)[:2]
        assert found[index] == pytest.approx(dpo(logps_of(policy, rows), logps_of(other, rows)), abs=1e-5)
        assert abs(found[index] - LN2) > 1e-3
    ledger = Ledger.read(tmp_path)
    assert {stage.reference.folder for stage in ledger.stages} == {str(other)}
    assert len({stage.reference.sha256 for stage in ledger.stages} | {ledger.stages[0].output.sha256}) == 2


@pytest.mark.parametrize("order", ["given", "easy_to_hard"])
def test_cached_and_resident_agree(tmp_path, tiny_model_dir, other, sources, order):
    args = {"order": order, "val_fraction": 0.2}
    fit(tmp_path / "resident", tiny_model_dir, sources, reference=ExternalReference(str(other)), **args)
    fit(tmp_path / "cached", tiny_model_dir, sources, reference=CachedExternalReference(str(other)), **args)
    assert losses(tmp_path / "cached") == pytest.approx(losses(tmp_path / "resident"), abs=1e-5)


@pytest.mark.parametrize("own_tokenizer", [False, True])
def test_s_as_the_other_model_is_a_cached_reference_bit_for_bit(tmp_path, tiny_model_dir, sources, own_tokenizer):
    """One stage in padded rows: the same batches go through the same weights."""
    tokenizer = str(tiny_model_dir) if own_tokenizer else None
    reference = CachedExternalReference(str(tiny_model_dir), tokenizer)
    args = {"layout": "padded", "val_fraction": 0.3}
    fit(tmp_path / "external", tiny_model_dir, sources[1:], reference=reference, **args)
    fit(tmp_path / "cached", tiny_model_dir, sources[1:], reference=CachedReference(), **args)
    assert reproducible(tmp_path / "external") == reproducible(tmp_path / "cached")
    assert_same_weights(tmp_path / "external" / "stages" / "01-b", tmp_path / "cached" / "stages" / "01-b")
    [path] = (tmp_path / "external" / "references").glob("external-*")
    ours = load_file(path)
    theirs = load_file(tmp_path / "cached" / "references" / "01.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


class Notes(DPOLitModule):
    """Which models are loaded, and whether the first still lives when the second is."""

    seen: list = []
    alive: list = []

    def load_weights(self, model_name_or_path):
        gc.collect()
        self.alive.append([name for name, model in self.seen if model() is not None])
        weights = super().load_weights(model_name_or_path)
        self.seen.append((model_name_or_path, weakref.ref(weights)))
        return weights


def test_it_is_gone_before_the_policy_comes(tmp_path, tiny_model_dir, other, sources):
    Notes.seen, Notes.alive = [], []
    reference = CachedExternalReference(str(other))
    cut = {"trainer_args": {"max_steps": 4}}
    fit(tmp_path, tiny_model_dir, sources, reference=reference, module_class=Notes, **cut)
    assert [name for name, _ in Notes.seen] == [str(other), str(tiny_model_dir)]
    assert Notes.alive == [[], []]
    # Going on needs the table alone.
    Notes.seen, checkpoint = [], tmp_path / "checkpoints" / "stopped-step=4.ckpt"
    fit(tmp_path, tiny_model_dir, sources, checkpoint, CachedExternalReference(str(other)), module_class=Notes)
    assert [name for name, _ in Notes.seen] == [str(tiny_model_dir)]


@pytest.mark.parametrize("kind", ["resident", "cached", "own tokenizer", "adapter"])
def test_resumes_from_every_checkpoint(tmp_path, tiny_model_dir, other, foreign, sources, kind):
    makers = {
        "cached": lambda: CachedExternalReference(str(other)),
        "own tokenizer": lambda: CachedExternalReference(str(foreign), str(foreign)),
    }
    module_args = LORA if kind == "adapter" else {}
    make = makers.get(kind, lambda: ExternalReference(str(other)))
    check_every_checkpoint(tmp_path, tiny_model_dir, sources, make, module_args=module_args)


@pytest.mark.parametrize("kind", [ExternalReference, CachedExternalReference])
def test_a_fork_goes_on_with_it(tmp_path, tiny_model_dir, other, sources, kind):
    fit(tmp_path / "whole", tiny_model_dir, sources, reference=kind(str(other)))
    made = forked(tmp_path / "whole", 2)
    fit(tmp_path / "fork", tiny_model_dir, sources, None, kind(str(other)), module_class=made)
    later = [row for row in reproducible(tmp_path / "whole") if row["stage/index"] != "1"]
    assert reproducible(tmp_path / "fork") == later


def test_a_fork_may_leave_it(tmp_path, tiny_model_dir, other, sources):
    """The ledger's first reference isn't S; the fork begins at M_1, as policy and as reference."""
    fit(tmp_path / "parent", tiny_model_dir, sources, reference=ExternalReference(str(other)))
    fit(tmp_path / "fork", tiny_model_dir, sources, module_class=forked(tmp_path / "parent", 2))
    assert first_losses(tmp_path / "fork") == [pytest.approx(LN2, abs=1e-6)]
    with pytest.raises(ResumeError, match="S has sha .* began with"):
        fit(tmp_path / "no", other, sources, module_class=forked(tmp_path / "parent", 2))


def test_a_refused_run_leaves_the_table_of_another(tmp_path, tiny_model_dir, other, sources):
    fit(tmp_path, tiny_model_dir, sources, reference=CachedExternalReference(str(other)))
    [path] = (tmp_path / "references").glob("external-*")
    before = path.read_bytes()
    with pytest.raises(ConfigurationError, match="holds the models of an earlier run"):
        fit(tmp_path, tiny_model_dir, sources, reference=CachedExternalReference(str(tiny_model_dir)))
    assert path.read_bytes() == before


def test_another_model_is_refused_on_resume(tmp_path, tiny_model_dir, other, sources):
    for kind in (ExternalReference, CachedExternalReference):
        run = tmp_path / kind.__name__
        fit(run, tiny_model_dir, sources, reference=kind(str(other)), trainer_args={"max_steps": 4})
        checkpoint = run / "checkpoints" / "stopped-step=4.ckpt"
        with pytest.raises(ResumeError, match="the external reference has sha .* began with"):
            fit(run, tiny_model_dir, sources, checkpoint, kind(str(tiny_model_dir)))


class Moves(ExternalReference):
    """Lets the policy in after all."""

    def advance(self, policy, stage, inputs):
        self._model.load_state_dict(policy.state_dict())


def test_an_external_reference_that_moves_is_noticed(tmp_path, tiny_model_dir, other, sources):
    with pytest.raises(SelfCheckError, match="stage 1.*the reference has sha .*, the external model has"):
        fit(tmp_path, tiny_model_dir, sources, reference=Moves(str(other)))


def test_quantised_it_scores_nearly_the_same(tmp_path, tiny_model_dir, other, sources):
    pytest.importorskip("bitsandbytes")
    plain, quantised = CachedExternalReference(str(other)), CachedExternalReference(str(other), quantization="nf4")
    for name, reference in (("plain", plain), ("nf4", quantised)):
        fit(tmp_path / name, tiny_model_dir, sources, reference=reference, trainer_args={"max_steps": 1})
    (ids, ours), (same, theirs) = table(tmp_path / "nf4"), table(tmp_path / "plain")
    relative = ((ours - theirs).abs() / theirs.abs()).max().item()
    assert torch.equal(ids, same) and 1e-4 < relative < 0.5


# ---- a tokenizer of its own


def test_two_tokenizers_score_the_same_text(tmp_path, tiny_model_dir, foreign, sources):
    reference = CachedExternalReference(str(foreign), str(foreign))
    fit(tmp_path, tiny_model_dir, sources, reference=reference, shuffle=False, val_fraction=0.3)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(foreign), AutoTokenizer.from_pretrained(foreign)
    ids, found = table(tmp_path)
    expected = []
    for index, (name, count) in enumerate(COUNTS.items()):
        with torch.no_grad():
            expected.append(sequence_logps(model, tokenizer, make_rows(count, index, name)))
    # Held-out pairs are scored as well.
    assert ids.tolist() == [index << 40 | row for index, count in enumerate(COUNTS.values()) for row in range(count)]
    assert torch.allclose(found, torch.cat(expected), rtol=1e-5, atol=1e-4)


def messages(rows):
    return [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "chosen": [{"role": "assistant", "content": row["chosen"].strip()}],
            "rejected": [{"role": "assistant", "content": row["rejected"].strip()}],
        }
        for row in rows
    ]


def test_messages_are_rendered_by_its_own_template(tmp_path, tiny_model_dir, foreign):
    rows = messages(make_rows(4, 0, "a"))
    source = PreferenceSource("a", str(write_jsonl(tmp_path / "a.jsonl", rows)))
    reference = CachedExternalReference(str(foreign), str(foreign))
    fit(tmp_path / "run", tiny_model_dir, [source], reference=reference, trainer_args={"max_steps": 1})
    model, tokenizer = AutoModelForCausalLM.from_pretrained(foreign), AutoTokenizer.from_pretrained(foreign)
    expected = []
    for row in rows:
        prompt = f"<s>user:{row['prompt'][0]['content']}<end><s>assistant:"
        start = len(tokenizer(prompt)["input_ids"])
        for side in ("chosen", "rejected"):
            # The end of the turn once.
            ids = tokenizer(f"{prompt}{row[side][0]['content']}<end>", return_tensors="pt")["input_ids"]
            with torch.no_grad():
                logps = model(ids).logits.log_softmax(-1)
            expected.append(logps[0, start - 1 : -1].gather(1, ids[0, start:, None]).sum())
    _, found = table(tmp_path / "run")
    assert torch.allclose(found, torch.stack(expected).view(-1, 2), rtol=1e-5, atol=1e-4)


def test_calls_and_thoughts_reach_its_template(tmp_path):
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    row = {
        "prompt": [{"role": "user", "content": "1 + 1?"}],
        "chosen": [{"role": "assistant", "content": "", "tool_calls": [call]}],
        "rejected": [{"role": "assistant", "content": "it is 3", "reasoning_content": "hm"}],
    }
    source = PreferenceSource("a", str(write_jsonl(tmp_path / "a.jsonl", [row])))
    theirs = tokenizer_of("qwen3")
    [pair] = ForeignRows([source], "drop", theirs, "foreign", None, "<eos>").store([0]).get([0])
    expected = PairTokenizer(theirs, 999)(*(row[side] for side in ("prompt", "chosen", "rejected")))
    assert (pair.chosen_ids, pair.rejected_ids) == (expected.chosen_ids, expected.rejected_ids)
    assert '"arguments": {"a": 1}' in theirs.decode(pair.chosen_ids) and "hm" in theirs.decode(pair.rejected_ids)


def test_each_side_ends_once_in_its_own_way(tmp_path, tiny_tokenizer, foreign):
    rows = [
        {"prompt": "w1 w2", "chosen": " w3 <eos>", "rejected": " w4"},
        {"prompt": "w1 w2", "chosen": " w5", "rejected": " w6 <eos>"},
    ]
    source = PreferenceSource("a", str(write_jsonl(tmp_path / "a.jsonl", rows)))
    theirs = AutoTokenizer.from_pretrained(foreign)
    foreign_rows = ForeignRows([source], "drop", theirs, "foreign", None, tiny_tokenizer.eos_token)
    ours = PairTokenizer(tiny_tokenizer, 64)
    for row, pair in zip(rows, foreign_rows.store([0, 1]).get([0, 1]), strict=True):
        own = ours(row["prompt"], row["chosen"], row["rejected"])
        for ids in (own.chosen_ids, own.rejected_ids):
            assert ids.count(tiny_tokenizer.eos_token_id) == 1 and ids[-1] == tiny_tokenizer.eos_token_id
        for ids, text in ((pair.chosen_ids, row["chosen"]), (pair.rejected_ids, row["rejected"])):
            assert ids.count(theirs.eos_token_id) == 1 and ids[-1] == theirs.eos_token_id
            assert theirs.decode(ids[:-1]).replace(" ", "") == text.removesuffix("<eos>").replace(" ", "")


def test_lengths_are_the_policys(tmp_path, tiny_model_dir, foreign, sources):
    reference = CachedExternalReference(str(foreign), str(foreign))
    _, module = fit(tmp_path, tiny_model_dir, sources, reference=reference, trainer_args={"max_steps": 1})
    [path] = (tmp_path / "references").glob("external-*")
    found, data = load_file(path), module.trainer.datamodule
    lengths = torch.from_numpy(data.store.lengths(found["pair_id"].tolist())[1:])
    assert torch.equal(torch.stack([found["chosen_lengths"], found["rejected_lengths"]]), lengths)


# ---- refusals, all before weights load


class ReadsNoWeights(DPOLitModule):
    """The refusals come before."""

    def load_weights(self, model_name_or_path):
        raise AssertionError("weights were loaded")


class PerToken(ReadsNoWeights):
    """Logps a token."""

    def compute_logps(self, model, batch):
        logps = super().compute_logps(model, batch)
        return PairLogps(logps.chosen / 2, logps.rejected / 2, logps.chosen_lengths, logps.rejected_lengths)


@pytest.mark.parametrize(
    "make, module_class, data, message",
    [
        # `<unk>` alone has id 2 in both.
        (lambda f: ExternalReference(f), ReadsNoWeights, {}, "66 of the policy's 67 tokens.*`tokenizer: .*model`"),
        (lambda f: CachedExternalReference(f), ReadsNoWeights, {}, "tokens have other ids or none"),
        (lambda f: CachedExternalReference(f, f), PerToken, {}, "needs logps of tokens or per token"),
        (lambda f: CachedExternalReference(f, f), ReadsNoWeights, {"max_length": 8}, "`data.max_length` cuts .*'a'"),
        (
            lambda f: CachedExternalReference(f, f, 30),
            ReadsNoWeights,
            {},
            "of the 12 pairs .* longer than its `max_length` of 30; raise `model.reference.init_args.max_length`",
        ),
    ],
)
def test_refused_before_weights_load(tmp_path, tiny_model_dir, foreign, sources, make, module_class, data, message):
    with pytest.raises(ConfigurationError, match=message):
        fit(tmp_path, tiny_model_dir, sources, reference=make(str(foreign)), module_class=module_class, **data)


def test_a_length_without_a_tokenizer_and_a_tokenizer_that_is_not_there(tmp_path, tiny_model_dir, sources):
    with pytest.raises(ConfigurationError, match="`max_length` of CachedExternalReference is 9 without"):
        CachedExternalReference("x", max_length=9)
    bare = tmp_path / "bare"
    shutil.copytree(tiny_model_dir, bare, ignore=shutil.ignore_patterns("tokenizer*", "special*", "chat*"))
    with pytest.raises(ConfigurationError, match="no tokenizer at .*bare' to compare"):
        fit(tmp_path / "run", tiny_model_dir, sources, reference=ExternalReference(str(bare)))


def test_a_rendered_dialogue_without_a_template_is_refused(tmp_path, tiny_model_dir, foreign):
    bare = tmp_path / "bare"
    shutil.copytree(foreign, bare)
    (bare / "chat_template.jinja").unlink()
    source = PreferenceSource("a", str(write_jsonl(tmp_path / "a.jsonl", messages(make_rows(4, 0, "a")))))
    with pytest.raises(ConfigurationError, match="'a' is conversational.* has no chat template"):
        fit(tmp_path / "run", tiny_model_dir, [source], reference=CachedExternalReference(str(bare), str(bare)))


# ---- the command line


def test_by_command_line_and_again(tmp_path, tiny_model_dir, foreign, sources, capsys):
    words = ["fit", f"--trainer.default_root_dir={tmp_path}", "--trainer.accelerator=cpu"]
    words += ["--trainer.enable_progress_bar=false", f"--model.model_name_or_path={tiny_model_dir}"]
    words += ["--model.reference=sdpo_lightning.CachedExternalReference"]
    words += [f"--model.reference.model_name_or_path={foreign}", f"--model.reference.tokenizer={foreign}"]
    listed = [{"name": source.name, "path": source.path} for source in sources]
    words += [f"--data.sources={json.dumps(listed)}", "--data.order=given", "--data.batch_size=2"]
    main([*words, "--trainer.max_steps=4"])
    main(words)
    assert "going on from" in capsys.readouterr().out
    # 5 and 7 pairs by 2.
    assert len(losses(tmp_path)) == 3 + 4
