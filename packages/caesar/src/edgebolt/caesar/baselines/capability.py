"""Compression without regard to staleness: one ratio for all, or one by the device's link."""

from __future__ import annotations

import numpy as np

from edgebolt.caesar.ratios import check_range, ranks, with_ratios
from edgebolt.common.communication import Dense, TopK
from edgebolt.common.federated import Algorithm, KeepModel, Server, Visit, WeightedMean

__all__ = ["CAC", "FIC", "FlexCom", "LinkRatios"]


class LinkRatios:
    """Gives each visit ratios by the rank of its device's link: the slowest the largest.

    Linear in the rank over all devices that were measured; the middle of the range for one that was not.

    Args:
        least, most: of the ratios; 0.1 and 0.6 is the range that Caesar's paper gives all schemes.

    Raises:
        ValueError: unless ``0 <= least <= most < 1``.
    """

    def __init__(self, least: float = 0.1, most: float = 0.6) -> None:
        check_range(least, most)
        self.least, self.most = least, most

    def __call__(self, server: Server, visits: list[Visit]) -> list[Visit]:
        """The visits with ``settings["down_ratio"]`` and ``settings["up_ratio"]``."""
        clients = [visit.client for visit in visits]
        for way in ("down", "up"):
            visits = with_ratios(visits, f"{way}_ratio", self._ratios(server.reports[f"{way}_bps"].numpy())[clients])
        return visits

    def _ratios(self, bps: np.ndarray) -> np.ndarray:
        ratios = np.full(len(bps), (self.least + self.most) / 2)
        known = np.flatnonzero(~np.isnan(bps))
        if len(known) > 1:
            ratios[known] = np.linspace(self.least, self.most, len(known))[ranks(bps[known])]
        return ratios


class FIC(Algorithm):
    """Fixed identical compression: Top-K at one ratio, both ways.

    The baseline of Caesar's paper, as remembered. Degraded entries of the model get the device's own former value,
    where it has one, and else zero.

    Args:
        ratio: ``θ``; 0.35 is the middle of the range of the paper.
        min_numel: tensors with fewer entries travel whole.

    Example::

        >>> FIC(ratio=0.5).up.ratio
        0.5
    """

    def __init__(self, ratio: float = 0.35, min_numel: int = 1024) -> None:
        super().__init__(
            aggregator=WeightedMean("uniform"),
            down=TopK(ratio, fill="memory", min_numel=min_numel),
            up=TopK(ratio, min_numel=min_numel),
            callbacks=[KeepModel()],
        )


class CAC(Algorithm):
    """Capability-aware compression: Top-K both ways, the ratio the larger the slower the device's link.

    The baseline of Caesar's paper; its principle as remembered, its rule (:class:`LinkRatios`) our completion.

    Args:
        least, most: of the ratios.
        min_numel: tensors with fewer entries travel whole.

    Example::

        >>> CAC().up.setting
        'up_ratio'
    """

    def __init__(self, least: float = 0.1, most: float = 0.6, min_numel: int = 1024) -> None:
        super().__init__(
            configure=[LinkRatios(least, most)],
            aggregator=WeightedMean("uniform"),
            down=TopK(setting="down_ratio", fill="memory", min_numel=min_numel),
            up=TopK(setting="up_ratio", min_numel=min_numel),
            callbacks=[KeepModel()],
        )


class FlexCom(Algorithm):
    """Upload compressed by the device's link, download dense.

    After Li et al., "FlexCom" (arXiv 2012.11804), of which the abstract was read: sparse uploads whose ratio follows
    what a device's link can bear. Here :class:`LinkRatios` sets it; the paper optimises energy instead.

    Args:
        least, most: of the ratios.
        min_numel: tensors with fewer entries travel whole.

    Example::

        >>> FlexCom().down.name
        'dense'
    """

    def __init__(self, least: float = 0.1, most: float = 0.6, min_numel: int = 1024) -> None:
        super().__init__(
            configure=[LinkRatios(least, most)],
            aggregator=WeightedMean("uniform"),
            down=Dense(),
            up=TopK(setting="up_ratio", min_numel=min_numel),
        )
