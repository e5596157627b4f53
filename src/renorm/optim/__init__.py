"""What to hand to an optimizer: parameter groups, and weight decay toward one."""

from .groups import param_groups
from .toward import decay_toward_one

__all__ = ["decay_toward_one", "param_groups"]
