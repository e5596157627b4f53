"""Notebooks become pages: text, code, and the outputs that are kept in the file."""

from __future__ import annotations

import json
import re
from base64 import b64decode
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

_LINK = re.compile(r"(\]\([^)\s:]+)\.ipynb(?=[)#])")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for every notebook, and its pictures; the notebook stays, to be loaded down.

    Args:
        files: those in docs/, completed in place.
        config: of the site.

    Returns:
        The files.

    Raises:
        PluginError: a picture has no text: give its cell "alt" in the metadata.
    """
    for file in [file for file in files if file.src_uri.endswith(".ipynb")]:
        path = PurePosixPath(file.src_uri)
        pictures: dict[str, bytes] = {}
        parts = [part for cell in json.loads(file.content_string)["cells"] for part in _parts(cell, path, pictures)]
        files.append(File.generated(config, str(path.with_suffix(".md")), content="\n\n".join(parts)))
        for name, picture in pictures.items():
            files.append(File.generated(config, str(path.with_name(name)), content=picture))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Turn links to notebooks to their pages.

    Args:
        markdown: of any page.

    Returns:
        The Markdown with links that stay on the site.
    """
    return _LINK.sub(r"\1.md", markdown)


def _parts(cell: dict[str, Any], path: PurePosixPath, pictures: dict[str, bytes]) -> Iterator[str]:
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        yield source
    if cell["cell_type"] != "code":
        return
    yield _fenced(source, "python")
    for output in cell["outputs"]:
        if "text" in output:
            yield _fenced("".join(output["text"]), "text")
            continue
        data = output.get("data", {})
        if "image/png" in data:
            yield _picture(b64decode("".join(data["image/png"])), cell["metadata"].get("alt"), path, pictures)
        elif "text/html" in data:
            yield "".join(data["text/html"])
        elif "text/plain" in data:
            yield _fenced("".join(data["text/plain"]), "text")


def _fenced(text: str, language: str) -> str:
    return f"```{language}\n{text.rstrip()}\n```"


def _picture(content: bytes, alt: str | None, path: PurePosixPath, pictures: dict[str, bytes]) -> str:
    if not alt:
        raise PluginError(f'{path}: picture {len(pictures) + 1} has no text; give its cell "alt" in the metadata')
    name = f"{path.stem}-{len(pictures) + 1}.png"
    pictures[name] = content
    return f"![{alt}]({name})"
