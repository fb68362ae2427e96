"""Federated averaging and its Lightning strategy."""

from __future__ import annotations

from typing import Any, Literal

from lightning.pytorch.strategies import StrategyRegistry

from edgebolt.common.federated.algorithm import Algorithm, WeightedMean, Weights
from edgebolt.common.federated.client import KeepMoments
from edgebolt.common.federated.strategy import FederatedStrategy

__all__ = ["FedAvg", "FedAvgStrategy"]

Moments = Literal["reset", "keep"]


class FedAvg(Algorithm):
    """Federated averaging: ``w <- w + sum_i (n_i / n) (w_i - w)`` over the round's delivered updates.

    Source: McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", 2017,
    algorithm 1; written on differences, which is the same sum.

    Args:
        weights: ``"samples"``: ``n_i`` training samples (the paper); ``"uniform"``: equal weights.
        moments: ``"reset"``: the optimizer starts empty at every visit (the paper's SGD has no state);
            ``"keep"``: each device keeps its own momentum from visit to visit.

    Raises:
        ValueError: for another value of ``weights`` or ``moments``.

    Example::

        >>> FedAvg(moments="keep").callbacks
        [<edgebolt.common.federated.client.KeepMoments object at ...>]
    """

    def __init__(self, weights: Weights = "samples", moments: Moments = "reset") -> None:
        if moments not in ("reset", "keep"):
            raise ValueError(f"moments={moments!r}: use 'reset' or 'keep'.")
        super().__init__(aggregator=WeightedMean(weights), callbacks=[KeepMoments()] if moments == "keep" else [])


class FedAvgStrategy(FederatedStrategy):
    """:class:`FedAvg` as a strategy of its own; ``Trainer(strategy="fedavg")`` once this package is imported.

    Args:
        weights: ``"samples"`` or ``"uniform"``.
        moments: ``"reset"`` or ``"keep"``, at every visit.
        **kwargs: those of ``FederatedStrategy``; by default ten clients with an equal share each, all in every round.

    Example::

        >>> import lightning as L
        >>> import edgebolt.common.federated
        >>> trainer = L.Trainer(max_epochs=3, strategy="fedavg", accelerator="cpu", logger=False)
    """

    strategy_name = "fedavg"

    def __init__(self, weights: Weights = "samples", moments: Moments = "reset", **kwargs: Any) -> None:
        super().__init__(algorithm=FedAvg(weights, moments), **kwargs)


StrategyRegistry.register("fedavg", FedAvgStrategy, description="Federated averaging", override=True)
