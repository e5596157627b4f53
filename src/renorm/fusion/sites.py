"""Finding, in a traced forward, what can be done in one call with a norm layer, and proving that it may."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..activation import Activation, activate, is_piecewise_linear
from .roles import IDENTITY, call_activation, hooked, module_activation, role, written

_ADDS: dict[Any, bool] = {operator.add: False, torch.add: False, "add": False, operator.iadd: True, "add_": True}
_ARITHMETIC = frozenset({operator.sub, operator.mul, operator.truediv, operator.neg, torch.sub, torch.mul, torch.cat})
_FRESH = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear)


def call_norm(
    norm: nn.Module, x: Tensor, residual: Any = None, in_place: bool = False, act: Activation | None = None
) -> Tensor:
    """Normalize, add and activate in one go.

    Args:
        norm: norm layer.
        x: its input.
        residual: what is added to the normalized output; None for nothing.
        in_place: whether the model adds in place, which matters for a residual of another shape or dtype.
        act: activation applied last, if any.

    Returns:
        What the calls return one after the other.
    """
    if residual is None or (isinstance(residual, Tensor) and _is_alike(residual, x)):
        y: Tensor = norm(x, residual=residual, act=act)
        return y
    add = operator.iadd if in_place else operator.add  # broadcasts and promotes, as layers do not
    return activate(add(norm(x), residual), act)


def _is_alike(residual: Tensor, x: Tensor) -> bool:
    return residual.shape == x.shape and residual.dtype == x.dtype


@dataclass(frozen=True)
class Fused:
    """A call of a norm layer that takes in what follows it.

    Args:
        name: the layer's name in the model.
        adds: whether it adds a residual.
        act: activation it applies, if any.
        note: when, if not always.
    """

    name: str
    adds: bool
    act: Activation | None
    note: str = ""

    def __str__(self) -> str:
        parts = ("the residual add" if self.adds else None, self.act)
        return f"{self.name}: fused with {' and '.join(filter(None, parts))}{self.note and ', ' + self.note}"


@dataclass(frozen=True)
class NotFused:
    """A call of a norm layer that is left as it is.

    Args:
        name: the layer's name in the model.
        reason: why.
        note: when, if not always.
    """

    name: str
    reason: str
    note: str = ""

    def __str__(self) -> str:
        return f"{self.name or '(root)'}: not fused, {self.reason}{self.note and ', ' + self.note}"


class UnfusableError(Exception):
    """Why nothing can be fused into a call of a norm layer."""


@dataclass
class Site:
    """A call of a norm layer, and the calls after it that it can take in.

    Args:
        owner: module whose forward it is in.
        norm: the call of the layer.
        chain: the calls that it takes in, in order.
        add: the addition among them, if any.
        residual: what is added.
        act: the activation at the end of them, if any.
    """

    owner: nn.Module
    norm: fx.Node
    chain: list[fx.Node] = field(default_factory=list)
    add: fx.Node | None = None
    residual: fx.Node | None = None
    act: Activation | None = None

    @property
    def last(self) -> fx.Node:
        """The call whose value the site computes."""
        return self.chain[-1] if self.chain else self.norm

    @property
    def in_place(self) -> bool:
        """Whether the addition is in place."""
        return self.add is not None and _ADDS[self.add.target]

    def modules(self) -> Iterator[tuple[str, nn.Module]]:
        """The modules that are no longer called as the forward calls them.

        Yields:
            Name and module.
        """
        for node in (self.norm, *self.chain):
            if node.op == "call_module":
                yield str(node.target), _module(node, self.owner)


def find_site(norm: fx.Node, owner: nn.Module) -> Site:
    """What can be done in one call with a norm layer.

    Args:
        norm: call of a layer that only normalizes, in the graph of the owner's forward.
        owner: module with the layer.

    Returns:
        The site, with an addition, an activation or both.

    Raises:
        UnfusableError: there is nothing, or no proof that it may be done.
    """
    if hooked(_module(norm, owner)):
        raise UnfusableError("there is a hook on it")
    if len(norm.args) != 1 or norm.kwargs:
        raise UnfusableError("it is called with more than its input")
    site = Site(owner, norm)
    follower = _follower(site)
    if follower.op != "call_module" and follower.target in _ADDS:
        _take_add(site, follower)
        try:
            follower = _follower(site)
        except UnfusableError:
            return site
    act = _activation(site, follower)
    if act is not None and not _changes_what_is_kept(site, follower, act):
        site.act = act
        site.chain.append(follower)
    elif site.add is None:
        raise UnfusableError(_describe(follower, owner))
    return site


def _follower(site: Site) -> fx.Node:
    """The one call that uses the value so far; identities become part of the site."""
    while True:
        users = list(site.last.users)
        if len(users) != 1:
            raise UnfusableError(f"its output is used {len(users)} times" if users else "its output is not used")
        if users[0].op == "output":
            raise UnfusableError(f"its output leaves {type(site.owner).__name__}")
        if not (_is_call_with(users[0], site.last) and role(_module(users[0], site.owner)) == IDENTITY):
            return users[0]
        site.chain.append(users[0])


def _activation(site: Site, node: fx.Node) -> Activation | None:
    if _is_call_with(node, site.last):
        return module_activation(_module(node, site.owner))
    return call_activation(node) if node.args[:1] == (site.last,) else None


def _take_add(site: Site, node: fx.Node) -> None:
    if len(node.args) != 2 or node.kwargs not in ({}, {"alpha": 1}):
        raise UnfusableError("its output is added with a factor")
    residual = node.args[1] if node.args[0] is site.last else node.args[0]
    if not isinstance(residual, fx.Node) or residual is site.last:
        raise UnfusableError("no other tensor is added")
    if _ADDS[node.target] and node.args[0] is not site.last:
        raise UnfusableError("its output is added in place to another tensor")
    if not _may_wait(site, node):
        raise UnfusableError("what happens before the residual add may change its input or its statistics")
    site.add, site.residual = node, residual
    site.chain.append(node)


def _may_wait(site: Site, add: fx.Node) -> bool:
    """Whether the layer may be called as late as where the residual is added."""
    between = []
    node = site.norm.next
    while node is not add:
        if node not in site.chain:
            between.append(node)
        node = node.next
    return not between or (_is_ours_alone(site) and not any(_touches(node, site) for node in between))


def _is_ours_alone(site: Site) -> bool:
    """Whether nobody else can change the layer's input: it is new memory, and goes nowhere else."""
    x = site.norm.args[0]
    if not isinstance(x, fx.Node) or x.op != "call_module" or len(x.users) != 1:
        return False
    module = _module(x, site.owner)
    return type(module) in _FRESH and not hooked(module)


def _touches(node: fx.Node, site: Site) -> bool:
    """Whether a node may call the layer of the site, or looks at its state."""
    if node.op == "get_attr":
        return str(node.target).startswith(f"{site.norm.target}.")
    return node.op == "call_module" and _module(site.norm, site.owner) in _module(node, site.owner).modules()


def _changes_what_is_kept(site: Site, last: fx.Node, act: Activation) -> bool:
    """Whether something writes later to what the layer keeps for an activation's gradient, and torch would not."""
    if site.add is None or site.residual is None or act == "relu":
        return False  # the gradient is computed from the layer's input, or torch keeps its relu's output too
    kept = last if is_piecewise_linear(act) else site.residual
    family, node = _family(kept, site), site.add.next
    while node.op != "output":
        if node is not last and node not in site.chain and written(node, site.owner) in family:
            return True
        node = node.next
    return False


def _family(value: fx.Node, site: Site) -> set[fx.Node]:
    """The nodes that may share memory with one."""
    family, found = {value}, [value]
    while found:
        node = found.pop()
        near = [user for user in node.users if not _is_fresh(user, site)]
        if not _is_fresh(node, site):
            near += node.all_input_nodes
        for other in near:
            if other not in family:
                family.add(other)
                found.append(other)
    return family


def _is_fresh(node: fx.Node, site: Site) -> bool:
    """Whether a call's value is memory of its own."""
    if node is site.add or node.op == "output":
        return not (node is site.add and site.in_place)
    if written(node, site.owner) is not None:
        return False
    if node.op == "call_module":
        module = _module(node, site.owner)
        return isinstance(module, (*_FRESH, _BatchNorm)) or module_activation(module) is not None
    return node.target in _ARITHMETIC or node.target in _ADDS or call_activation(node) is not None


def _is_call_with(node: fx.Node, value: fx.Node) -> bool:
    return node.op == "call_module" and node.args == (value,) and not node.kwargs


def _module(node: fx.Node, owner: nn.Module) -> nn.Module:
    return owner.get_submodule(str(node.target))


def _describe(node: fx.Node, owner: nn.Module) -> str:
    if node.target is call_norm:
        return "it is the residual that another layer adds"
    if node.op == "call_module":
        module = _module(node, owner)
        return f"{type(module).__name__}{' with a hook' * hooked(module)} follows"
    return f"{node.target if isinstance(node.target, str) else getattr(node.target, '__name__', node.target)} follows"
