"""SAFA: everybody trains, some go on with old models, and a cache on the server stands in for the late ones."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from edgebolt.common.communication import Tensors
from edgebolt.common.federated import (
    Algorithm,
    ClientCallback,
    Closed,
    Closing,
    Deadline,
    Device,
    Outcome,
    Server,
    Visit,
)

__all__ = ["SAFA", "KeepAndSend"]

_KEY = "safa"


class KeepAndSend(ClientCallback):
    """The device keeps the model that it has trained, ``memory["own"]``, and sends it whole instead of its change."""

    def install(self, device: Device, visit: Visit, tensors: Tensors) -> Tensors:
        """Without a new model it goes on with its own."""
        return tensors if visit.start is not None else dict(device.memory["own"])

    def on_client_start(self, trainer: Any, module: Any, device: Device, visit: Visit) -> None:
        """Where it starts from."""
        named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        device.memory["from"] = {name: tensor.detach().clone() for name, tensor in named.items()}

    def upload(self, device: Device, visit: Visit, update: Tensors) -> Tensors:
        """The model."""
        start = device.memory.pop("from")
        own = {name: start[name] + change for name, change in update.items()}
        device.memory["own"] = own
        return own


class SAFA(Algorithm):
    """All devices online train in every round; the first to finish are merged, with what the server keeps of the rest.

    Source: Wu et al., "SAFA: A Semi-Asynchronous Protocol for Fast Federated Learning With Low Overhead", IEEE Trans.
    Computers 2021, and its released code. A device that finished its last visit in the last round, or is more than
    ``lag`` rounds behind, is sent the model; others go on with their own. Of those that finish, the first ``quota`` of
    all devices are picked, those before others that were not picked the last time; when these alone fill the quota,
    the round ends. The server's cache has a model for each device; ``w`` is their mean by samples. Models that came in
    time and were not picked enter the cache after that; late ones stay on their devices. The release looks up who will
    crash before it chooses; here nobody does, and a device's crash is found out like everybody's.

    Args:
        lag: rounds; 5 as remembered (the release's default is 1).
        quota: share of the devices that is picked in a round.
        closing: when a round ends that has not reached its quota; default ``Deadline()``.

    Raises:
        ValueError: for arguments that are out of range.

    Example::

        >>> SAFA(lag=1, quota=0.3).quota
        0.3
    """

    def __init__(self, lag: int = 5, quota: float = 0.2, closing: Closing | None = None) -> None:
        if type(lag) is not int or lag < 1:
            raise ValueError(f"lag={lag!r}: use a whole number of rounds, 1 or more.")
        if not 0 < quota <= 1:
            raise ValueError(f"quota={quota!r}: use a share of the devices, above 0 and up to 1.")
        self.lag, self.quota = lag, quota
        super().__init__(callbacks=[KeepAndSend()], closing=Deadline() if closing is None else closing)

    def _notes(self, server: Server) -> Mapping[str, Any]:
        """``version``: round of the model from which each device's own one stems; -1: there is none."""
        nobody = torch.full((server.population,), -1)
        new = {"version": nobody, "finished": nobody, "picked": nobody > 0, "cache": {}}
        notes: Mapping[str, Any] = server.memory.get(_KEY, new)
        return notes

    def plan(self, server: Server) -> list[Visit]:
        """Everybody who is online."""
        return [self._visit(server, int(client)) for client in server.online()]

    def _visit(self, server: Server, client: int) -> Visit:
        finished = int(self._notes(server)["finished"][client])
        synchronised = finished < 0 or finished == server.round - 1 or self._deprecated(server, client)
        return Visit(client, server.steps(client), start="global" if synchronised else None)

    def _deprecated(self, server: Server, client: int) -> bool:
        return server.round - int(self._notes(server)["version"][client]) > self.lag

    def closing_time(self, server: Server, outcomes: list[Outcome]) -> float:
        """When those that were not picked the last time fill the quota, or as ``closing`` says."""
        latest, picked = super().closing_time(server, outcomes), self._notes(server)["picked"]
        arrived = sorted(o.finished for o in outcomes if o.delivered and not picked[o.visit.client])
        wanted = math.ceil(self.quota * server.population)
        return min(latest, arrived[wanted - 1]) if len(arrived) >= wanted else latest

    def aggregate(self, server: Server, closed: Closed) -> None:
        """Pick, merge the cache, and let those that were not picked into it."""
        notes = self._notes(server)
        models = {update.client: self.up.decode(update.message) for update in closed.updates}
        wanted = math.ceil(self.quota * server.population)
        by_merit = sorted(
            closed.updates, key=lambda u: (bool(notes["picked"][u.client]), u.outcome.finished, u.client)
        )
        picked = {update.client for update in by_merit[:wanted]}
        cache = dict(notes["cache"])
        for client in [outcome.visit.client for outcome in closed.outcomes]:
            if client in cache and self._deprecated(server, client):
                cache[client] = server.models["global"]
        cache |= {client: models[client] for client in picked}
        samples = server.reports["samples"].double()
        total = float(samples.sum())
        merged = {}
        for name, tensor in server.models["global"].items():
            # The release begins with everybody at the first model; here who is unheard stands for the present one.
            change = torch.zeros_like(tensor)
            for client in sorted(cache):
                change.add_(cache[client][name] - tensor, alpha=float(samples[client]) / total)
            merged[name] = tensor + change
        version, finished, was_picked = (notes[name].clone() for name in ("version", "finished", "picked"))
        for outcome in closed.outcomes:
            if outcome.delivered:
                client = outcome.visit.client
                version[client] = server.round if outcome.visit.start is not None else version[client]
                finished[client] = server.round
                was_picked[client] = client in picked
        cache |= {client: model for client, model in models.items() if client not in picked}
        server.models["global"] = merged
        server.memory[_KEY] = {"version": version, "finished": finished, "picked": was_picked, "cache": cache}
