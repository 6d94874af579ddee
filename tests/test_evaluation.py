"""`evaluate`: the models of a run, lm-eval on local tasks under the names of the real ones, the table."""

import json
import math
import random
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from helpers import WORDS, make_rows, write_jsonl
from runs import fit
from transformers import AutoModelForCausalLM

from sdpo_lightning import PreferenceSource, evaluation
from sdpo_lightning.cli import main
from sdpo_lightning.evaluation import EQ_BENCH, H4, mean_figure, read_figure
from sdpo_lightning.evaluation_models import find_models
from sdpo_lightning.ledger import Ledger
from sdpo_lightning.types import ConfigurationError, ResumeError

DOCUMENTS, EXAMPLES = 10, 30


@pytest.fixture(scope="module")
def finished_run(tiny_model_dir, tmp_path_factory) -> Path:
    """Two stages; its `config.yaml` names S, as the command line's does."""
    folder = tmp_path_factory.mktemp("evaluated")
    sources = [
        PreferenceSource(name, str(write_jsonl(folder / f"{name}.jsonl", make_rows(4, seed, name))))
        for seed, name in enumerate(("a", "b"))
    ]
    fit(folder / "run", tiny_model_dir, sources)
    (folder / "run" / "config.yaml").write_text(yaml.safe_dump({"model": {"model_name_or_path": str(tiny_model_dir)}}))
    return folder / "run"


@pytest.fixture
def run(finished_run, tmp_path) -> Path:
    return shutil.copytree(finished_run, tmp_path / "run")


# ---- which models


def test_the_models_of_a_run_are_s_and_its_stages(run, tiny_model_dir):
    found, ledger = find_models(run), Ledger.read(run)
    assert [model.label for model in found.models] == ["M_0", "M_1", "M_2"] and found.is_run
    assert [model.folder for model in found.models] == [str(tiny_model_dir), *map(str, sorted(run.glob("stages/*")))]
    assert [model.sha256 for model in found.models] == [ledger.s_sha256, *(s.output.sha256 for s in ledger.stages)]
    assert found.left_out == {}


def test_models_that_are_not_there_are_named_and_altered_ones_refused(run):
    (run / "config.yaml").unlink()
    ledger = Ledger.read(run)
    ledger.stages[1].output, ledger.stages[1].status = None, "open"
    ledger.write(run)
    found = find_models(run)
    assert [model.label for model in found.models] == ["M_1"]
    assert found.left_out == {
        "M_0": "the run has no config.yaml that names S; give `--s`",
        "M_2": "stage 2 'b' isn't done",
    }
    assert [model.label for model in find_models(run, "some/hub-name").models] == ["M_0", "M_1"]
    (next(run.glob("stages/01-*")) / "generation_config.json").write_text("{}")
    with pytest.raises(ResumeError, match="01-a isn't as the run left it"):
        find_models(run)


def test_a_plain_folder_is_one_model_and_an_adapter_has_a_base(tiny_model_dir, tmp_path):
    (model,) = find_models(tiny_model_dir).models
    assert (model.label, model.base) == ("tiny", None)
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "some/base"}')
    assert find_models(tmp_path).models[0].base == "some/base"
    for wrong in (tmp_path / "nothing", tmp_path.parent):
        with pytest.raises(ConfigurationError, match="run directory or a model folder"):
            find_models(wrong)


# ---- figures


def test_the_suites_are_those_of_the_paper():
    assert [(m.task, m.shots, m.metric) for m in H4.measures] == [
        ("arc_challenge", 25, "acc_norm"),
        ("hellaswag", 10, "acc_norm"),
        ("mmlu", 5, "acc"),
        ("truthfulqa_mc2", 0, "acc"),
    ]
    assert H4.mean == "H4" and EQ_BENCH.tasks() == {"eq_bench": 0}


def test_the_mean_and_its_error_by_hand():
    rows = {"ARC": (60, 1.0), "HellaSwag": (80, 2.0), "MMLU": (65, 2.0), "TruthfulQA": (55, 4.0)}
    figures = {label: {"value": v, "standard_error": e} for label, (v, e) in rows.items()}
    # (60 + 80 + 65 + 55) / 4 = 65; sqrt(1 + 4 + 4 + 16) / 4 = 5 / 4.
    assert mean_figure(H4, figures) == (65.0, 1.25)
    figures["ARC"]["standard_error"] = None
    assert mean_figure(H4, figures) == (65.0, None)
    assert mean_figure(H4, {"ARC": figures["ARC"]}) is None and mean_figure(EQ_BENCH, figures) is None


def results(shots: int) -> dict:
    """As lm-eval gives a group of two tasks."""
    return {
        "results": {"mmlu": {"acc,none": 0.5, "acc_stderr,none": 0.1, "alias": "mmlu"}, "a": {}, "b": {}},
        "group_subtasks": {"mmlu": ["inner"], "inner": ["a", "b"], "a": []},
        "n-shot": {"a": shots, "b": shots},
        "n-samples": {"a": {"effective": 7, "original": 9}, "b": {"effective": 5, "original": 5}},
        "versions": {"mmlu": 2},
    }


def test_a_figure_of_a_group_counts_the_documents_of_its_tasks():
    measure = H4.measures[2]
    figure = read_figure(results(5), measure, 4096)
    # 100 x .5 and 100 x .1; 7 + 5 documents.
    assert (figure.value, figure.standard_error, figure.documents, figure.task_version) == (50.0, 10.0, 12, "2")
    with pytest.raises(ConfigurationError, match="ran {'a': 4, 'b': 4} examples in the context, expected 5"):
        read_figure(results(4), measure, 4096)
    found = results(5)
    del found["results"]["mmlu"]["acc,none"]
    with pytest.raises(ConfigurationError, match="has no 'acc'"):
        read_figure(found, measure, 4096)


# ---- the verb


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["evaluate"], "RUN_OR_FOLDER"),
        (["evaluate", "{run}", "--suite", "other"], "invalid choice"),
        (["evaluate", "{run}", "--suite", "h4", "--only", "M_9"], r"\['M_9'\]"),
        (["evaluate", "{run}", "--suite", "h4", "--limit", "0"], "0 is no number from 1 on"),
        (["evaluate", "{run}", "--suite", "mt_bench"], "--questions"),
        (["evaluate", "{run}", "--suite", "mt_bench", "--questions", "q", "--judge_url", "http://h/v1"], "go together"),
    ],
)
def test_what_cannot_be_run_ends_with_2(words, said, run, capsys):
    with pytest.raises(SystemExit) as caught:
        main([word.format(run=run) for word in words])
    assert caught.value.code == 2
    assert re.search(said, capsys.readouterr().err)


def test_without_lm_eval_the_extra_is_named(run, capsys, monkeypatch):
    monkeypatch.setattr(evaluation, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as caught:
        main(["evaluate", str(run), "--suite", "h4"])
    assert caught.value.code == 2 and "pip install 'sdpo-lightning[eval]'" in capsys.readouterr().err


# ---- lm-eval itself, on tasks of the same kinds and names

MULTIPLE_CHOICE = {
    "dataset_path": "json",
    "output_type": "multiple_choice",
    "fewshot_split": "train",
    "test_split": "test",
    "fewshot_config": {"sampler": "first_n"},
    "doc_to_text": "{{question}}",
    "doc_to_target": "gold",
    "doc_to_choice": "choices",
    "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")],
}

SCORING = """
import re

def mc2(doc, results):
    import math
    mass = [math.exp(loglikelihood) for loglikelihood, _ in results]
    return {"acc": mass[doc["gold"]] / sum(mass)}

def first_word(doc, results):
    words = re.findall(r"w\\d+", results[0])
    right = bool(words) and words[0] == doc["answer"]
    return {"eqbench": 100.0 * right, "percent_parseable": 100.0 * bool(words)}
"""


def choices(seed: str, count: int) -> list[dict]:
    draw = random.Random(seed)
    return [
        {
            "question": " ".join(draw.choices(WORDS, k=4)),
            "choices": [" ".join(draw.choices(WORDS, k=k)) for k in (1, 2, 3)],
            "gold": draw.randrange(3),
        }
        for _ in range(count)
    ]


def task(folder: Path, name: str, kind: dict, rows: list[dict], version: float) -> None:
    files = {"test": str(write_jsonl(folder / f"{name}.jsonl", rows))}
    if "fewshot_split" in kind:
        files["train"] = str(write_jsonl(folder / f"{name}-train.jsonl", choices(f"{name}-train", EXAMPLES)))
    content = {"task": name, **kind, "dataset_kwargs": {"data_files": files}, "metadata": {"version": version}}
    # A function is a tag of its own in lm-eval's YAML.
    (folder / f"{name}.yaml").write_text(re.sub(r"'(!function [\w.]+)'", r"\1", yaml.safe_dump(content)))


@pytest.fixture
def task_folder(tmp_path) -> Path:
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "scoring.py").write_text(SCORING)
    task(folder, "arc_challenge", MULTIPLE_CHOICE, choices("arc", DOCUMENTS), 1.5)
    task(folder, "hellaswag", MULTIPLE_CHOICE, choices("hella", DOCUMENTS), 2.5)
    for name, count in (("mmlu_one", 6), ("mmlu_two", 2)):
        task(folder, name, MULTIPLE_CHOICE, choices(name, count), 1.0)
    acc = [{"metric": "acc", "weight_by_size": True}]
    group = {
        "group": "mmlu",
        "task": ["mmlu_one", "mmlu_two"],
        "aggregate_metric_list": acc,
        "metadata": {"version": 4},
    }
    (folder / "mmlu.yaml").write_text(yaml.safe_dump(group))
    mc2 = MULTIPLE_CHOICE | {"process_results": "!function scoring.mc2", "num_fewshot": 0}
    mc2["metric_list"] = MULTIPLE_CHOICE["metric_list"][:1]
    task(folder, "truthfulqa_mc2", mc2, choices("truth", DOCUMENTS), 3.5)
    means = [
        {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("eqbench", "percent_parseable")
    ]
    eq = {
        "dataset_path": "json",
        "output_type": "generate_until",
        "test_split": "test",
        "doc_to_text": "prompt",
        "doc_to_target": "answer",
        "process_results": "!function scoring.first_word",
        "generation_kwargs": {"do_sample": False, "max_gen_toks": 3, "until": ["w59"]},
        "metric_list": means,
    }
    draw = random.Random("eq")
    rows = [{"prompt": " ".join(draw.choices(WORDS, k=3)), "answer": draw.choice(WORDS)} for _ in range(DOCUMENTS)]
    task(folder, "eq_bench", eq, rows, 2.0)
    return folder


def logp(model, tokenizer, context: str, answer: str) -> float:
    """Summed logp of an answer by one plain forward pass."""
    before, after = (tokenizer(text)["input_ids"] for text in (context, f"{context} {answer}"))
    with torch.no_grad():
        logps = model(torch.tensor([after])).logits[0].float().log_softmax(-1)
    return sum(float(logps[place - 1, after[place]]) for place in range(len(before), len(after)))


def by_hand(model, tokenizer, name: str, rows: list[dict], shots: int) -> dict[str, float]:
    """acc, acc_norm (by characters) and the mass of the right choice, as lm-eval's documentation defines them."""
    examples = [f"{row['question']} {row['choices'][row['gold']]}" for row in choices(f"{name}-train", shots)]
    acc = norm = mass = 0.0
    for row in rows:
        context = "\n\n".join([*examples, row["question"]])
        found = [logp(model, tokenizer, context, answer) for answer in row["choices"]]
        by_length = [value / len(answer) for value, answer in zip(found, row["choices"], strict=True)]
        acc += found.index(max(found)) == row["gold"]
        norm += by_length.index(max(by_length)) == row["gold"]
        mass += math.exp(found[row["gold"]]) / sum(map(math.exp, found))
    return {"acc": 100 * acc / len(rows), "acc_norm": 100 * norm / len(rows), "mass": 100 * mass / len(rows)}


@pytest.mark.slow
def test_h4_over_the_models_of_a_run(run, task_folder, tiny_tokenizer, capsys):
    pytest.importorskip("lm_eval")
    words = ["evaluate", str(run), "--suite", "h4", "--task_folder", str(task_folder), "--device", "cpu"]
    main([*words, "--batch_size", "4", "--only", "M_0", "M_2"])
    table = json.loads((run / "evaluation" / "h4.json").read_text())
    for label, folder in (("M_0", find_models(run).models[0].folder), ("M_2", next(run.glob("stages/02-*")))):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        cells = {row["label"]: row for row in table["rows"] if row["model"] == label}
        arc = by_hand(model, tiny_tokenizer, "arc_challenge", choices("arc", DOCUMENTS), 25)["acc_norm"]
        hella = by_hand(model, tiny_tokenizer, "hellaswag", choices("hella", DOCUMENTS), 10)["acc_norm"]
        parts = [
            by_hand(model, tiny_tokenizer, n, choices(n, c), 5)["acc"] for n, c in (("mmlu_one", 6), ("mmlu_two", 2))
        ]
        truth = by_hand(model, tiny_tokenizer, "truthfulqa_mc2", choices("truth", DOCUMENTS), 0)["mass"]
        # MMLU: each document counts the same, 6 and 2 of 8.
        expected = {"ARC": arc, "HellaSwag": hella, "MMLU": (6 * parts[0] + 2 * parts[1]) / 8, "TruthfulQA": truth}
        assert {name: cells[name]["value"] for name in expected} == pytest.approx(expected, abs=1e-3)
        # Of n answers, a share p right: sqrt(p (1 - p) / (n - 1)).
        p = arc / 100
        assert cells["ARC"]["standard_error"] == pytest.approx(100 * math.sqrt(p * (1 - p) / (DOCUMENTS - 1)))
        assert table["means"][label]["value"] == pytest.approx(sum(expected.values()) / 4, abs=1e-3)
        errors = [cells[name]["standard_error"] for name in expected]
        assert table["means"][label]["standard_error"] == pytest.approx(math.sqrt(sum(e**2 for e in errors)) / 4)
        told = {name: (c["shots"], c["metric"], c["documents"], c["task_version"]) for name, c in cells.items()}
        assert told == {
            "ARC": (25, "acc_norm", DOCUMENTS, "1.5"),
            "HellaSwag": (10, "acc_norm", DOCUMENTS, "2.5"),
            "MMLU": (5, "acc", 8, "4"),
            "TruthfulQA": (0, "acc", DOCUMENTS, "3.5"),
        }
    assert table["settings"]["apply_chat_template"] is False and table["versions"]["lm-eval"]
    text = (run / "evaluation" / "h4.md").read_text()
    assert (
        text.splitlines()[0] == "| model | ARC | HellaSwag | MMLU | TruthfulQA | H4 |"
        and text in capsys.readouterr().out
    )
    assert find_models(run).left_out == {}

    # A rerun keeps what is there and runs what isn't; another setting begins a new table.
    loads = []
    from lm_eval.models import huggingface

    class Counted(huggingface.HFLM):
        def __init__(self, pretrained, dtype, device, batch_size, trust_remote_code):
            loads.append(Path(pretrained).name)
            super().__init__(pretrained, dtype=dtype, device=device, batch_size=batch_size)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface, "HFLM", Counted)
        main(words)
        assert loads == ["01-a"]
        again = json.loads((run / "evaluation" / "h4.json").read_text())
        assert [row for row in again["rows"] if row["model"] != "M_1"] == table["rows"]
        assert set(again["means"]) == {"M_0", "M_1", "M_2"}
        main([*words, "--limit", "3", "--only", "M_1"])
    assert json.loads((run / "evaluation" / "stale" / "h4.json").read_text()) == again
    limited = json.loads((run / "evaluation" / "h4.json").read_text())
    assert {row["documents"] for row in limited["rows"] if row["label"] == "ARC"} == {3}


def test_eq_bench_reads_generated_answers(tiny_model_dir, task_folder, tiny_tokenizer, tmp_path):
    pytest.importorskip("lm_eval")
    words = ["--task_folder", str(task_folder), "--device", "cpu", "--out", str(tmp_path / "out")]
    main(["evaluate", str(tiny_model_dir), "--suite", "eq_bench", *words])
    table = json.loads((tmp_path / "out" / "eq_bench.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    right = readable = 0
    for row in map(json.loads, (task_folder / "eq_bench.jsonl").read_text().splitlines()):
        ids = tiny_tokenizer(row["prompt"])["input_ids"]
        for _ in range(3):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == tiny_tokenizer.eos_token_id:
                break
        said = [w for w in tiny_tokenizer.decode(ids[3:]).split("w59")[0].split() if w in WORDS]
        right, readable = right + (said[:1] == [row["answer"]]), readable + bool(said)
    cells = {row["label"]: row for row in table["rows"]}
    assert cells["EQ-Bench"]["value"] == pytest.approx(100 * right / DOCUMENTS)
    assert cells["parseable %"]["value"] == pytest.approx(100 * readable / DOCUMENTS)
    assert cells["EQ-Bench"]["standard_error"] is not None and table["means"] == {}


def test_an_unknown_task_is_refused_before_a_model_is_read(run, tmp_path, capsys):
    pytest.importorskip("lm_eval")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit) as caught:
        main(["evaluate", str(run), "--suite", "eq_bench", "--task_folder", str(tmp_path / "empty")])
    assert caught.value.code == 2 and "knows no ['eq_bench']" in capsys.readouterr().err
