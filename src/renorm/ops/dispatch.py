"""The one place that chooses who computes: kernels of ours, torch's own, or the definition."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..checks import check_channels, check_devices, check_example_weight, check_groups
from ..limits import Limits
from ..moments import Moments, accumulation_dtype
from ..transforms import is_transformed, snapshot
from . import backends, composed, kernels, reference
from .composed import compose, finish
from .problem import Correction, Inputs, LaunchError, Running, RunningState, Settings, Target, checked
from .tracking import Rule, move


def normalize(inputs: Inputs, settings: Settings, correction: Target | Correction | None) -> tuple[Tensor, Moments]:
    """Normalize a batch by its own statistics, corrected by r and d; add the residual; activate.

    Args:
        inputs: as a caller gives them.
        settings: grouping, eps and activation.
        correction: what r and d are computed from, or r and d themselves; None for batch norm.

    Returns:
        The output, shape and dtype of x, 0 where masked; and the moments of every channel in every example group,
        (G, C), which are constants for autograd.

    Raises:
        TypeError: x is not floating point, or the mask not boolean.
        ValueError: a shape does not fit, or a group has a single element and no correction.
    """
    if inputs.x.is_mkldnn:
        y, moments = normalize(_dense(inputs), settings, correction)
        return y.to_mkldnn(), moments
    if isinstance(correction, Target):
        inputs = checked(inputs, settings, correction)
        check_devices(inputs.x, (*inputs, correction.mean, correction.var))
        running = _as_accumulated(inputs.x, Running(correction.mean, correction.var))
        correction = Target(*running, correction.r_max, correction.d_max)
    else:
        inputs = checked(inputs, settings)
        check_devices(inputs.x, inputs)
    if inputs.x.numel() == 0:
        return _normalize_nothing(inputs)
    check_groups(inputs.x, settings.grouping, corrected=correction is not None)
    if backends.take(inputs.x):
        try:
            return kernels.normalize(inputs, settings, correction)
        except LaunchError as error:
            backends.give_up(inputs.x.device.type, error)
    if is_transformed():
        y, moments, _ = reference.forward(inputs, settings, correction)
        return finish(y, inputs, settings), Moments(*(moment.detach() for moment in moments))
    return compose(backends.of_torch(inputs, settings), inputs, settings, correction)


def train(inputs: Inputs, settings: Settings, state: RunningState, limits: Limits | None, rule: Rule) -> Tensor:
    """A layer's training step: normalize a batch, corrected towards the running statistics, which then move.

    Args:
        inputs: as a caller gives them.
        settings: grouping, eps and activation.
        state: the layer's buffers, moved in place.
        limits: of the correction; None for batch norm.
        rule: by which they move.

    Returns:
        The output.

    Raises:
        TypeError: x is not floating point, or the mask not boolean.
        ValueError: a shape does not fit, or a group has a single element and no correction.
    """
    if inputs.x.is_mkldnn:
        return train(_dense(inputs), settings, state, limits, rule).to_mkldnn()
    if inputs.mask is not None:
        inputs = checked(inputs, settings, state)  # which makes it as large as x
    if not backends.is_watched(inputs.x):
        facts = _facts_of_step(inputs, settings, state, limits, rule)
        kind = _kinds.get(facts)
        if kind is None and (module := backends.module_of_steps(inputs, state)) is not None:
            inputs = checked(inputs, settings, state)
            check_groups(inputs.x, settings.grouping, corrected=limits is not None)
            kind = _remember(facts, module.kind_of_step(inputs, settings, rule))
        if kind is not None:
            try:
                return kernels.step(inputs, (kind, settings, state, limits))
            except LaunchError as error:
                backends.give_up(inputs.x.device.type, error)
    y, moments = normalize(inputs, settings, target_of(inputs, state, limits))
    if inputs.x.numel() > 0:
        track(state, moments, rule, settings)
    return y


def evaluate(inputs: Inputs, settings: Settings, running: Running, example_weight: float) -> Tensor:
    """Normalize by the running statistics, weighed with the example's own; add the residual; activate.

    Args:
        inputs: as a caller gives them.
        settings: channels_per_group, eps and activation; every example is by itself.
        running: statistics of every channel.
        example_weight: alpha, the weight of the example's own statistics, in [0, 1].

    Returns:
        The output, shape and dtype of x; differentiable, through the example's own statistics too. Without any of
        mask, weighing and channel groups what is normalized is nn.BatchNorm's, bit for bit.

    Raises:
        TypeError: x is not floating point, or the mask not boolean.
        ValueError: a shape does not fit, or `example_weight` is outside [0, 1].
    """
    is_more = example_weight != 0 or not backends.is_batch_norm(inputs, settings)
    if not is_more and _suit_torch(inputs, running):
        x, weight, bias, *_ = inputs
        try:
            return torch.batch_norm(x, weight, bias, *running, False, 0.0, settings.eps, torch.backends.cudnn.enabled)
        except RuntimeError:
            pass  # the checks below say it by our names
    check_example_weight(example_weight)
    if is_more and inputs.x.is_mkldnn:
        return evaluate(_dense(inputs), settings, running, example_weight).to_mkldnn()
    inputs = checked(inputs, settings, running)
    if is_more:
        check_devices(inputs.x, (*inputs, *running))
    check_channels(inputs.x.shape[1], settings.grouping.channels_per_group)
    running = _as_accumulated(inputs.x, running)
    if is_more and backends.take_evaluation(inputs):
        try:
            return kernels.evaluate(inputs, settings, running, example_weight)
        except LaunchError as error:
            backends.give_up(inputs.x.device.type, error)
    return composed.evaluate(inputs, settings, running, example_weight)


def track(state: RunningState, moments: Moments, rule: Rule, settings: Settings) -> None:
    """Move a layer's buffers by one batch, in place and without leaving the device.

    A batch whose moments are not finite is only counted, one without a counted element not even that.

    Args:
        state: the buffers.
        moments: of every channel in every example group, (G, C), with count (G, 1).
        rule: by which they move.
        settings: channels_per_group and eps.

    Raises:
        ValueError: there is no such rule.
    """
    if backends.take_moments(moments, state):
        try:
            kernels.track(state, moments, rule, settings)
            return
        except LaunchError as error:
            backends.give_up(moments.mean.device.type, error)
    move(state, moments, rule, settings)


def target_of(inputs: Inputs, state: RunningState, limits: Limits | None) -> Target | None:
    """What a batch is corrected towards.

    Args:
        inputs: the batch.
        state: the layer's buffers.
        limits: of the correction; None for batch norm.

    Returns:
        Running statistics and limits; None for batch norm.
    """
    if limits is None:
        return None
    mean, var, steps, _ = state
    if not backends.take(inputs.x):  # these keep r and d themselves
        mean, var, steps = snapshot(mean), snapshot(var), snapshot(steps)
    return Target(mean, var, *limits(steps, accumulation_dtype(inputs.x.dtype)))


# Kinds of steps by their facts, which were checked then: to ask everything of a small layer takes longer than its step.
_kinds: dict[Any, Any] = {}
_MOST_KINDS = 4096


def _facts_of_step(
    inputs: Inputs, settings: Settings, state: RunningState, limits: Limits | None, rule: Rule
) -> tuple[Any, ...]:
    """All that checks, choices and kinds depend on."""
    # one expression, since calls and tuples for each tensor cost as much again
    x, weight, bias, mask, residual = inputs
    mean, var, steps, skipped = state
    grouping, eps, act = settings
    return (
        x.shape, x.stride(), x.dtype, x.device,
        grouping.examples_per_group, grouping.channels_per_group, eps, act, limits is None, rule,
        type(mean), mean.dtype, mean.shape, mean.device, mean.is_contiguous(), mean.is_neg(),
        type(var), var.dtype, var.shape, var.device, var.is_contiguous(), var.is_neg(),
        type(steps), steps.dtype, steps.shape, steps.device, type(skipped), skipped.dtype, skipped.shape,
        skipped.device, *backends.available.values(),
        weight is None
        or (type(weight), weight.dtype, weight.shape, weight.device, weight.is_contiguous(), weight.is_neg()),
        bias is None or (type(bias), bias.dtype, bias.shape, bias.device, bias.is_contiguous(), bias.is_neg()),
        mask is None or (type(mask), mask.shape, mask.device, mask.is_contiguous()),
        residual is None or (type(residual), residual.dtype, residual.shape, residual.device, residual.stride()),
    )  # fmt: skip


def _remember(facts: Any, kind: Any) -> Any:
    if len(_kinds) >= _MOST_KINDS:
        _kinds.clear()
    _kinds[facts] = kind
    return kind


def _dense(inputs: Inputs) -> Inputs:
    residual = inputs.residual
    if residual is not None and residual.is_mkldnn:
        residual = residual.to_dense()
    return inputs._replace(x=inputs.x.to_dense(), residual=residual)


def _normalize_nothing(inputs: Inputs) -> tuple[Tensor, Moments]:
    # Connected to weight and bias, so that their gradients are zeros rather than missing.
    x, weight, bias, *_ = inputs
    y = x.clone()
    for parameter in (weight, bias):
        if parameter is not None:
            y = y + parameter.sum().to(x.dtype)
    nothing = torch.zeros(1, x.shape[1], dtype=accumulation_dtype(x.dtype), device=x.device)
    return y, Moments(nothing, nothing, nothing[:, :1])


def _suit_torch(inputs: Inputs, running: Running) -> bool:
    """Whether parameters and dtypes are as torch's batch norm wants them; all other checks may wait for its refusal."""
    x, weight, bias, *_ = inputs
    dtype = running.mean.dtype
    if torch.compiler.is_compiling() or running.var.dtype is not dtype or x.numel() == 0:
        return False
    for parameter in (weight, bias):
        if parameter is not None and parameter.dtype is not dtype:
            return False
    if weight is not None and not weight.is_contiguous():
        return False
    return x.dtype is dtype or dtype is accumulation_dtype(x.dtype)


def _as_accumulated(x: Tensor, running: Running) -> Running:
    dtype = accumulation_dtype(x.dtype)
    if running.mean.dtype == running.var.dtype == dtype:
        return running  # a cast to its own dtype would hide a statistic from what folds exported graphs
    return Running(running.mean.to(dtype), running.var.to(dtype))
