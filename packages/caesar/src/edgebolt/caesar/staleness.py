"""How much of the model a device is sent: less, the fresher its own old model is."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgebolt.caesar.ratios import with_ratios
from edgebolt.common.federated import Server, Visit

__all__ = ["DownloadRatios", "cluster", "download_ratio"]


def download_ratio(staleness: NDArray[np.float64], round: int, most: float = 0.6) -> NDArray[np.float64]:
    """``θ_d = (1 - δ / t) θ_d^max``, the share of the model that is degraded.

    Source: Caesar (arXiv 2412.19989), as two summaries of the paper and a re-implementation have it.

    Args:
        staleness: ``δ = t - r``, rounds since the device last took part, ``[n]``; ``t`` itself if it never did: then
            the ratio is 0, for it has no model that could fill anything in.
        round: ``t``, counted from 1.
        most: ``θ_d^max``.

    Returns:
        float64 ``[n]``, from 0 to below ``most``.

    Raises:
        ValueError: if ``t`` is below 1, or a staleness is not between 0 and ``t``.

    Example::

        >>> download_ratio(np.array([1.0, 5.0, 10.0]), round=10).round(2).tolist()
        [0.54, 0.3, 0.0]
    """
    if round < 1:
        raise ValueError(f"round={round!r}: rounds are counted from 1.")
    if not ((staleness >= 0) & (staleness <= round)).all():
        raise ValueError(
            f"staleness={staleness!r}: use 0 to {round} rounds, {round} for a device that never took part."
        )
    ratios: NDArray[np.float64] = (1 - staleness / round) * most
    return ratios


def cluster(values: NDArray[np.float64], clusters: int) -> NDArray[np.int64]:
    """Exact one-dimensional k-means: the split with the least sum of squared distances to the clusters' means.

    Dynamic programming over the sorted distinct values, ``O(clusters · distinct²)``. Clusters are numbered from the
    smallest values up; there are fewer of them where there are fewer distinct values.

    Args:
        values: ``[n]``.
        clusters: at most so many.

    Returns:
        int64 ``[n]``, the cluster of each value.

    Example::

        >>> cluster(np.array([1.0, 9.0, 2.0, 30.0]), 2).tolist()
        [0, 0, 0, 1]
    """
    distinct, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    n, k = len(distinct), min(clusters, len(distinct))
    if not n:
        return np.zeros(0, dtype=np.int64)
    weight, total, square = (np.concatenate([[0.0], np.cumsum(counts * distinct**power)]) for power in range(3))

    def spread(first: NDArray[np.int64], last: int) -> NDArray[np.float64]:
        """Sum of squared distances to the mean of ``distinct[first:last]``, for each first."""
        amount, summed = weight[last] - weight[first], total[last] - total[first]
        spreads: NDArray[np.float64] = square[last] - square[first] - summed**2 / amount
        return spreads

    best = np.full((k + 1, n + 1), np.inf)
    start = np.zeros((k + 1, n + 1), dtype=np.int64)
    best[0, 0] = 0.0
    for used in range(1, k + 1):
        for last in range(used, n + 1):
            first = np.arange(used - 1, last)
            costs = best[used - 1, first] + spread(first, last)
            start[used, last] = first[costs.argmin()]
            best[used, last] = costs.min()
    labels, end = np.zeros(n, dtype=np.int64), n
    for used in range(k, 0, -1):
        begin = int(start[used, end])
        labels[begin:end] = used - 1
        end = begin
    result: NDArray[np.int64] = labels[inverse.reshape(-1)]
    return result


class DownloadRatios:
    """Gives each visit ``settings["down_ratio"]`` from the staleness of its device's own model.

    A part for ``Algorithm(configure=[...], down=HybridSign(setting="down_ratio"))``. Participants are grouped by
    staleness; a group has the ratio of its mean staleness, and so one encoding. Devices that never took part are sent
    the whole model and never join a group, which could only degrade what they cannot fill in.

    Source: Caesar, sections on the download (see :func:`download_ratio`); groups by k-means as remembered; their
    number, and the two rules about devices without a model, are completions.

    Args:
        most: ``θ_d^max``, 0 to below 1. 0.6 is the paper's.
        clusters: groups a round; None: every staleness for itself. 3 is inferred.

    Raises:
        ValueError: for arguments that are out of range.

    Example::

        >>> DownloadRatios(clusters=None).most
        0.6
    """

    def __init__(self, most: float = 0.6, clusters: int | None = 3) -> None:
        if not 0 <= most < 1:
            raise ValueError(f"most={most!r}: use the largest share to degrade, 0 to below 1.")
        if clusters is not None and (type(clusters) is not int or clusters < 1):
            raise ValueError(f"clusters={clusters!r}: use 1 or more, or None for no clusters.")
        self.most, self.clusters = most, clusters

    def __call__(self, server: Server, visits: list[Visit]) -> list[Visit]:
        """The visits with their ratios. The server goes by the rounds of which updates arrived."""
        clients = [visit.client for visit in visits]
        last = server.reports["last_round"][clients].double().numpy()
        staleness = server.round - last  # δ = t - r; rounds are counted from 0 here, so t and r are both one less
        holds = last >= 0
        if self.clusters is not None and holds.any():
            group = cluster(staleness[holds], self.clusters)
            staleness[holds] = (np.bincount(group, staleness[holds]) / np.bincount(group))[group]
        ratios = download_ratio(staleness, server.round + 1, self.most)
        return with_ratios(visits, "down_ratio", ratios)
