"""A rewritten forward, with the conditions under which it does what the original forward does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from ..norm import Norm
from .roles import is_bare, role
from .sites import Fused, NotFused, Site, UnfusableError, call_norm, find_site
from .tracing import Trace, UntraceableError, trace

LISTS = (nn.ModuleList, nn.ModuleDict)  # without a forward: what they hold is called by who holds them


@dataclass(frozen=True)
class Plan:
    """A rewritten forward for one mode, and what must still be as it was when it was traced.

    Args:
        run: the rewritten forward, a function of the module and its inputs.
        inputs: number of inputs.
        settings: attributes that the forward reads, with their values.
        members: names of the children, parameters and buffers that are there, by the name of their parent.
        roles: roles of modules that are called otherwise, by name.
    """

    run: Callable[..., Any]
    inputs: int
    settings: tuple[tuple[str, object], ...]
    members: tuple[tuple[str, tuple[str, ...]], ...]
    roles: tuple[tuple[str, str | None], ...]

    def holds(self, owner: nn.Module, args: tuple[object, ...]) -> bool:
        """Whether the rewritten forward does for these inputs what the original forward does.

        Args:
            owner: module that is called.
            args: its positional arguments.

        Returns:
            True if everything is as it was.
        """
        return (
            len(args) == self.inputs
            and all(isinstance(arg, Tensor) for arg in args)
            and all(_same(getattr(owner, name, None), value) for name, value in self.settings)
            and all(_members(owner, name) == names for name, names in self.members)
            and all(role(_find(owner, name)) == expected for name, expected in self.roles)
        )


@dataclass(frozen=True)
class Outcome:
    """What became of a module in one mode.

    Args:
        plan: the rewritten forward; None if nothing is fused.
        fused: calls that take in what follows.
        not_fused: calls that do not.
    """

    plan: Plan | None
    fused: tuple[Fused, ...] = ()
    not_fused: tuple[NotFused, ...] = ()


def make_plan(owner: nn.Module, cls: type[nn.Module], training: bool) -> Outcome:
    """Trace a module's forward and fuse into its norm layers what follows them.

    Args:
        owner: module with norm layers.
        cls: class whose forward is traced.
        training: mode that the plan is for.

    Returns:
        The plan, if any, and a row for every call of a norm layer; names are relative to the owner.
    """
    try:
        traced = trace(owner, cls, training)
        parents = _parents(traced.graph, owner)
    except UntraceableError as reason:
        return left(owner, str(reason))
    sites, not_fused = _fuse(traced.graph, owner)
    if not sites:
        return Outcome(None, (), not_fused)
    fused = tuple(Fused(str(site.norm.target), site.add is not None, site.act) for site in sites)
    return Outcome(_plan(traced, owner, parents, sites), fused, not_fused)


def left(owner: nn.Module, reason: str) -> Outcome:
    """The outcome for a module that is left as it is.

    Args:
        owner: module with norm layers.
        reason: why.

    Returns:
        An outcome without a plan.
    """
    return Outcome(None, (), tuple(NotFused(name, reason) for name in layers_of(owner)))


def layers_of(owner: nn.Module) -> dict[str, Norm]:
    """The norm layers that a module's own forward would call, and that only normalize.

    Args:
        owner: any module.

    Returns:
        Layer by name: its children, and what is in its lists and dicts of modules.
    """
    layers: dict[str, Norm] = {}
    for name, child in owner.named_children():
        if isinstance(child, Norm) and is_bare(child):
            layers[name] = child
        elif type(child) in LISTS:
            layers |= {f"{name}.{inner}": layer for inner, layer in layers_of(child).items()}
    return layers


def _fuse(graph: fx.Graph, owner: nn.Module) -> tuple[list[Site], tuple[NotFused, ...]]:
    """Rewrite a graph; the last layers first, so that of two that are added the later one adds the other."""
    uncalled = layers_of(owner)
    sites, not_fused = [], []
    for node in reversed(list(graph.nodes)):
        layer = owner.get_submodule(str(node.target)) if node.op == "call_module" else None
        if not (isinstance(layer, Norm) and is_bare(layer)):
            continue
        uncalled = {name: other for name, other in uncalled.items() if other is not layer}
        try:
            site = find_site(node, owner)
        except UnfusableError as reason:
            not_fused.append(NotFused(str(node.target), str(reason)))
        else:
            _replace(graph, site)
            sites.append(site)
    not_fused += [NotFused(name, f"{type(owner).__name__} does not call it") for name in uncalled]
    return sites[::-1], tuple(not_fused[::-1])


def _replace(graph: fx.Graph, site: Site) -> None:
    with graph.inserting_before(site.add or site.norm):
        layer = graph.get_attr(str(site.norm.target))
        call = graph.call_function(call_norm, (layer, site.norm.args[0], site.residual, site.in_place, site.act))
    site.last.replace_all_uses_with(call)
    for node in reversed((site.norm, *site.chain)):
        graph.erase_node(node)


def _plan(traced: Trace, owner: nn.Module, parents: tuple[str, ...], sites: list[Site]) -> Plan:
    """The plan for a rewritten graph."""
    run = type(fx.GraphModule(owner, traced.graph)).forward
    inputs = sum(node.op == "placeholder" for node in traced.graph.nodes)
    members = tuple((name, _members(owner, name)) for name in parents)
    roles = {name: role(module) for site in sites for name, module in site.modules()}
    return Plan(run, inputs, traced.settings, members, tuple(roles.items()))


def _parents(graph: fx.Graph, owner: nn.Module) -> tuple[str, ...]:
    """The modules whose children a forward calls: the owner, and its lists, outer ones first."""
    parents = {""}
    for node in graph.nodes:
        parts = str(node.target).split(".")[:-1] if node.op == "call_module" else []
        parents |= {".".join(parts[:depth]) for depth in range(1, len(parts) + 1)}
    for name in parents - {""}:
        if type(owner.get_submodule(name)) not in (*LISTS, nn.Sequential):
            raise UntraceableError(f"{type(owner).__name__} calls modules inside {name!r}, around its forward")
    return tuple(sorted(parents))


def _members(owner: nn.Module, name: str) -> tuple[str, ...]:
    parent: Any = _find(owner, name) if name else owner
    tables = (parent._modules, parent._parameters, parent._buffers)
    return tuple([member for table in tables for member, value in table.items() if value is not None])


def _find(owner: nn.Module, name: str) -> Any:
    """get_submodule, several times faster; the parents are known to have these children."""
    module: Any = owner
    for part in name.split("."):
        module = module._modules[part]
    return module


def _same(value: object, expected: object) -> bool:
    return value is expected or (type(value) is type(expected) and value == expected)
