"""`renorm report`: run folders as one page, beside what the papers claim."""

from .page import report

__all__ = ["report"]
