"""Weight decay toward one: an optimizer of gamma does what it would do with a parameter that is gamma - 1."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim

from renorm.optim import decay_toward_one, param_groups

DECAY = 0.3
OPTIMIZERS: dict[str, Callable[..., optim.Optimizer]] = {
    "Adadelta": optim.Adadelta,
    "Adafactor": optim.Adafactor,
    "Adagrad": optim.Adagrad,
    "Adam": optim.Adam,
    "Adam, decoupled": functools.partial(optim.Adam, decoupled_weight_decay=True),
    "Adam, fused": functools.partial(optim.Adam, fused=True),
    "Adam, foreach": functools.partial(optim.Adam, foreach=True),
    "AdamW": optim.AdamW,
    "AdamW, amsgrad": functools.partial(optim.AdamW, amsgrad=True),
    "Adamax": optim.Adamax,
    "ASGD": optim.ASGD,
    "NAdam": optim.NAdam,
    "RAdam": optim.RAdam,
    "RMSprop": functools.partial(optim.RMSprop, momentum=0.9),
    "Rprop": optim.Rprop,
    "SGD": optim.SGD,
    "SGD, nesterov": functools.partial(optim.SGD, momentum=0.9, nesterov=True),
}
every_optimizer = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)


class Subclassed(optim.SGD):
    """Hooks are called by its step and, once there has been a plain SGD, by that of its parent too."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


def network() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).double()
    nn.init.uniform_(model[1].weight, -1, 4)
    return model


def attached(model: nn.Module, make: Callable[..., optim.Optimizer] = optim.SGD, **options: Any) -> Any:
    return decay_toward_one(make(param_groups(model, DECAY, toward=1), **{"lr": 0.1} | options))


def pull(gamma: Tensor, times: int = 1) -> Tensor:
    """Gamma after steps of SGD without a gradient."""
    return 1 + (gamma.detach().clone() - 1) * (1 - 0.1 * DECAY) ** times


def without_gradients(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return model


@every_optimizer
def test_gamma_moves_as_one_plus_a_parameter_that_decays_toward_zero(make: Callable[..., optim.Optimizer]) -> None:
    model = network()
    optimizer = attached(model, make, lr=0.05)
    rest = [parameter.detach().clone().requires_grad_() for parameter in model.parameters()]
    rest[2].detach().sub_(1)
    reference = make([{"params": rest, "weight_decay": DECAY}], lr=0.05)
    for _ in range(5):
        for parameter, other in zip(model.parameters(), rest, strict=True):
            parameter.grad = torch.randn_like(parameter)
            other.grad = parameter.grad.clone()
        optimizer.step()
        reference.step()
    rest[2].detach().add_(1)
    for parameter, other in zip(model.parameters(), rest, strict=True):
        torch.testing.assert_close(parameter, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("make", [optim.SGD, optim.AdamW], ids=["coupled", "decoupled"])
def test_without_a_gradient_gamma_approaches_one(make: Callable[..., optim.Optimizer]) -> None:
    model = without_gradients(network())
    expected = pull(model[1].weight, 3)
    optimizer = attached(model, make)
    for _ in range(3):
        optimizer.step()
    torch.testing.assert_close(model[1].weight.detach(), expected)


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("make", [optim.SGD, Subclassed])
def test_a_closure_sees_gamma(make: Callable[..., optim.Optimizer], named: bool) -> None:
    optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    model = network()
    before = model[1].weight.detach().clone()
    seen: list[Tensor] = []

    def closure() -> float:
        seen.append(model[1].weight.detach().clone())
        without_gradients(model)
        return 5.0

    optimizer = attached(model, make)
    assert (optimizer.step(closure=closure) if named else optimizer.step(closure)) == 5.0
    assert len(seen) == 1
    assert torch.equal(seen[0], before)
    torch.testing.assert_close(model[1].weight.detach(), pull(before))


def test_step_hooks_of_others_see_gamma_after_the_step() -> None:
    model = without_gradients(network())
    expected = pull(model[1].weight)
    seen: list[Tensor] = []
    optimizer = attached(model)
    optimizer.register_step_post_hook(lambda *_: seen.append(model[1].weight.detach().clone()))
    optimizer.step()
    torch.testing.assert_close(seen, [expected])


def test_an_error_in_a_closure_leaves_gamma_bit_for_bit() -> None:
    model = network()
    before = model[1].weight.detach().clone()

    def closure() -> float:
        raise KeyboardInterrupt

    optimizer = attached(model)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    assert torch.equal(model[1].weight, before)


def test_an_error_in_a_step_leaves_gamma_bit_for_bit_and_later_steps_as_they_should_be() -> None:
    model = without_gradients(network())
    before = model[1].weight.detach().clone()
    optimizer = attached(model)
    optimizer.param_groups[0]["lr"] = "0.1"
    with pytest.raises(TypeError):
        optimizer.step()
    assert torch.equal(model[1].weight, before)
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.step()
    torch.testing.assert_close(model[1].weight.detach(), pull(before))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gamma_without_a_gradient_stays_bit_for_bit(dtype: torch.dtype) -> None:
    model = network().to(dtype)
    nn.init.normal_(model[1].weight, 0, 0.01)
    before = model[1].weight.detach().clone()
    attached(model).step()
    assert torch.equal(model[1].weight, before)


def test_a_skipped_step_of_a_gradient_scaler_leaves_gamma_bit_for_bit() -> None:
    model = without_gradients(network().float())
    before = model[1].weight.detach().clone()
    optimizer, scaler = attached(model, optim.AdamW, fused=True), torch.amp.GradScaler("cpu")
    scaler.scale(torch.zeros(1))
    model[0].bias.grad.fill_(torch.inf)  # type: ignore[union-attr]
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(model[1].weight, before)
    model[0].bias.grad.fill_(0)  # type: ignore[union-attr]
    scaler.step(optimizer)
    torch.testing.assert_close(model[1].weight.detach(), pull(before))


@pytest.mark.parametrize("scheduler_first", [False, True])
def test_learning_rate_schedulers_work(scheduler_first: bool) -> None:
    model = without_gradients(network())
    before = model[1].weight.detach().clone()
    optimizer = optim.SGD(param_groups(model, DECAY, toward=1), lr=0.1)
    if not scheduler_first:
        decay_toward_one(optimizer)
    scheduler = optim.lr_scheduler.StepLR(optimizer, 1)
    decay_toward_one(optimizer)
    optimizer.step()
    scheduler.step()
    optimizer.step()
    expected = 1 + (before - 1) * (1 - 0.1 * DECAY) * (1 - 0.01 * DECAY)
    torch.testing.assert_close(model[1].weight.detach(), expected)


def test_weight_decay_is_read_at_every_step() -> None:
    model = without_gradients(network())
    optimizer = attached(model)
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    before = model[1].weight.detach().clone()
    optimizer.step()
    assert torch.equal(model[1].weight, before)


def test_twice_is_once() -> None:
    model = without_gradients(network())
    expected = pull(model[1].weight)
    decay_toward_one(attached(model)).step()
    torch.testing.assert_close(model[1].weight.detach(), expected)


def test_a_checkpoint_resumes() -> None:
    model = network()
    optimizer = attached(model, momentum=0.9)
    gradients = [torch.randn(3).double() for _ in range(4)]
    for gradient in gradients[:2]:
        without_gradients(model)[1].weight.grad = gradient.clone()
        optimizer.step()
    other = network()
    other.load_state_dict(model.state_dict())
    resumed = attached(other, momentum=0.9)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for gradient in gradients[2:]:
        for one, its in ((model, optimizer), (other, resumed)):
            without_gradients(one)[1].weight.grad = gradient.clone()
            its.step()
    assert torch.equal(other[1].weight, model[1].weight)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")
def test_a_compiled_step_decays_toward_one(fresh_compiler: None) -> None:
    model = without_gradients(network())
    expected = pull(model[1].weight, 3)
    step = torch.compile(attached(model).step, backend="eager")
    for _ in range(3):
        step()
    torch.testing.assert_close(model[1].weight.detach(), expected)


def plainly_made(model: nn.Module) -> optim.Optimizer:
    return optim.SGD(param_groups(model, DECAY, toward=1), lr=0.1)


def copied(model: nn.Module) -> optim.Optimizer:
    return copy.deepcopy(attached(model))


def unpickled(model: nn.Module) -> optim.Optimizer:
    optimizer: optim.Optimizer = pickle.loads(pickle.dumps(attached(model)))
    return optimizer


@pytest.mark.parametrize("make", [plainly_made, copied, unpickled])
def test_an_optimizer_that_would_decay_toward_zero_instead_refuses_to_step(
    make: Callable[[nn.Module], optim.Optimizer],
) -> None:
    optimizer = make(without_gradients(network()))
    (gamma,) = next(group["params"] for group in optimizer.param_groups if group["name"] == "gamma")
    before = gamma.detach().clone()
    with pytest.raises(RuntimeError, match=r"renorm.optim.decay_toward_one\(optimizer\)"):
        optimizer.step()
    assert torch.equal(gamma, before)
    decay_toward_one(optimizer)
    gamma.grad = torch.zeros_like(gamma)
    optimizer.step()
    torch.testing.assert_close(gamma.detach(), pull(before))


def test_an_optimizer_without_such_a_group_is_refused() -> None:
    optimizer = optim.SGD(param_groups(network(), DECAY), lr=0.1)
    with pytest.raises(ValueError, match="must have a group that decays toward 1"):
        decay_toward_one(optimizer)
    optimizer = optim.SGD(param_groups(network(), DECAY, norm="none", toward=1), lr=0.1)
    with pytest.raises(ValueError, match="a gamma to decay: with norm='all'"):
        decay_toward_one(optimizer)
