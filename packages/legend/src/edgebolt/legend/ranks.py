"""LEGEND's rank distribution: an arithmetic sequence that grows towards the output."""

from __future__ import annotations

import math

import numpy as np

__all__ = ["rank_distribution"]


def rank_distribution(layers: int, budget: int, step: float = 1.0, min_rank: int = 1) -> list[int]:
    """Ranks that add up to a budget and grow by ``step`` from layer to layer.

    ``r_l = Φ / L + λ (l - (L - 1) / 2)``, raised to ``min_rank``, what is left scaled to the budget, rounded by the
    largest remainder and sorted. That ranks grow towards the output is the paper's (Liu et al., LEGEND, 2025,
    abstract); that they form an arithmetic sequence is believed; the closed form and its rounding are our completion.

    Args:
        layers: ``L``.
        budget: ``Φ``, the sum of all ranks.
        step: ``λ``, the difference of neighbouring ranks; 0: uniform, below 0: ranks shrink towards the output.
        min_rank: the smallest rank.

    Returns:
        One rank per layer, input first.

    Raises:
        ValueError: if there is no layer, ``min_rank`` is below 1, ``step`` is not finite, or the budget is not enough.

    Example::

        >>> rank_distribution(12, 96, 1)
        [3, 4, 5, 6, 7, 8, 8, 9, 10, 11, 12, 13]
        >>> rank_distribution(12, 96, 0)
        [8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8]
        >>> rank_distribution(6, 48, -1)
        [10, 9, 8, 8, 7, 6]
    """
    if layers < 1 or min_rank < 1 or not math.isfinite(step):
        raise ValueError(
            f"layers={layers!r}, min_rank={min_rank!r}, step={step!r}: use 1 or more layers, ranks of 1 or more and a "
            "finite step."
        )
    if budget < layers * min_rank:
        raise ValueError(
            f"budget={budget!r} is less than {layers} layers of rank {min_rank}: use {layers * min_rank} or more."
        )
    wanted = budget / layers + abs(step) * (np.arange(layers) - (layers - 1) / 2)
    # What a layer gets above the smallest rank; raising the lowest ranks takes from the others in proportion.
    above = np.maximum(wanted - min_rank, 0)
    spare = budget - layers * min_rank
    above *= spare / above.sum() if spare else 0
    whole = np.floor(above).astype(int)
    # The largest remainders are rounded up; among equal ones, those nearer to the input.
    order = sorted(range(layers), key=lambda layer: (round(whole[layer] - above[layer], 9), layer))
    whole[order[: spare - int(whole.sum())]] += 1
    ranks = sorted(int(rank) + min_rank for rank in whole)
    return ranks if step >= 0 else ranks[::-1]
