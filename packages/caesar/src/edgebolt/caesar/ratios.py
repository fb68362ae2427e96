"""What all parts that choose compression ratios have in common."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from edgebolt.common.communication import Tensors
from edgebolt.common.federated import Visit

__all__ = ["check_range", "dense_bytes", "ranks", "with_ratios"]


def check_range(least: float, most: float) -> None:
    """Raises ValueError unless ``0 <= least <= most < 1``."""
    if not 0 <= least <= most < 1:
        raise ValueError(f"least={least!r}, most={most!r}: use shares to drop with 0 <= least <= most < 1.")


def ranks(values: NDArray[np.float64]) -> NDArray[np.int64]:
    """Rank of each value, 0 for the largest; of equal values the first has the lower one.

    Example::

        >>> ranks(np.array([3.0, 9.0, 3.0])).tolist()
        [1, 0, 2]
    """
    rank = np.empty(len(values), dtype=np.int64)
    rank[np.argsort(-values, kind="stable")] = np.arange(len(values))
    return rank


def with_ratios(visits: list[Visit], setting: str, ratios: Iterable[float]) -> list[Visit]:
    """The visits, each with its ratio under this name in its settings."""
    return [
        replace(visit, settings={**visit.settings, setting: float(ratio)})
        for visit, ratio in zip(visits, ratios, strict=True)
    ]


def dense_bytes(model: Tensors) -> int:
    """Bytes of the tensors, uncompressed."""
    return sum(tensor.nbytes for tensor in model.values())
