"""Every picture is a link to itself, so that it can be seen in its own size."""

from __future__ import annotations

import re

_PICTURE = re.compile(r'<img [^>]*?src="(?P<source>[^"]+)"[^>]*>')


def on_page_content(content: str, **_: object) -> str:
    """Put a link around each picture of a page.

    Args:
        content: of the page, HTML.

    Returns:
        The HTML with links.
    """
    return _PICTURE.sub(r'<a href="\g<source>">\g<0></a>', content)
