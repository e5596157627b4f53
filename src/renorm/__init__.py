"""Batch normalization that means the same thing in training and at inference."""

from . import functional, optim, samplers
from .blocks import LateFreeze, accumulate, freeze
from .conversion.convert import ConversionReport, convert, to_batchnorm
from .conversion.recipe import recipe
from .conversion.state_dicts import merge, translate_state_dict
from .inference.estimate import adapt, estimate
from .inference.report import Weighing
from .inference.weigh import weigh
from .inspection.inspect import inspect
from .inspection.report import Inspection
from .layers import (
    BatchGroupNorm,
    BatchGroupNorm1d,
    BatchGroupNorm2d,
    BatchGroupNorm3d,
    BatchNorm,
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    BatchRenorm,
    BatchRenorm1d,
    BatchRenorm2d,
    BatchRenorm3d,
    GhostBatchNorm,
    GhostBatchNorm1d,
    GhostBatchNorm2d,
    GhostBatchNorm3d,
)
from .limits import Limits
from .moments import Moments
from .norm import Norm
from .recommendation import Recommendation, recommend
from .recurrent import BatchRenormGRU, BatchRenormLSTM
from .synchronize import joinables, synchronize

__version__ = "0.1.0"

__all__ = [
    "BatchGroupNorm",
    "BatchGroupNorm1d",
    "BatchGroupNorm2d",
    "BatchGroupNorm3d",
    "BatchNorm",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchRenorm",
    "BatchRenorm1d",
    "BatchRenorm2d",
    "BatchRenorm3d",
    "BatchRenormGRU",
    "BatchRenormLSTM",
    "ConversionReport",
    "GhostBatchNorm",
    "GhostBatchNorm1d",
    "GhostBatchNorm2d",
    "GhostBatchNorm3d",
    "Inspection",
    "LateFreeze",
    "Limits",
    "Moments",
    "Norm",
    "Recommendation",
    "Weighing",
    "accumulate",
    "adapt",
    "convert",
    "estimate",
    "freeze",
    "functional",
    "inspect",
    "joinables",
    "merge",
    "optim",
    "recipe",
    "recommend",
    "samplers",
    "synchronize",
    "to_batchnorm",
    "translate_state_dict",
    "weigh",
]
