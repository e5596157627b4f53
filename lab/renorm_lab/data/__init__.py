"""Images to train on, from a name or a path."""

from .dataset import Dataset, Part
from .load import load_dataset

__all__ = ["Dataset", "Part", "load_dataset"]
