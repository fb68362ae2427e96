"""Federated averaging with quantised uploads."""

from __future__ import annotations

from typing import Literal

from edgebolt.common.communication import QSGD
from edgebolt.common.federated import Algorithm, WeightedMean

__all__ = ["FedQSGD"]


class FedQSGD(Algorithm):
    """Updates travel as QSGD spells them, the model dense.

    Source: Alistarh et al., "QSGD", 2017, which quantises gradients alone; see
    :class:`~edgebolt.common.communication.QSGD`.

    Args:
        bits: of an entry.
        norm: ``"max"`` has less variance than the ``"l2"`` of the paper's analysis.
        min_numel: tensors with fewer entries travel whole.

    Example::

        >>> FedQSGD(bits=8).up.bits
        8
    """

    def __init__(self, bits: int = 4, norm: Literal["l2", "max"] = "max", min_numel: int = 1024) -> None:
        super().__init__(aggregator=WeightedMean("uniform"), up=QSGD(bits, norm=norm, min_numel=min_numel))
