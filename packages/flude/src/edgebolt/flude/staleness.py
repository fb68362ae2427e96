"""Updates from models of different age, merged."""

from __future__ import annotations

from typing import Literal

from edgebolt.common.communication import Tensors
from edgebolt.common.federated import Outcome, Server, WeightedMean
from edgebolt.common.federated.algorithm import Weights, merge
from edgebolt.flude.sessions import interrupted

__all__ = ["StaleMean"]

_KEY = "old models"


class StaleMean(WeightedMean):
    """``w <- w + Σ_i a_i Δ_i`` with ``a_i ∝ n_i (1 + s_i)^(-exponent)``, ``s_i`` the age in rounds of i's start.

    The paper's aggregation (FLUDE, arXiv 2412.19991) could not be read; this is a completion. The weight is that of
    FedBuff's code and FedScale, ``1 / sqrt(1 + s)`` (not NVFlare's ``1 / (1 + sqrt(s))``). Differences are merged, so
    that an update from an old model does not pull the new one back to it. With all ages 0 it is FedAvg, bit for bit.

    Args:
        exponent: of ``1 + s``; 0: age does not matter.
        weights: ``"samples"`` or ``"uniform"``.
        merged: ``"differences"``, or ``"models"``: the mean of the models that devices ended with, old ones pulling
            back, as plain averaging would have it; the server then keeps the models that visits began with.

    Raises:
        ValueError: for arguments that are out of range.

    Example::

        >>> from edgebolt.common.federated import Algorithm
        >>> algorithm = Algorithm(aggregator=StaleMean(exponent=0.5))
    """

    def __init__(
        self,
        exponent: float = 0.5,
        weights: Weights = "samples",
        merged: Literal["differences", "models"] = "differences",
    ) -> None:
        super().__init__(weights)
        if not exponent >= 0:
            raise ValueError(f"exponent={exponent!r}: use 0 or more.")
        if merged not in ("differences", "models"):
            raise ValueError(f"merged={merged!r}: use 'differences' or 'models'.")
        self.exponent, self.merged = exponent, merged

    def __call__(self, server: Server, model: Tensors, updates: list[tuple[Outcome, Tensors]]) -> Tensors:
        """The merged model."""
        self._keep(server, model)
        samples, changes = server.reports["samples"], []
        for outcome, update in updates:
            age = server.round - outcome.visit.origin(server.round)
            share = float(samples[outcome.visit.client]) if self.weights == "samples" else 1.0
            if self.merged == "models" and age:
                old = server.memory[_KEY][outcome.visit.origin(server.round)]
                update = {name: change + (old[name] - model[name]) for name, change in update.items()}
            changes.append((share * (1.0 + age) ** -self.exponent, update))
        return {name: merge(t, [(a, u[name]) for a, u in changes if name in u]) for name, t in model.items()}

    def observe(self, server: Server, outcomes: list[Outcome]) -> None:
        """Keep the round's model where nobody arrived, and forget those with which no interrupted visit began."""
        self._keep(server, server.models["global"])
        if self.merged == "models":
            begun = {session["base"] for session in interrupted(server).values()}
            server.memory[_KEY] = {base: old for base, old in server.memory[_KEY].items() if base in begun}

    def _keep(self, server: Server, model: Tensors) -> None:
        old: dict[int, Tensors] = server.memory.get(_KEY, {})
        if self.merged == "models" and server.round not in old:
            server.memory[_KEY] = {**old, server.round: model}
