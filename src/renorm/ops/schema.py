"""The operations that torch knows of: their signatures, and where a GPU's implementations are found."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch

_FORWARD = (
    "(Tensor x, Tensor? weight, Tensor? bias, Tensor? mask, Tensor? residual, Tensor? running_mean, "
    "Tensor? running_var, Tensor? r_max, Tensor? d_max, Tensor? r, Tensor? d, int? examples_per_group, "
    "int channels_per_group, float eps, str act) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_SIGNATURES = {
    "normalize": _FORWARD,
    # The same without a registered gradient, for the autograd.Function of eager mode: torch asks Python for the
    # gradient of the other at every call.
    "normalize_eager": _FORWARD,
    "normalize_backward": (
        "(Tensor dy, Tensor x, Tensor? weight, Tensor? mask, Tensor? residual, Tensor? y, Tensor count, "
        "Tensor coefficients, int? examples_per_group, int channels_per_group, str act, bool wants_residual) "
        "-> (Tensor, Tensor, Tensor, Tensor)"
    ),
    "evaluate": (
        "(Tensor x, Tensor? weight, Tensor? bias, Tensor? mask, Tensor? residual, Tensor running_mean, "
        "Tensor running_var, float example_weight, int channels_per_group, float eps, str act) -> Tensor"
    ),
    "track": (
        "(Tensor(a!) running_mean, Tensor(b!) running_var, Tensor(c!) steps, Tensor(d!) skipped, Tensor mean, "
        "Tensor var, Tensor count, str tracking, float? momentum, int channels_per_group, float eps) -> ()"
    ),
    # Both in one call, for layers in eager mode: the output, the count and the coefficients.
    "normalize_and_track": (
        "(Tensor x, Tensor? weight, Tensor? bias, Tensor? mask, Tensor? residual, Tensor(a!) running_mean, "
        "Tensor(b!) running_var, Tensor(c!) steps, Tensor(d!) skipped, Tensor? r_max, Tensor? d_max, "
        "int? examples_per_group, int channels_per_group, float eps, str act, str tracking, float? momentum) "
        "-> (Tensor, Tensor, Tensor)"
    ),
}
_ON_GPU = {
    "normalize": "launch.normalize",
    "normalize_eager": "launch.normalize",
    "normalize_backward": "launch.normalize_backward",
    "evaluate": "launch.evaluate",
    "track": "tracking.track",
    "normalize_and_track": "launch.normalize_and_track",
}


def _define() -> torch.library.Library:
    library = torch.library.Library("renorm", "FRAGMENT")
    for name, signature in _SIGNATURES.items():
        library.define(name + signature)
        library.impl(name, _imported_at_first_call(_ON_GPU[name]), "CUDA")
    return library


def _imported_at_first_call(path: str) -> Any:
    """A function of the Triton kernels, whose import takes a second."""
    module, name = path.split(".")

    def call(*arguments: Any) -> Any:
        function = getattr(import_module(f".triton.{module}", __package__), name)
        with torch.cuda.device(arguments[0].device):  # Triton launches on the current one
            return function(*arguments)

    return call


LIBRARY = _define()  # torch forgets the operations of a library that is gone
