"""Every command, YAML and Python block of README and docs is run or read; names that they mention exist."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
import tomllib
import types
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from helpers import make_rows, write_jsonl
from runs import ParsesOnly, parity_in_this_process

from sdpo_lightning import evaluate_command, parity_command
from sdpo_lightning.cli import main
from sdpo_lightning.verbs import VERBS

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "examples").glob("*/README.md"))]
# Run by tests of their own: tests/test_demo.py, tests/test_manners.py.
ELSEWHERE = ("demo", "--print_completion")
# Seconds that the fast suite may spend: these pages' commands are run in it, the others' by `make test-slow`.
FAST_PAGES = ("quickstart.md",)
# matplotlib alone takes seconds.
SLOW = ("sdpo-lightning report",)

pytestmark = pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str
    line: int
    kind: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks() -> list[Block]:
    """All fenced blocks, in order."""
    found = []
    for page in PAGES:
        name = page.name if page.parent.name != page.parent.parent.name else page.name
        lines, kind, begin = page.read_text().splitlines(), None, 0
        for number, line in enumerate(lines, 1):
            if not line.startswith("```"):
                continue
            if kind is None:
                kind, begin = line[3:].strip(), number
            else:
                found.append(Block(name, begin, kind, "\n".join(lines[begin : number - 1]) + "\n"))
                kind = None
        assert kind is None, f"{page}: a block without an end"
    return found


BLOCKS = blocks()


def commands() -> list[tuple[Block, str]]:
    """Each command of the bash blocks, continued lines joined, comments gone."""
    found = []
    for block in BLOCKS:
        if block.kind == "bash":
            for line in block.text.replace("\\\n", " ").splitlines():
                if words := shlex.split(line, comments=True):
                    found.append((block, shlex.join(words)))
    return found


OURS = [(block, line) for block, line in commands() if line.startswith("sdpo-lightning ")]


def marked(values):
    """Each once; those of other pages than the fast ones are slow."""
    seen, params = set(), []
    for block, line in values:
        if line not in seen:
            seen.add(line)
            fast = block.page in FAST_PAGES and not line.startswith(SLOW)
            marks = () if fast else (pytest.mark.slow,)
            params.append(pytest.param(line, marks=marks, id=f"{block}-{line[:60]}"))
    return params


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_model_dir) -> Path:
    """A folder with what the pages name: run.yaml, its data and model, and the finished run in runs/mine."""
    folder = tmp_path_factory.mktemp("docs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        prepare(folder, tiny_model_dir)
        main(["fit", "--config=run.yaml", *small([])])
    return folder


def prepare(folder: Path, model_dir: Path) -> None:
    """All but the run."""
    (folder / "path" / "to").mkdir(parents=True)
    for name in ("sft-model", "base-model"):
        shutil.copytree(model_dir, folder / "path" / "to" / name)
    shutil.copytree(ROOT / "configs", folder / "configs")
    for seed, name in enumerate(("easy", "hard")):
        write_jsonl(folder / f"{name}.jsonl", make_rows(10, seed, name))
    [first] = [block for block in BLOCKS if block.page == "quickstart.md" and block.kind == "yaml"]
    (folder / "run.yaml").write_text(first.text)


@pytest.fixture
def world(finished, tmp_path, monkeypatch) -> Path:
    """A copy of it, to be changed."""
    folder = tmp_path / "world"
    shutil.copytree(finished, folder)
    monkeypatch.chdir(folder)
    return folder


def small(words: list[str]) -> list[str]:
    """Settings behind those of a page: one CPU, and data and model of the fixture where a recipe names others."""
    verb = words[0] if words else "fit"
    if verb == "report":
        return []
    given = " ".join(words)
    extra = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    if verb in ("fit", "rank", "parity"):
        # Two tokens an answer instead of 64.
        extra += ["--trainer.callbacks+=sdpo_lightning.StageSamples", "--trainer.callbacks.max_new_tokens=2"]
    if "configs/" in given or "--trainer.strategy" in given or "--trainer.devices" in given:
        extra += ["--trainer.devices=1", "--trainer.num_nodes=1", "--trainer.strategy=auto"]
    if verb == "fit" and len(words) > 3 and "--trainer.default_root_dir" not in given and "--ckpt_path" not in given:
        # runs/mine is finished, and of other settings.
        extra += ["--trainer.default_root_dir=runs/own"]
    if "configs/" in given:
        none = dict.fromkeys(("columns", "split", "preset", "val_path"))
        sources = [{"name": name, "path": f"{name}.jsonl", **none} for name in ("easy", "hard")]
        extra += ["--model.model_name_or_path=path/to/sft-model", f"--data.sources={json.dumps(sources)}"]
        extra += ["--trainer.precision=32-true", "--data.max_length=64"]
    return extra


def words_of(line: str, world: Path) -> list[str]:
    """The words behind `sdpo-lightning`, with what stands for a name of the reader's own filled in."""
    [checkpoint, *_] = sorted((world / "runs" / "mine" / "checkpoints").glob("*.ckpt"))
    words = shlex.split(line.replace("X.ckpt", checkpoint.name))[1:]
    return [re.sub(r"^RUN(?=/|$)", "runs/mine", word) for word in words]


@pytest.mark.parametrize("line", marked(OURS))
def test_a_command_runs(line, world, capsys, monkeypatch):
    words = words_of(line, world)
    # As programs: tests/test_parity.py.
    monkeypatch.setattr(parity_command, "_run", parity_in_this_process)
    if words[0] in ELSEWHERE:
        return
    if words[0] == "evaluate":
        # Run by tests/test_evaluation.py: its suites are downloads. Here all words have a meaning.
        assert evaluate_command._parser().parse_args(words[1:]).suite in words
        return
    if "--print_config" in words:
        with pytest.raises(SystemExit) as stop:
            main(words)
        assert stop.value.code == 0
        return
    if words[0] == "report":
        for run in words[1:]:
            if run.startswith("runs/") and not Path(run).exists():
                shutil.copytree("runs/mine", run)
    main([*words, *small(words)])
    out = capsys.readouterr().out
    if words[0] == "fit":
        # The last one counts.
        given = [*words, *small(words)]
        roots = re.findall(r"--trainer.default_root_dir[= ](\S+)", " ".join(given)) or ["runs/mine"]
        root = roots[-1]
        assert (Path(root) / "stages").is_dir()
    elif words[0] == "report":
        assert "written: " in out
    elif words[0] == "parity":
        assert "the same training" in out
    elif words[0] == "check":
        assert "0 errors" in out
    elif words[0] == "rank":
        assert "accuracy of M_0" in out
    elif words[0] == "estimate":
        assert "GiB" in out
    else:
        assert words[0] in ("validate", "test", "predict")


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.kind == "bash"], ids=str)
def test_commands_name_what_is_there(block):
    """What isn't ours to run: targets, extras, modules and scripts exist; ours begin with a verb."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    makefile = (ROOT / "Makefile").read_text()
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if not words:
            continue
        match words:
            case ["sdpo-lightning", "--print_completion", shell, *_]:
                # Run by tests/test_manners.py.
                assert shell == "shtab-bash"
            case ["sdpo-lightning", verb, *_]:
                assert verb in VERBS, line
            case ["make", target]:
                assert re.search(rf"^\.?{target}( \S+)*:", makefile, re.M), line
            case ["pip", "install", pinned] if "==" in pinned:
                assert pinned in (ROOT / "constraints.txt").read_text().split(), line
            case ["pip", "install", *rest]:
                wanted = rest[-1]
                extras = re.findall(r"\[(\w+)\]", wanted)
                assert set(extras) <= set(project["optional-dependencies"]), line
                assert extras or (ROOT / wanted / "pyproject.toml").is_file(), line
            case ["python", "-m", module, *_]:
                assert (ROOT / f"{module.replace('.', '/')}.py").is_file() or module == "sdpo_lightning", line
            case ["brevity-dpo", *_]:
                # Run by tests/test_example.py.
                assert (ROOT / "examples" / "brevity_dpo" / "config.yaml").is_file()
            case _:
                pytest.fail(f"{block}: nobody tests {line!r}")


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.kind == "yaml"], ids=str)
def test_yaml_is_read_by_the_parser(block, tmp_path, tiny_model_dir, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prepare(tmp_path, tiny_model_dir)
    Path("block.yaml").write_text(block.text)
    parsed = ParsesOnly(args=["fit", "--config=run.yaml", "--config=block.yaml"]).config.fit.as_dict()
    given = yaml.safe_load(block.text)
    assert set(given) <= {"seed_everything", "trainer", "model", "data"}
    for group, settings in given.items():
        for key in settings:
            assert parsed[group][key] is not None, key


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.kind.startswith("python") and b.page != "README.md"], ids=str)
def test_python_runs(block, tmp_path, tiny_model_dir, monkeypatch):
    """The README's is run by tests/test_entry.py."""
    code = compile(block.text, str(block), "exec")
    if "no-run" in block.kind:
        return
    monkeypatch.chdir(tmp_path)
    prepare(tmp_path, tiny_model_dir)
    module = types.ModuleType("of_a_page")
    monkeypatch.setitem(sys.modules, "of_a_page", module)
    exec(code, vars(module))
    if "Trainer(" in block.text:
        [run] = Path("runs").iterdir()
        assert len(list((run / "stages").iterdir())) == 2


def test_every_block_has_a_kind():
    kinds = {block.kind.split()[0] if block.kind else "" for block in BLOCKS}
    # Rows are read by tests/test_row_forms.py.
    assert kinds <= {"bash", "yaml", "python", "jsonl", "bibtex", "text"}
    assert {"bash", "yaml", "python", "jsonl"} <= kinds
    assert len(OURS) > 25


# ---- what the pages mention


def inline() -> list[tuple[str, str]]:
    """(page, text) of each piece of inline code."""
    found = []
    for page in PAGES:
        text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
        found += [(page.name, code) for code in re.findall(r"`([^`\n]+)`", text)]
    return found


def test_verbs_and_files_in_the_text_exist():
    for page, code in inline():
        if found := re.match(r"sdpo-lightning (\w+)", code):
            assert found[1] in (*VERBS, "VERB"), (page, code)
        if re.fullmatch(r"(tests|benchmarks|configs|docs|examples|sdpo_lightning)/[\w./-]+", code):
            assert (ROOT / code).exists(), (page, code)
        elif re.fullmatch(r"[\w]+\.md", code):
            assert any((folder / code).exists() for folder in (ROOT, ROOT / "docs")), (page, code)
        elif found := re.match(r"python -m (benchmarks\.\w+)", code):
            assert (ROOT / f"{found[1].replace('.', '/')}.py").is_file(), (page, code)
        elif re.fullmatch(r"test_\w+\.py", code):
            assert (ROOT / "tests" / code).is_file(), (page, code)


def test_links_lead_somewhere():
    links = [(page, link) for page in PAGES for link in re.findall(r"\]\(([^)#\s]+)", page.read_text())]
    assert len(links) > 5
    for page, link in links:
        assert link.startswith("https://") or (page.parent / link).exists(), (page.name, link)


def test_settings_in_the_text_exist():
    words = ["fit", "--model.model_name_or_path=x", "--data.sources=[]"]
    parsed = ParsesOnly(args=words).config.fit
    seen = 0
    for page, code in inline():
        for name in re.findall(r"(?<![\w./-])((?:trainer|model|data)\.(?!md\b)[a-z_]+)(?![\w(./])", code):
            group, key = name.split(".")
            seen += 1
            # In subclass mode only.
            assert key in parsed[group] or key == "class_path", (page, code)
    assert seen > 100


def test_versions_are_those_of_the_files():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [line for extra in project["optional-dependencies"].values() for line in extra]
    asked = {}
    for line in [*project["dependencies"], *extras]:
        name, bound = re.match(r"([\w-]+)(?:\[\w+\])?([>=<].*?)?(?:;.*)?$", line).groups()
        if bound:
            asked.setdefault(name, bound.strip())
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
    rows = re.findall(r"^\| (\S+) \| `(\S+)` \| (\S+) \|", (ROOT / "docs" / "versions.md").read_text(), re.M)
    table = {name: (bound, tested) for name, bound, tested in rows}
    assert table.pop("python")[0] == project["requires-python"]
    assert table.keys() == asked.keys() - {"pytest", "pytest-xdist", "ruff", "hypothesis", "mypy"}
    for name, (bound, tested) in table.items():
        assert bound == asked[name]
        assert tested == pinned.get(name, "none")


def test_before_a_commit_as_in_make_lint():
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    assert [repo["repo"] for repo in config["repos"]] == ["local"]
    [hook] = [hook for hook in config["repos"][0]["hooks"] if hook["id"] == "ruff-check"]
    assert set(hook["additional_dependencies"]) < set((ROOT / "constraints.txt").read_text().split())


def test_the_citation_names_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["preferred-citation"]["url"].endswith("2403.19270")


def test_numbers_against_trl_are_the_measured_ones():
    measured = json.loads((ROOT / "benchmarks" / "results" / "vs_trl.json").read_text())
    text = (ROOT / "docs" / "speed.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| ([\d.]+) \(([\d.]+) to ([\d.]+)\) \|", text, re.M)
    assert len(rows) == 9
    for key, *values in rows:
        assert [float(value) for value in values] == measured[key], key
    readme = re.findall(r"^\| (CPU time.*?) \| (\.\d+) \|$", (ROOT / "README.md").read_text(), re.M)
    keys = ("time_1epoch_vs_A2", "time_3epochs_vs_A2", "time_1epoch_vs_A6")
    assert [float(value) for _, value in readme] == [round(measured[key][0] + 1e-9, 2) for key in keys]


def test_numbers_of_scaling_are_the_written_ones():
    written = (ROOT / "benchmarks" / "results" / "scaling.md").read_text()
    rows = re.findall(r"^\| (\w+)[^|]* \| (\d\.\d\d) \| (\d\.\d\d) \|$", (ROOT / "docs" / "speed.md").read_text(), re.M)
    assert len(rows) == 4
    for axis, time, memory in rows:
        assert re.search(rf"^\| {axis} \| {time} \| \w+ \| {memory} \|", written, re.M), axis


def test_settings_page_has_every_key():
    parsed = ParsesOnly(args=["fit", "--model.model_name_or_path=x", "--data.sources=[]"]).config.fit
    text = (ROOT / "docs" / "settings.md").read_text()
    keys = [f"{group}.{key}" for group in ("model", "data") for key in vars(parsed[group])]
    assert len(keys) > 40
    assert [key for key in keys if f"`{key}`" not in text] == []
