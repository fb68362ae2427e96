"""How long things take: moving averages, a batch's delay by its tokens, a link's delay by bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["BatchDelay", "Link", "MovingAverage"]


class MovingAverage:
    """``x ← history · x + (1 - history) · new``; the first value is taken as it is.

    Args:
        history: weight of what was before (HAT's state monitor: 0.8).
        value: to begin with; None: nothing is known yet.

    Raises:
        ValueError: for a weight outside [0, 1).

    Example::

        >>> speed = MovingAverage()
        >>> for new in (1.0, 2.0):
        ...     speed.update(new)
        >>> speed.value
        1.2
    """

    def __init__(self, history: float = 0.8, value: float | None = None) -> None:
        if not 0 <= history < 1:
            raise ValueError(f"history={history}: the weight of what was before is in [0, 1).")
        self.history, self.value = history, value

    def update(self, new: float) -> None:
        """Take a new value in."""
        self.value = new if self.value is None else self.history * self.value + (1 - self.history) * new

    def __call__(self, default: float) -> float:
        """The average, or ``default`` while nothing is known."""
        return default if self.value is None else self.value


class BatchDelay:
    """``g(n)``: seconds that a batch of ``n`` tokens takes, as measured.

    A moving average for 1, 2, 4, 8 … tokens each; between them, and beyond the last, straight lines. A measurement at
    ``n`` moves the averages on both sides of ``n`` by what it differs from the line, the nearer one by more.
    Averages that are smaller than one before them count as that one: more tokens never take less time. That the table
    has this form is ours; the weight of history is the paper's.

    Args:
        seconds: to begin with, for 1, 2, 4 … tokens: measured before, or a model of the machine.
        history: weight of what was before.

    Raises:
        ValueError: for fewer than two values, one that is not above 0, or a weight outside [0, 1).

    Example::

        >>> delay = BatchDelay([0.010, 0.010, 0.012, 0.016])  # of 1, 2, 4 and 8 tokens
        >>> delay(3), delay(16)
        (0.011, 0.024)
        >>> delay.update(8, 0.026)
        >>> delay(8)
        0.018
    """

    def __init__(self, seconds: Sequence[float], history: float = 0.8) -> None:
        if len(seconds) < 2 or not all(value > 0 for value in seconds):
            raise ValueError(f"seconds={list(seconds)}: give at least two, for 1 and 2 tokens, each above 0.")
        if not 0 <= history < 1:
            raise ValueError(f"history={history}: the weight of what was before is in [0, 1).")
        self.history = history
        self._seconds = np.array(seconds, float)

    @property
    def seconds(self) -> list[float]:
        """For 1, 2, 4 … tokens, never falling."""
        return [float(value) for value in np.maximum.accumulate(self._seconds)]

    def __call__(self, tokens: float) -> float:
        """Seconds of a batch."""
        return self._read(np.maximum.accumulate(self._seconds), tokens)

    @staticmethod
    def _read(curve: np.ndarray, tokens: float) -> float:
        at = np.exp2(np.arange(len(curve)))
        if tokens >= at[-1]:
            slope = max((curve[-1] - curve[-2]) / (at[-1] - at[-2]), 0.0)
            return float(curve[-1] + slope * (tokens - at[-1]))
        return float(np.interp(tokens, at, curve))

    def update(self, tokens: int, seconds: float) -> None:
        """Take a measured batch in."""
        off = (1 - self.history) * (seconds - self._read(self._seconds, tokens))
        # Beyond the last average the line's end swings the further out; without this it would overshoot.
        off /= max(2.0 * tokens / 2 ** (len(self._seconds) - 1) - 1, 1.0)
        place = min(max(np.log2(max(tokens, 1)), 0.0), len(self._seconds) - 1.0)
        below = min(int(place), len(self._seconds) - 2)
        self._seconds[below] += (1 - (place - below)) * off
        self._seconds[below + 1] += (place - below) * off


@dataclass(frozen=True)
class Link:
    """Time that bytes take between a device and the cloud.

    Args:
        up, down: bytes a second.
        latency: seconds that a message takes beside its bytes, one way.

    Example::

        >>> Link(up=7.5e6, down=12.5e6).up_seconds(351 * 8192)
        0.38338...
    """

    up: float
    down: float
    latency: float = 0.0

    def __post_init__(self) -> None:
        if not (self.up > 0 and self.down > 0 and self.latency >= 0):
            raise ValueError(f"{self}: bytes a second are above 0, a latency is not negative.")

    def up_seconds(self, count: float) -> float:
        """Seconds until ``count`` bytes are in the cloud."""
        return self.latency + count / self.up

    def down_seconds(self, count: float) -> float:
        """Seconds until ``count`` bytes are on the device."""
        return self.latency + count / self.down
