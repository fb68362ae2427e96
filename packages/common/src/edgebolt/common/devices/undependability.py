"""How devices fail and go offline: groups of failure rates, presence that changes, and where a visit dies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgebolt.common.devices.constants import FAILURE_PHASES
from edgebolt.common.random import stream

__all__ = ["Cut", "Undependability"]


@dataclass(frozen=True)
class Cut:
    """Where a visit dies.

    Attributes:
        steps: training steps that are done.
        down: share of the download that has arrived; below 1 the device never had the model.
        up: share of the upload that was sent; None: the device died before it began to send.

    Example::

        >>> Cut.at(0.05, steps=10), Cut.at(0.5, steps=10), Cut.at(0.95, steps=10)
        (Cut(steps=0, down=0.5, up=None), Cut(steps=5, down=1.0, up=None), Cut(steps=10, down=1.0, up=0.5))
    """

    steps: int
    down: float = 1.0
    up: float | None = None

    @classmethod
    def at(cls, place: float, steps: int, phases: Sequence[float] = FAILURE_PHASES) -> Cut:
        """The cut at a share of a visit's time.

        Args:
            place: 0 to below 1.
            steps: training steps of the visit.
            phases: shares of its time in download, training and upload; they sum to 1.
        """
        down, train, up = phases
        if place < down:
            return cls(0, down=round(place / down, 9))
        if place < down + train:
            return cls(min(int((place - down) / train * steps), max(0, steps - 1)))
        return cls(steps, up=round(min((place - down - train) / up, 1.0), 9) if up else 0.0)


class Undependability:
    """Groups of devices that fail more or less often, and a presence that changes every few rounds.

    Source: FLUDE (arXiv 2412.19991) as remembered: three equal groups whose devices fail with rates around 0.2, 0.4
    and 0.6, drawn from a normal distribution; devices that are online independently, at rates that are drawn anew
    every few rounds. The spread, the times and where in a visit devices die are inferred.

    A visit fails with its device's rate, however long it is, so a resumed one fails as often as a whole one.

    Args:
        rates: mean failure rate of each group.
        spread: standard deviation of a device's rate around its group's; rates are cut off at 0 and 0.95.
        online: lowest and highest rate at which a device is online; None: always.
        online_period: rounds after which these rates are drawn again.
        phases: shares of a visit's time in download, training and upload: the place where it dies is uniform in it.
        by: a number for each device, such as its most frequent label, shape ``[n]``: devices of equal numbers fall
            into the same group or neighbouring ones, so that failures take away some labels more than others. Which
            numbers fail most is drawn. None: groups are dealt out at random.

    Raises:
        ValueError: for arguments that are out of range.

    Example::

        >>> from edgebolt.common.devices import Fleet, Undependability
        >>> fleet = Fleet.jetson(120).undependable(Undependability(rates=(0.2, 0.4, 0.6), online=None))
        >>> rates = fleet.at(0).failure_rate
        >>> [int((abs(rates - mean) < 0.1).sum()) > 30 for mean in (0.2, 0.4, 0.6)]
        [True, True, True]
    """

    def __init__(
        self,
        rates: Sequence[float] = (0.2, 0.4, 0.6),
        spread: float = 0.05,
        online: tuple[float, float] | None = (0.2, 0.8),
        online_period: int = 5,
        phases: tuple[float, float, float] = FAILURE_PHASES,
        by: NDArray[np.integer] | Sequence[int] | None = None,
    ) -> None:
        if not rates or not all(0 <= rate <= 0.95 for rate in rates):
            raise ValueError(f"rates={rates!r}: give each group a mean failure rate from 0 to 0.95.")
        if not spread >= 0:
            raise ValueError(f"spread={spread!r}: use a standard deviation of 0 or more.")
        if online is not None and not 0 < online[0] <= online[1] <= 1:
            raise ValueError(f"online={online!r}: use (lowest, highest) with 0 < lowest <= highest <= 1, or None.")
        if type(online_period) is not int or online_period < 1:
            raise ValueError(f"online_period={online_period!r}: use a whole number of rounds, 1 or more.")
        if len(phases) != 3 or min(phases) < 0 or abs(sum(phases) - 1) > 1e-9:
            raise ValueError(f"phases={phases!r}: use three shares, of download, training and upload, that sum to 1.")
        self.rates, self.spread, self.online, self.online_period = tuple(rates), spread, online, online_period
        self.phases, self.by = phases, None if by is None else np.asarray(by)

    def groups(self, n: int, seed: int) -> NDArray[np.int64]:
        """The group of each of ``n`` devices, int64 ``[n]``; sizes differ by one at most.

        Raises:
            ValueError: if ``by`` has another length.
        """
        if self.by is not None and self.by.shape != (n,):
            raise ValueError(f"by has the shape {self.by.shape}: give one number for each of the {n} devices.")
        rng = stream(seed, "failure group")
        order = rng.permutation(n)
        if self.by is not None:
            values, number = np.unique(self.by, return_inverse=True)
            order = order[np.argsort(rng.permutation(len(values))[number.reshape(-1)][order], kind="stable")]
        group: NDArray[np.int64] = np.empty(n, dtype=np.int64)
        group[order] = np.arange(n) * len(self.rates) // n
        return group

    def failure_rates(self, n: int, seed: int) -> NDArray[np.float64]:
        """The rate at which each device's visits fail, float64 ``[n]``."""
        mean = np.asarray(self.rates)[self.groups(n, seed)]
        noise = stream(seed, "failure rate").normal(0.0, self.spread, n) if self.spread else np.zeros(n)
        rates: NDArray[np.float64] = np.clip(mean + noise, 0.0, 0.95)
        return rates

    def online_rates(self, n: int, seed: int, round: int) -> NDArray[np.float64]:
        """The rate at which each device is online in a round, float64 ``[n]``."""
        if self.online is None:
            return np.ones(n)
        low, high = self.online
        rates: NDArray[np.float64] = stream(seed, "online rate", round // self.online_period).uniform(low, high, n)
        return rates
