"""What a device says of itself before the first round."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from edgebolt.common.federated import ClientCallback, Device, Visit
from edgebolt.common.federated.labels import LabelSource, find_labels

if TYPE_CHECKING:
    import lightning.pytorch as pl

__all__ = ["Introduction"]


class Introduction(ClientCallback):
    """Reports, at a visit with ``settings["introduce"]``, the device's batch size and how many samples each class has.

    Args:
        labels: where the labels are, see :func:`~edgebolt.common.federated.labels.find_labels`.
        histogram: whether labels are reported at all.
    """

    def __init__(self, labels: LabelSource = None, histogram: bool = True) -> None:
        self.labels, self.histogram = labels, histogram

    def on_client_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, device: Device, visit: Visit
    ) -> dict[str, Any] | None:
        """``batch_size`` and ``labels``, {class: samples}.

        Raises:
            TypeError: if no labels are found; says how to name them.
        """
        if not visit.settings.get("introduce"):
            return None
        loader = device.data()
        report: dict[str, Any] = {"batch_size": loader.batch_size or 1}
        if self.histogram:
            classes, counts = np.unique(find_labels(loader.dataset, self.labels), return_counts=True)
            report["labels"] = {str(label): int(count) for label, count in zip(classes, counts, strict=True)}
        return report
