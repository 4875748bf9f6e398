"""Imports run one way: optim → hash_table → tables → functional → engines, reference → cuda_src.

The code is read, not run, so an import inside a function or under TYPE_CHECKING counts too.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "cupy_sparse_adamw"

LEAVES = {"_checks", "_locks", "_memory", "_signals", "_slots", "_types"}
ENGINES = {"engines.cpu", "engines.cuda"}
ANYTHING = {"*"}

# What each layer may import, besides itself.
ALLOWED = {
    "_signals": set(),
    "_locks": {"_signals"},
    "_memory": set(),
    "_slots": {"_memory"},
    "_types": {"_slots"},
    "_checks": {"_types"},
    "initializers": LEAVES,
    "reference": LEAVES,
    "engines": LEAVES,
    "engines.cpu": LEAVES,
    "engines.cuda": LEAVES | {"cuda_src"},
    "cuda_src": set(),
    "functional": LEAVES | {"reference"} | ENGINES,
    "missed_steps": LEAVES | {"functional"},
    "tables": LEAVES | {"functional", "missed_steps", "embedding_table", "recis"},
    "embedding_table": LEAVES | {"functional", "missed_steps", "tables"},
    "embedding_hooks": LEAVES | {"functional", "tables", "embedding_table"},
    "untouched": LEAVES | {"missed_steps", "tables", "embedding_table", "embedding_hooks"},
    "recis": LEAVES | {"functional", "tables"},
    "row_bound": LEAVES | {"functional"},
    "saved_rows": LEAVES,
    "row_store": LEAVES | {"functional", "row_bound", "saved_rows", "missed_steps"},
    "lookup_grads": LEAVES | {"functional", "row_store"},
    "row_table": LEAVES | {"functional", "row_store", "lookup_grads", "missed_steps", "tables"},
    "children": LEAVES,
    "slices": LEAVES,
    "hooks": LEAVES,
    "policies": LEAVES | {"functional", "hooks"},
    "hash_table": LEAVES
    | {"functional", "row_store", "lookup_grads", "row_table", "tables"}
    | {"initializers", "children", "slices", "hooks", "policies"},
    "state_dicts": LEAVES | {"hash_table"},
    "optimizer_state": LEAVES | {"missed_steps"},
    "_step_hooks": set(),
    "optim": LEAVES
    | {"_step_hooks"}
    | {"functional", "missed_steps", "tables", "untouched", "hash_table", "optimizer_state"},
    "checkpoint.plain_state": LEAVES,
    "checkpoint.files": LEAVES,
    "checkpoint.index": LEAVES | {"checkpoint.files"},
    "checkpoint.dense": LEAVES | {"checkpoint.files"},
    "checkpoint.modules": LEAVES
    | {"checkpoint.dense", "checkpoint.plain_state", "checkpoint.tables"}
    | {"tables", "embedding_table"},
    "checkpoint.tables": LEAVES
    | {"functional", "tables", "hash_table", "row_store", "row_table", "saved_rows"}
    | {"missed_steps", "embedding_table"},
    "checkpoint": LEAVES
    | {"checkpoint.files", "checkpoint.index", "checkpoint.tables", "checkpoint.plain_state"}
    | {"checkpoint.dense", "checkpoint.modules"}
    | {"tables", "embedding_table", "hash_table", "optim", "optimizer_state", "row_store"}
    | {"missed_steps"},
    "_doctor": LEAVES | {"functional", "missed_steps"},
    "__init__": ANYTHING,
    "__main__": ANYTHING,
}

# Imported inside functions only, in the branch that needs it.
LAZY = {("functional", engine) for engine in ENGINES} | {
    ("tables", "recis"),
    ("tables", "embedding_table"),
}

# The one layer that may import each of these.
OWNER = {
    "numba": "engines.cpu",
    "llvmlite": "engines.cpu",
    "cupy": "engines.cuda",
    "safetensors": "checkpoint.files",
}


class Import(NamedTuple):
    line: int
    target: str  # dotted; absolute
    in_function: bool


def layer_of(module: str) -> str:
    """The layer of a module of the package: engines.cpu of cupy_sparse_adamw.engines.cpu.adamw."""
    parts = module.split(".")[1:] or ["__init__"]
    return ".".join(parts[:2]) if parts[0] in ("engines", "checkpoint") else parts[0]


def imports(tree: ast.AST, package: str, modules: set[str]) -> Iterator[Import]:
    """Everything imported by a module that lies in ``package``."""

    def visit(node: ast.AST, in_function: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(node.lineno, alias.name, in_function)
        elif isinstance(node, ast.ImportFrom):
            base = resolve("." * node.level + (node.module or ""))
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield Import(node.lineno, full if full in modules else base, in_function)
        elif isinstance(node, ast.Call) and name_of(node.func) in {"import_module", "__import__"}:
            name = node.args[0] if node.args else None
            literal = isinstance(name, ast.Constant) and isinstance(name.value, str)
            yield Import(node.lineno, resolve(name.value) if literal else "?", in_function)
        in_function = in_function or isinstance(
            node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
        )
        for child in ast.iter_child_nodes(node):
            yield from visit(child, in_function)

    def resolve(name: str) -> str:
        tail = name.lstrip(".")
        level = len(name) - len(tail)
        if not level:
            return name
        base = package.split(".")
        return ".".join([*base[: len(base) - level + 1], *([tail] if tail else [])])

    def name_of(func: ast.expr) -> str:
        return getattr(func, "attr", getattr(func, "id", ""))

    yield from visit(tree, False)


def find_back_arrows(root: Path) -> list[str]:
    """What is wrong with the imports of the source tree at ``root``, one line each."""
    files = {}
    for folder, prefix in ((root / PACKAGE, PACKAGE), (root / "cuda_src", f"{PACKAGE}.cuda_src")):
        for path in sorted(folder.rglob("*.py")):
            parts = [prefix, *path.relative_to(folder).with_suffix("").parts]
            files[".".join(parts).removesuffix(".__init__")] = path
    wrong = []
    for module, path in files.items():
        layer = layer_of(module)
        where = path.relative_to(root)
        if layer not in ALLOWED:
            wrong.append(
                f"{where}: unknown layer {layer}; add it to ALLOWED in tests/test_layers.py"
            )
            continue
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        for line, target, in_function in imports(
            ast.parse(path.read_text(encoding="utf-8")), package, set(files)
        ):
            top = target.split(".")[0]
            to = layer_of(target) if top == PACKAGE else top
            if target == "?":
                if layer != "functional" or not in_function:
                    wrong.append(f"{where}:{line}: only functional may import a name it computes")
            elif top in OWNER and layer != OWNER[top]:
                wrong.append(f"{where}:{line}: only {OWNER[top]} may import {top}")
            elif top == PACKAGE and to != layer and not ALLOWED[layer] & {to, *ANYTHING}:
                wrong.append(f"{where}:{line}: {layer} may not import {to}")
            elif (layer, to) in LAZY and not in_function:
                wrong.append(f"{where}:{line}: {layer} imports {to} outside a function")
    return wrong


def test_imports_run_one_way():
    assert find_back_arrows(ROOT) == []


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A source tree with one empty file for each layer."""
    for layer in ALLOWED:
        folder = tmp_path / ("" if layer == "cuda_src" else PACKAGE) / layer.replace(".", "/")
        is_package = layer in {"reference", "engines", "cuda_src"} | ENGINES
        path = folder / "__init__.py" if is_package else folder.with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path


@pytest.mark.parametrize(
    ("path", "code", "complaint"),
    [
        ("tables.py", "from .optim import SparseAdamW", ":1: tables may not import optim"),
        ("tables.py", "from . import optim", ":1: tables may not import optim"),
        ("tables.py", "import cupy_sparse_adamw.optim", ":1: tables may not import optim"),
        ("tables.py", "from . import SparseAdamW", ":1: tables may not import __init__"),
        ("tables.py", "def f():\n    from .optim import X", ":2: tables may not import optim"),
        ("tables.py", "__import__('cupy_sparse_adamw.optim')", ":1: tables may not import optim"),
        ("optim.py", "from .engines.cpu.adamw import f", ":1: optim may not import engines.cpu"),
        ("_types.py", "from ._checks import f", ":1: _types may not import _checks"),
        ("reference/a.py", "from ..engines import cpu", ":1: reference may not import engines.cpu"),
        ("engines/cpu/a.py", "from .. import cuda", ":1: engines.cpu may not import engines.cuda"),
        (
            "engines/cpu/a.py",
            "from ...functional import f",
            ": engines.cpu may not import functional",
        ),
        ("functional.py", "from .engines import cpu", ":1: functional imports engines.cpu outside"),
        ("functional.py", "import numba.core", ":1: only engines.cpu may import numba"),
        ("engines/cpu/a.py", "import cupy", ":1: only engines.cuda may import cupy"),
        ("tables.py", "def f(x):\n    import_module(x)", ":2: only functional may import a name"),
        ("new.py", "", ": unknown layer new; add it to ALLOWED"),
    ],
)
def test_a_planted_back_arrow_is_found(tree: Path, path: str, code: str, complaint: str):
    assert find_back_arrows(tree) == []
    (tree / PACKAGE / path).write_text(code)
    (wrong,) = find_back_arrows(tree)
    assert wrong.startswith(f"{PACKAGE}/{path}")
    assert complaint.lstrip(":") in wrong


def test_arrows_that_run_forward_are_not(tree: Path):
    plants = {
        "optim.py": "from .hash_table import HashTable\nfrom . import tables, functional",
        "functional.py": "def f(name):\n    from .engines import cpu\n    import_module(name)",
        "engines/cpu/a.py": "import numba\nfrom ... import _types\nfrom .b import f",
        "engines/cpu/b.py": "",
        "reference/__init__.py": "from .a import f",
        "reference/a.py": "import torch",
    }
    for path, code in plants.items():
        (tree / PACKAGE / path).write_text(code)
    assert find_back_arrows(tree) == []


def run_from_source(code: str, cwd: Path, **env: str) -> str:
    """What ``code`` prints in a new Python that finds the package through PYTHONPATH alone."""
    # What an editable install finds beside PYTHONPATH must not count.
    prelude = (
        "import sys\n"
        "hooks = [f for f in sys.meta_path if 'Editable' in getattr(f, '__name__', '')]\n"
        "sys.meta_path = [f for f in sys.meta_path if f not in hooks]\n"
    )
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-c", prelude + code],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": path, **env},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_loads_no_compiler_and_needs_no_gpu(tmp_path: Path):
    code = (
        f"import {PACKAGE}\nfrom {PACKAGE} import checkpoint\n"
        f"print([m for m in {sorted(OWNER)} if m in sys.modules])\n"
    )
    assert run_from_source(code, tmp_path, CUDA_VISIBLE_DEVICES="") == "[]"


def test_it_runs_from_a_source_tree_with_pythonpath_alone(tmp_path: Path):
    code = (
        "import torch\n"
        f"import {PACKAGE}\n"
        "table = torch.nn.Embedding(3, 2, sparse=True)\n"
        f"optimizer = {PACKAGE}.SparseAdamW({{'table': table}}, lr=0.5)\n"
        "before = table.weight.detach().clone()\n"
        "table(torch.tensor([1])).sum().backward()\n"
        "optimizer.step()\n"
        "print((table.weight != before).any(1).tolist())\n"
        f"print({PACKAGE}.__file__)\n"
    )
    moved, file = run_from_source(code, tmp_path).splitlines()
    assert moved == "[False, True, False]"
    assert Path(file) == ROOT / PACKAGE / "__init__.py"


def test_every_package_is_in_the_wheel():
    listed = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for init in (ROOT / PACKAGE).rglob("__init__.py"):
        name = ".".join(init.parent.relative_to(ROOT).parts)
        assert f'    "{name}",\n' in listed, f"{name}: add it to tool.setuptools.packages"
