"""The shape of the package: ranks, imports, docstrings, sizes, and what it does without."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import sdpo_lightning

ROOT = Path(sdpo_lightning.__file__).parent
NAME = "sdpo_lightning"
# Module -> what it may import although its rank isn't lower, and where.
LAZY_EXEMPTIONS = {
    ("cli", "main", verb) for verb in ("demo", "check_command", "completion_command", "parity_command")
}
MAX_FILE_LINES = 350
MAX_FUNCTION_LINES = 60

Function = ast.FunctionDef | ast.AsyncFunctionDef


def _module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


FILES = {_module_name(path): path for path in sorted(ROOT.rglob("*.py"))}
TREES = {module: ast.parse(path.read_text()) for module, path in FILES.items()}
MODULES = [module for module in FILES if not module.endswith(("__init__", "__main__"))]


def _rank(module: str) -> int | None:
    found = re.match(r"Rank (\d): \S", ast.get_docstring(TREES[module]) or "")
    return int(found[1]) if found else None


RANKS = {module: _rank(module) for module in MODULES}


def _resolve(dotted: str) -> str | None:
    """The module of this package that `dotted` names or lies in, without the package's own name."""
    parts = dotted.split(".")
    if parts[0] != NAME:
        return None
    for end in range(len(parts), 1, -1):
        if (module := ".".join(parts[1:end])) in FILES:
            return module
    # `from sdpo_lightning import X`: the lazy names of the package.
    home = sdpo_lightning._HOMES.get(parts[1]) if len(parts) > 1 else None
    return home or "__init__"


def _imported(module: str) -> Iterator[tuple[str, str | None, int]]:
    """(imported module, enclosing function, line) for each import of the package within `module`."""

    def walk(node: ast.AST, function: str | None) -> Iterator[tuple[str, str | None, int]]:
        for child in ast.iter_child_nodes(node):
            names: list[str] = []
            if isinstance(child, ast.Import):
                names = [alias.name for alias in child.names]
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{module}:{child.lineno}: relative import"
                names = [f"{child.module}.{alias.name}" for alias in child.names]
            for name in names:
                if (target := _resolve(name)) is not None:
                    yield target, function, child.lineno
            yield from walk(child, child.name if isinstance(child, Function) else function)

    yield from walk(TREES[module], None)


def test_every_module_says_its_rank():
    assert {"types", "losses", "data.curriculum", "data.loader", "module", "cli"} <= set(MODULES)
    assert [module for module, rank in RANKS.items() if rank is None] == []


def test_a_file_imports_only_files_of_lower_rank():
    edges, wrong, exempted = 0, [], set()
    for module, rank in RANKS.items():
        for target, function, line in _imported(module):
            edges += 1
            if (module, function, target) in LAZY_EXEMPTIONS:
                exempted.add((module, function, target))
                continue
            other = RANKS.get(target)
            if rank is None or other is None:
                # A module without a rank is the business of the test above.
                if target.endswith("__init__"):
                    wrong.append(f"{module}:{line} imports the package root")
                continue
            if other >= rank:
                wrong.append(f"{module} (rank {rank}), line {line}, imports {target} (rank {other})")
    assert wrong == []
    # The walk sees what there is to see: `module` alone imports ten and more files.
    assert edges > 40
    assert exempted == LAZY_EXEMPTIONS


IMPORT_EACH = """
import importlib, json, sys
found = {}
for module in sys.argv[1:]:
    for name in [n for n in sys.modules if n.split(".")[0] == "sdpo_lightning"]:
        del sys.modules[name]
    try:
        importlib.import_module("sdpo_lightning." + module)
        error = None
    except Exception as e:
        error = repr(e)
    lightning = sorted({n.split(".")[0] for n in sys.modules} & {"lightning", "pytorch_lightning"})
    found[module] = {"error": error, "lightning": lightning, "bitsandbytes": "bitsandbytes" in sys.modules}
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def imports() -> dict[str, dict]:
    """Each module imported alone, in one fresh interpreter, lowest rank first."""
    modules = sorted(MODULES, key=lambda module: (99 if RANKS[module] is None else RANKS[module], module))
    command = [sys.executable, "-c", IMPORT_EACH, *modules]
    done = subprocess.run(command, cwd=ROOT.parent, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_every_module_imports_alone(imports):
    assert set(imports) == set(MODULES)
    assert {module: row["error"] for module, row in imports.items() if row["error"]} == {}


def test_ranks_0_to_3_import_no_lightning(imports):
    low = [module for module, rank in RANKS.items() if rank is not None and rank <= 3]
    assert len(low) >= 12
    assert {module: imports[module]["lightning"] for module in low if imports[module]["lightning"]} == {}
    # The probe does notice Lightning where it belongs.
    assert imports["module"]["lightning"]


def test_ranks_0_to_3_name_no_lightning():
    """Also not inside a function, which the test above would miss."""
    named = []
    for module, rank in RANKS.items():
        if rank is None or rank > 3:
            continue
        for top, line in _top_level_names(module):
            if top in ("lightning", "pytorch_lightning", "lightning_fabric"):
                named.append(f"{module}:{line}")
    assert named == []


def _top_level_names(module: str) -> Iterator[tuple[str, int]]:
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name.split(".")[0], node.lineno
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.split(".")[0], node.lineno


def test_nothing_imports_bitsandbytes(imports):
    written = [f"{m}:{line}" for m in FILES for top, line in _top_level_names(m) if top == "bitsandbytes"]
    assert written == []
    # `import_module("bitsandbytes")` and its like.
    strings = [
        f"{module}:{node.lineno}"
        for module in FILES
        for node in ast.walk(TREES[module])
        if isinstance(node, ast.Call)
        and any(isinstance(a, ast.Constant) and str(a.value).startswith("bitsandbytes") for a in node.args)
    ]
    assert strings == []


def _public(tree: ast.Module) -> Iterator[tuple[str, ast.AST]]:
    """Public classes, functions and methods; `__init__` and nested functions are none."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef | Function) and not node.name.startswith("_"):
            yield node.name, node
            for member in node.body if isinstance(node, ast.ClassDef) else ():
                if isinstance(member, ast.ClassDef | Function) and not member.name.startswith("_"):
                    yield f"{node.name}.{member.name}", member


def test_everything_public_has_a_docstring():
    seen = [(f"{module}.{name}", node) for module, tree in TREES.items() for name, node in _public(tree)]
    assert len(seen) > 100
    assert [name for name, node in seen if not ast.get_docstring(node)] == []


@pytest.mark.parametrize("module", ["losses", "logprobs", "data.curriculum", "metrics"])
def test_functions_of_tensors_give_shapes(module):
    with_tensors = []
    for name, node in _public(TREES[module]):
        if not isinstance(node, Function):
            continue
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        annotations = " ".join(ast.unparse(a.annotation) for a in arguments if a.annotation)
        if re.search(r"Tensor|PairLogps|PreferenceBatch", annotations):
            with_tensors.append((name, ast.get_docstring(node) or ""))
    assert with_tensors
    assert [name for name, text in with_tensors if "[" not in text] == []


def test_files_are_short():
    lines = {module: len(path.read_text().splitlines()) for module, path in FILES.items()}
    assert {module: count for module, count in lines.items() if count > MAX_FILE_LINES} == {}


def test_functions_are_short():
    long = {}
    for module, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, Function):
                count = node.end_lineno - node.lineno + 1
                if count > MAX_FUNCTION_LINES:
                    long[f"{module}.{node.name}"] = count
    assert long == {}


def test_no_hasattr():
    calls = [
        f"{module}:{node.lineno}"
        for module, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "hasattr"
    ]
    assert calls == []


def test_no_kwargs_in_public_signatures():
    found = []
    for module, tree in TREES.items():
        for name, node in _public(tree):
            functions = [node] if isinstance(node, Function) else []
            if isinstance(node, ast.ClassDef):
                # A class's signature is that of its special methods.
                functions = [m for m in node.body if isinstance(m, Function) and m.name.startswith("__")]
            found += [f"{module}.{name}" for function in functions if function.args.kwarg is not None]
    assert found == []


def test_no_drawer_called_utils():
    assert [str(path) for path in ROOT.rglob("*util*.py")] == []


def test_no_class_is_called_sdpo():
    nodes = [node for tree in TREES.values() for node in ast.walk(tree)]
    names = [node.name for node in nodes if isinstance(node, ast.ClassDef)]
    assert [name for name in names if name.lower().startswith("sdpo")] == []


def test_every_lazy_name_of_the_package_is_where_it_says():
    for name, home in sdpo_lightning._HOMES.items():
        assert name in {node.name for node in TREES[home].body if isinstance(node, ast.ClassDef)}, name
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = sdpo_lightning.no_such_name


def test_contributing_lists_every_module_at_its_rank():
    text = (ROOT.parent / "CONTRIBUTING.md").read_text()
    listed = {}
    for rank, names in re.findall(r"^\| (\d+) \| (`.*`) \|$", text, re.M):
        listed |= {name.replace("/", "."): int(rank) for name in re.findall(r"`([^`]+)`", names)}
    assert listed == {module: rank for module, rank in RANKS.items() if rank is not None}
