"""ultralytics, which changes things when it is imported."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image


@pytest.fixture
def ultralytics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The package, with its settings in a folder of the test's, and without what it does to torch, NumPy and Pillow."""
    monkeypatch.setenv("YOLO_CONFIG_DIR", str(tmp_path))
    monkeypatch.setenv("YOLO_OFFLINE", "true")
    monkeypatch.setattr(torch, "save", torch.save)
    monkeypatch.setattr(Image, "open", Image.open)
    with np.printoptions(), torch._tensor_str.printoptions():
        yield pytest.importorskip("ultralytics")
