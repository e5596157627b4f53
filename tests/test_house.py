"""What CONTRIBUTING says of the house and `make lint` does not check."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LIBRARY, LAB = ROOT / "src" / "renorm", ROOT / "lab" / "renorm_lab"
TREES = {
    file.relative_to(ROOT).as_posix(): ast.parse(file.read_text(encoding="utf-8"))
    for folder in (LIBRARY, LAB)
    for file in sorted(folder.rglob("*.py"))
}
OPS = "src/renorm/ops/"
CALL_OPERATIONS = tuple(OPS + name for name in ("kernels.py", "backends.py"))
MIRROR_OPERATIONS = OPS + "schema.py"  # whose parameters are torch's flat lists
MAKE_TENSORS = {
    "arange", "empty", "empty_strided", "eye", "full", "linspace", "logspace", "normal", "ones", "rand", "randint",
    "randn", "randperm", "tensor", "zeros",
}  # fmt: skip
MOST_PARAMETERS = 6
MOST_FILES = 100


def test_operations_are_called_in_few_places() -> None:
    called = [
        f"{file}:{node.lineno}"
        for file, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.ops.renorm"
    ]
    assert any(place.startswith(CALL_OPERATIONS) for place in called)
    assert not [place for place in called if not place.startswith(CALL_OPERATIONS)]


def test_no_function_takes_more_than_six_positional_parameters() -> None:
    too_many = [
        f"{file}:{function.lineno} {function.name}"
        for file, tree in TREES.items()
        for function in _functions(tree)
        if _positional_parameters(function) > MOST_PARAMETERS and not file.startswith(MIRROR_OPERATIONS)
    ]
    assert not too_many


def test_the_library_says_where_its_tensors_are() -> None:
    """Else they are on the caller's default device, which is for tensors of the caller's own."""
    calls = [
        (f"{file}:{node.lineno} {ast.unparse(node.func)}", {keyword.arg for keyword in node.keywords})
        for file, tree in TREES.items()
        for node in ast.walk(tree)
        if file.startswith("src/") and isinstance(node, ast.Call) and _makes_a_tensor(node.func)
    ]
    assert calls
    assert not [place for place, named in calls if "device" not in named]


def _makes_a_tensor(function: ast.expr) -> bool:
    module, _, name = ast.unparse(function).rpartition(".")
    return module == "torch" and name in MAKE_TENSORS


def _functions(tree: ast.AST) -> Iterator[ast.FunctionDef]:
    """Functions and methods, but for constructors, Triton's kernels and what torch calls with lists of its own."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef) and any(
            ast.unparse(d).startswith("triton.jit") for d in node.decorator_list
        ):
            continue
        if isinstance(node, ast.ClassDef) and any("autograd.Function" in ast.unparse(base) for base in node.bases):
            continue
        if isinstance(node, ast.FunctionDef) and node.name != "__init__":
            yield node
        yield from _functions(node)


def _positional_parameters(function: ast.FunctionDef) -> int:
    """How many a caller may give by place."""
    names = [parameter.arg for parameter in (*function.args.posonlyargs, *function.args.args)]
    return len(names) - (names[:1] in (["self"], ["cls"]))


def test_the_library_has_few_files() -> None:
    assert sum(file.startswith("src/") for file in TREES) <= MOST_FILES


@pytest.mark.parametrize("script", ["Makefile", "tests/oldest.sh", ".github/workflows/tests.yml", ".ci/run"])
def test_scripts_name_files_that_are_there(script: str) -> None:
    named = re.findall(r"(?:tests|benchmarks|lab)/[\w/.-]+\w", (ROOT / script).read_text(encoding="utf-8"))
    assert not [path for path in named if not (ROOT / path).exists() and path != "lab/build"]  # which clean removes
