"""Which norm layers have a path to a model's output that leads through no other norm layer."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from ..fusion.tracing import Tracer, UntraceableError, first_line, watched_trace
from ..norm import Norm
from ..recurrent import BatchRenormGRU, BatchRenormLSTM

_NORMS = (Norm, nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
_RECURRENT = (BatchRenormLSTM, BatchRenormGRU)  # normalize all they are given, and are not traced inside
_NORMALIZING = {
    F.batch_norm, F.instance_norm, F.group_norm, F.layer_norm, F.rms_norm,
    torch.batch_norm, torch.instance_norm, torch.group_norm, torch.layer_norm, torch.rms_norm,
}  # fmt: skip

# What looks at a tensor without passing on its values.
_DATA_ATTRIBUTES = {"T", "mT", "H", "mH", "real", "imag", "data"}
_BLIND_METHODS = {
    "size", "dim", "ndimension", "numel", "nelement", "stride", "element_size", "get_device", "is_contiguous",
    "is_floating_point", "new_empty", "new_full", "new_ones", "new_tensor", "new_zeros",
}  # fmt: skip
_BLIND_FUNCTIONS = {
    torch.numel, torch.empty_like, torch.full_like, torch.ones_like, torch.rand_like, torch.randn_like,
    torch.zeros_like, torch.is_floating_point,
}  # fmt: skip
_SHAPED_AS = {"expand_as", "reshape_as", "type_as", "view_as"}  # only the first tensor's values are passed on


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm layer.

    Args:
        module: any module.

    Returns:
        True for layers of renorm, for torch's and for subclasses of them.
    """
    return isinstance(module, _NORMS)


def exposed_norms(model: nn.Module) -> set[nn.Module]:
    """The norm layers with a path to the model's output through no other norm layer.

    Args:
        model: any model; DDP and torch.compile around it are looked through.

    Returns:
        The layers. Of a recurrent layer of renorm, the norm layers of its last cells.

    Raises:
        UntraceableError: torch.fx cannot trace the model.
    """
    model = _unwrapped(model)
    if _is_leaf(model):
        return set(_norms_at_end(model))
    graph = _trace(model)
    found: set[nn.Module] = set()
    seen: set[fx.Node] = set()
    ahead = [node for node in graph.nodes if node.op == "output"]
    while ahead:
        node = ahead.pop()
        if node in seen:
            continue
        seen.add(node)
        module = model.get_submodule(str(node.target)) if node.op == "call_module" else None
        if module is not None:
            found.update(_norms_at_end(module))
        ahead += _sources(node, module)
    return found


def _unwrapped(model: nn.Module) -> nn.Module:
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif isinstance(inner := model._modules.get("_orig_mod"), nn.Module):  # torch.compile's
            model = inner
        else:
            return model


def _is_leaf(module: nn.Module) -> bool:
    return is_norm(module) or isinstance(module, _RECURRENT)


def _norms_at_end(module: nn.Module) -> Iterator[nn.Module]:
    """The norm layers that are last in a module called as a whole."""
    if is_norm(module):
        yield module
    elif isinstance(module, _RECURRENT):
        cells = list(module.cells)
        for cell in cells[-(len(cells) // module.num_layers) :]:
            yield from filter(is_norm, cell.children())


def _sources(node: fx.Node, module: nn.Module | None) -> list[fx.Node]:
    """The nodes whose values a node passes on without normalizing them."""
    if module is not None:
        if not _is_leaf(module):
            return node.all_input_nodes
        residual = node.kwargs.get("residual", node.args[2] if len(node.args) > 2 else None)
        return [residual] if isinstance(module, Norm) and isinstance(residual, fx.Node) else []
    target: Any = node.target
    if node.op == "call_method":
        if target in _BLIND_METHODS:
            return []
        return node.all_input_nodes[:1] if target in _SHAPED_AS else node.all_input_nodes
    if node.op != "call_function":
        return node.all_input_nodes
    if target is getattr:
        return node.all_input_nodes if node.args[1] in _DATA_ATTRIBUTES else []
    return [] if target in _NORMALIZING or target in _BLIND_FUNCTIONS else node.all_input_nodes


def _trace(model: nn.Module) -> fx.Graph:
    """The graph of a model's training, in which norm layers are calls."""
    try:
        # a copy, since a forward may leave something in the model; of everything but the parameters
        stand_in = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()}).train()
        graph, unseen = watched_trace(_NormCalls(), stand_in)
    except Exception as error:  # a forward that runs on stand-ins for tensors may fail in any way
        raise UntraceableError(f"torch.fx cannot trace {type(model).__name__} ({first_line(error)})") from error
    if "random numbers" in unseen:
        raise UntraceableError(f"{type(model).__name__} draws random numbers, and may be another graph the next time")
    _follow_in_place(graph)
    return graph


def _follow_in_place(graph: fx.Graph) -> None:
    """Let what comes after `x.add_(y)` use its value, also where it uses x."""
    order = {node: place for place, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        is_in_place = node.op == "call_method" and str(node.target).endswith("_") and node.target[-2:] != "__"
        if is_in_place and isinstance(node.args[0], fx.Node):
            later = [user for user in node.args[0].users if order[user] > order[node]]
            for user in later:
                user.replace_input_with(node.args[0], node)


class _NormCalls(Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return _is_leaf(m) or (super().is_leaf_module(m, module_qualified_name) and not _has_leaf(m))

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        """A module without norm layers that cannot be traced is a call, too."""
        stack = self.module_stack.copy()
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            if _has_leaf(m):
                raise
            self.module_stack = stack
            return self.create_proxy("call_module", self.path_of_module(m), args, kwargs)


def _has_leaf(module: nn.Module) -> bool:
    return any(map(_is_leaf, module.modules()))
