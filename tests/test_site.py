"""The site: it builds without a warning, loads nothing from elsewhere, and its pictures have texts and figures."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

import renorm

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
PICTURE = re.compile(r"!\[(?P<text>[^\]]*)\]\((?P<path>[^)\s]+)\)")
FIGURES_OF = {  # where the CSV does not lie beside the picture
    "docs/figures/copies.png": "benchmarks/results/layers.csv",
    "docs/figures/microbatch.png": "results/microbatch-digits/results.csv",
    "docs/figures/workers.png": "results/workers-fashion/results.csv",
    "docs/figures/models.png": "benchmarks/results/models.csv",
}
pytestmark = pytest.mark.skipif(not (ROOT / "results").exists(), reason="an sdist holds no results")
NAMES = [name for name in renorm.__all__ if name not in ("functional", "optim", "samplers")]


def pictures() -> list[Path]:
    """Every picture that a page shows, by its path."""
    return sorted({
        Path(os.path.normpath(page.parent / picture["path"]))
        for page in [*PAGES, ROOT / "README.md"]
        for picture in PICTURE.finditer(page.read_text(encoding="utf-8"))
    })  # fmt: skip


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda page: page.stem)
def test_every_picture_of_a_page_has_a_text(page: Path) -> None:
    source = page.read_text(encoding="utf-8")
    assert "<img" not in source, "pictures are written as ![text](path)"
    without = [picture["path"] for picture in PICTURE.finditer(source) if len(picture["text"].split()) < 3]
    assert not without


@pytest.mark.parametrize("picture", pictures(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_plot_has_its_numbers_in_a_table(picture: Path) -> None:
    elsewhere = FIGURES_OF.get(picture.relative_to(ROOT).as_posix())
    table = ROOT / elsewhere if elsewhere else picture.with_suffix(".csv")
    candidates = [table] if elsewhere else [table, picture.parent / "results.csv"]
    assert picture.exists()
    assert any(path.exists() and path.stat().st_size > 0 for path in candidates)


def build(folder: Path, config: Path = ROOT / "mkdocs.yml") -> subprocess.CompletedProcess[str]:
    """Build the site as `make docs` does, into a folder."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", config, "--site-dir", folder]
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, check=False
    )


class Page(HTMLParser):
    """What a page loads, where its links lead, and the texts of its pictures."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.texts: list[str | None] = []
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.ids.add(given.get("id", ""))
        if tag == "img":
            self.texts.append(given.get("alt"))
        if tag == "a":
            self.links.append(given.get("href", ""))
        elif tag == "link" and given.get("rel") not in ("canonical", "prev", "next"):
            self.loaded.append(given.get("href", ""))
        self.loaded += [given[name] for name in ("src", "srcset", "poster", "data") if name in given]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built once."""
    folder = tmp_path_factory.mktemp("site")
    built = build(folder)
    assert built.returncode == 0, built.stdout + built.stderr
    assert "WARNING" not in built.stdout + built.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    """Every page of the site."""
    return {path: Page(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}


@pytest.mark.slow
@pytest.mark.xdist_group("site")
class TestSite:
    """Of the site as it is built."""

    def test_every_page_of_the_docs_is_there(self, site: Path) -> None:
        for page in PAGES:
            assert (site / page.relative_to(DOCS)).with_suffix(".html").exists(), page

    def test_nothing_is_loaded_from_elsewhere(self, site: Path, pages: dict[Path, Page]) -> None:
        for path, page in pages.items():
            assert page.loaded, path
            elsewhere = [source for source in page.loaded if re.match(r"(?:[a-z]+:)?//", source)]
            assert not elsewhere, path
        for sheet in site.rglob("*.css"):
            assert not re.search(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//", sheet.read_text(encoding="utf-8")), sheet

    def test_what_a_page_loads_or_links_to_is_there(self, site: Path, pages: dict[Path, Page]) -> None:
        for path, page in pages.items():
            if path.name == "404.html":  # its paths are the server's
                continue
            for source in [*page.loaded, *page.links]:
                place, _, anchor = source.partition("#")
                if not source or re.match(r"[a-z]+:", place):
                    continue
                target = (path.parent / place).resolve() if place else path
                target = target / "index.html" if target.is_dir() else target
                assert target.exists(), (path, source)
                if anchor and not anchor.startswith("__") and target.suffix == ".html":
                    assert anchor in pages[target].ids, (path, source)

    def test_search_works_without_a_server(self, site: Path, pages: dict[Path, Page]) -> None:
        assert "BatchRenorm" in (site / "search" / "search_index.js").read_text(encoding="utf-8")
        assert "assets/iframe-worker.js" in pages[site / "index.html"].loaded

    def test_every_picture_has_a_text(self, pages: dict[Path, Page]) -> None:
        assert any(page.texts for page in pages.values())
        for path, page in pages.items():
            assert all(page.texts), path

    def test_formulas_are_mathml(self, site: Path) -> None:
        html = (site / "mathematics.html").read_text(encoding="utf-8")
        assert "<math" in html
        for path in site.rglob("*.html"):
            text = re.sub(r"<(code|script|pre)\b.*?</\1>", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
            assert "arithmatex" not in text
            assert not re.search(r"\$[^$<]*\\[a-z]+", text), path

    def test_the_reference_has_every_public_name(self, site: Path) -> None:
        reference = "".join(page.read_text(encoding="utf-8") for page in (site / "reference").glob("*.html"))
        headings = re.findall(r"<h2[^>]*>(.*?)</h2>|<h3[^>]*>(.*?)</h3>", reference, re.DOTALL)
        shown = {re.sub(r"<[^>]*>", "", first or second).split()[0] for first, second in headings}
        missing = {name for name in NAMES if f"renorm.{name}" not in shown}
        assert not missing

    def test_docstrings_are_rendered(self, site: Path) -> None:
        html = (site / "reference" / "inference.html").read_text(encoding="utf-8")
        assert '<details class="source"' in html
        assert "Examples:" in html
        assert "Raises:" in html
        assert "<blockquote>" not in html, "an example is shown as a quotation"
        assert "Example:</" not in html


@pytest.mark.slow
@pytest.mark.parametrize("link", ["gone.md", "#gone", "../gone.csv"])
def test_a_dead_link_fails_the_build(tmp_path: Path, link: str) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text(f"# Page\n\n[gone]({link})\n", encoding="utf-8")
    config = {"INHERIT": f"{ROOT / 'mkdocs.yml'}", "docs_dir": "docs", "nav": ["index.md"]}
    (tmp_path / "mkdocs.yml").write_text(
        json.dumps(config | {"hooks": [], "plugins": [], "watch": []}), encoding="utf-8"
    )
    built = build(tmp_path / "site", tmp_path / "mkdocs.yml")
    assert built.returncode != 0
    assert link in built.stdout + built.stderr
