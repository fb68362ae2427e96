"""How old an interrupted visit may be for its device to go on with it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["AIMD", "Fixed", "Quantile", "Threshold"]


class Threshold:
    """``W_t``: a device whose interrupted visit began more than ``W_t`` rounds ago is sent the new model instead.

    Source: FLUDE (arXiv 2412.19991) has a dynamic threshold, ``W_new``; its rule could not be found. Each subclass is
    a completion. ``W = 0``: everybody is sent the model, as without a cache; ``W = inf``: whoever can go on does.

    Attributes:
        first: ``W_0``.
    """

    first: float

    def next(
        self, threshold: float, staleness: NDArray[np.float64], loss: float | None, notes: dict[str, Any]
    ) -> float:
        """The threshold of the next round.

        Args:
            threshold: of the round that has ended.
            staleness: rounds since the interrupted visits of this round's cohort began, ``[those who had one]``.
            loss: mean training loss that was reported in the round; None: nobody reported.
            notes: of this policy, kept from round to round: tensors and built-ins.
        """
        return threshold


class Fixed(Threshold):
    """The same in all rounds.

    Args:
        rounds: ``W``, 0 or more; infinity is allowed.

    Raises:
        ValueError: if it is negative.

    Example::

        >>> Fixed(5).first
        5
    """

    def __init__(self, rounds: float) -> None:
        if not rounds >= 0:
            raise ValueError(f"rounds={rounds!r}: use 0 or more rounds; float('inf') is allowed.")
        self.first = rounds


class Quantile(Threshold):
    """Follows a quantile of the cohort's staleness, so that about a share ``1 - share`` of the caches is refreshed.

    ``W_new = (1 - κ) W + κ quantile_share(staleness)``; a round in which nobody had an interrupted visit changes
    nothing.

    Args:
        share: of those with an interrupted visit who may go on with it.
        first: ``W_0``.
        rate: ``κ``.

    Raises:
        ValueError: for arguments that are out of range.

    Example::

        >>> Quantile(0.5, first=4, rate=0.5).next(4.0, np.array([1.0, 2.0, 9.0]), None, {})
        3.0
    """

    def __init__(self, share: float = 0.8, first: float = 5.0, rate: float = 0.3) -> None:
        if not 0 <= share <= 1 or not 0 < rate <= 1 or not 0 <= first < math.inf:
            raise ValueError(f"share={share!r}, first={first!r}, rate={rate!r}: use 0 to 1, 0 or more, above 0 to 1.")
        self.share, self.first, self.rate = share, first, rate

    def next(
        self, threshold: float, staleness: NDArray[np.float64], loss: float | None, notes: dict[str, Any]
    ) -> float:
        """Nearer to this round's quantile."""
        if not len(staleness):
            return threshold
        return (1 - self.rate) * threshold + self.rate * float(np.quantile(staleness, self.share))


class AIMD(Threshold):
    """One round more while the loss falls, else half of it: additive increase, multiplicative decrease.

    Every ``period`` rounds: if the mean loss of these rounds is at least a share ``progress`` below that of the
    ``period`` before, ``W + 1``, at most ``most``; else ``floor(W / 2)``, at least ``least``. Old models do little
    harm while training goes well.

    Args:
        first, least, most: ``W_0``, ``W_min``, ``W_max``.
        period: rounds between two changes.
        progress: the fall of the loss that counts as progress, a share.

    Raises:
        ValueError: for arguments that are out of range.

    Example: the loss has fallen by 10 % between two periods of one round::

        >>> notes = {}
        >>> policy = AIMD(period=1)
        >>> nobody = np.array([])
        >>> w = policy.next(5.0, nobody, 1.0, notes)
        >>> policy.next(w, nobody, 0.9, notes), policy.next(6.0, nobody, 0.899, notes)
        (6.0, 3.0)
    """

    def __init__(
        self, first: float = 5.0, least: float = 1.0, most: float = 20.0, period: int = 5, progress: float = 0.01
    ) -> None:
        if not 0 <= least <= first <= most < math.inf:
            raise ValueError(f"first={first!r}, least={least!r}, most={most!r}: use 0 <= least <= first <= most.")
        if type(period) is not int or period < 1:
            raise ValueError(f"period={period!r}: use a whole number of rounds, 1 or more.")
        if not 0 <= progress < 1:
            raise ValueError(f"progress={progress!r}: use a share from 0 to below 1.")
        self.first, self.least, self.most, self.period, self.progress = first, least, most, period, progress

    def next(
        self, threshold: float, staleness: NDArray[np.float64], loss: float | None, notes: dict[str, Any]
    ) -> float:
        """Changed at the end of a period, by the losses that were reported in it."""
        losses = [*notes.get("losses", []), *([] if loss is None else [loss])]
        rounds = notes.get("rounds", 0) + 1
        if rounds < self.period or not losses:
            notes.update(losses=losses, rounds=rounds)
            return threshold
        mean, before = sum(losses) / len(losses), notes.get("before")
        notes.update(losses=[], rounds=0, before=mean)
        if before is None:
            return threshold
        if mean <= before * (1 - self.progress):
            return min(threshold + 1, self.most)
        return max(float(math.floor(threshold / 2)), self.least)
