"""Counts launches of layers over the stub, first and bound, as JSON. A process of its own, begun by stub.driver.run."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from typing import Any

import torch
from stub import driver

import renorm
from renorm.ops import backends
from renorm.ops.triton import forward, plans

counted: Counter[str] = Counter()


def count_calls(name: str) -> None:
    original = getattr(plans.Launch, name)

    def call(self: Any, *arguments: Any) -> None:
        counted[name] += 1
        original(self, *arguments)

    setattr(plans.Launch, name, call)


def launches(layer: torch.nn.Module, x: torch.Tensor) -> dict[str, int]:
    """Of a step with its backward."""
    counted.clear()
    layer(x).backward(torch.ones_like(x))
    return dict(counted)


def without_compiler() -> dict[str, Any]:
    """What a layer does whose kernels do not compile."""
    layer, x = renorm.BatchRenorm2d(12), torch.randn(8, 12, 4, 4)
    expected = torch.nn.BatchNorm2d(12)(x)

    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("Failed to find C compiler")

    forward.apply_whole = type("Kernel", (), {"__getitem__": lambda *_: fails, "__name__": "apply_whole"})()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        first, second = layer(x), layer(x)
    return {
        "warnings": [str(warning.message) for warning in caught], "steps": int(layer.num_batches_tracked),
        "error": float((first - expected).abs().max()), "goes on": backends.available["cpu"],
        "again": float((second - expected).abs().max()),
    }  # fmt: skip


def main() -> None:
    driver.activate()
    for name in ("first", "__call__"):
        count_calls(name)
    small, large = (8, 16, 4, 4), (64, 16, 32, 32)
    found = {}
    for kind, shape in (("small", small), ("large", large)):
        x = torch.randn(shape).contiguous(memory_format=torch.channels_last).requires_grad_()
        for name, limits in (("constant", renorm.Limits.constant()), ("ramp", renorm.Limits())):
            layer = renorm.BatchRenorm2d(16, limits=limits)
            found[f"{kind}, {name}"] = [launches(layer, x), launches(layer, x)]
    layer, x = renorm.BatchRenorm2d(16), torch.randn(8 * 16 * 16 + 1)[1:].view(small).requires_grad_()
    aligned = torch.randn(small, requires_grad=True)
    found["aligned, then not"] = [launches(layer, aligned), launches(layer, x)]

    found["without a compiler"] = without_compiler()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
