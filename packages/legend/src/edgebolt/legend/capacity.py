"""What the server believes of each device: moving averages of measured times."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from edgebolt.common.federated import Outcome, Server

__all__ = ["CapacityEstimate"]

_KEY = "legend/capacity"
_FORWARD, _BACKWARD, _DOWN, _UP = range(4)


class CapacityEstimate:
    """Moving averages of what devices have been measured at, one row a device.

    Source: LEGEND's capacity estimation. That it is a moving average ``x <- ρ x + (1 - ρ) x̂`` with ρ = 0.8 is the
    group's habit as remembered, not read in the paper; that the first measurement is taken as it is, and that the
    downlink is estimated beside the uplink, is our completion.

    ======== ==================================================== ============
    symbol   quantity                                             column
    ======== ==================================================== ============
    f        forward pass of the whole model, seconds a step      0
    μ        backward pass of one layer, seconds a step           1
    .        seconds for a byte from the server                   2
    β        seconds for a byte to the server (the paper's β      3
             is this times the bytes of a unit of rank)
    ======== ==================================================== ============

    Args:
        smoothing: ``ρ``, the weight of the past: 0 (only the last measurement) to below 1.

    Raises:
        ValueError: for another ``smoothing``.

    Example::

        >>> CapacityEstimate(smoothing=0.5).smoothing
        0.5
    """

    def __init__(self, smoothing: float = 0.8) -> None:
        if not 0 <= smoothing < 1:
            raise ValueError(f"smoothing={smoothing!r}: the weight of the past is 0 or more, and below 1.")
        self.smoothing = smoothing

    def table(self, server: Server) -> torch.Tensor:
        """The estimates, float64 ``[population, 4]``; NaN where a device was never measured."""
        unknown = torch.full((server.population, 4), float("nan"), dtype=torch.float64)
        table: torch.Tensor = server.memory.get(_KEY, unknown)
        return table

    def observe(self, server: Server, outcomes: list[Outcome]) -> None:
        """Take in what the delivered visits of a round (or the probes of the enrolment) were measured at."""
        table = self.table(server).clone()
        for outcome in outcomes:
            steps, depth = outcome.timed_steps, outcome.visit.settings.get("depth")
            if not outcome.delivered or not steps or depth is None:
                continue
            backward = (outcome.compute_seconds - outcome.forward_seconds) / depth
            measured = torch.tensor(
                [
                    outcome.forward_seconds / steps,
                    backward / steps,
                    outcome.down_seconds / outcome.down_bytes,
                    outcome.up_seconds / outcome.up_bytes,
                ],
                dtype=torch.float64,
            )
            row = table[outcome.visit.client]
            # In this form a constant measurement leaves the estimate alone, to the last bit.
            moved = row + (1 - self.smoothing) * (measured - row)
            table[outcome.visit.client] = torch.where(row.isnan(), measured, moved)
        server.memory[_KEY] = table

    def times(
        self,
        server: Server,
        clients: NDArray[np.int64],
        steps: NDArray[np.int64],
        down_bytes: NDArray[np.float64],
        up_bytes: NDArray[np.float64],
    ) -> NDArray[np.float64]:
        """``t_i(k) = steps (f_i + k μ_i) + bytes up and down``, the time that a visit would take at each depth.

        Args:
            server: whose devices.
            clients: int64 ``[cohort]``.
            steps: local steps of each, int64 ``[cohort]``.
            down_bytes: bytes that are sent to the device at depth 1 to L, float64 ``[L]``.
            up_bytes: bytes that it sends, likewise.

        Returns:
            Seconds, float64 ``[cohort, L]``, depth 1 first. A device that was never measured gets the median of those
            that were; all NaN if none was.
        """
        table = self.table(server).numpy()[clients]
        known = ~np.isnan(table[:, 0])
        if known.any():
            table = np.where(known[:, None], table, np.median(table[known], axis=0))
        depths = np.arange(1, len(up_bytes) + 1)
        compute = steps[:, None] * (table[:, [_FORWARD]] + depths * table[:, [_BACKWARD]])
        sent: NDArray[np.float64] = down_bytes * table[:, [_DOWN]] + up_bytes * table[:, [_UP]]
        seconds: NDArray[np.float64] = compute + sent
        return seconds
