"""Recurrent layers: their arithmetic, masks, statistics once per sequence, and nn.LSTM's and nn.GRU's conventions."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils.checkpoint import checkpoint

import renorm
from renorm import BatchRenormGRU, BatchRenormLSTM, Limits
from renorm import functional as F

LIMITS = Limits.constant(1.5, 0.5)  # tight enough to clip
UNLIMITED = Limits.constant(math.inf, math.inf)
LAYERS = (BatchRenormLSTM, BatchRenormGRU)
Recurrent = BatchRenormLSTM | BatchRenormGRU
each_class = pytest.mark.parametrize("cls", LAYERS)
each_limits = pytest.mark.parametrize("limits", [LIMITS, UNLIMITED, None], ids=["clipping", "unlimited", "batch norm"])
DEEP = {"num_layers": 2, "bidirectional": True}
LENGTHS = torch.tensor([5, 2, 4, 1, 3, 5])


def build(cls: type[Recurrent], dtype: torch.dtype | None = torch.float64, **options: Any) -> Recurrent:
    """A layer whose gammas, statistics and steps are not those of a fresh one."""
    rnn = cls(3, 4, dtype=dtype, **{"limits": LIMITS, "momentum": 0.3, **options})
    with torch.no_grad():
        for norm in norms(rnn):
            norm.weight.uniform_(0.5, 1.5)
            if norm.bias is not None:
                norm.bias.normal_()
            norm.running_mean.normal_(std=0.2)
            norm.running_var.uniform_(0.1, 0.4)
    return rnn


def norms(rnn: nn.Module) -> list[renorm.Norm]:
    return [module for module in rnn.modules() if isinstance(module, renorm.Norm)]


def buffers(rnn: nn.Module) -> list[Tensor]:
    return [buffer.clone() for buffer in rnn.buffers()]


def batch(steps: int = 5, examples: int = 6) -> Tensor:
    """Input, (T, N, 3), whose distribution changes from step to step."""
    scale = 1 + torch.arange(steps)[:, None, None]
    return torch.randn(steps, examples, 3, dtype=torch.float64) * scale / 2 + scale / 3


def mask_of(lengths: Tensor = LENGTHS) -> Tensor:
    return torch.arange(int(lengths.max()))[:, None] < lengths


def as_tuple(state: Any) -> tuple[Tensor, ...]:
    return state if isinstance(state, tuple) else (state,)


class ByHand:
    """One layer in one direction, a step at a time on the rows that count, without our layers."""

    def __init__(self, rnn: Recurrent) -> None:
        self.rnn = rnn
        self.cell = rnn.cells[0]
        self.seen: dict[str, list[Tensor]] = {"norm_ih": [], "norm_hh": [], "norm_cell": []}

    def normalize(self, name: str, x: Tensor) -> Tensor:
        norm = getattr(self.cell, name)
        self.seen[name].append(x.detach())
        parameters = (norm.weight, norm.bias)
        if not self.rnn.training:
            return F.weighted_batch_norm(x, norm.running_mean, norm.running_var, *parameters)
        if norm.limits is None:
            return F.batch_norm(x, *parameters)[0]
        r_max, d_max = norm.limits.r_max, norm.limits.d_max
        return F.batch_renorm(x, norm.running_mean, norm.running_var, *parameters, r_max=r_max, d_max=d_max)[0]

    def lstm(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        gates = self.normalize("norm_ih", x @ self.cell.weight_ih.T)
        gates = gates + self.normalize("norm_hh", h @ self.cell.weight_hh.T) + self.cell.bias
        i, f, g, o = gates[:, :4], gates[:, 4:8], gates[:, 8:12], gates[:, 12:]
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(self.normalize("norm_cell", c)), c

    def gru(self, x: Tensor, h: Tensor) -> tuple[Tensor, ...]:
        a = self.normalize("norm_ih", x @ self.cell.weight_ih.T) + self.cell.bias
        b = self.normalize("norm_hh", h @ self.cell.weight_hh.T)
        r, z = torch.sigmoid(a[:, :4] + b[:, :4]), torch.sigmoid(a[:, 4:8] + b[:, 4:8])
        return ((1 - z) * torch.tanh(a[:, 8:] + r * b[:, 8:]) + z * h,)

    def __call__(self, x: Tensor, mask: Tensor, state: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        step = self.lstm if len(state) == 2 else self.gru
        outputs = []
        for row, counted in zip(x, mask, strict=True):
            here = counted.nonzero()[:, 0]
            after = step(row[here], *(tensor[here] for tensor in state))
            state = [old.index_copy(0, here, new) for old, new in zip(state, after, strict=True)]
            outputs.append(torch.zeros_like(state[0]).index_copy(0, here, state[0][here]))
        return torch.stack(outputs), state

    def statistics(self, name: str) -> tuple[Tensor, Tensor]:
        """Running mean and variance after the sequence, from what was seen."""
        norm, steps = getattr(self.cell, name), self.seen[name]
        count = torch.tensor([[float(len(x))] for x in steps], dtype=torch.float64)
        moments = renorm.Moments(
            torch.stack([x.mean(0) for x in steps]), torch.stack([x.var(0, unbiased=False) for x in steps]), count
        )
        return F.update_running(
            norm.running_mean, norm.running_var, moments, momentum=norm.momentum, tracking=norm.tracking
        )


@each_class
@each_limits
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("is_masked", [True, False], ids=["masked", "unmasked"])
@pytest.mark.parametrize("given", [True, False], ids=["state", "no state"])
def test_output_state_gradients_and_statistics_are_those_of_a_loop_by_hand(
    cls: type[Recurrent], limits: Limits | None, training: bool, is_masked: bool, given: bool
) -> None:
    lengths = torch.tensor([5, 3, 5, 4, 2, 3])  # batch norm by hand needs two rows at every step
    rnn = build(cls, limits=limits).train(training)
    by_hand = ByHand(copy.deepcopy(rnn))
    x = batch()
    mask = mask_of(lengths) if is_masked else torch.ones(5, 6, dtype=torch.bool)
    count = 2 if cls is BatchRenormLSTM else 1
    start = [torch.randn(1, 6, 4, dtype=torch.float64) * float(given) for _ in range(count)]
    state = (tuple(start) if count == 2 else start[0]) if given else None

    output, final = rnn(x, state, mask if is_masked else None)
    expected, expected_final = by_hand(x, mask, [tensor[0] for tensor in start])
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close([tensor[0] for tensor in as_tuple(final)], expected_final)

    weights = torch.randn_like(output)
    found = torch.autograd.grad((output * weights).sum(), list(rnn.parameters()))
    wanted = torch.autograd.grad((expected * weights).sum(), list(by_hand.rnn.parameters()))
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-8)

    for name in by_hand.seen if training else ():
        if by_hand.seen[name]:
            norm = getattr(rnn.cells[0], name)
            torch.testing.assert_close((norm.running_mean, norm.running_var), by_hand.statistics(name))
            assert norm.num_batches_tracked == 1


@each_class
@pytest.mark.parametrize("tracking", ["total", "var", "std"])
def test_statistics_are_the_merged_moments_of_all_counted_steps(cls: type[Recurrent], tracking: Any) -> None:
    rnn = build(cls, momentum=1.0, tracking=tracking)
    x, mask = batch(), mask_of()
    rnn(x, mask=mask)
    projected = x @ rnn.cells[0].weight_ih.T
    norm = rnn.cells[0].norm_ih
    torch.testing.assert_close(norm.running_mean, projected[mask].mean(0))
    if tracking == "std":  # the mean over steps of what each was divided by, weighted by count
        sigma = torch.stack(
            [(row[m].var(0, unbiased=False) + norm.eps).sqrt() for row, m in zip(projected, mask, strict=True)]
        )
        share = mask.sum(1, keepdim=True) / mask.sum()
        torch.testing.assert_close(norm.running_var, (share * sigma).sum(0).square() - norm.eps)
    else:
        torch.testing.assert_close(norm.running_var, projected[mask].var(0, unbiased=tracking == "var"))


@each_class
@pytest.mark.parametrize("options", [{}, DEEP], ids=["one", "deep"])
def test_statistics_move_once_per_sequence_and_in_training_only(cls: type[Recurrent], options: dict[str, Any]) -> None:
    rnn = build(cls, **options)
    for calls in range(1, 4):
        before = buffers(rnn)
        rnn(batch(calls + 1))
        assert all(norm.num_batches_tracked == calls for norm in norms(rnn))
        assert not any(map(torch.equal, buffers(rnn)[::4], before[::4]))
    before = buffers(rnn.eval())
    rnn(batch())
    assert all(map(torch.equal, buffers(rnn), before))


@each_class
def test_norm_layers_alone_in_training_mode_also_move_once(cls: type[Recurrent]) -> None:
    rnn = build(cls).eval()
    for norm in norms(rnn):
        norm.train()
    rnn(batch(), mask=mask_of())
    assert all(norm.num_batches_tracked == 1 for norm in norms(rnn))


@each_class
def test_several_sequences_in_an_accumulation_move_the_statistics_once(cls: type[Recurrent]) -> None:
    apart = build(cls, tracking="total", momentum=1.0)
    together = copy.deepcopy(apart)
    x = batch(6)
    with renorm.accumulate(nn.Sequential(apart)):
        apart(x[:3]), apart(x[3:])
    together(x)
    assert all(norm.num_batches_tracked == 1 for norm in norms(apart))
    found, expected = apart.cells[0].norm_ih, together.cells[0].norm_ih
    torch.testing.assert_close((found.running_mean, found.running_var), (expected.running_mean, expected.running_var))


@each_class
def test_an_error_moves_nothing(cls: type[Recurrent]) -> None:
    rnn = build(cls, limits=None)
    before = buffers(rnn)
    with pytest.raises(ValueError, match="more than one element"):
        rnn(batch(examples=1))
    assert all(map(torch.equal, buffers(rnn), before))
    rnn(batch())
    assert all(norm.num_batches_tracked == 1 for norm in norms(rnn))


@each_class
@pytest.mark.parametrize("options", [{}, DEEP], ids=["one", "deep"])
@pytest.mark.parametrize("is_masked", [True, False], ids=["masked", "unmasked"])
def test_without_clipping_training_computes_what_evaluation_does(
    cls: type[Recurrent], options: dict[str, Any], is_masked: bool
) -> None:
    rnn = build(cls, limits=UNLIMITED, **options)
    evaluating = copy.deepcopy(rnn).eval()
    x, mask = batch(), mask_of() if is_masked else None
    for found, expected in zip(rnn(x, mask=mask), evaluating(x, mask=mask), strict=True):
        torch.testing.assert_close(found, expected)


@each_class
@each_limits
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_what_padding_holds_changes_nothing(cls: type[Recurrent], limits: Limits | None, training: bool) -> None:
    clean = build(cls, limits=limits, **DEEP).train(training)
    dirty = copy.deepcopy(clean)
    x, mask = batch(), mask_of()
    padded = x.where(mask[..., None], math.nan)
    results = []
    for rnn, values in ((clean, x), (dirty, padded)):
        values = values.clone().requires_grad_()
        output, state = rnn(values, mask=mask)
        loss = output.square().sum() + sum(tensor.square().sum() for tensor in as_tuple(state))
        loss.backward()
        results.append((output, *as_tuple(state), values.grad, *(p.grad for p in rnn.parameters()), *buffers(rnn)))
    for found, expected in zip(*results, strict=True):
        assert found.isfinite().all()
        assert torch.equal(found, expected)
    assert (results[0][0][~mask] == 0).all()
    gradient = next(tensor for tensor in results[0] if tensor.shape == x.shape)
    assert (gradient[~mask] == 0).all()
    assert (gradient[mask] != 0).any()


@each_class
@pytest.mark.parametrize("options", [{}, DEEP], ids=["one", "deep"])
def test_each_sequence_alone_equals_its_place_in_the_padded_batch(
    cls: type[Recurrent], options: dict[str, Any]
) -> None:
    rnn = build(cls, **options).eval()
    x = batch()
    output, state = rnn(x, mask=mask_of())
    for example, length in enumerate(LENGTHS):
        alone, final = rnn(x[:length, example : example + 1])
        torch.testing.assert_close(output[:length, example], alone[:, 0])
        for found, expected in zip(as_tuple(state), as_tuple(final), strict=True):
            torch.testing.assert_close(found[:, example], expected[:, 0])


@each_class
def test_steps_that_do_not_count_may_lie_anywhere(cls: type[Recurrent]) -> None:
    rnn = build(cls, bidirectional=True).eval()
    x = batch(7, 1)
    counted = torch.tensor([False, True, True, False, True, False, False])
    output, state = rnn(x, mask=counted[:, None])
    short, final = rnn(x[counted])
    torch.testing.assert_close(output[counted], short)
    torch.testing.assert_close(state, final)


@each_class
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_an_example_without_a_counted_step_keeps_its_state(cls: type[Recurrent], training: bool) -> None:
    rnn = build(cls, **DEEP).train(training)
    start = tuple(torch.randn(4, 6, 4, dtype=torch.float64) for _ in range(2))
    mask = mask_of().clone()
    mask[:, 2] = False
    output, state = rnn(batch(), start if cls is BatchRenormLSTM else start[0], mask)
    for found, expected in zip(as_tuple(state), start, strict=False):
        assert torch.equal(found[:, 2], expected[:, 2])
    assert (output[:, 2] == 0).all()


@each_class
def test_an_empty_batch_passes_through_and_moves_nothing(cls: type[Recurrent]) -> None:
    rnn = build(cls)
    before = buffers(rnn)
    output, state = rnn(batch(examples=0))
    assert output.shape == (5, 0, 4)
    assert all(tensor.shape == (1, 0, 4) for tensor in as_tuple(state))
    assert all(map(torch.equal, buffers(rnn), before))


@each_class
def test_a_single_example_trains_with_limits(cls: type[Recurrent]) -> None:
    rnn = build(cls)
    output, _ = rnn(batch(examples=1))
    output.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in rnn.parameters())
    assert all(norm.num_batches_tracked == 1 for norm in norms(rnn))


TORCH_OPTIONS: dict[str, dict[str, Any]] = {
    "one": {},
    "layers": {"num_layers": 3},
    "bidirectional": {"bidirectional": True},
    "deep": DEEP,
    "no bias": {"bias": False, **DEEP},
    "batch first": {"batch_first": True, **DEEP},
}


def torch_twin(rnn: Recurrent, **options: Any) -> nn.RNNBase:
    """nn.LSTM or nn.GRU with the same weights; the norm layers of ours become the identity at evaluation."""
    kind = nn.LSTM if isinstance(rnn, BatchRenormLSTM) else nn.GRU
    twin = kind(3, 4, dtype=torch.float64, **options)
    directions = 2 if rnn.bidirectional else 1
    with torch.no_grad():
        for norm in norms(rnn):
            norm.reset_parameters()
            norm.running_var.fill_(1 - norm.eps)
        for index, cell in enumerate(rnn.cells):
            name = f"l{index // directions}" + ("_reverse" if index % directions else "")
            getattr(twin, f"weight_ih_{name}").copy_(cell.weight_ih)
            getattr(twin, f"weight_hh_{name}").copy_(cell.weight_hh)
            if rnn.bias:
                getattr(twin, f"bias_ih_{name}").copy_(cell.bias)
                getattr(twin, f"bias_hh_{name}").zero_()
    return twin


@each_class
@pytest.mark.parametrize("options", TORCH_OPTIONS.values(), ids=TORCH_OPTIONS)
@pytest.mark.parametrize("is_given", [True, False], ids=["state", "no state"])
def test_conventions_are_those_of_torch(cls: type[Recurrent], options: dict[str, Any], is_given: bool) -> None:
    rnn = build(cls, **options).eval()
    twin = torch_twin(rnn, **options)
    x = batch().transpose(0, 1) if options.get("batch_first") else batch()
    start = tuple(torch.randn(len(rnn.cells), 6, 4, dtype=torch.float64) for _ in range(2))
    state = (start if cls is BatchRenormLSTM else start[0]) if is_given else None
    torch.testing.assert_close(rnn(x, state), twin(x, state))


@each_class
@pytest.mark.parametrize("is_sorted", [True, False], ids=["sorted", "unsorted"])
def test_packed_sequences_go_in_and_come_out_as_with_torch(cls: type[Recurrent], is_sorted: bool) -> None:
    rnn = build(cls, **DEEP).eval()
    twin = torch_twin(rnn, **DEEP)
    lengths = LENGTHS.sort(descending=True).values if is_sorted else LENGTHS
    packed = pack_padded_sequence(batch(), lengths, enforce_sorted=is_sorted)
    start = tuple(torch.randn(4, 6, 4, dtype=torch.float64) for _ in range(2))
    state = start if cls is BatchRenormLSTM else start[0]
    (found, found_state), (expected, expected_state) = rnn(packed, state), twin(packed, state)
    assert isinstance(found, PackedSequence)
    torch.testing.assert_close(found_state, expected_state)
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other)


@each_class
def test_a_packed_sequence_trains_as_a_mask_does(cls: type[Recurrent]) -> None:
    packing, masking = (rnn := build(cls)), copy.deepcopy(rnn)
    x = batch()
    packed, _ = packing(pack_padded_sequence(x, LENGTHS, enforce_sorted=False))
    padded, _ = masking(x, mask=mask_of())
    expected = pack_padded_sequence(padded, LENGTHS, enforce_sorted=False)
    torch.testing.assert_close(packed.data, expected.data)
    torch.testing.assert_close(buffers(packing), buffers(masking))


@each_class
def test_batch_first_concerns_input_output_and_mask(cls: type[Recurrent]) -> None:
    steps_first = build(cls, **DEEP)
    batch_first = copy.deepcopy(steps_first)
    batch_first.batch_first = True
    x, mask = batch(), mask_of()
    output, state = steps_first(x, mask=mask)
    transposed, same = batch_first(x.transpose(0, 1), mask=mask.T)
    assert torch.equal(transposed.transpose(0, 1), output)
    assert all(map(torch.equal, as_tuple(same), as_tuple(state)))


@each_class
@pytest.mark.parametrize("limits", [UNLIMITED, None], ids=["training with limits", "evaluation"])
def test_segments_with_the_state_handed_over_are_one_sequence(cls: type[Recurrent], limits: Limits | None) -> None:
    whole = build(cls, num_layers=2, limits=limits, momentum=0.0).train(limits is not None)
    parts = copy.deepcopy(whole)
    x, mask = batch(), mask_of()
    first, state = parts(x[:3], mask=mask[:3])
    second, state = parts(x[3:], state, mask[3:])
    output, final = whole(x, mask=mask)
    torch.testing.assert_close(torch.cat((first, second)), output)
    torch.testing.assert_close(state, final)
    assert all(norm.num_batches_tracked == 0 for norm in norms(parts))


@each_class
def test_the_gradient_stops_where_the_state_is_detached(cls: type[Recurrent]) -> None:
    rnn = build(cls)
    x = batch().requires_grad_()
    _, state = rnn(x[:3])
    detached = tuple(tensor.detach() for tensor in as_tuple(state))
    output, _ = rnn(x[3:], detached if cls is BatchRenormLSTM else detached[0])
    output.square().sum().backward()
    assert (x.grad[:3] == 0).all()
    assert (x.grad[3:] != 0).any()


@each_class
@pytest.mark.parametrize("mode", ["evaluation", "training without limits"])
def test_gradients_are_those_of_finite_differences(cls: type[Recurrent], mode: str) -> None:
    rnn = build(cls, limits=None, **DEEP).train(mode != "evaluation")
    mask = torch.tensor([[True, True, True, True], [True, True, False, True], [True, True, False, True]])

    def outputs(x: Tensor, *start: Tensor) -> tuple[Tensor, ...]:
        output, state = rnn(x, start if cls is BatchRenormLSTM else start[0], mask)
        return output, *as_tuple(state)

    count = 2 if cls is BatchRenormLSTM else 1
    start = [torch.randn(4, 4, 4, dtype=torch.float64, requires_grad=True) for _ in range(count)]
    assert torch.autograd.gradcheck(outputs, (batch(3, 4).requires_grad_(), *start), fast_mode=True)


@each_class
def test_state_dicts_and_copies_carry_everything(cls: type[Recurrent]) -> None:
    rnn = build(cls, **DEEP)
    rnn(batch())
    loaded = cls(3, 4, dtype=torch.float64, limits=LIMITS, momentum=0.3, **DEEP)
    loaded.load_state_dict(rnn.state_dict())
    x = batch()
    for twin in (copy.deepcopy(rnn), loaded):
        reference = copy.deepcopy(rnn)
        assert torch.equal(twin(x)[0], reference(x)[0])
        assert all(map(torch.equal, buffers(twin), buffers(reference)))


@each_class
def test_reset_parameters_starts_anew(cls: type[Recurrent]) -> None:
    rnn = build(cls, num_layers=2)
    rnn(batch())
    torch.manual_seed(7)
    rnn.reset_parameters()
    assert all((norm.weight == 0.1).all() and norm.num_batches_tracked == 0 for norm in norms(rnn))
    torch.manual_seed(7)
    fresh = cls(3, 4, num_layers=2, dtype=torch.float64)
    assert all(map(torch.equal, rnn.parameters(), fresh.parameters()))
    assert max(cell.weight_hh.abs().max() for cell in fresh.cells) <= 0.5  # 1 / sqrt(4)


@each_class
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_changes_nothing(cls: type[Recurrent], use_reentrant: bool) -> None:
    plain = build(cls)
    recomputed = copy.deepcopy(plain)
    x, mask = batch().requires_grad_(), mask_of()
    plain(x, mask=mask)[0].square().sum().backward()
    checkpoint(recomputed, x, None, mask, use_reentrant=use_reentrant)[0].square().sum().backward()
    for one, other in zip(recomputed.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    assert all(map(torch.equal, buffers(recomputed), buffers(plain)))


@each_class
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_autocast_runs_and_keeps_statistics_in_single_precision(cls: type[Recurrent], training: bool) -> None:
    rnn = build(cls, dtype=torch.float32).train(training)
    exact = copy.deepcopy(rnn)
    x, mask = batch().float(), mask_of()
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = rnn(x, mask=mask)
    output.sum().backward()
    torch.testing.assert_close(output.float(), exact(x, mask=mask)[0], rtol=0.1, atol=0.1)
    assert all(parameter.grad.isfinite().all() for parameter in rnn.parameters())
    assert all(norm.running_mean.dtype == torch.float32 for norm in norms(rnn))


@each_class
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_half_precision_keeps_statistics_in_single_precision(cls: type[Recurrent], training: bool) -> None:
    rnn = build(cls, dtype=torch.float32).bfloat16().train(training)
    output, state = rnn(batch().bfloat16(), mask=mask_of())
    assert {output.dtype, *(tensor.dtype for tensor in as_tuple(state))} == {torch.bfloat16}
    assert all(norm.running_mean.dtype == torch.float32 for norm in norms(rnn))


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")
@pytest.mark.parametrize(("cls", "training"), [(BatchRenormLSTM, False), (BatchRenormGRU, True)])
def test_compiled_as_one_graph(cls: type[Recurrent], training: bool) -> None:
    rnn = build(cls, dtype=torch.float32).train(training)
    eager = copy.deepcopy(rnn)
    fast = torch.compile(rnn, fullgraph=True, backend="aot_eager")
    mask = mask_of(torch.tensor([2, 1, 2]))
    for _ in range(2):
        x = batch(2, 3).float()
        torch.testing.assert_close(fast(x, mask=mask), eager(x, mask=mask), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(buffers(rnn), buffers(eager), rtol=1e-5, atol=1e-5)


@each_class
def test_to_batchnorm_evaluates_equally(cls: type[Recurrent]) -> None:
    rnn = build(cls, **DEEP).eval()
    x, mask = batch(), mask_of()
    expected, _ = rnn(x, mask=mask)
    plain = renorm.to_batchnorm(rnn)
    assert not norms(plain)
    torch.testing.assert_close(plain(x, mask=mask)[0], expected)


@each_class
def test_dropout_is_between_layers_and_in_training_only(cls: type[Recurrent]) -> None:
    rnn = build(cls, num_layers=2, dropout=1.0)
    whole = copy.deepcopy(rnn)
    whole.dropout = 0.0
    x = batch()
    before = rnn.cells[1].norm_ih.running_mean.clone()
    output, _ = rnn(x)
    whole(x)
    assert all(map(torch.equal, buffers(rnn.cells[0]), buffers(whole.cells[0])))  # takes the input as it is
    torch.testing.assert_close(rnn.cells[1].norm_ih.running_mean, 0.7 * before)  # sees zeros only
    assert (output != 0).all()
    whole.load_state_dict(rnn.state_dict())
    assert torch.equal(rnn.eval()(x)[0], whole.eval()(x)[0])


@each_class
def test_dropout_of_a_single_layer_is_warned_of(cls: type[Recurrent]) -> None:
    with pytest.warns(UserWarning, match=r"dropout=0.5 has no effect with num_layers=1"):
        cls(3, 4, dropout=0.5)


@each_class
def test_options_reach_every_norm_layer(cls: type[Recurrent]) -> None:
    def options(rnn: Recurrent) -> set[Any]:
        return {(norm.limits, norm.momentum, norm.eps, norm.tracking) for norm in norms(rnn)}

    assert options(cls(3, 4, **DEEP)) == {(Limits(), 0.01, 1e-5, "std")}
    rnn = cls(3, 4, **DEEP, limits=LIMITS, momentum=None, eps=1e-3, tracking="total")
    assert options(rnn) == {(LIMITS, None, 1e-3, "total")}


def test_repr_says_what_is_set() -> None:
    rnn = BatchRenormLSTM(3, 4, 2, False, True, 0.5, True)
    assert "BatchRenormLSTM(\n  3, 4, num_layers=2, bias=False, batch_first=True, dropout=0.5, bidirectional=True" in (
        repr(rnn)
    )


REFUSALS: dict[str, tuple[Callable[[type[Recurrent]], object], type[Exception], str]] = {
    "input_size": (lambda cls: cls(0, 4), ValueError, "input_size must be at least 1, got 0"),
    "hidden_size": (lambda cls: cls(3, -1), ValueError, "hidden_size must be at least 1, got -1"),
    "num_layers": (lambda cls: cls(3, 4, 0), ValueError, "num_layers must be at least 1, got 0"),
    "dropout": (lambda cls: cls(3, 4, dropout=1.5), ValueError, r"dropout must be .* in \[0, 1\], got 1.5"),
    "tracking": (lambda cls: cls(3, 4, tracking="ema"), ValueError, "tracking must be one of .*, got 'ema'"),
    "features": (
        lambda cls: build(cls)(torch.zeros(5, 6, 2)),
        ValueError,
        r"x must have shape \(T, N, input_size\) with input_size=3, got \(5, 6, 2\)",
    ),
    "features, batch first": (
        lambda cls: build(cls, batch_first=True)(torch.zeros(5, 6, 2)),
        ValueError,
        r"x must have shape \(N, T, input_size\)",
    ),
    "features, packed": (
        lambda cls: build(cls)(pack_padded_sequence(torch.zeros(5, 6, 2), LENGTHS, enforce_sorted=False)),
        ValueError,
        r"x must have shape \(T, N, input_size\) with input_size=3, got \(5, 6, 2\)",
    ),
    "unbatched": (lambda cls: build(cls)(torch.zeros(5, 3)), ValueError, r"x must have shape .* got \(5, 3\)"),
    "integers": (
        lambda cls: build(cls)(torch.zeros(5, 6, 3, dtype=torch.long)),
        TypeError,
        "x must be a floating-point tensor, got torch.int64",
    ),
    "no step": (lambda cls: build(cls)(batch(0)), ValueError, r"at least one time step, got shape \(0, 6, 3\)"),
    "mask's dtype": (
        lambda cls: build(cls)(batch(), mask=mask_of().float()),
        TypeError,
        "mask must be a boolean tensor, True where a step counts, got torch.float32",
    ),
    "mask's shape": (
        lambda cls: build(cls)(batch(), mask=mask_of().T),
        ValueError,
        r"mask must have the shape of x without features, \(5, 6\), got \(6, 5\)",
    ),
    "mask of a packed sequence": (
        lambda cls: build(cls)(pack_padded_sequence(batch(), LENGTHS, enforce_sorted=False), mask=mask_of()),
        ValueError,
        r"mask must be None for a PackedSequence, which has lengths, got \(5, 6\)",
    ),
    "state's shape": (
        lambda cls: build(cls)(
            batch(), (torch.zeros(1, 6, 4), torch.zeros(1, 6, 3)) if cls is BatchRenormLSTM else torch.zeros(1, 6, 3)
        ),
        ValueError,
        r"[hc] of state must have shape \(1, 6, 4\), .* got \(1, 6, 3\)",
    ),
}


@each_class
@pytest.mark.parametrize(("call", "error", "message"), REFUSALS.values(), ids=REFUSALS)
def test_refusals_name_argument_value_and_what_is_accepted(
    cls: type[Recurrent], call: Callable[[type[Recurrent]], object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call(cls)


@pytest.mark.parametrize("state", [torch.zeros(1, 6, 4), (torch.zeros(1, 6, 4),)], ids=["h alone", "tuple of one"])
def test_an_lstm_wants_both_parts_of_its_state(state: Any) -> None:
    with pytest.raises(TypeError, match=r"state must be a tuple of 2 tensors, \(h, c\), got"):
        build(BatchRenormLSTM)(batch(), state)


class PerStep(nn.Module):
    """Batch norm with statistics of their own for every time step, and one gamma and beta (Cooijmans et al. 2017)."""

    def __init__(self, shared: renorm.Norm, steps: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(
            nn.BatchNorm1d(shared.num_features, momentum=shared.momentum, affine=False) for _ in range(steps)
        )
        self.weight, self.bias = shared.weight, shared.bias
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norms[self.calls % len(self.norms)]
        self.calls += 1
        y = norm(x) * self.weight
        return y if self.bias is None else y + self.bias


def layer_for_digits(method: str, steps: int) -> nn.Module:
    if method in ("LSTM", "GRU"):
        return getattr(nn, method)(8, 32)
    cls = BatchRenormGRU if method == "renorm GRU" else BatchRenormLSTM
    rnn = cls(8, 32, limits=Limits.over(steps))
    if method == "per step":
        for cell in rnn.cells:
            for name, norm in list(cell.named_children()):
                setattr(cell, name, PerStep(norm, 8))
    return rnn


def accuracy_on_digits(method: str, seed: int, shortest: int = 8, examples: int = 4, steps: int = 1_500) -> float:
    """Test accuracy in % after training on the first rows of digits, at least the shortest number of them."""
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    x = torch.from_numpy(digits.images).float().transpose(0, 1) / 16  # (8, N, 8)
    y = torch.from_numpy(digits.target)
    generator = torch.Generator().manual_seed(0)
    held_out, used = torch.randperm(len(y), generator=generator).split((500, len(y) - 500))
    lengths = torch.randint(shortest, 9, y.shape, generator=generator)
    torch.manual_seed(seed)
    rnn, head = layer_for_digits(method, steps), nn.Linear(32, 10)

    def scores(chosen: Tensor) -> Tensor:
        rows, mask = x[:, chosen], torch.arange(8)[:, None] < lengths[chosen]
        if shortest == 8:
            state = rnn(rows)[1]
        elif isinstance(rnn, nn.RNNBase):
            state = rnn(pack_padded_sequence(rows, lengths[chosen], enforce_sorted=False))[1]
        else:
            state = rnn(rows.where(mask[..., None], math.nan), mask=mask)[1]
        return head(as_tuple(state)[0][-1])

    optimizer = torch.optim.Adam([*rnn.parameters(), *head.parameters()], 0.002)
    for _ in range(steps):
        chosen = used[torch.randint(len(used), (examples,))]
        loss = nn.functional.cross_entropy(scores(chosen), y[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    rnn.eval()
    with torch.no_grad():
        return 100 * (scores(held_out).argmax(1) == y[held_out]).float().mean().item()


@pytest.mark.slow
def test_digits_row_by_row_in_batches_of_four() -> None:
    methods = ("LSTM", "per step", "renorm LSTM")
    accuracies = {method: [accuracy_on_digits(method, seed) for seed in range(3)] for method in methods}
    # at a learning rate where it helps most; measured,
    # plain 90.4, 86.2, 91.6; per step 82.2, 85.4, 88.2; renorm 94.6, 94.0, 95.6
    for plain, per_step, corrected in zip(*accuracies.values(), strict=True):
        assert corrected > per_step + 3, accuracies
        assert corrected > plain, accuracies
    assert min(accuracies["renorm LSTM"]) > 90, accuracies


# measured with 16: LSTM 86.4, 86.6, 86.8, ours 92.4, 92.0, 92.4; GRU 85.8, 86.2, 86.0, ours 91.2, 93.8, 94.2;
# with 4, where the last steps often count a single example: LSTM 78.0, 77.4, 80.4, ours 76.6, 75.6, 75.8
@pytest.mark.slow
@pytest.mark.parametrize(("kind", "examples", "margin"), [("LSTM", 16, 3), ("GRU", 16, 3), ("LSTM", 4, -8)])
def test_digits_cut_to_their_first_rows(kind: str, examples: int, margin: float) -> None:
    for seed in range(3):
        plain = accuracy_on_digits(kind, seed, shortest=5, examples=examples)
        assert accuracy_on_digits(f"renorm {kind}", seed, shortest=5, examples=examples) > plain + margin
