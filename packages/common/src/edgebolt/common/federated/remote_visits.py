"""The device half of a run whose visits are trained by an engine's workers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.utilities import rank_zero_warn

from edgebolt.common.communication import Message, Tensors
from edgebolt.common.devices import CostModel
from edgebolt.common.engines.engine import UNHEARD, Engine, Order
from edgebolt.common.engines.job import Job
from edgebolt.common.engines.memory import dump_memory, load_memory
from edgebolt.common.federated.device_half import DeviceHalf
from edgebolt.common.federated.visit import Visit

__all__ = ["RemoteVisits"]


class RemoteVisits(DeviceHalf):
    """Hands visits to an engine and takes what they come to in their turn; shows models in this process.

    Device memories stay where the engine keeps them. A device's visits follow each other: one is submitted when the
    former has been answered.

    Args:
        engine: runs the visits.
        job: the tensors with which the run began -> what the workers get; called when the first visit is submitted.
        cost: what steps cost, as workers and this process have counted it.
        kwargs: those of :class:`DeviceHalf`.
    """

    def __init__(self, engine: Engine, job: Callable[[Tensors], Job], cost: CostModel, **kwargs: Any) -> None:
        self._stored: dict[int, Any] = {}  # client -> its memory, as the engine stores it; None: empty
        super().__init__(**kwargs)
        self.engine, self.job, self.cost = engine, job, cost
        self._begun = False
        self._kept: dict[int, bytes] = {}  # the memories, once the workers are gone
        self._here = False  # the open visit is trained in this process
        self._unheard: dict[int, list[tuple[Visit, int]]] = {}
        self._held: dict[tuple[int, int], dict[str, Any]] = {}  # (client, stage) -> what its order will be made of
        self._orders: dict[tuple[int, int], Order] = {}  # submitted and not answered
        self._number = self._failures = 0

    @property
    def ahead(self) -> int:  # type: ignore[override]
        """As many as the engine takes."""
        return self.engine.ahead

    @property
    def memories_stay(self) -> bool:  # type: ignore[override]
        """As the engine has it."""
        return self.engine.memories_stay

    @property
    def trains(self) -> bool:
        """Only what the engine leaves to this process."""
        return self._here

    def submit(self, visit: Visit, message: Message | None, round: int, **what: Any) -> None:
        """Let a visit run before its turn. A device that dies before it has the message does nothing."""
        if message is None:
            return
        what |= {
            "visit": visit,
            "message": message,
            "round": round,
            "flops": what.pop("samples") * self._expected(visit),
        }
        first = all(client != visit.client for client, _ in (*self._orders, *self._held))
        self._held[visit.client, visit.stage] = what
        if first:
            self._send(visit)

    def _expected(self, visit: Visit) -> float:
        """FLOPs of a sample, if they have been counted for such settings, else their mean over what has been."""
        counted = self.cost.known(visit.settings)
        return counted[0] if counted else self.cost.mean()

    def _send(self, visit: Visit) -> None:
        if not self._begun:
            self._begun = True
            self._attend(False)
            self.engine.begin(self.job(self.initial))
        what, client = self._held.pop((visit.client, visit.stage)), visit.client
        self.note_groups()
        self.touched.add(client)
        order = Order(
            number=self._number,
            profile=self.make_device(client, {}).profile,
            groups=self.groups,
            memory=self._stored.get(client),
            delivered=self._unheard.pop(client, []),
            **what,
        )
        self._number += 1
        self._orders[client, visit.stage] = order
        self.engine.submit(order)

    def open(self, visit: Visit, message: Message | None, round: int) -> None:
        """It is the visit's turn."""
        self.touched.add(visit.client)
        self._stored.setdefault(visit.client, None)
        if (visit.client, visit.stage) in self._held:
            self._send(visit)
        order = self._orders.get((visit.client, visit.stage))
        self._here = order is not None and self.engine.here(order)
        if self._here:
            assert order is not None
            self._attend(True)
            self._stored[visit.client], self._unheard[visit.client] = order.memory, order.delivered
            super().open(visit, message, round)

    def _memory_for(self, client: int) -> dict[str, Any]:
        return self.memory(client)

    def close(self, visit: Visit, *, died: bool, enrolling: bool, timed: bool) -> Message | None:
        """Wait for what the visit has come to."""
        order = self._orders.pop((visit.client, visit.stage), None)
        if self._here:
            assert self.device is not None
            self._here, memory = False, self.device.memory
            message = super().close(visit, died=died, enrolling=enrolling, timed=timed)
            self._store(visit.client, memory)
            self._attend(False)
            return message
        self.loss_sum, self.sample_flops = 0.0, (0.0, 0.0)
        if order is None:  # it died before it had the message
            return None
        answer = self.engine.answer(order)
        if answer.failure:
            self._failed(order, answer.failure)
        else:
            self._stored[visit.client] = answer.memory
            self._failures, self.loss_sum = 0, answer.loss_sum
            if timed:
                self.cost.note(visit.settings, answer.sample_flops)
                self.sample_flops = self.cost.known(visit.settings) or answer.sample_flops
        return None if answer.message is None else answer.message.to(self.module.device)

    def _failed(self, order: Order, failure: str) -> None:
        """A visit that could not be run is a failed client; several in a row are no accident."""
        client = order.visit.client
        self._stored[client], self._unheard[client] = order.memory, order.delivered
        self._failures += 1
        if self._failures == self.engine.failures:
            raise RuntimeError(
                f"{self._failures} visits in a row could not be run, the last of client {client}: {failure}\n"
                "If workers run out of memory, use fewer or a smaller batch_size. The last checkpoint is whole."
            )
        rank_zero_warn(f"Client {client} counts as failed: its visit could not be run: {failure}")

    def acknowledge(self, visit: Visit) -> None:
        """The device hears of it before anybody looks at its memory."""
        if self.listeners:
            self.touched.add(visit.client)
            self._unheard.setdefault(visit.client, []).append((visit, self.make_device(visit.client, {}).round))

    def memory(self, client: int) -> dict[str, Any]:
        """What one device remembers, fetched; a note of it, if it stays with the device."""
        stored = self._stored.get(client)
        held = {} if stored is None else load_memory(self._kept.get(client) or self.engine.get(stored))
        if self.engine.memories_stay:  # the device hears with its next order, perhaps after a resumption
            told = [(visit.to_plain(), round) for visit, round in self._unheard.get(client, [])]
            return {**held, UNHEARD: told} if told else held
        memory: dict[str, Any] = move_data_to_device(held, self.module.device)
        if unheard := self._unheard.pop(client, []):
            self.hear(self.make_device(client, memory), unheard)
            self._store(client, memory)
        return memory

    def _store(self, client: int, memory: dict[str, Any]) -> None:
        self._stored[client] = self.engine.put(dump_memory(memory)) if memory else None
        self._kept.pop(client, None)

    @property
    def memories(self) -> dict[int, dict[str, Any]]:
        """What all devices remember, fetched."""
        return {client: self.memory(client) for client in self._stored}

    @memories.setter
    def memories(self, memories: dict[int, dict[str, Any]]) -> None:
        self._unheard = {}
        self._stored = {}
        for client, memory in memories.items():
            if UNHEARD in memory:
                self._unheard[client] = [(Visit.from_plain(visit), round) for visit, round in memory[UNHEARD]]
            self._store(client, {name: value for name, value in memory.items() if name != UNHEARD})

    def state_dict(self) -> dict[str, Any]:
        """As in the process of the Trainer; the memories are fetched."""
        if self._orders:
            if self.trainer.interrupted:
                self.engine.end()  # after OnExceptionCheckpoint's error, which this is, Lightning tears nothing down
            raise RuntimeError(
                "A checkpoint in mid-round would have to hold visits that other processes run: save at the end of a "
                "round (ModelCheckpoint without every_n_train_steps and train_time_interval; max_epochs instead of "
                "max_steps and max_time, which end in mid-round), or use engine=Serial()."
            )
        return super().state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`, and of that of any other engine."""
        super().load_state_dict(state)
        if state["local"] is not None:
            raise ValueError(
                "The checkpoint was written in mid-round, with a visit open: resume it with engine=Serial(), at least "
                "to the end of that round."
            )

    def end(self) -> None:
        """Stop the workers; what devices remember is kept here, for a checkpoint after the fit."""
        self._attend(True)
        trainer: Any = self.trainer
        if trainer.interrupted:
            if not self._begun:
                self.engine.give_up()
        else:
            if self.engine.collective and not self._begun:
                self.engine.begin(self.job(self.initial))
            for client in list(self._unheard):
                self.memory(client)  # where it hears of its deliveries
            self._kept = {c: self.engine.get(stored) for c, stored in self._stored.items() if stored is not None}
        self.engine.end()

    def _attend(self, here: bool) -> None:
        """Let the device half's callbacks see a visit's steps where these are trained, and no idle ones.

        It may be one of the Trainer's callbacks that has come to this, so their list is replaced, not changed.
        """
        trainer: Any = self.trainer
        others = [c for c in trainer.callbacks if not any(c is mine for mine in self.callbacks)]
        trainer.callbacks = [*self.callbacks, *others] if here else others
