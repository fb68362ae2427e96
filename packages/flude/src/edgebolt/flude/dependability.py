"""How likely a device is to finish what it begins, and whom to choose by it."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from edgebolt.common.federated import Outcome, Server, Visit

__all__ = ["DependableSelection", "dependability"]

_KEY = "dependability"


def dependability(server: Server, prior: tuple[float, float] = (2.0, 2.0)) -> NDArray[np.float64]:
    """``R_i = α_i / (α_i + β_i)``, the mean of each device's Beta posterior of finishing a visit, float64 ``[n]``.

    Source: FLUDE (arXiv 2412.19991): a Beta prior, updated on-line with a device's history.

    Args:
        server: its memory holds the counts of a :class:`DependableSelection`, if one has learned.
        prior: ``(α_0, β_0)`` where none has.
    """
    alpha, beta = _posterior(server, prior)
    mean: NDArray[np.float64] = alpha / (alpha + beta)
    return mean


class DependableSelection:
    """Prefers devices that finish what they begin, those less that were chosen more than their share, and explores.

    Source: FLUDE (arXiv 2412.19991). That dependability is a Beta posterior updated on-line is from a summary of the
    paper, that selection holds back devices by an adaptive threshold on how often they were used from a survey's
    sentence about it. The formula is a completion, after Oort's penalty and exploration::

        σ_t = max(1, κ X t / N)                             X devices a round, t rounds so far, this one included
        P_i = R_i (σ_t / q_i)^(ν [q_i > σ_t])               q_i: how often i was chosen
        ε_t = max(least_exploration, exploration decay^(t-1))  share of the cohort that explores

    Explorers are devices that were never chosen, then any others, uniformly: for ever. Without that a device that was
    unlucky early is never heard again, and with it its data. The rest are the largest ``P_i`` of those online.

    A visit that was not delivered counts as a failure; one that a deadline cut short by default too, though it is the
    server that did not wait. One that was under way when the round closed because enough others had come counts for
    nothing, whatever became of it: else rounds would close ever earlier, for the more is called failed, the less is
    expected.

    Args:
        prior: ``(α_0, β_0)`` of the Beta prior; (2, 2) is inferred.
        penalty: ``ν``; 0: chosen by ``R_i`` alone.
        fair_share: ``κ``.
        exploration, decay, least_exploration: ``ε_0``, its factor a round, and its floor.
        explore: ``"all"``: see above; ``"new"``: devices that were never chosen and no others, as Oort does.
        estimate: ``"mean"`` of the posterior, or a ``"sample"`` from it (Thompson).
        forgetting: ``γ``: at each observation ``α <- γ α + (1 - γ) α_0 + y``, so that a device that has changed is
            believed in the end; 1: nothing is forgotten.
        late_fails: whether an update that missed the deadline counts as a failure; if not it counts for nothing.

    Raises:
        ValueError: for arguments that are out of range.

    Example::

        >>> from edgebolt.common.federated import Algorithm
        >>> algorithm = Algorithm(selector=DependableSelection(prior=(1, 1)))
    """

    def __init__(
        self,
        prior: tuple[float, float] = (2.0, 2.0),
        penalty: float = 2.0,
        fair_share: float = 1.0,
        exploration: float = 0.9,
        decay: float = 0.98,
        least_exploration: float = 0.2,
        explore: Literal["all", "new"] = "all",
        estimate: Literal["mean", "sample"] = "mean",
        forgetting: float = 1.0,
        late_fails: bool = True,
    ) -> None:
        if len(prior) != 2 or min(prior) <= 0:
            raise ValueError(f"prior={prior!r}: use two numbers above 0, such as (2, 2) or (1, 1).")
        if penalty < 0 or fair_share <= 0:
            raise ValueError(f"penalty={penalty!r}, fair_share={fair_share!r}: use 0 or more, and a factor above 0.")
        shares = {"exploration": exploration, "decay": decay, "least_exploration": least_exploration}
        for name, value in {**shares, "forgetting": forgetting}.items():
            if not 0 <= value <= 1:
                raise ValueError(f"{name}={value!r}: use 0 to 1.")
        if explore not in ("all", "new"):
            raise ValueError(f"explore={explore!r}: use 'all' or 'new'.")
        if estimate not in ("mean", "sample"):
            raise ValueError(f"estimate={estimate!r}: use 'mean' or 'sample'.")
        self.prior, self.penalty, self.fair_share = (float(prior[0]), float(prior[1])), penalty, fair_share
        self.exploration, self.decay, self.least_exploration = exploration, decay, least_exploration
        self.explore, self.estimate, self.forgetting, self.late_fails = explore, estimate, forgetting, late_fails

    def observe(self, server: Server, outcomes: list[Outcome]) -> None:
        """Update the posteriors of those who were chosen."""
        sessions = [outcome for outcome in outcomes if is_session(outcome.visit)]
        if not sessions:
            return
        alpha, beta = (array.copy() for array in _posterior(server, self.prior))
        chosen, deadline = _chosen(server).copy(), server.memory.get("deadline", -math.inf)
        for outcome in sessions:
            client = outcome.visit.client
            chosen[client] += 1
            unfinished = outcome.reason == "late" or outcome.finished > server.now
            if unfinished and not (self.late_fails and server.now >= deadline):
                continue
            keep = self.forgetting
            alpha[client] = keep * alpha[client] + (1 - keep) * self.prior[0] + outcome.delivered
            beta[client] = keep * beta[client] + (1 - keep) * self.prior[1] + (not outcome.delivered)
        server.memory[_KEY] = {
            name: torch.from_numpy(array) for name, array in {"alpha": alpha, "beta": beta, "chosen": chosen}.items()
        }

    def priority(self, server: Server) -> NDArray[np.float64]:
        """``P_i`` of every device, float64 ``[n]``."""
        alpha, beta = _posterior(server, self.prior)
        estimate = alpha / (alpha + beta) if self.estimate == "mean" else server.rng("dependability").beta(alpha, beta)
        chosen = _chosen(server)
        share = max(1.0, self.fair_share * server.per_round * (server.round + 1) / server.population)
        over = chosen > share
        estimate[over] *= (share / chosen[over]) ** self.penalty
        priority: NDArray[np.float64] = estimate
        return priority

    def __call__(self, server: Server) -> np.ndarray:
        """Sorted client indices, shape ``[min(per_round, online)]``."""
        online, rng = server.online(), server.rng("selection")
        size = min(server.per_round, len(online))
        share = max(self.least_exploration, self.exploration * self.decay**server.round)
        online = rng.permutation(online)  # equals are chosen at random
        new = _chosen(server)[online] == 0
        pool = np.concatenate([online[new], online[~new]]) if self.explore == "all" else online[new]
        explorers = pool[: round(share * size)]
        rest = online[~np.isin(online, explorers)]
        best = rest[np.argsort(-self.priority(server)[rest], kind="stable")][: size - len(explorers)]
        return np.sort(np.concatenate([explorers, best]))


def is_session(visit: Visit) -> bool:
    """Whether a device was asked to work: to train, or to send again what it had trained."""
    return bool(visit.steps) or visit.base is not None


def _posterior(server: Server, prior: tuple[float, float]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    counts = server.memory.get(_KEY)
    if counts is None:
        return np.full(server.population, float(prior[0])), np.full(server.population, float(prior[1]))
    return counts["alpha"].cpu().numpy(), counts["beta"].cpu().numpy()


def _chosen(server: Server) -> NDArray[np.int64]:
    counts = server.memory.get(_KEY)
    chosen: NDArray[np.int64] = (
        np.zeros(server.population, np.int64) if counts is None else counts["chosen"].cpu().numpy()
    )
    return chosen
