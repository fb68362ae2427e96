"""Simulated time and energy of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping

__all__ = ["Clock"]


class Clock:
    """Simulated seconds since the start of a run, and the joules that its devices have spent.

    The clock knows nothing of the host: it moves only when it is told, so a run gives the same times on any machine.

    Example::

        >>> from edgebolt.common.devices import Clock
        >>> clock = Clock()
        >>> clock.advance_to(812.43)
        >>> clock.spend(15.0)
        >>> clock
        812.4 s
        >>> clock.state_dict()
        {'now': 812.43, 'energy_joules': 15.0}
    """

    def __init__(self) -> None:
        self._now = 0.0
        self._energy_joules = 0.0

    @property
    def now(self) -> float:
        """Simulated seconds since the start."""
        return self._now

    @property
    def energy_joules(self) -> float:
        """Energy that all devices have spent so far, in J."""
        return self._energy_joules

    def advance_to(self, t: float) -> None:
        """Move the clock to the instant ``t``, in seconds; ``t == now`` is allowed.

        Raises:
            ValueError: If ``t`` is before ``now`` or not finite.
        """
        t = float(t)
        if not math.isfinite(t) or t < self._now:
            raise ValueError(f"the clock stands at {self._now!r} s and never goes back, got {t!r}")
        self._now = t

    def spend(self, joules: float) -> None:
        """Add energy that a device has spent, in J.

        Raises:
            ValueError: If ``joules`` is negative or not finite.
        """
        joules = float(joules)
        if not math.isfinite(joules) or joules < 0:
            raise ValueError(f"spent energy must be a finite number of joules, not negative, got {joules!r}")
        self._energy_joules += joules

    def state_dict(self) -> dict[str, float]:
        """The state as plain floats, for a checkpoint."""
        return {"now": self._now, "energy_joules": self._energy_joules}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Take the state of :meth:`state_dict`; here the clock may go back.

        Raises:
            ValueError: If a key is missing or unknown.
        """
        if set(state) != {"now", "energy_joules"}:
            raise ValueError(f"the state of a clock has 'now' and 'energy_joules', got {sorted(state)}")
        self._now = float(state["now"])
        self._energy_joules = float(state["energy_joules"])

    def __repr__(self) -> str:
        return f"{self._now:.1f} s" if self._now >= 10 else f"{self._now:.3g} s"
