"""The lab stands on the library's public names."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import renorm_lab

PUBLIC = {"renorm", "renorm.files", "renorm.functional", "renorm.markup", "renorm.optim", "renorm.samplers"}
SOURCE = Path(renorm_lab.__file__).parent


@pytest.mark.parametrize("file", sorted(SOURCE.rglob("*.py")), ids=lambda file: str(file.relative_to(SOURCE)))
def test_imports_of_the_library_are_of_public_modules(file: Path):
    imported = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            imported.add(node.module)
    ours = {name for name in imported if name.split(".")[0] == "renorm"}
    assert all(name in PUBLIC or name.startswith("renorm.integrations.") for name in ours)
