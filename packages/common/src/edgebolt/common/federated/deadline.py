"""When a round closes although some of its devices have not answered."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from edgebolt.common.federated.server import Server
from edgebolt.common.federated.visit import Outcome

__all__ = ["Deadline"]

_KEY = "deadline"


class Deadline:
    """A round ends at a deadline, or some time after enough updates have arrived.

    A part for ``Algorithm(closing=...)``. The deadline is ``slack`` times the median of the times that the cohort's
    devices are expected to need, from their last measured links and speeds and their last messages' sizes; as long as
    none of them was measured there is none. A round in which all have ended, or have been seen to fail, closes at once
    in any case. Source: common practice (Bonawitz et al. 2019; NVFlare closes some seconds after a minimum of
    results); the numbers are assumed.

    Args:
        slack: ``deadline = slack * median``; None: no deadline. In the benchmark of FLUDE 98 % of the Jetsons' visits
            that do not fail take less than 3 medians, and 72 % less than 1.5.
        arrivals: share of the expected updates after which the round closes; None: it waits for the deadline.
        grace: seconds between the last of these and the end.
        chance: server -> probability that each device delivers, float ``[population]``; what is expected of a cohort
            is its sum. None: everybody.

    Raises:
        ValueError: for arguments that are out of range.

    Example::

        >>> from edgebolt.common.federated import Algorithm
        >>> impatient = Algorithm(closing=Deadline(slack=2.0))
    """

    def __init__(
        self,
        slack: float | None = 3.0,
        arrivals: float | None = None,
        grace: float = 0.0,
        chance: Callable[[Server], NDArray[np.float64]] | None = None,
    ) -> None:
        if slack is not None and not slack > 0:
            raise ValueError(f"slack={slack!r}: use a factor above 0 on the median expected time, or None.")
        if arrivals is not None and not 0 < arrivals <= 1:
            raise ValueError(f"arrivals={arrivals!r}: use a share above 0 and up to 1, or None.")
        if not 0 <= grace < math.inf:
            raise ValueError(f"grace={grace!r}: use seconds, 0 or more.")
        self.slack, self.arrivals, self.grace, self.chance = slack, arrivals, grace, chance

    def __call__(self, server: Server, outcomes: list[Outcome]) -> float:
        """Simulated seconds; infinity if nothing but the end of all visits closes the round.

        ``server.memory["deadline"]`` has the deadline alone: who is later than that was too slow, while others that
        came late were not needed any more.
        """
        closing = math.inf
        if self.slack is not None:
            expected = self.expected_seconds(server, outcomes)
            if not np.isnan(expected).all():
                closing = min(o.started for o in outcomes) + self.slack * float(np.nanmedian(expected))
        server.memory[_KEY] = closing
        if self.arrivals is not None:
            clients = [outcome.visit.client for outcome in outcomes]
            hoped = len(clients) if self.chance is None else float(self.chance(server)[clients].sum())
            arrived = sorted(outcome.finished for outcome in outcomes if outcome.delivered)
            enough = max(1, math.ceil(self.arrivals * hoped))
            if len(arrived) >= enough:
                closing = min(closing, arrived[enough - 1] + self.grace)
        return closing

    def observe(self, server: Server, outcomes: list[Outcome]) -> None:
        """Keep how large the messages were."""
        for outcome in outcomes:
            if outcome.delivered and (outcome.visit.steps or outcome.visit.base is not None):
                server.record(outcome.visit.client, {"sent_bytes": outcome.up_bytes})
                if outcome.visit.start is not None:
                    server.record(outcome.visit.client, {"received_bytes": outcome.down_bytes})

    @staticmethod
    def expected_seconds(server: Server, outcomes: list[Outcome]) -> NDArray[np.float64]:
        """What the visits were expected to take, float64 ``[visits]``; NaN for devices that were never measured."""
        unknown = torch.full((server.population,), float("nan"))
        names = ("step_seconds", "down_bps", "up_bps", "received_bytes", "sent_bytes")
        seconds = []
        for visit in (outcome.visit for outcome in outcomes):
            step, down, up, received, sent = (float(server.reports.get(n, unknown)[visit.client]) for n in names)
            download = 8 * received / down if visit.start is not None else 0.0
            train = visit.steps * step if visit.steps else 0.0
            seconds.append(download + train + 8 * sent / up)
        return np.array(seconds)
