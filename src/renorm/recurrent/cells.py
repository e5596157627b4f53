"""LSTM and GRU cells with normalized projections, and how they run over a sequence."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ..layers import BatchRenorm1d
from ..limits import Limits
from ..ops.tracking import Tracking

_GAIN = 0.1  # gamma at the start: with 1, gates saturate and gradients vanish (Cooijmans et al. 2017, section 4)

State = tuple[Tensor, ...]  # h first, (N, H) each


class NormOptions(NamedTuple):
    """What the norm layers of a recurrent layer have in common.

    Args:
        eps: added to variances.
        momentum: weight of a new sequence in the running statistics; None for the cumulative average.
        limits: of the correction; None for batch norm.
        tracking: how the running variance moves.
        device: of parameters and buffers.
        dtype: of parameters.
    """

    eps: float
    momentum: float | None
    limits: Limits | None
    tracking: Tracking
    device: torch.device | str | None
    dtype: torch.dtype | None

    def layer(self, num_features: int, bias: bool) -> BatchRenorm1d:
        """A norm layer.

        Args:
            num_features: number of channels.
            bias: whether it has a bias.

        Returns:
            The layer, shared by all time steps.
        """
        return BatchRenorm1d(
            num_features, self.eps, self.momentum, device=self.device, dtype=self.dtype,
            bias=bias, limits=self.limits, tracking=self.tracking,
        )  # fmt: skip


class Cell(nn.Module, ABC):
    """One layer in one direction: the projections of input and state, normalized apart, and one bias.

    Args:
        input_size: I, features of the input.
        hidden_size: H, features of the state.
        bias: whether there is a bias.
        norm: options of the norm layers.
    """

    gates: ClassVar[int]
    states: ClassVar[tuple[str, ...]]  # name of each tensor of a state
    bias: nn.Parameter | None

    def __init__(self, input_size: int, hidden_size: int, bias: bool, norm: NormOptions) -> None:
        super().__init__()
        width = self.gates * hidden_size

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=norm.device, dtype=norm.dtype))

        self.hidden_size = hidden_size
        self.weight_ih = parameter(width, input_size)
        self.weight_hh = parameter(width, hidden_size)
        self.register_parameter("bias", parameter(width) if bias else None)
        self.norm_ih = norm.layer(width, bias=False)
        self.norm_hh = norm.layer(width, bias=False)

    def reset_parameters(self) -> None:
        """Start anew: weights and bias as nn.LSTM's, gamma 0.1, and no sequence seen."""
        bound = 1 / math.sqrt(self.hidden_size)
        for parameter in self.parameters(recurse=False):
            nn.init.uniform_(parameter, -bound, bound)
        for norm in self.children():
            assert isinstance(norm, BatchRenorm1d)
            norm.reset_parameters()
            nn.init.constant_(norm.weight, _GAIN)  # type: ignore[arg-type]  # affine layers have it

    def forward(self, x: Tensor, state: State, mask: Tensor | None, reverse: bool) -> tuple[Tensor, State]:
        """Run over a sequence.

        Args:
            x: input, (T, N, I), finite also where it does not count.
            state: before the first step, (N, H) each.
            mask: True where a step counts, (T, N), or None.
            reverse: whether the last step comes first.

        Returns:
            h at every step, (T, N, H), 0 where masked; and the state after the last counted step of each example.
        """
        # unbound at once, since the gradient of indexing is a tensor of all steps at every step
        steps = linear(x, self.weight_ih).unbind(0)
        masks = [None] * len(steps) if mask is None else list(mask.unbind(0))
        outputs = []
        for projected, counted in zip(*((reversed(s) if reverse else s) for s in (steps, masks)), strict=True):
            after = self.step(projected, state, counted)
            if counted is None:
                state = after
                outputs.append(state[0])
                continue
            here = counted[:, None]
            state = tuple(torch.where(here, new, old) for new, old in zip(after, state, strict=True))
            outputs.append(torch.where(here, state[0], 0))
        return torch.stack(outputs[::-1] if reverse else outputs), state

    @abstractmethod
    def step(self, projected: Tensor, state: State, mask: Tensor | None) -> State:
        """One time step.

        Args:
            projected: the input's projection, (N, gates * H).
            state: from before, (N, H) each.
            mask: True for the examples that count, (N,), or None for all.

        Returns:
            The state after it; anything finite where masked.
        """


class LSTMCell(Cell):
    """Gates in nn.LSTM's order, i, f, g, o; the cell's content is normalized on its way out."""

    gates = 4
    states = ("h", "c")

    def __init__(self, input_size: int, hidden_size: int, bias: bool, norm: NormOptions) -> None:
        super().__init__(input_size, hidden_size, bias, norm)
        self.norm_cell = norm.layer(hidden_size, bias=True)
        self.reset_parameters()

    def step(self, projected: Tensor, state: State, mask: Tensor | None) -> State:
        """See `Cell.step`."""
        h, c = state
        gates = _normalized(self.norm_ih, projected, mask)
        gates = gates + _normalized(self.norm_hh, linear(h, self.weight_hh), mask)
        if self.bias is not None:
            gates = gates + self.bias
        i, f, g, o = gates.chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * _normalized(self.norm_cell, c, mask).tanh(), c


class GRUCell(Cell):
    """Gates in nn.GRU's order, r, z, n."""

    gates = 3
    states = ("h",)

    def __init__(self, input_size: int, hidden_size: int, bias: bool, norm: NormOptions) -> None:
        super().__init__(input_size, hidden_size, bias, norm)
        self.reset_parameters()

    def step(self, projected: Tensor, state: State, mask: Tensor | None) -> State:
        """See `Cell.step`."""
        (h,) = state
        of_input = _normalized(self.norm_ih, projected, mask)
        if self.bias is not None:
            of_input = of_input + self.bias
        of_state = _normalized(self.norm_hh, linear(h, self.weight_hh), mask)
        (r, z, n), (r_h, z_h, n_h) = of_input.chunk(3, 1), of_state.chunk(3, 1)
        z = (z + z_h).sigmoid()
        n = (n + (r + r_h).sigmoid() * n_h).tanh()
        return ((1 - z) * n + z * h,)


def _normalized(norm: BatchRenorm1d, x: Tensor, mask: Tensor | None) -> Tensor:
    # At evaluation examples do not see each other, and torch's own operation is the fastest.
    y: Tensor = norm(x, mask) if norm.training and mask is not None else norm(x)
    return y
