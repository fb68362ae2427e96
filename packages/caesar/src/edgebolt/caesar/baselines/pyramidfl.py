"""PyramidFL: Oort's selection, and an upload the smaller the less a device's gradient weighs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from edgebolt.caesar.ratios import check_range, ranks, with_ratios
from edgebolt.common.communication import Dense, Tensors, TopK
from edgebolt.common.federated import (
    Algorithm,
    ClientCallback,
    Device,
    Oort,
    ReportLoss,
    Server,
    Visit,
    WeightedMean,
)

if TYPE_CHECKING:
    import lightning.pytorch as pl

__all__ = ["GradientRatios", "PyramidFL", "ReportNorm"]


class ReportNorm(ClientCallback):
    """Reports how far the visit has moved the weights: ``update_norm``."""

    def install(self, device: Device, visit: Visit, tensors: Tensors) -> Tensors:
        """Remember where it starts from."""
        device.memory["norm_start"] = tensors
        return tensors

    def on_client_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, device: Device, visit: Visit
    ) -> dict[str, Any]:
        """The Euclidean norm of the change."""
        start = device.memory.pop("norm_start", {})
        moved = (p.detach() - start[name] for name, p in module.named_parameters() if name in start)
        return {"update_norm": float(sum(float(change.double().square().sum()) for change in moved)) ** 0.5}


class GradientRatios:
    """``settings["up_ratio"] = low + rank (high - low) / K``, rank 0 for the largest last update of the cohort.

    Source: PyramidFL's released code (``param_server.py``), where it is the rate of an upload dropout and the rank is
    that of the gradient's norm; here it is that of the norm of what the last visit changed.

    Args:
        least, most: ``low`` and ``high``, 0.1 and 0.6 as released.
    """

    def __init__(self, least: float = 0.1, most: float = 0.6) -> None:
        check_range(least, most)
        self.least, self.most = least, most

    def __call__(self, server: Server, visits: list[Visit]) -> list[Visit]:
        """The visits with their ratios; a device that has not reported counts as the largest."""
        norms = server.reports.get("update_norm")
        told = np.array([np.inf if norms is None else norms[visit.client].nan_to_num(nan=np.inf) for visit in visits])
        ratios = self.least + ranks(told) * (self.most - self.least) / max(1, len(visits))
        return with_ratios(visits, "up_ratio", ratios)


class PyramidFL(Algorithm):
    """Participants by utility, and of the less important ones a smaller upload; download dense.

    Source: Li et al., "PyramidFL", MobiCom 2022, and its released code. Reduced: the release drops whole tensors at
    random (one random number each), here the smallest entries are dropped, by Top-K, as Caesar's paper compares
    schemes; spare time is not used for further local epochs, so that all methods make the same number of steps.

    Args:
        least, most: of the upload's ratios.
        min_numel: tensors with fewer entries travel whole.

    Example::

        >>> type(PyramidFL().selector).__name__
        'Oort'
    """

    def __init__(self, least: float = 0.1, most: float = 0.6, min_numel: int = 1024) -> None:
        super().__init__(
            selector=Oort(),
            configure=[GradientRatios(least, most)],
            aggregator=WeightedMean("samples"),
            down=Dense(),
            up=TopK(setting="up_ratio", min_numel=min_numel),
            callbacks=[ReportLoss(), ReportNorm()],
        )
