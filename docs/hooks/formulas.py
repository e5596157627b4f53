"""Formulas become MathML when the site is built, which browsers show without a script."""

from __future__ import annotations

import html
import re

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError
from mkdocs.structure.pages import Page

_FORMULA = re.compile(r'<(?P<tag>span|div) class="arithmatex">(?P<tex>.*?)</(?P=tag)>', re.DOTALL)


def on_page_content(content: str, page: Page, **_: object) -> str:
    """Convert what pymdownx.arithmatex has marked.

    Args:
        content: of the page, HTML.
        page: named if a formula is not understood.

    Returns:
        The HTML with MathML in it.

    Raises:
        PluginError: a formula has a command that latex2mathml does not know.
    """

    def mathml(formula: re.Match[str]) -> str:
        display = "block" if formula["tag"] == "div" else "inline"
        tex = html.unescape(formula["tex"]).strip()
        converted = convert(tex, display=display)
        if "\\" in converted:  # what is not known is passed on as it is
            raise PluginError(f"{page.file.src_uri}: latex2mathml does not know all of {tex}")
        return f'<div class="formula">{converted}</div>' if display == "block" else converted

    return _FORMULA.sub(mathml, content)
