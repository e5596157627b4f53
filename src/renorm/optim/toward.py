"""Weight decay toward one, by any optimizer: it is given gamma - 1."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

TOWARD = "decay_toward"  # key of a parameter group
_ATTRIBUTE = "_renorm_offset"
AnyOptimizer = TypeVar("AnyOptimizer", bound=Optimizer)


def decay_toward_one(optimizer: AnyOptimizer) -> AnyOptimizer:
    """Let an optimizer decay gamma toward 1, in the groups that `param_groups(..., toward=1)` made, in place.

    During its steps gamma - 1 stands in gamma's place, so whatever the optimizer does toward 0, coupled or decoupled,
    it does toward 1. A gamma that it leaves is left bit for bit, and one that an error interrupts is put back.
    Gradients, state and state dicts are as ever.

    Call it once the optimizer is made, before step hooks of your own; again for a copy or an unpickled one. An
    optimizer that goes by a parameter's size (Adafactor), or keeps an average of it (ASGD), does so with gamma - 1.

    Args:
        optimizer: made from the groups.

    Returns:
        The optimizer.

    Raises:
        ValueError: no group decays toward 1.

    Example:
        >>> import renorm
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
        >>> groups = renorm.optim.param_groups(model, weight_decay=0.5, toward=1)
        >>> optimizer = renorm.optim.decay_toward_one(torch.optim.SGD(groups, lr=0.1))
        >>> torch.nn.init.constant_(model[1].weight, 3.0).grad = torch.zeros(2)
        >>> optimizer.step()
        >>> model[1].weight.detach()  # 3 - 0.1 * 0.5 * (3 - 1)
        tensor([2.9000, 2.9000])
    """
    if not _marked(optimizer):
        raise ValueError(
            "optimizer must have a group that decays toward 1, as param_groups(..., toward=1) makes one where it finds "
            "a gamma to decay: with norm='all', or norm='auto' for a model that can be traced"
        )
    if _ATTRIBUTE in vars(optimizer):
        return optimizer
    offset = _Offset(optimizer)
    step = optimizer.step

    @functools.wraps(step)
    def guarded(self: Optimizer, *args: Any, **kwargs: Any) -> Any:
        try:
            return step(*args, **kwargs)
        finally:
            offset.undo()

    # Hooks, so that those of others see gamma; a method, since hooks do not hear of errors.
    vars(optimizer)[_ATTRIBUTE] = offset
    vars(optimizer)["step"] = types.MethodType(guarded, optimizer)
    optimizer.register_step_pre_hook(offset.before)
    optimizer.register_step_post_hook(offset.after)
    return optimizer


@functools.cache
def require_attachment() -> None:
    """From now on, refuse steps of optimizers that would decay toward 0 what should decay toward 1."""
    register_optimizer_step_pre_hook(_refuse_unattached)


def _refuse_unattached(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if _ATTRIBUTE not in vars(optimizer) and _marked(optimizer):
        raise RuntimeError(
            f"a parameter group decays toward 1, which {type(optimizer).__name__} does after "
            "renorm.optim.decay_toward_one(optimizer); a copy of an optimizer needs it anew"
        )


def _marked(optimizer: Optimizer) -> list[Tensor]:
    groups = [group for group in optimizer.param_groups if group.get(TOWARD) == 1]
    return [parameter for group in groups for parameter in group["params"]]


class _Offset:
    """Takes 1 from gammas before a step and gives it back afterwards.

    Args:
        optimizer: whose steps they are.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._shifted: list[tuple[Tensor, Tensor, Tensor]] = []  # gamma, what it was, and what it was less 1

    def before(self, _: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Step pre hook."""
        if len(args) > 1 and args[1] is not None:
            args = (args[0], self._around(args[1]), *args[2:])
        if kwargs.get("closure") is not None:
            kwargs = kwargs | {"closure": self._around(kwargs["closure"])}
        self._do()
        return args, kwargs

    def after(self, *_: Any) -> None:
        """Step post hook."""
        self.undo()

    @torch.no_grad()
    def undo(self) -> None:
        """Give back what was taken, if it was; what the optimizer changed stays changed."""
        while self._shifted:
            gamma, was, less = self._shifted[-1]
            gamma.copy_(was + (gamma - less))  # not gamma + 1, which would round a gamma that is not changed
            self._shifted.pop()

    @torch.no_grad()
    def _do(self) -> None:
        if self._shifted:
            return  # a subclass's step calls its parent's, and each calls the hooks
        for gamma in _marked(self._optimizer):
            self._shifted.append((gamma, gamma.clone(), gamma - 1))
            gamma.copy_(self._shifted[-1][2])

    def _around(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """A closure that sees gamma as it is."""

        def evaluate() -> Any:
            self.undo()
            loss = closure()
            self._do()
            return loss

        return evaluate
