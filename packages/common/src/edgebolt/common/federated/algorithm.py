"""What a paper says: who trains, with what settings, what is sent, how updates are merged."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch

from edgebolt.common.communication import Codec, Dense, Message, Tensors
from edgebolt.common.federated.client import ClientCallback
from edgebolt.common.federated.server import Server
from edgebolt.common.federated.visit import Closed, Evaluation, Outcome, Visit

__all__ = ["Aggregator", "Algorithm", "Closing", "Configure", "Selector", "Submodel", "Uniform", "WeightedMean"]

Weights = Literal["samples", "uniform"]


@runtime_checkable
class Selector(Protocol):
    """Chooses a round's cohort."""

    def __call__(self, server: Server) -> np.ndarray:
        """Client indices, shape ``[cohort]``; the cohort may be smaller than ``server.per_round``."""


class Closing(Protocol):
    """Says when a stage closes."""

    def __call__(self, server: Server, outcomes: list[Outcome]) -> float:
        """Simulated seconds; what finishes later is late. ``outcomes`` are those of all visits of the stage."""


class Configure(Protocol):
    """Changes the visits that were planned so far: settings, steps, batch sizes, lanes."""

    def __call__(self, server: Server, visits: list[Visit]) -> list[Visit]:
        """The visits to go on with."""


class Submodel(Protocol):
    """Says which part of a model a visit is sent."""

    def key(self, visit: Visit) -> Hashable:
        """Visits that start from the same model and have the same key are sent the same, encoded once."""

    def __call__(self, tensors: Tensors, visit: Visit) -> Tensors:
        """What is sent of a model; a tensor that is left out has, on the device, the value of the run's beginning."""


class Aggregator(Protocol):
    """Merges updates into a model."""

    def __call__(self, server: Server, model: Tensors, updates: list[tuple[Outcome, Tensors]]) -> Tensors:
        """New tensors for the model; ``updates`` are sorted by client and never empty."""


def merge(tensor: torch.Tensor, changes: Sequence[tuple[float, torch.Tensor]]) -> torch.Tensor:
    """``w + sum_i a_i delta_i`` with ``a_i = share_i / sum(shares)``, summed in float32 or wider, in this order.

    Args:
        tensor: ``w``.
        changes: ``(share_i, delta_i)`` of those who sent the tensor; if all shares are 0, or nobody sent it, it stays.
    """
    total = sum(share for share, _ in changes)
    if not total:
        return tensor
    wide = torch.promote_types(tensor.dtype, torch.float32)
    change = torch.zeros_like(tensor, dtype=wide)
    for share, delta in changes:
        change.add_(delta.to(wide), alpha=share / total)
    return (tensor.to(wide) + change).to(tensor.dtype)


class Uniform:
    """A uniform sample without replacement of the devices that are online (McMahan et al. 2017)."""

    def __call__(self, server: Server) -> np.ndarray:
        """Sorted client indices, shape ``[min(per_round, online)]``."""
        online = server.online()
        if len(online) <= server.per_round:
            return online
        return np.sort(server.rng("selection").choice(online, server.per_round, replace=False))


class WeightedMean:
    """``w + sum_i a_i delta_i`` per tensor, over the devices that sent it: FedAvg on differences.

    Args:
        weights: ``"samples"``: ``a_i`` proportional to the client's training samples (McMahan et al. 2017);
            ``"uniform"``: equal.

    Sums run in float32 or wider, in the order of client indices. A tensor that nobody sent keeps its value.
    """

    def __init__(self, weights: Weights = "samples") -> None:
        if weights not in ("samples", "uniform"):
            raise ValueError(f"weights={weights!r}: use 'samples' or 'uniform'.")
        self.weights = weights

    def __call__(self, server: Server, model: Tensors, updates: list[tuple[Outcome, Tensors]]) -> Tensors:
        """The merged model."""
        samples = server.reports["samples"]
        shares = [float(samples[o.visit.client]) if self.weights == "samples" else 1.0 for o, _ in updates]
        merged = {}
        for name, tensor in model.items():
            held = [
                (share, update[name]) for share, (_, update) in zip(shares, updates, strict=True) if name in update
            ]
            merged[name] = merge(tensor, held)
        return merged


class Algorithm:
    """The server half of a federated algorithm, assembled of parts; override a method where a part is not enough.

    Server code sees the :class:`~edgebolt.common.federated.Server` and messages, never a device. It keeps what it
    learns in ``server.memory`` and ``server.reports``, which are checkpointed, and nothing in itself: the same
    object may serve several runs. A part with a method ``observe(server, outcomes)`` is told of the enrolment's and of
    every round's end.

    Args:
        selector: who trains; default :class:`Uniform`.
        configure: applied in turn to the planned visits.
        aggregator: how updates are merged; default :class:`WeightedMean`.
        submodel: which part of the model a visit is sent; default: all of it.
        down, up: codecs of the two directions; default :class:`~edgebolt.common.communication.Dense`. A visit's
            settings may tune them (``Codec.with_settings``); visits whose codecs are equal are sent one encoding.
        callbacks: the device half: what devices do beside training.
        closing: when a stage closes; default: when all of its visits have ended.

    Attributes:
        carries_over: ``True``: updates may stay in flight past the round's end (asynchronous algorithms).

    Example: the whole of federated averaging::

        >>> fedavg = Algorithm(aggregator=WeightedMean("samples"))
    """

    carries_over: bool = False

    def __init__(
        self,
        selector: Selector | None = None,
        configure: Sequence[Configure] = (),
        aggregator: Aggregator | None = None,
        submodel: Submodel | None = None,
        down: Codec | None = None,
        up: Codec | None = None,
        callbacks: Sequence[ClientCallback] = (),
        closing: Closing | None = None,
    ) -> None:
        self.selector: Selector = Uniform() if selector is None else selector
        self.configure = list(configure)
        self.aggregator: Aggregator = WeightedMean() if aggregator is None else aggregator
        self.submodel = submodel
        self.down: Codec = Dense() if down is None else down
        self.up: Codec = Dense() if up is None else up
        self.callbacks = list(callbacks)
        self.closing = closing

    @property
    def parts(self) -> list[Any]:
        """The server's parts, in the order in which they are told of a round's end."""
        return [self.selector, *self.configure, self.aggregator, self.submodel, self.closing]

    def enrol(self, server: Server) -> list[Visit]:
        """Visits before the first round, of 0 steps each: label histograms, probes of speed. Default: none.

        No update travels back, only what devices report.
        """
        return []

    def plan(self, server: Server) -> list[Visit]:
        """All visits of the round. Pure: it reads the server and changes nothing."""
        visits = [Visit(int(client), server.steps(int(client))) for client in self.selector(server)]
        for configure in self.configure:
            visits = configure(server, visits)
        return visits

    def download(self, server: Server, visit: Visit) -> Message:
        """Encode what the device is sent; called only where ``visit.start`` names a model."""
        assert visit.start is not None
        start, part, codec = visit.start, self.submodel, self.down.with_settings(visit.settings)
        if part is None:
            return server.once((start, codec), lambda: codec.encode(server.models[start]))
        return server.once((start, part.key(visit), codec), lambda: codec.encode(part(server.models[start], visit)))

    def aggregate(self, server: Server, closed: Closed) -> None:
        """Merge the updates of a ``(lane, stage)`` at the simulated instant at which it closes."""
        if closed.updates:
            updates = [(update.outcome, self.up.decode(update.message)) for update in closed.updates]
            server.models["global"] = self.aggregator(server, server.models["global"], updates)

    def closing_time(self, server: Server, outcomes: list[Outcome]) -> float:
        """When a stage closes, in simulated seconds, at the latest when all have ended; later updates are late."""
        last = max(outcome.finished for outcome in outcomes)
        return last if self.closing is None else min(last, self.closing(server, outcomes))

    def finish(self, server: Server, outcomes: list[Outcome]) -> None:
        """Once a round, after its last aggregation, with all outcomes that closed in it, failures included."""
        self.observe(server, outcomes)

    def observe(self, server: Server, outcomes: list[Outcome]) -> None:
        """Tell the parts that learn what became of visits: at each round's end, and after the enrolment."""
        for part in self.parts:
            if hasattr(part, "observe"):
                part.observe(server, outcomes)

    def figures(self, server: Server, outcomes: list[Outcome]) -> dict[str, float]:
        """Further figures of a finished round for history and loggers, by names such as ``"legend/depth"``."""
        return {}

    def evaluation(self, server: Server) -> list[Evaluation]:
        """What is validated after the round; default: the global model on the Trainer's validation loader."""
        return [Evaluation()]
