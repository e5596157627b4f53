"""docs/messages.md has every error and warning of the source and no other, word for word but for what is filled in."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = (ROOT / "src" / "renorm", ROOT / "lab" / "renorm_lab")
PAGE = ROOT / "docs" / "messages.md"
FILLED_IN = ".{1,120}?"


def _pattern(node: ast.expr) -> str:
    """A regular expression for the text that an expression makes."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.escape(_plain(node.value))
    if isinstance(node, ast.JoinedStr):
        return "".join(_pattern(part) for part in node.values)
    if isinstance(node, ast.BinOp):
        return _pattern(node.left) + _pattern(node.right)
    if isinstance(node, ast.IfExp):
        return f"(?:{_pattern(node.body)}|{_pattern(node.orelse)})"
    return FILLED_IN


def _plain(text: str) -> str:
    """Without the marks of code, and with one space for any."""
    return re.sub(r"\s+", " ", text.replace("`", ""))


def _messages(file: Path) -> Iterator[tuple[int, str]]:
    """Line and pattern of everything that a file raises or warns of in words of its own."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        call = node.exc if isinstance(node, ast.Raise) else node
        if not isinstance(call, ast.Call) or not call.args:
            continue
        if call is node and ast.unparse(call.func) != "warnings.warn":
            continue
        pattern = _pattern(call.args[0])
        if re.search("[a-z]{3}", pattern.replace(FILLED_IN, "")):
            yield node.lineno, pattern


SAID = {file: list(_messages(file)) for package in PACKAGES for file in sorted(package.rglob("*.py"))}


@pytest.mark.parametrize("file", SAID, ids=lambda file: str(file.relative_to(ROOT)))
def test_the_page_has_every_message_of_a_file(file: Path) -> None:
    page = _plain(PAGE.read_text(encoding="utf-8"))
    missing = [f"line {line}: {pattern}" for line, pattern in SAID[file] if not re.search(pattern, page)]
    assert not missing


def test_the_page_has_no_other_messages() -> None:
    patterns = [re.compile(pattern) for said in SAID.values() for _, pattern in said]
    listed = re.findall(r"^- (`+)(.+?)\1(?!`)", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert len(listed) > 100
    others = [message for _, message in listed if not any(p.fullmatch(_plain(message).strip()) for p in patterns)]
    assert not others
