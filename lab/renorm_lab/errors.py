"""The one exception whose message is all that a user needs to see."""

from __future__ import annotations

import re
from collections.abc import Iterable

from renorm.markup import printable


class LabError(Exception):
    """Something outside the program is wrong: an option, a file, a process. The message is one line, or a list.

    Args:
        message: what is wrong; of other lines, as in the messages of other programs, one is made.
        listed: lines of a list below it.
    """

    def __init__(self, message: str, listed: Iterable[str] = ()) -> None:
        super().__init__(message, tuple(listed))  # what a process hands to another

    def __str__(self) -> str:
        message, listed = self.args
        return "\n  ".join(printable(re.sub(r"\s*[\r\n\t]\s*", " ", line)) for line in (message, *listed))
