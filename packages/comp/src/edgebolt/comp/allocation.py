"""What goes where: whole layers first, then a rate for each of the others."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import numpy as np

__all__ = ["Allocation", "layers_to_drop", "rates_by_cost", "removal_rates", "whole_units"]

Allocation = Literal["effect", "inverse_importance", "uniform"]


def layers_to_drop(
    importance: Sequence[float], ratio: float, depth_fraction: float, protect: Sequence[int] = (0,)
) -> list[int]:
    """The layers that go as a whole: the least important, never a protected one.

    The order, layers by importance and then neurons, is the paper's (abstract); how much of the ratio whole layers
    take is ours.

    Args:
        importance: of each layer.
        ratio: share of the layers' parameters that goes in all.
        depth_fraction: share of the ratio that whole layers take, rounded down.
        protect: indices that stay; negative ones count from the output.

    Returns:
        Ascending indices.

    Raises:
        ValueError: for a protected layer that there is not.

    Example::

        >>> layers_to_drop([0.9, 0.1, 0.3, 0.05, 0.4], ratio=0.5, depth_fraction=0.8)
        [1, 3]
    """
    layers = len(importance)
    if not all(-layers <= index < layers for index in protect):
        raise ValueError(
            f"protect={tuple(protect)}: the model has {layers} layers; use indices from {-layers} to {layers - 1}."
        )
    safe = {index % layers for index in protect}
    # 0.1 * 30 is 3.0000000000000004 and 0.3 * 10 / 3 is 0.9999999999999999
    count = min(int(depth_fraction * ratio * layers + 1e-9), layers - max(1, len(safe)))
    order = sorted((index for index in range(layers) if index not in safe), key=lambda index: importance[index])
    return sorted(order[:count])


def removal_rates(
    importance: Sequence[float],
    sizes: Sequence[int],
    remove: float,
    allocation: Literal["inverse_importance", "uniform"] = "inverse_importance",
    largest: float = 0.8,
) -> list[float]:
    """The share of its prunable parameters that each remaining layer loses.

    That every remaining layer has a rate of its own is a digest's sentence; the rule is ours: inversely proportional
    to its importance, and where that passes ``largest``, the rest goes to the other layers.

    Args:
        importance: of the layers that remain.
        sizes: prunable parameters of each.
        remove: parameters to remove from them in all.
        allocation: ``"inverse_importance"``, or ``"uniform"``: the same rate everywhere.
        largest: rate that no layer passes.

    Raises:
        ValueError: if they cannot lose as many; the message says how many they can.

    Example::

        >>> removal_rates([0.1, 0.2, 0.4], sizes=[100, 100, 100], remove=70)
        [0.4, 0.2, 0.1]
    """
    weights = 1 / np.maximum(np.asarray(importance, float), 1e-6)
    if allocation == "uniform":
        weights = np.ones_like(weights)
    size = np.asarray(sizes, float)
    _check_enough(remove, largest * size.sum())
    rates = np.zeros(len(size))
    full = np.zeros(len(size), bool)
    for _ in range(len(size)):
        rest = remove - largest * size[full].sum()
        share = rest / max((weights * size)[~full].sum(), 1e-30)
        rates = np.where(full, largest, weights * share)
        over = (rates > largest) & ~full
        if not over.any():
            break
        full |= over
    return [round(float(rate), 12) for rate in rates]


def rates_by_cost(curves: Sequence[Sequence[tuple[float, float]]], sizes: Sequence[int], remove: float) -> list[float]:
    """The share that each block loses, where removal costs least: one price a parameter for all blocks. Ours.

    A curve is taken for its lower convex hull, so that what is cheap only behind something dear is weighed with it.

    Args:
        curves: of each block, from few to many: share that is gone, and what that costs.
        sizes: parameters of each block.
        remove: parameters to remove in all.

    Raises:
        ValueError: if they cannot lose as many; the message says how many they can.

    Example::

        >>> rates_by_cost([[(0.4, 1.0), (0.8, 3.0)], [(0.4, 1.5), (0.8, 3.5)]], sizes=[100, 100], remove=100)
        [0.6, 0.4]
    """
    _check_enough(remove, sum(curve[-1][0] * size for curve, size in zip(curves, sizes, strict=True) if curve))
    pieces = []
    for index, curve in enumerate(curves):
        hull = [(0.0, 0.0)]
        for share, cost in curve:
            while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], (share, cost)):
                hull.pop()
            hull.append((share, cost))
        for start, end in pairwise(hull):
            pieces.append((_slope(start, end) / sizes[index], index, start[0], end[0] - start[0]))
    rates = [0.0] * len(curves)
    for _, index, _, share in sorted(pieces):
        taken = min(share, remove / sizes[index])
        rates[index] += taken
        remove -= taken * sizes[index]
        if remove <= 0:
            break
    return [round(rate, 12) for rate in rates]


def _slope(start: tuple[float, float], end: tuple[float, float]) -> float:
    return (end[1] - start[1]) / (end[0] - start[0])


def _check_enough(remove: float, most: float) -> None:
    if remove > most * (1 + 1e-9):
        raise ValueError(
            f"{remove:,.0f} parameters should leave the remaining layers, of which at most {most:,.0f} can go: lower "
            "the ratio, raise depth_fraction so that more whole layers go, raise largest_rate, or set "
            "prune_attention=True."
        )


def whole_units(rates: Sequence[float], units: Sequence[int], weights: Sequence[int], round_to: int = 1) -> list[int]:
    """How many units each layer loses, so that what is left is a multiple and the sum is met as closely as it can be.

    Args:
        rates: wanted share of each layer.
        units: units of each layer.
        weights: parameters of one unit of each layer.
        round_to: what the number of units that are left is a multiple of.

    Returns:
        Units to remove. What rounding adds to one layer or takes from it is made up for in the next one, so that the
        sum of parameters is met to half of those of ``round_to`` units, where every layer has a multiple of it.

    Example::

        >>> whole_units([0.1, 0.2, 0.3], units=[64, 64, 64], weights=[10, 10, 10], round_to=8)
        [8, 8, 24]
    """
    lost, owed = [], 0.0
    for rate, count, weight in zip(rates, units, weights, strict=True):
        owed += rate * count * weight  # of this layer, and what rounding left of the layers before it
        left = round((count - owed / weight) / round_to) * round_to
        gone = max(0, count - max(left, min(round_to, count))) if rate > 0 else 0
        lost.append(gone)
        owed -= gone * weight
    return lost
