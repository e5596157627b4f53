"""What is timed: one step of a layer or of a network, as the harness wants it."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from harness import Step


def train_step(layer: nn.Module, x: Tensor, residual: Tensor | None) -> Step:
    """Forward and backward of a layer, to everything that has a gradient.

    Args:
        layer: in training mode.
        x: its input, which wants a gradient.
        residual: handed to the layer, if there is one; wants a gradient too.

    Returns:
        A step with the parts forward, backward and both.
    """
    extra = {} if residual is None else {"residual": residual}
    leaves = (x, *extra.values(), *layer.parameters())
    dy = torch.randn_like(x)

    def step() -> dict[str, float]:
        start = time.perf_counter()
        y = layer(x, **extra)
        middle = time.perf_counter()
        gradients = torch.autograd.grad(y, leaves, dy)
        del y, gradients  # to give memory back takes time too
        end = time.perf_counter()
        return {"forward": middle - start, "backward": end - middle, "both": end - start}

    return step


def eval_step(layer: nn.Module, x: Tensor) -> Step:
    """Forward of a layer without gradients.

    Args:
        layer: in evaluation mode.
        x: its input.

    Returns:
        A step with the part forward.
    """

    @torch.inference_mode()
    def step() -> dict[str, float]:
        start = time.perf_counter()
        layer(x)
        return {"forward": time.perf_counter() - start}

    return step


def warm_step(call: Callable[[], object]) -> Step:
    """A call without gradients, in caches that another one before it has filled, whatever ran before that.

    Args:
        call: what is timed, by the processor's time in this process, which leaves out what others take from it; runs on
            one thread.

    Returns:
        A step with the part step.
    """

    @torch.inference_mode()
    def step() -> dict[str, float]:
        call()
        start = time.process_time()
        call()
        return {"step": time.process_time() - start}

    return step


def copy_step(x: Tensor) -> Step:
    """A copy of a tensor: what a layer would take that reads and writes each byte once.

    Args:
        x: the tensor.

    Returns:
        A step with the part forward.
    """
    x = x.detach()

    def step() -> dict[str, float]:
        start = time.perf_counter()
        x.clone()
        return {"forward": time.perf_counter() - start}

    return step


def network_step(model: nn.Module, images: Tensor) -> Step:
    """A training step of a classifier with SGD.

    Args:
        model: in training mode.
        images: its input.

    Returns:
        A step with the part step.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    labels = torch.arange(len(images))

    def step() -> dict[str, float]:
        start = time.perf_counter()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()  # last, so that a step finds no memory that it would give back
        return {"step": time.perf_counter() - start}

    return step
