"""MIFA: the last update of every device stands in for it while it is away."""

from __future__ import annotations

import torch

from edgebolt.common.communication import Tensors
from edgebolt.common.federated import Algorithm, Closing, Deadline, Outcome, Server

__all__ = ["MIFA", "MemorizedMean"]

_KEY = "mifa"


class MemorizedMean:
    """``w <- w + 1/N Σ_i G_i`` with ``G_i`` the latest update of device i, of this round or an earlier one.

    Source: Gu et al., "Fast Federated Learning in the Presence of Arbitrary Device Unavailability", NeurIPS 2021
    (MIFA), as remembered. There every device has delivered before the first step; here the mean is over those that
    have delivered so far, for nobody can be made to.

    The server keeps a model's worth of numbers for each device.
    """

    def __call__(self, server: Server, model: Tensors, updates: list[tuple[Outcome, Tensors]]) -> Tensors:
        """The merged model."""
        latest = {**server.memory.get(_KEY, {}), **{outcome.visit.client: update for outcome, update in updates}}
        server.memory[_KEY] = latest
        return stepped(model, latest)

    def observe(self, server: Server, outcomes: list[Outcome]) -> None:
        """A round in which nobody delivered moves the model too, by what is remembered."""
        latest = server.memory.get(_KEY, {})
        if latest and not any(outcome.delivered for outcome in outcomes):
            server.models["global"] = stepped(server.models["global"], latest)


def stepped(model: Tensors, latest: dict[int, Tensors]) -> Tensors:
    """``w + mean of the latest updates``, summed in the order of clients."""
    moved = {}
    for name, tensor in model.items():
        total = torch.zeros_like(tensor)
        for client in sorted(latest):
            total += latest[client][name]
        moved[name] = tensor + total / len(latest)
    return moved


class MIFA(Algorithm):
    """Federated averaging with the memorised latest updates of all devices.

    Source: see :class:`MemorizedMean`. The cohort is uniform among those online; a round ends at a deadline.

    Args:
        closing: when a round ends; default ``Deadline()``.

    Example::

        >>> MIFA().aggregator
        <edgebolt.flude.baselines.mifa.MemorizedMean object at ...>
    """

    def __init__(self, closing: Closing | None = None) -> None:
        super().__init__(aggregator=MemorizedMean(), closing=Deadline() if closing is None else closing)
