"""Links to files outside docs/ lead to copies on the site, so that the same links work in the repository and here."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
COPIES = "files"  # the folder of the copies on the site
_SOURCES = {page: source for source, page in PAGES.items()}
_LINK = re.compile(r"(?<=\]\()(?P<path>[^)\s#:]+)(?P<anchor>#[^)\s]*)?(?=\))")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the root's pages, and everything that pages link to outside docs/.

    Args:
        files: those in docs/, completed in place.
        config: of the site.

    Returns:
        The files.
    """
    for source, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    linked = {target for file in files.documentation_pages() for target in _targets(file)}
    copied = {target for target in linked if _place(target).startswith(f"{COPIES}/")}
    folders = {target for target in copied if (ROOT / target).is_dir()}
    for folder in sorted(folders):
        names = _names(folder)
        copied |= {f"{folder}/{name}" for name in names}
        files.append(_added(config, _place(folder), content=_listing(folder, names)))
    for target in sorted(copied - folders):
        files.append(_added(config, _place(target), abs_src_path=str(ROOT / target)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Turn links that leave docs/ to where the site has their targets.

    Args:
        markdown: of the page.
        page: whose links these are.

    Returns:
        The Markdown with links that stay on the site.
    """
    folder = PurePosixPath(page.file.src_uri).parent

    def onsite(link: re.Match[str]) -> str:
        target = _resolve(page.file, link["path"])
        if target is None:
            return link[0]
        return os.path.relpath(_place(target), folder) + (link["anchor"] or "")

    return _LINK.sub(onsite, markdown)


def _targets(file: File) -> Iterator[str]:
    for link in _LINK.finditer(file.content_string):
        target = _resolve(file, link["path"])
        if target is not None:
            yield target


def _resolve(file: File, link: str) -> str | None:
    """The linked path from the root; None for what MkDocs itself follows, or reports as dead."""
    source = _SOURCES.get(file.src_uri)
    folder = ROOT if source else ROOT / "docs" / PurePosixPath(file.src_uri).parent
    target = Path(os.path.normpath(folder / link))
    if not target.exists() or not target.is_relative_to(ROOT):
        return None
    path = target.relative_to(ROOT).as_posix()
    return None if path.startswith("docs/") and source is None else path


def _place(target: str) -> str:
    """Where the site has a file of the repository, or the list of a folder's files."""
    if target.startswith("docs/"):
        return target.removeprefix("docs/")
    if target == "README.md":
        return "index.md"
    if target in PAGES:
        return PAGES[target]
    return f"{COPIES}/{target}/index.md" if (ROOT / target).is_dir() else f"{COPIES}/{target}"


def _added(config: MkDocsConfig, place: str, **source: str) -> File:
    return File.generated(config, place, inclusion=InclusionLevel.NOT_IN_NAV, **source)


def _names(folder: str) -> list[str]:
    return sorted(path.relative_to(ROOT / folder).as_posix() for path in (ROOT / folder).rglob("*") if path.is_file())


def _listing(folder: str, names: list[str]) -> str:
    return "\n".join([f"# {folder}", "", *(f"- [{name}]({name})" for name in names)]) + "\n"
