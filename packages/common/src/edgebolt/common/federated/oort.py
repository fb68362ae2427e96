"""Oort's selection of participants: those whose loss is high and who are not slow."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from edgebolt.common.federated.server import Server
from edgebolt.common.federated.visit import Outcome

__all__ = ["Oort"]

_KEY = "oort"


class Oort:
    """Prefers devices of high statistical utility, lowers that of slow ones, and keeps exploring.

    Source: Lai et al., "Oort: Efficient Federated Learning via Guided Participant Selection", OSDI 2021, and
    its released code: ``U_i = n_i loss_i + sqrt(0.1 ln t / r_i)``, times ``(T / t_i)^α`` where ``t_i > T``, the
    first term clipped at a quantile and divided by its maximum. The loss of the last visit stands for the root mean
    square of the samples' losses, which would need a loss a sample; the preferred round time ``T`` is a quantile of
    the measured ones, without Oort's pacer.

    Losses come from the callback :class:`~edgebolt.common.federated.ReportLoss`.

    Args:
        exploration: share of a cohort that was never seen before, at the beginning.
        decay: factor on it a round.
        least_exploration: it does not fall below.
        penalty: ``α``, exponent of the penalty of slow devices.
        pace: quantile of the measured round times that is ``T``.
        clip: quantile at which utilities are clipped.

    Raises:
        ValueError: for arguments that are out of range.
    """

    def __init__(
        self,
        exploration: float = 0.9,
        decay: float = 0.98,
        least_exploration: float = 0.2,
        penalty: float = 2.0,
        pace: float = 0.5,
        clip: float = 0.95,
    ) -> None:
        shares = {"exploration": exploration, "decay": decay, "pace": pace, "clip": clip}
        for name, value in {**shares, "least_exploration": least_exploration}.items():
            if not 0 <= value <= 1:
                raise ValueError(f"{name}={value!r}: use 0 to 1.")
        if penalty < 0:
            raise ValueError(f"penalty={penalty!r}: use an exponent of 0 or more.")
        self.exploration, self.decay, self.least_exploration = exploration, decay, least_exploration
        self.penalty, self.pace, self.clip = penalty, pace, clip

    def observe(self, server: Server, outcomes: list[Outcome]) -> None:
        """Keep how long the visits took: ``server.reports["visit_seconds"]``."""
        for outcome in outcomes:
            if outcome.delivered and outcome.steps:
                server.record(outcome.visit.client, {"visit_seconds": outcome.finished - outcome.started})

    def utility(self, server: Server) -> NDArray[np.float64]:
        """``U_i`` of every device, float64 ``[population]``; NaN where its loss is not known."""
        unknown: NDArray[np.float64] = np.full(server.population, np.nan)
        loss, seconds = (
            server.reports[name].numpy() if name in server.reports else unknown for name in ("loss", "visit_seconds")
        )
        statistical: NDArray[np.float64] = server.reports["samples"].numpy() * loss
        known = ~np.isnan(statistical)
        if not known.any():
            return statistical
        statistical = np.minimum(statistical, np.quantile(statistical[known], self.clip))
        statistical = statistical / max(float(statistical[known].max()), np.finfo(float).tiny)
        last = np.maximum(server.reports["last_round"].numpy(), 0) + 1
        utility = statistical + np.sqrt(0.1 * math.log(server.round + 1) / last)
        preferred = np.nanquantile(seconds[known], self.pace)
        slow = known & (seconds > preferred)
        utility[slow] *= (preferred / seconds[slow]) ** self.penalty
        result: NDArray[np.float64] = utility
        return result

    def __call__(self, server: Server) -> np.ndarray:
        """Sorted client indices, shape ``[min(per_round, online)]``."""
        online, rng = server.online(), server.rng("selection")
        size = min(server.per_round, len(online))
        utility = self.utility(server)[online]
        seen, new = online[~np.isnan(utility)], online[np.isnan(utility)]
        share = max(self.least_exploration, self.exploration * self.decay**server.round)
        explored = min(len(new), max(size - len(seen), round(share * size)))
        chosen = rng.choice(new, explored, replace=False)
        rest = size - explored
        if rest:
            utility = utility[~np.isnan(utility)]
            # Of those near the last that would fit, one each in proportion to its utility (the released code's 95 %).
            cut = 0.95 * np.sort(utility)[-rest]
            near = utility >= cut
            odds = utility[near] / utility[near].sum()
            chosen = np.concatenate([chosen, rng.choice(seen[near], rest, replace=False, p=odds)])
        return np.sort(chosen)
