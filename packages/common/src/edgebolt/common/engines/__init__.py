"""Where visits are trained: here, or on many cores, GPUs and machines, by one argument of the strategy.

Import public names from ``edgebolt.common.engines``.
"""

from edgebolt.common.engines.engine import Answer, Engine, Order, Serial
from edgebolt.common.engines.ranks import Ranks
from edgebolt.common.engines.ray_engine import RayEngine

__all__ = ["Answer", "Engine", "Order", "Ranks", "RayEngine", "Serial"]
