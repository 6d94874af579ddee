"""How the command line answers: at once where nothing heavy is needed, in one line, with the word that was meant."""

import ast
import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

import sdpo_lightning
from sdpo_lightning.cli import main
from sdpo_lightning.parser_errors import name_key, shorten
from sdpo_lightning.spelling import did_you_mean
from sdpo_lightning.verbs import VERBS

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")

# Runs the entry point, then says which of the heavy packages are there.
ENTRY = """
import json, runpy, sys
sys.argv = ["sdpo-lightning", *sys.argv[1:]]
code = 0
try:
    runpy.run_module("sdpo_lightning", run_name="__main__")
except SystemExit as stop:
    code = stop.code or 0
heavy = {"torch", "lightning", "transformers", "datasets", "numpy", "jsonargparse", "matplotlib"}
print(json.dumps([code, sorted(heavy & set(sys.modules))]))
"""


def refused(words, capsys) -> str:
    """Run, expect exit code 2 and one line on stderr, and return it."""
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize(
    "words, code, said",
    [
        (["--help"], 0, "  estimate  "),
        (["--version"], 0, "sdpo-lightning "),
        ([], 2, "no verb"),
        (["fitt"], 2, "did you mean `fit`?"),
        (["configs", "ls"], 0, "solar_10.7b"),
        (["demo", "--help"], 0, "--control"),
        (["report", "--help"], 0, "comparison.html"),
        (["report", "/nowhere"], 2, "`report`"),
    ],
)
def test_nothing_heavy_is_imported(words, code, said, tmp_path):
    done = subprocess.run([sys.executable, "-c", ENTRY, *words], capture_output=True, text=True, cwd=tmp_path)
    assert json.loads(done.stdout.splitlines()[-1]) == [code, []]
    assert said in (done.stderr if code else done.stdout)
    assert len(done.stderr.splitlines()) == (1 if code else 0)


def test_report_is_written_without_torch(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,stage/index,train/loss\n1,1,0.693\n2,1,0.5\n")
    code = ENTRY.replace('"matplotlib"', '"x"').replace('"numpy", ', "")
    done = subprocess.run([sys.executable, "-c", code, "report", str(tmp_path)], capture_output=True, text=True)
    assert json.loads(done.stdout.splitlines()[-1]) == [0, []]
    assert (tmp_path / "report.html").exists()


def test_the_probe_sees_heavy_modules():
    code = ENTRY.replace("import json", "import json, numpy", 1)
    done = subprocess.run([sys.executable, "-c", code, "--version"], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == [0, ["numpy"]]


@pytest.mark.parametrize(
    "words, expected",
    [
        (["fit", "--data.max_lenght=3"], "did you mean `--data.max_length`?"),
        (["estimate", "--modle.beta=3"], "did you mean `--model.beta`?"),
        (["fit", "--model.optimizer.init_args.lrr=1"], "`model.optimizer`: unknown key `lrr`; did you mean `lr`?"),
        (["fit", "--data.sources=[{nam: a, path: b}]"], "`data.sources`: unknown key `nam`; did you mean `name`?"),
        (["fit", "--model.reference=ResidentReferenc"], "did you mean `ResidentReference`?"),
        (["fit", "--data.order=revers"], "got 'revers'; did you mean `reversed`?"),
        (["validat"], "did you mean `validate`?"),
        (["configs", "cp", "zephyr"], "did you mean `zephyr_7b`?"),
    ],
)
def test_a_wrong_word_is_named(words, expected, capsys):
    assert expected in refused(words, capsys)


@pytest.mark.parametrize(
    "config, expected",
    [
        ({"modle": {"beta": 1}}, "unknown key `modle.beta`; did you mean `model.beta`?"),
        ({"data": {"max_lenght": 1}}, "unknown key `data.max_lenght`; did you mean `data.max_length`?"),
        (
            {"trainer": {"callbacks": [{"class_path": "sdpo_lightning.StageExport", "init_args": {"keep_lst": 2}}]}},
            "`trainer.callbacks`: unknown key `keep_lst`; did you mean `keep_last`?",
        ),
    ],
)
def test_a_wrong_key_of_a_file_is_named(config, expected, capsys, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    line = refused(["fit", f"--config={path}"], capsys)
    assert line.endswith(expected) and len(line) < 120


def test_messages():
    assert did_you_mean("bta", ["beta", "gamma"]) == "; did you mean `beta`?"
    assert did_you_mean("zzz", ["beta", "gamma"]) == ""
    assert name_key("Group 'model' does not accept option 'betta'", ["model.beta"]) == (
        "unknown key `model.betta`; did you mean `model.beta`?"
    )
    assert name_key("Option 'x' is required but not provided", ["y"]) == "Option 'x' is required but not provided"
    union = (
        'Parser key "model.beta":\n  Does not validate against any of the Union subtypes\n'
        "  Subtypes: [<class 'int'>]\n  Errors:\n  - Expected a <class 'int'>\n"
        "  - Expected a <class 'NoneType'>\n  Given value: abc"
    )
    assert shorten(union) == "`model.beta`: Expected a int"
    # What is always said is kept where nothing else is.
    assert shorten("Expected a path but x either not accessible or invalid").startswith("Expected a path but x")


def test_configs_are_listed_and_copied_once(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["configs", "ls"])
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    shipped = {p.relative_to(ROOT / "configs").as_posix() for p in (ROOT / "configs").rglob("*.[ys]*")} - {"slurm"}
    assert set(lines) == {name.removesuffix(".yaml") for name in shipped}
    first = (ROOT / "configs" / "zephyr_7b.yaml").read_text().splitlines()[0]
    assert lines["zephyr_7b"] == first.removeprefix("# ")
    main(["configs", "cp", "zephyr_7b"])
    assert Path("zephyr_7b.yaml").read_text() == (ROOT / "configs" / "zephyr_7b.yaml").read_text()
    Path("zephyr_7b.yaml").write_text("mine")
    assert "is there already" in refused(["configs", "cp", "zephyr_7b"], capsys)
    assert Path("zephyr_7b.yaml").read_text() == "mine"
    main(["configs", "cp", "slurm/solar_10.7b_2_nodes.yaml", "new/"])
    assert Path("new/solar_10.7b_2_nodes.yaml").exists()


def test_env_names_versions_and_no_place(capsys, monkeypatch):
    monkeypatch.setenv("USER", "somebody-here")
    monkeypatch.setenv("HF_TOKEN", "hf_0123456789abcdefghij")
    main(["env"])
    said = capsys.readouterr().out
    for name in ("python", "torch", "lightning", "transformers", "datasets", "cuda"):
        assert any(line.split()[0] == name and len(line.split()) > 1 for line in said.splitlines())
    assert "/" not in said and "somebody-here" not in said and "hf_" not in said


def test_print_config_round_trips(tmp_path, capsys):
    words = ["--model.model_name_or_path=m", "--data.sources=[{name: a, path: a.jsonl}]", "--trainer.max_steps=3"]
    words += ["--model.optimizer=torch.optim.SGD", "--model.optimizer.init_args.lr=0.25", "--model.beta=0.3"]

    def printed(words):
        with pytest.raises(SystemExit) as stop:
            main(["fit", *words, "--print_config"])
        assert not stop.value.code
        return capsys.readouterr().out

    first = printed(words)
    assert yaml.safe_load(first)["model"]["beta"] == 0.3
    path = tmp_path / "run.yaml"
    path.write_text(first)
    assert printed([f"--config={path}"]) == first


def test_completion_knows_every_verb(capsys):
    assert "takes one of shtab-bash" in refused(["--print_completion", "fish"], capsys)
    if find_spec("shtab") is None:
        assert "sdpo-lightning[completion]" in refused(["--print_completion", "shtab-bash"], capsys)
        return
    main(["--print_completion", "shtab-bash"])
    script = capsys.readouterr().out
    assert f"_subparsers=({' '.join(VERBS)})" in script
    assert "--data.max_length" in script and "--model_config" in script and "--control" in script
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_type_checkers_see_every_lazy_name():
    tree = ast.parse(Path(sdpo_lightning.__file__).read_text())
    [block] = [node for node in tree.body if isinstance(node, ast.If)]
    assert ast.unparse(block.test) == "TYPE_CHECKING"
    seen = {alias.asname: node.module for node in block.body for alias in node.names}
    assert seen == {name: f"sdpo_lightning.{home}" for name, home in sdpo_lightning._HOMES.items()}
