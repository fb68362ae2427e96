"""FLUDE: devices that may fail, chosen by how dependable they are, and whose work is kept when they do."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from lightning.pytorch.strategies import StrategyRegistry
from numpy.typing import NDArray

from edgebolt.common.communication import Codec
from edgebolt.common.federated import (
    Algorithm,
    Closing,
    Deadline,
    FederatedStrategy,
    Outcome,
    ReportLoss,
    Selector,
    Server,
)
from edgebolt.common.federated.algorithm import Weights
from edgebolt.flude.dependability import DependableSelection, dependability
from edgebolt.flude.sessions import ResumeSessions, SessionCache
from edgebolt.flude.staleness import StaleMean
from edgebolt.flude.thresholds import Threshold

__all__ = ["Flude", "FludeStrategy"]


class Flude(Algorithm):
    """Federated learning with undependable devices.

    Source: FLUDE (arXiv 2412.19991). Its body could not be read: that there is a Beta posterior of dependability, an
    adaptive selection by it, a rolling cache on the device, and a distribution of the model by a staleness threshold
    is from a summary of the paper; every formula is a completion, a named option of a part:

    ====================  ==================================================================================
    selection             :class:`~edgebolt.flude.DependableSelection`
    cache on the device   :class:`~edgebolt.flude.SessionCache`
    who is sent the model :class:`~edgebolt.flude.ResumeSessions` with :class:`~edgebolt.flude.AIMD`,
                          :class:`~edgebolt.flude.Quantile` or :class:`~edgebolt.flude.Fixed`
    aggregation           :class:`~edgebolt.flude.StaleMean`
    end of a round        :class:`~edgebolt.common.federated.Deadline`: all have ended, or 80 % of the expected
                          updates and ``grace`` seconds, or three times the median expected time
    ====================  ==================================================================================

    Args:
        selector: who trains; default ``DependableSelection(prior)``.
        threshold: which interrupted visits go on; default ``AIMD()``. ``Fixed(0)``: none.
        cache_every: steps between two writes of the cache.
        prior: ``(α_0, β_0)`` of dependability.
        exponent, weights, merged: of the aggregation.
        closing: when a round ends; default ``Deadline(arrivals=0.8, grace=grace)`` with dependability as chance.
        grace: seconds that a round goes on once enough updates have come.
        down, up: codecs.

    Raises:
        ValueError: for arguments that are out of range.

    Example::

        >>> from edgebolt.common.devices import Fleet, Undependability
        >>> from edgebolt.common.federated import Dirichlet, FederatedStrategy
        >>> fleet = Fleet.jetson(120).undependable(Undependability(rates=(0.2, 0.4, 0.6)))
        >>> strategy = FederatedStrategy(Flude(), clients=Dirichlet(120, alpha=0.5), per_round=24, fleet=fleet)
    """

    def __init__(
        self,
        selector: Selector | None = None,
        threshold: Threshold | None = None,
        cache_every: int = 1,
        prior: tuple[float, float] = (2.0, 2.0),
        exponent: float = 0.5,
        weights: Weights = "samples",
        merged: Literal["differences", "models"] = "differences",
        closing: Closing | None = None,
        grace: float = 10.0,
        down: Codec | None = None,
        up: Codec | None = None,
    ) -> None:
        self.prior, self.learner = prior, DependableSelection(prior)
        self.sessions = ResumeSessions(threshold, cache_every)
        super().__init__(
            selector=self.learner if selector is None else selector,
            configure=[self.sessions],
            aggregator=StaleMean(exponent, weights, merged),
            down=down,
            up=up,
            callbacks=[ReportLoss(), SessionCache(cache_every)],
            closing=Deadline(arrivals=0.8, grace=grace, chance=self.chance) if closing is None else closing,
        )

    def observe(self, server: Server, outcomes: list[Outcome]) -> None:
        """Dependability is learned under every selector: the end of a round is expected by it."""
        super().observe(server, outcomes)
        if not isinstance(self.selector, DependableSelection):
            self.learner.observe(server, outcomes)

    def chance(self, server: Server) -> NDArray[np.float64]:
        """``R_i`` of every device."""
        return dependability(server, self.prior)

    def figures(self, server: Server, outcomes: list[Outcome]) -> dict[str, float]:
        """``flude/threshold`` of the next round, visits that went on, mean age of what arrived, mean ``R_i``."""
        arrived = [server.round - o.visit.origin(server.round) for o in outcomes if o.delivered]
        return {
            "flude/threshold": self.sessions.current(server),
            "flude/resumed": sum(outcome.visit.base is not None for outcome in outcomes),
            "flude/staleness": sum(arrived) / max(1, len(arrived)),
            "flude/dependability": float(self.chance(server).mean()),
        }


class FludeStrategy(FederatedStrategy):
    """:class:`Flude` as a strategy of its own; ``Trainer(strategy="flude")`` once this package is imported.

    Args:
        threshold, cache_every, exponent, grace: see :class:`Flude`.
        **kwargs: those of ``FederatedStrategy``.
    """

    strategy_name = "flude"

    def __init__(
        self,
        threshold: Threshold | None = None,
        cache_every: int = 1,
        exponent: float = 0.5,
        grace: float = 10.0,
        **kwargs: Any,
    ) -> None:
        algorithm = Flude(threshold=threshold, cache_every=cache_every, exponent=exponent, grace=grace)
        super().__init__(algorithm=algorithm, **kwargs)


StrategyRegistry.register("flude", FludeStrategy, description="Training with undependable devices", override=True)
