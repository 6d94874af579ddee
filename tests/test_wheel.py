"""Wheel and sdist: built from a copy, and the wheel used where the checkout isn't. `make wheel-test`."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
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
