"""Norm layers in a model, and modules around them that are to be replaced or left as a whole."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from ..fusion.tracing import UntraceableError, trace

IsNorm = Callable[[nn.Module], bool]

_STATISTICS = ("running_mean", "running_var", "ra_mean", "ra_var")
_BATCH_NORM = re.compile(r"Batch(Norm|Renorm|ReNorm)")
_NORM = re.compile(r"(?i:norm)|BN|Bn|(?:^|_)bn")
# Classes of TabNet, Composer and those who copy them, by name: the batch norm inside, and the size of its batches.
_GHOSTS = {"GBN": ("bn", "virtual_batch_size")} | {
    f"GhostBatchNorm{dimension}": ("batchnorm", "ghost_batch_size") for dimension in ("1d", "2d", "3d")
}
_LOOPS = (ast.For, ast.While, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.Lambda, ast.FunctionDef)


@dataclass(frozen=True)
class Ghost:
    """A ghost batch norm that calls an ordinary one in a loop.

    Args:
        attribute: name of the batch norm in it.
        norm: the batch norm.
        examples_per_group: size of the ghost batches.
    """

    attribute: str
    norm: nn.Module
    examples_per_group: int


@dataclass(frozen=True)
class Unit:
    """A norm layer of a model, or a module around norm layers that goes as a whole.

    Args:
        name: its name in the model.
        module: the module.
        reason: why nothing may be replaced inside; empty for a norm layer.
    """

    name: str
    module: nn.Module
    reason: str

    def selected(self, where: Callable[[str, nn.Module], bool]) -> bool:
        """Whether the user wants it, or a norm layer in it, converted."""
        parts = [
            (name, part) for name, part in self.module.named_modules(prefix=self.name) if isinstance(part, _BatchNorm)
        ]
        return any(where(name, part) for name, part in parts) or where(self.name, self.module)


def full_name(cls: type) -> str:
    """A class with its module, by which it is known without being imported."""
    return f"{cls.__module__}.{cls.__qualname__}"


def units(model: nn.Module, is_norm: IsNorm) -> list[Unit]:
    """What there is to replace in a model.

    Args:
        model: any model.
        is_norm: whether a module is a norm layer.

    Returns:
        Norm layers and modules around them, in the order of the model, none inside of another.
    """
    found: list[Unit] = []
    for name, module in model.named_modules():
        if is_norm(module):
            found.append(Unit(name, module, ""))
        elif _calls_in_its_own_way(module, is_norm):
            reason = "it is not certain that it calls each batch norm in it once a forward"
            found.append(Unit(name, module, reason))
    inside = {part for unit in found for part in unit.module.modules() if part is not unit.module}
    return [unit for unit in found if unit.module not in inside]


def looks_like_batch_norm(module: nn.Module) -> bool:
    """Whether a user may expect a module to be converted.

    Args:
        module: any module.

    Returns:
        True for batch norm, for whatever keeps running statistics or is called batch norm, as long as it has no
        layers of another kind in it, and for ghost batch norm around one.
    """
    if isinstance(module, _InstanceNorm):
        return False
    if isinstance(module, _BatchNorm) or ghost_of(module) is not None:
        return True
    keeps_statistics = any(hasattr(module, name) for name in _STATISTICS)
    if not keeps_statistics and not _BATCH_NORM.search(type(module).__name__):
        return False
    inner = [part for part in module.modules() if isinstance(part, _BatchNorm)]
    return (keeps_statistics or not inner) and _has_no_parameters_but(module, [*inner, module])


def ghost_of(module: nn.Module) -> Ghost | None:
    """The parts of another library's ghost batch norm.

    Args:
        module: any module.

    Returns:
        Them; None for everything else.
    """
    attribute, size = _GHOSTS.get(type(module).__name__, ("", ""))
    norm, examples = module._modules.get(attribute), getattr(module, size, None)
    if not isinstance(norm, _BatchNorm) or not isinstance(examples, int) or list(module.children()) != [norm]:
        return None
    return Ghost(attribute, norm, examples) if _has_no_parameters_but(module, [norm]) else None


def _has_no_parameters_but(module: nn.Module, parts: list[nn.Module]) -> bool:
    """Whether all parameters are those of some modules; of a module that is among them, its own alone."""
    known = {id(parameter) for part in parts for parameter in part.parameters(recurse=part is not module)}
    return all(id(parameter) in known for parameter in module.parameters())


def _calls_in_its_own_way(module: nn.Module, is_norm: IsNorm) -> bool:
    """Whether a module consists of norm layers, and may call one several times or not with the whole batch."""
    if type(module).forward is nn.Module.forward or not _NORM.search(type(module).__name__):
        return False
    norms = list(_norms_in(module, is_norm))
    return bool(norms) and _has_no_parameters_but(module, norms) and not _calls_each_once(module, norms, is_norm)


def _norms_in(module: nn.Module, is_norm: IsNorm) -> Iterator[nn.Module]:
    """The norm layers in a module, not those inside of others."""
    for child in dict.fromkeys(module.children()):
        if is_norm(child):
            yield child
        else:
            yield from _norms_in(child, is_norm)


def _calls_each_once(module: nn.Module, norms: list[nn.Module], is_norm: IsNorm) -> bool:
    try:
        calls = _calls(module, is_norm)
    except UntraceableError:
        return _is_written_with_one_call_each(module, is_norm)
    return calls == Counter(dict.fromkeys(norms, 1))


def _calls(module: nn.Module, is_norm: IsNorm) -> Counter[nn.Module]:
    """How often a training forward calls each norm layer in a module."""
    found: Counter[nn.Module] = Counter()
    for node in trace(module, type(module), True).graph.nodes:
        if node.op == "call_module":
            child = module.get_submodule(str(node.target))
            if is_norm(child):
                found[child] += 1
            elif any(_norms_in(child, is_norm)):
                found += _calls(child, is_norm)
    return found


def _is_written_with_one_call_each(module: nn.Module, is_norm: IsNorm) -> bool:
    """What the code tells where a forward cannot be traced: the branches that depend on shapes, above all."""
    children = {name: child for name, child in module._modules.items() if child is not None}
    inner = {name: [child] if is_norm(child) else list(_norms_in(child, is_norm)) for name, child in children.items()}
    called = {name: child for name, child in children.items() if inner[name]}
    if len(set(called.values())) < len(called):
        return False
    if not all(is_norm(child) or _calls_each_once(child, inner[name], is_norm) for name, child in called.items()):
        return False
    try:
        methods = list(_methods(type(module)))
    except (OSError, TypeError, SyntaxError):  # of a class without source
        return False
    return all(sum(_uses(method, name, forward) for method, forward in methods) == 1 for name in called)


def _methods(cls: type[nn.Module]) -> Iterator[tuple[ast.FunctionDef, bool]]:
    """Methods that a module's forward may call, and whether they are the forward."""
    overridden: set[str] = {"__init__"}
    for owner in cls.__mro__[: cls.__mro__.index(nn.Module)]:
        tree = ast.parse(textwrap.dedent(inspect.getsource(owner)))
        methods = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name not in overridden]
        for method in methods:
            yield method, method.name == "forward" and vars(owner).get("forward") is cls.forward
        if not any(isinstance(node, ast.Name) and node.id == "super" for m in methods for node in ast.walk(m)):
            overridden.update(method.name for method in methods)


def _uses(method: ast.FunctionDef, name: str, forward: bool) -> int:
    """How often a method calls a child; 2 for what is not one plain call in the forward itself."""
    this = method.args.args[0].arg if method.args.args else ""
    attributes = (node for node in ast.walk(method) if isinstance(node, ast.Attribute))
    uses = [node for node in attributes if ast.unparse(node) == f"{this}.{name}"]
    calls = [node.func for node in ast.walk(method) if isinstance(node, ast.Call) and node.func in uses]
    if not forward:
        return 2 * bool(calls)
    loops = (node for node in ast.walk(method) if isinstance(node, _LOOPS) and node is not method)
    looped = any(call in ast.walk(loop) for loop in loops for call in calls)
    return len(uses) if uses == calls and not looped else 2
