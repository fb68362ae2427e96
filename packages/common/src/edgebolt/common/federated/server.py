"""What the server knows: models, what devices reported, time, bytes. All of it is checkpointed."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any

import numpy as np
import torch

from edgebolt.common.communication import Message, Tensors, TrafficLedger
from edgebolt.common.devices import Clock
from edgebolt.common.random import stream

__all__ = ["Server"]

_MEASURED = ("step_seconds", "forward_seconds", "sample_seconds", "down_bps", "up_bps")


class Server:
    """The server's state, which an :class:`~edgebolt.common.federated.Algorithm` reads and writes.

    It knows no device object and no device memory: what it may know of a device is what the device sent.

    Attributes:
        models: name -> tensors, ``"global"`` first; an algorithm may add ``"group/3"``, ``"cluster/0"`` ...
            Tensors in it are replaced, never written into: messages and updates in flight refer to them.
        reports: name -> tensor over the population, shape ``[population, ...]``: ``samples``, ``visits``,
            ``last_round`` (-1: never delivered), ``step_seconds`` and, of these, ``forward_seconds`` (of a step that
            was trained or probed), ``sample_seconds`` (the same for a sample), ``down_bps``, ``up_bps`` (last
            measured, NaN: never) and the last value of every numeric entry that devices put in their reports.
        memory: the algorithm's own notes: tensors and built-ins only, by the name of the part that writes them.
        clock: simulated time and energy.
        ledger: every message and its exact bytes.
        round: index of the round that is running, from 0.
        population, per_round: number of devices; size of a cohort.

    Args:
        samples: training samples of each client, shape ``[population]``.
        steps_of: local steps of a visit, by client and batch size (``None``: the loader's own).
        online: round -> boolean array over the population.
        per_round: size of a cohort.
        seed: the run's seed.
    """

    def __init__(
        self,
        samples: np.ndarray,
        *,
        steps_of: Callable[[int, int | None], int],
        online: Callable[[int], np.ndarray],
        per_round: int,
        seed: int,
        clock: Clock | None = None,
        ledger: TrafficLedger | None = None,
    ) -> None:
        self.population = len(samples)
        self.per_round = per_round
        self.seed = seed
        self.round = 0
        self.clock = Clock() if clock is None else clock
        self.ledger = TrafficLedger() if ledger is None else ledger
        self.models: dict[str, Tensors] = {}
        self.memory: dict[str, Any] = {}
        unknown = torch.full((self.population,), float("nan"), dtype=torch.float64)
        self.reports: dict[str, torch.Tensor] = {
            "samples": torch.as_tensor(samples, dtype=torch.int64),
            "visits": torch.zeros(self.population, dtype=torch.int64),
            "last_round": torch.full((self.population,), -1, dtype=torch.int64),
            **{name: unknown.clone() for name in _MEASURED},
        }
        self._steps_of = steps_of
        self._online = online
        self._shared: dict[Hashable, Message] = {}

    @property
    def now(self) -> float:
        """Simulated seconds since the start of the run."""
        return float(self.clock.now)

    def online(self) -> np.ndarray:
        """Indices of the devices that have checked in this round, ascending, shape ``[online]``."""
        return np.flatnonzero(self._online(self.round))

    def steps(self, client: int, batch_size: int | None = None) -> int:
        """Local steps that the user asked for (``local_epochs`` or ``local_steps``), for one client."""
        return self._steps_of(client, batch_size)

    def rng(self, purpose: str, client: int | None = None) -> np.random.Generator:
        """A generator that depends on (run seed, purpose, round, client) alone, never on the order of calls."""
        return stream(self.seed, purpose, self.round, -1 if client is None else client)

    def once(self, key: Hashable, make: Callable[[], Message]) -> Message:
        """The message for ``key``, encoded once and shared by all visits until the next aggregation.

        Example::

            >>> from edgebolt.common.communication import Dense
            >>> server = Server(np.array([5, 5]), steps_of=lambda client, size: 1,
            ...                 online=lambda round: np.ones(2, bool), per_round=2, seed=0)
            >>> server.models["global"] = {"w": torch.ones(2)}
            >>> first = server.once("global", lambda: Dense().encode(server.models["global"]))
            >>> first is server.once("global", lambda: Dense().encode(server.models["global"]))
            True
        """
        if key not in self._shared:
            self._shared[key] = make()
        return self._shared[key]

    def forget_shared(self) -> None:
        """Drop the shared encodings: the models have changed."""
        self._shared.clear()

    def record(self, client: int, report: Mapping[str, Any]) -> None:
        """Keep the last value of each numeric entry (a number or a flat list of numbers) of a device's report."""
        for name, value in report.items():
            try:
                row = torch.as_tensor(value, dtype=torch.float64)
            except (TypeError, ValueError, RuntimeError):
                continue  # text and nested entries are for the algorithm's own `finish`
            if name not in self.reports:
                self.reports[name] = torch.full((self.population, *row.shape), float("nan"), dtype=torch.float64)
            self.reports[name][client] = row

    def state_dict(self) -> dict[str, Any]:
        """Tensors and built-ins only."""
        return {
            "round": self.round,
            "models": self.models,
            "reports": self.reports,
            "memory": self.memory,
            "clock": self.clock.state_dict(),
            "ledger": self.ledger.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self.round, self.models = state["round"], state["models"]
        self.reports, self.memory = state["reports"], state["memory"]
        self.clock.load_state_dict(state["clock"])
        self.ledger.load_state_dict(state["ledger"])
        self.forget_shared()
