"""Which layer for which training, with the measurements that speak for it."""

from .advice import Evidence, Recommendation
from .decide import recommend

__all__ = ["Evidence", "Recommendation", "recommend"]
