"""The loaders that Lightning sees: one epoch of them is one round, or one round's validation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from edgebolt.common.federated.client_data import ClientData
from edgebolt.common.random import derive

if TYPE_CHECKING:
    from edgebolt.common.federated.device_half import DeviceHalf
    from edgebolt.common.federated.loop import FederatedLoop
    from edgebolt.common.federated.visit import Evaluation, Visit

__all__ = ["EvaluationLoader", "RoundLoader", "visit_batches"]


class RoundLoader:
    """All batches of a round, visit after visit. Its length is fixed when the round is planned.

    Lightning does not prefetch from a sized loader, so the code between two ``yield`` runs exactly between two
    steps: that is where a visit is opened.

    Args:
        loop: the running round.
        data: the clients' batches.
        steps: batches of the round, before the Trainer's own limit.
        idle: a batch for a round in which nobody trains; without it the whole fit would end.
    """

    def __init__(self, loop: FederatedLoop, data: ClientData, steps: int, idle: Callable[[], Any]) -> None:
        self.loop, self.data, self.steps, self.idle = loop, data, steps, idle
        self._idle_batch: Any = None

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Any]:
        loop = self.loop
        if not loop.steps:
            loop.devices.note_groups()  # its visits open after the idle step, when the schedule has moved on
            yield self._idle()
            return
        while loop.running:
            visit = loop.open_next()
            if not loop.running:
                return
            if loop.devices.trains:
                yield from visit_batches(self.data, loop.devices, visit, loop.server.round, loop.needed, loop.done)
            else:  # it trains elsewhere; bars and counters count its steps here
                idle = self._idle()
                for _ in range(loop.needed):
                    yield idle

    def _idle(self) -> Any:
        if self._idle_batch is None:
            self._idle_batch = self.idle()
        return self._idle_batch

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the loop's own state knows the position. Its presence tells Lightning that resuming is exact."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to load."""


def visit_batches(
    data: ClientData, devices: DeviceHalf, visit: Visit, round: int, steps: int, done: int = 0
) -> Iterator[Any]:
    """The batches of a visit's steps, with the random states of each step set before it is drawn.

    Args:
        data: the clients' batches.
        devices: has the visit open.
        visit: the order.
        round: in which it takes place.
        steps: that it trains.
        done: of these, before it was resumed: their batches are drawn again and dropped.
    """
    seed = derive(devices.seed, "data", visit.origin(round), visit.stage, visit.client)
    batches = data.batches(visit.client, visit.done + steps, visit.batch_size, seed)
    for _ in range(visit.done):  # those that were trained before it was interrupted
        next(batches)
    for step in range(steps):
        devices.seed_step(step)
        batch = next(batches)
        if step >= done:
            yield batch


class EvaluationLoader:
    """The validation batches of several (model, client) pairs, with their tensors put in place in between.

    Args:
        loop: for its server models and devices.
        evaluations: the pairs.
        loaders: the validation loader of each pair.
    """

    def __init__(self, loop: FederatedLoop, evaluations: list[Evaluation], loaders: list[Any]) -> None:
        self.loop, self.evaluations, self.loaders = loop, evaluations, loaders

    def __len__(self) -> int:
        return sum(len(loader) for loader in self.loaders)

    def __iter__(self) -> Iterator[Any]:
        for evaluation, loader in zip(self.evaluations, self.loaders, strict=True):
            model = self.loop.server.models[evaluation.model]
            self.loop.devices.show(evaluation.model, model, evaluation.client)
            yield from loader
