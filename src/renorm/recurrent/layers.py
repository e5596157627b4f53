"""The recurrent layers, as nn.LSTM and nn.GRU are called."""

from __future__ import annotations

import warnings
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout
from torch.nn.utils.rnn import PackedSequence

from ..blocks import accumulate
from ..limits import Limits
from ..modules import norms
from ..ops.tracking import Tracking
from .cells import Cell, GRUCell, LSTMCell, NormOptions, State
from .sequences import check_mask, check_sequence, check_state, packed_like, unpacked

_PAPER_LIMITS = Limits()


class _Recurrent(nn.Module):
    """Layers and directions of cells; see the subclasses."""

    _cell: ClassVar[type[Cell]]

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        limits: Limits | None = _PAPER_LIMITS,
        momentum: float | None = 0.01,
        eps: float = 1e-5,
        tracking: Tracking = "std",
    ) -> None:
        super().__init__()
        for name, size in (("input_size", input_size), ("hidden_size", hidden_size), ("num_layers", num_layers)):
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if not 0 <= dropout <= 1:
            raise ValueError(f"dropout must be a probability in [0, 1], got {dropout}")
        if dropout > 0 and num_layers == 1:
            warnings.warn(
                f"dropout={dropout} has no effect with num_layers=1: it is between layers; give more, or dropout=0",
                stacklevel=3,
            )
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.bias = bias
        self.batch_first = batch_first
        self.dropout = float(dropout)
        self.bidirectional = bidirectional
        norm = NormOptions(eps, momentum, limits, tracking, device, dtype)
        directions = 2 if bidirectional else 1
        sizes = [input_size] + [hidden_size * directions] * (num_layers - 1)
        # in the order of a state's first dimension: both directions of a layer, then the next layer
        self.cells = nn.ModuleList(
            self._cell(size, hidden_size, bias, norm) for size in sizes for _ in range(directions)
        )

    def reset_parameters(self) -> None:
        """Start anew: weights and bias as nn.LSTM's, gamma 0.1, and no sequence seen."""
        for cell in self.cells:
            assert isinstance(cell, Cell)
            cell.reset_parameters()

    def _run(
        self, x: Tensor | PackedSequence, state: State | None, mask: Tensor | None
    ) -> tuple[Tensor | PackedSequence, State]:
        if isinstance(x, PackedSequence):
            if mask is not None:
                raise ValueError(f"mask must be None for a PackedSequence, which has lengths, got {tuple(mask.shape)}")
            padded, mask, lengths = unpacked(x)
            check_sequence(padded, self.input_size, "(T, N, input_size)")
            output, state = self._run_padded(padded, state, mask)
            return packed_like(x, output, lengths), state
        check_sequence(x, self.input_size, "(N, T, input_size)" if self.batch_first else "(T, N, input_size)")
        if mask is not None:
            check_mask(mask, tuple(x.shape[:2]))
        if not self.batch_first:
            return self._run_padded(x, state, mask)
        output, state = self._run_padded(x.transpose(0, 1), state, None if mask is None else mask.transpose(0, 1))
        return output.transpose(0, 1), state

    def _run_padded(self, x: Tensor, state: State | None, mask: Tensor | None) -> tuple[Tensor, State]:
        """Steps first: x is (T, N, I), the mask (T, N)."""
        if len(x) == 0:
            raise ValueError(f"x must have at least one time step, got shape {tuple(x.shape)}, steps first")
        shape = (len(self.cells), x.shape[1], self.hidden_size)
        if state is None:
            zeros = torch.zeros(shape, device=x.device, dtype=next(self.parameters()).dtype)
            state = (zeros,) * len(self._cell.states)
        check_state(state, shape, self._cell.states)
        if mask is not None:  # by selection: the gradient of the weights is a product with x, and 0 * NaN is NaN
            x = torch.where(mask[..., None], x, 0)
        with accumulate(*norms(self).values()):
            return self._run_layers(x, state, mask)

    def _run_layers(self, x: Tensor, state: State, mask: Tensor | None) -> tuple[Tensor, State]:
        directions = len(self.cells) // self.num_layers
        finals: list[State] = []
        for layer in range(self.num_layers):
            if layer > 0:
                x = dropout(x, self.dropout, self.training)
            outputs = []
            for direction in range(directions):
                index = layer * directions + direction
                before = tuple(tensor[index] for tensor in state)
                output, final = self.cells[index](x, before, mask, reverse=direction == 1)
                outputs.append(output)
                finals.append(final)
            x = torch.cat(outputs, 2) if directions > 1 else outputs[0]
        return x, tuple(torch.stack(tensors) for tensors in zip(*finals, strict=True))

    def extra_repr(self) -> str:
        """Settings, as far as they are not the defaults; those of the norm layers are with these."""
        parts = [f"{self.input_size}, {self.hidden_size}"]
        parts += [f"num_layers={self.num_layers}"] if self.num_layers > 1 else []
        parts += [] if self.bias else ["bias=False"]
        parts += ["batch_first=True"] if self.batch_first else []
        parts += [f"dropout={self.dropout}"] if self.dropout > 0 else []
        parts += ["bidirectional=True"] if self.bidirectional else []
        return ", ".join(parts)


class BatchRenormLSTM(_Recurrent):
    """An LSTM with batch renormalization of its input, its state and its cell, in place of nn.LSTM.

    The projections of input and state are normalized apart, then added, with one bias; the cell's content is
    normalized before its tanh. Each norm layer is shared by all time steps: every step is normalized by its own
    batch, and corrected towards the running statistics, which move once per call, from all steps together.
    So a sequence may have any length, also one that training never saw.

    Args:
        input_size: I, features of the input.
        hidden_size: H, features of the state.
        num_layers: layers, each of which takes the one before as input.
        bias: whether there is a bias in the gates; the cell's norm layer has one in any case.
        batch_first: whether input, output and mask are (N, T, ...) instead of (T, N, ...); the state never is.
        dropout: probability of zeroing an output between layers.
        bidirectional: whether a second set of cells reads each sequence from its end.
        device: of parameters and buffers.
        dtype: of parameters; running statistics have float32 at least.
        limits: of the correction, by call. The default is the paper's, plain batch norm for 5,000 steps: for another
            length of training pass `Limits.over(total_steps)`. None for batch norm with shared statistics.
        momentum: weight of a call in the running statistics; None for the cumulative average.
        eps: added to variances.
        tracking: how the running variance moves, see `Norm`.

    Raises:
        ValueError: a size is less than 1, dropout is no probability, or a norm option is out of range.

    Source:
        Ioffe 2017, section 5, which names recurrent networks as future work; Cooijmans et al. 2017, "Recurrent Batch
        Normalization", equations 6 to 8, for where to normalize and gamma = 0.1 at the start.

    Example:
        >>> lstm = BatchRenormLSTM(8, 16, batch_first=True, limits=Limits.over(1_000))
        >>> x, lengths = torch.randn(4, 5, 8), torch.tensor([5, 3, 2, 5])
        >>> output, (h, c) = lstm(x, mask=torch.arange(5) < lengths[:, None])
        >>> output.shape, h.shape, c.shape
        (torch.Size([4, 5, 16]), torch.Size([1, 4, 16]), torch.Size([1, 4, 16]))
        >>> torch.equal(output[1, 2], h[0, 1]), output[1, 3:].abs().max().item()
        (True, 0.0)
    """

    _cell = LSTMCell

    def forward(
        self,
        x: Tensor | PackedSequence,
        state: tuple[Tensor, Tensor] | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor | PackedSequence, tuple[Tensor, Tensor]]:
        """Run over a batch of sequences.

        Args:
            x: input, (T, N, I), or (N, T, I) if `batch_first`, floating point; or a packed sequence.
            state: h and c from before, (num_layers * directions, N, H) each; None for zeros.
            mask: True where a step counts, (T, N), or (N, T) if `batch_first`. At other steps the state is carried
                on, the output is 0, and nothing touches statistics or gradients; None for everywhere.

        Returns:
            The last layer's h at every step, x's shape with H * directions features, packed if x is; and h and c
            after each example's last counted step.

        Raises:
            TypeError: x is not floating point, the mask not boolean, or the state no tuple of two tensors.
            ValueError: a shape does not fit, there is no step, a packed sequence comes with a mask, or a single
                example is to train without limits.
        """
        output, (h, c) = self._run(x, state, mask)
        return output, (h, c)


class BatchRenormGRU(_Recurrent):
    """A GRU with batch renormalization of its input and its state, in place of nn.GRU.

    The projections of input and state are normalized apart. Otherwise as `BatchRenormLSTM`: one norm layer for all
    time steps, whose running statistics move once per call. nn.GRU's second bias, inside the reset gate's product,
    is left out.

    Args:
        input_size: I, features of the input.
        hidden_size: H, features of the state.
        num_layers: layers, each of which takes the one before as input.
        bias: whether there is a bias.
        batch_first: whether input, output and mask are (N, T, ...) instead of (T, N, ...); the state never is.
        dropout: probability of zeroing an output between layers.
        bidirectional: whether a second set of cells reads each sequence from its end.
        device: of parameters and buffers.
        dtype: of parameters; running statistics have float32 at least.
        limits: see `BatchRenormLSTM`.
        momentum: weight of a call in the running statistics; None for the cumulative average.
        eps: added to variances.
        tracking: how the running variance moves, see `Norm`.

    Raises:
        ValueError: a size is less than 1, dropout is no probability, or a norm option is out of range.

    Source:
        Ioffe 2017, section 5; Cooijmans et al. 2017, by analogy with the LSTM.

    Example:
        >>> gru = BatchRenormGRU(8, 16, limits=Limits.over(1_000))
        >>> output, h = gru(torch.randn(5, 4, 8))
        >>> torch.equal(output[-1], h[0]), gru.cells[0].norm_ih.num_batches_tracked.item()
        (True, 1)
    """

    _cell = GRUCell

    def forward(
        self, x: Tensor | PackedSequence, state: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        """Run over a batch of sequences.

        Args:
            x: input, (T, N, I), or (N, T, I) if `batch_first`, floating point; or a packed sequence.
            state: h from before, (num_layers * directions, N, H); None for zeros.
            mask: True where a step counts, (T, N), or (N, T) if `batch_first`. At other steps the state is carried
                on, the output is 0, and nothing touches statistics or gradients; None for everywhere.

        Returns:
            The last layer's h at every step, x's shape with H * directions features, packed if x is; and h after
            each example's last counted step.

        Raises:
            TypeError: x is not floating point, or the mask not boolean.
            ValueError: a shape does not fit, there is no step, a packed sequence comes with a mask, or a single
                example is to train without limits.
        """
        output, (h,) = self._run(x, None if state is None else (state,), mask)
        return output, h
