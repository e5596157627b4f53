"""Padded and packed sequences: which steps count, and what is refused."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence


def unpacked(x: PackedSequence) -> tuple[Tensor, Tensor, Tensor]:
    """A packed sequence as a padded one, examples in their original order.

    Args:
        x: packed sequence.

    Returns:
        Padded input, (T, N, I); True where a step counts, (T, N); lengths on the CPU, (N,).
    """
    padded, lengths = pad_packed_sequence(x)
    steps = torch.arange(len(padded), device=padded.device)
    return padded, steps[:, None] < lengths.to(padded.device), lengths


def packed_like(x: PackedSequence, output: Tensor, lengths: Tensor) -> PackedSequence:
    """Pack an output as its input was.

    Args:
        x: packed input.
        output: padded output, (T, N, H), examples in their original order.
        lengths: of the examples, (N,), on the CPU.

    Returns:
        The packed output, with the input's order of examples.
    """
    if x.sorted_indices is not None:
        output, lengths = output[:, x.sorted_indices], lengths[x.sorted_indices.cpu()]
    return PackedSequence(pack_padded_sequence(output, lengths).data, *x[1:])


def check_sequence(x: Tensor, input_size: int, layout: str) -> None:
    """Refuse input that is not a batch of sequences.

    Args:
        x: the input, steps first.
        input_size: features that it must have.
        layout: its shape as the caller passes it, such as "(T, N, input_size)".

    Raises:
        TypeError: it is not floating point.
        ValueError: it has another shape.
    """
    if not x.dtype.is_floating_point:
        raise TypeError(f"x must be a floating-point tensor, got {x.dtype}")
    if x.ndim != 3 or x.shape[2] != input_size:
        raise ValueError(f"x must have shape {layout} with input_size={input_size}, got {tuple(x.shape)}")


def check_mask(mask: Tensor, shape: tuple[int, ...]) -> None:
    """Refuse a mask that does not fit.

    Args:
        mask: True where a step counts.
        shape: that of the input without its features.

    Raises:
        TypeError: it is not boolean.
        ValueError: it has another shape.
    """
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be a boolean tensor, True where a step counts, got {mask.dtype}")
    if mask.shape != shape:
        raise ValueError(f"mask must have the shape of x without features, {shape}, got {tuple(mask.shape)}")


def check_state(state: tuple[Tensor, ...], shape: tuple[int, ...], names: tuple[str, ...]) -> None:
    """Refuse a state that does not fit.

    Args:
        state: its tensors.
        shape: that each must have, (num_layers * directions, N, H).
        names: one for each tensor.

    Raises:
        TypeError: it is no tuple of as many tensors as there are names.
        ValueError: a shape does not fit.
    """
    if not isinstance(state, tuple) or len(state) != len(names):
        given = f"{len(state)} of them" if isinstance(state, tuple) else type(state).__name__
        raise TypeError(f"state must be a tuple of {len(names)} tensors, ({', '.join(names)}), got {given}")
    for name, tensor in zip(names, state, strict=True):
        if tensor.shape != shape:
            raise ValueError(
                f"{name} of state must have shape {shape}, (num_layers * directions, N, hidden_size), "
                f"got {tuple(tensor.shape)}"
            )
