"""Wheel and sdist: built from a copy, and the wheel used where the checkout isn't. `make wheel-test`."""

import os
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

from sdpo_lightning import __version__

ROOT = Path(__file__).resolve().parent.parent
RECIPES = {path.relative_to(ROOT / "configs").as_posix() for path in (ROOT / "configs").rglob("*.yaml")}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("build") is None, reason="needs `build`: make venv"),
]


def run(*words, cwd: Path) -> str:
    """Run a command without the checkout on its path, and return what it says."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, cwd=cwd, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def packages(tmp_path_factory) -> Path:
    """A folder with both."""
    folder = tmp_path_factory.mktemp("packages")
    left = shutil.ignore_patterns(".*", "runs", "build", "dist", "*.egg-info", "__pycache__", "shared")
    shutil.copytree(ROOT, folder / "source", ignore=left)
    run(sys.executable, "-m", "build", "--outdir", folder / "dist", folder / "source", cwd=folder)
    return folder / "dist"


def test_both_hold_types_and_recipes(packages):
    [wheel], [sdist] = packages.glob("*.whl"), packages.glob("*.tar.gz")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"sdpo_lightning/py.typed", *(f"sdpo_lightning/configs/{name}" for name in RECIPES)} <= names
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/"))]
    with tarfile.open(sdist) as archive:
        inner = {name.partition("/")[2] for name in archive.getnames()}
    assert {"sdpo_lightning/py.typed", *(f"configs/{name}" for name in RECIPES)} <= inner
    assert f"-{__version__}-" in wheel.name
    # The version is written down once.
    given = re.compile(rf"(?m)^version\W+{re.escape(__version__)}")
    others = ("pyproject.toml", "setup.cfg", "CITATION.cff")
    assert [name for name in others if given.search((ROOT / name).read_text())] == []
    if find_spec("twine"):
        run(sys.executable, "-m", "twine", "check", "--strict", wheel, sdist, cwd=packages)


def test_the_wheel_works_on_its_own(packages, tmp_path):
    """Dependencies are this environment's, by a .pth file; the package is the wheel's."""
    run(sys.executable, "-m", "venv", tmp_path / "venv", cwd=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    [wheel] = packages.glob("*.whl")
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    [site] = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    # Appended: the wheel's own files come first, and a .pth within the linked folder isn't read.
    (site / "linked.pth").write_text("".join(f"{p}\n" for p in sys.path if p.endswith("site-packages")))
    command = tmp_path / "venv" / "bin" / "sdpo-lightning"
    where = run(python, "-c", "import sdpo_lightning as s; print(s.__file__)", cwd=tmp_path)
    assert where.startswith(str(site))
    assert run(command, "--version", cwd=tmp_path) == f"sdpo-lightning {__version__}\n"
    listed = {line.split()[0] for line in run(command, "configs", "ls", cwd=tmp_path).splitlines()}
    assert {name.removesuffix(".yaml") for name in RECIPES} <= listed
    run(command, "configs", "cp", "demo", cwd=tmp_path)
    printed = run(command, "fit", "--config=demo.yaml", "--print_config", cwd=tmp_path)
    assert "runs/demo/inputs/model" in printed


# ---- each extra, from the registry


@pytest.fixture(scope="module")
def base(packages, tmp_path_factory) -> Path:
    """An environment with the wheel, what it requires in the versions of `constraints.txt`, and nothing else."""
    folder = tmp_path_factory.mktemp("base") / "venv"
    run(sys.executable, "-m", "venv", folder, cwd=packages)
    install(folder, str(next(packages.glob("*.whl"))))
    return folder


def install(environment: Path, *words: str) -> None:
    python = environment / "bin" / "python"
    words = ("-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", *words)
    run(python, *words, cwd=environment)


def environment_with(base: Path, folder: Path, extra: str, packages: Path, *more: str) -> Path:
    """An environment with `wheel[extra]` and no other extra; what `base` has is linked. Returns where commands are."""
    run(sys.executable, "-m", "venv", folder, cwd=packages)
    [site] = (folder / "lib").glob("python*/site-packages")
    [linked] = (base / "lib").glob("python*/site-packages")
    (site / "linked.pth").write_text(f"{linked}\n")
    [wheel] = packages.glob("*.whl")
    # Its commands are made here too.
    install(folder, "--no-deps", "--ignore-installed", str(wheel))
    install(folder, f"{wheel}[{extra}]", *more)
    return folder / "bin"


def test_each_extra_is_tried():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    # `make venv` installs the one for development; vLLM needs a GPU.
    assert set(extras) == {"peft", "report", "eval", "completion", "liger", "vllm", "dev"}


def test_report_draws(base, packages, tmp_path):
    (tmp_path / "metrics.csv").write_text("step,stage/index,train/loss\n1,1,0.693\n2,1,0.5\n")
    plain = run(base / "bin" / "sdpo-lightning", "report", tmp_path, cwd=tmp_path)
    assert "no PNGs: matplotlib is missing" in plain and not (tmp_path / "report").exists()
    commands = environment_with(base, tmp_path / "venv", "report", packages)
    assert "written: 1 PNGs" in run(commands / "sdpo-lightning", "report", tmp_path, cwd=tmp_path)
    header = (tmp_path / "report" / "loss.png").read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">II", header[16:]) == (768, 480)


def test_completion_prints_a_script(base, packages, tmp_path):
    commands = environment_with(base, tmp_path / "venv", "completion", packages)
    script = run(commands / "sdpo-lightning", "--print_completion", "shtab-bash", cwd=tmp_path)
    assert "complete -" in script and "--model.model_name_or_path" in script


@pytest.mark.parametrize(
    ("extra", "tests", "passed"),
    [
        ("peft", ["test_fork.py", "-k", "test_adapters"], 1),
        ("eval", ["test_evaluation.py", "-k", "h4_over_the_models or eq_bench_reads"], 2),
        ("liger", ["test_execution.py", "-k", "kernels_of_liger"], 1),
    ],
    ids=["peft", "eval", "liger"],
)
def test_the_tests_of_an_extra(base, packages, tmp_path, extra, tests, passed):
    """On the wheel: a copy of the tests, without the package beside it."""
    commands = environment_with(base, tmp_path / "venv", extra, packages, "pytest", "hypothesis")
    shutil.copytree(ROOT / "tests", tmp_path / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    where = run(commands / "python", "-c", "import sdpo_lightning as s; print(s.__file__)", cwd=tmp_path / "tests")
    assert Path(where).is_relative_to(tmp_path / "venv")
    options = ["-p", "no:cacheprovider", "-o", "markers=slow", f"--basetemp={tmp_path / 'out'}"]
    said = run(commands / "python", "-m", "pytest", *options, *tests, cwd=tmp_path / "tests")
    assert f"{passed} passed" in said and "skipped" not in said
