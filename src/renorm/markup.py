"""Text from elsewhere as text: in HTML for notebooks, and in pictures."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from html import escape
from unicodedata import category


def table(header: Sequence[str], rows: Iterable[Sequence[str]], marked: Container[str] = ()) -> str:
    """A table.

    Args:
        header: names of the columns.
        rows: the lines.
        marked: first cells of the lines to mark.

    Returns:
        The HTML.

    Example:
        >>> table(["layer", "r"], [["<root>", "1.0"]], marked={"<root>"}).partition("<tbody>")[2]
        '<tr><td><mark>&lt;root&gt;</mark></td><td>1.0</td></tr></tbody></table>'
    """
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in header)
    body = "".join(f"<tr>{_cells(row, marked=row[0] in marked)}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def bullets(texts: Iterable[object]) -> str:
    """A list.

    Args:
        texts: the items.

    Returns:
        The HTML.

    Example:
        >>> bullets(["a < b"])
        '<ul><li>a &lt; b</li></ul>'
    """
    return f"<ul>{''.join(f'<li>{escape(str(text))}</li>' for text in texts)}</ul>"


def _cells(row: Sequence[str], *, marked: bool) -> str:
    first, *others = map(escape, row)
    return f"<td>{f'<mark>{first}</mark>' if marked else first}</td>" + "".join(f"<td>{cell}</td>" for cell in others)


def printable(text: str) -> str:
    """Text on one line that does to a terminal or a picture nothing but stand there.

    Args:
        text: any text, as the name of a file.

    Returns:
        The same, with escapes for control characters, line ends, and bytes that were no text.

    Example:
        >>> printable("layer\\n\\x1b[31m")
        'layer\\\\n\\\\x1b[31m'
    """
    return "".join(
        letter.encode("unicode_escape").decode() if category(letter) in ("Cc", "Cs", "Zl", "Zp") else letter
        for letter in text
    )


def picture_text(text: str) -> str:
    """Text for matplotlib, which takes what is between two dollar signs for a formula.

    Args:
        text: any text; line ends stay.

    Returns:
        What matplotlib draws as `text`.

    Example:
        >>> print(picture_text("$x_$.npz"))
        \\$x_\\$.npz
    """
    return "\n".join(map(printable, text.replace("$", r"\$").split("\n")))
