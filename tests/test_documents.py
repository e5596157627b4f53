"""The code of the documentation runs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from torch import distributed as dist

DOCS = Path(__file__).parent.parent / "docs"
BLOCK = re.compile(r"^( *)```python\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


EXPORTING = [
    pytest.mark.slow,  # AOTInductor compiles C++
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning"),
]
FRAMEWORKS = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
]
MONAI = [
    pytest.mark.skipif(find_spec("monai") is None, reason="needs MONAI"),
    pytest.mark.filterwarnings("ignore"),  # its own, and those of what it imports
]
PAGES = [
    "index", "recurrent", "training-loops", "distributed", "several-forwards", "trained-models", "weight-decay",
    "other-checkpoints", "finetuning", "shift", "mathematics", "limits", "coming-from", "small-batches",
    "dependent-batches", "tools", pytest.param("integrations", marks=FRAMEWORKS),
    pytest.param("shipping", marks=EXPORTING), pytest.param("tiled-inference", marks=MONAI),
]  # fmt: skip


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_a_page_runs(page: str) -> None:
    text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
    blocks = BLOCK.findall(text)
    assert blocks
    names: dict[str, object] = {}
    for indent, block in blocks:
        line = text[: text.index(block)].count("\n")
        exec(compile("\n" * line + re.sub(f"^{indent}", "", block, flags=re.MULTILINE), f"{page}.md", "exec"), names)


def test_what_the_decision_page_prints_is_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    text = (DOCS / "decide.md").read_text(encoding="utf-8")
    shown = re.findall(r"^```python\n(.*?)^```\n\n^```\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert len(shown) == text.count("```python") == text.count("```") / 4
    names: dict[str, object] = {}
    for code, output in shown:
        exec(code, names)
        assert capsys.readouterr().out == output


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.stem)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert (page.parent / link).exists(), link
