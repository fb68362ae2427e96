"""An event queue on simulated time: visits are dispatched, finish, close their stage, and are aggregated."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from typing import Any, cast

import torch

from edgebolt.common.communication import Message
from edgebolt.common.devices import Cut, Fleet
from edgebolt.common.federated.algorithm import Algorithm
from edgebolt.common.federated.device_half import DeviceHalf
from edgebolt.common.federated.flight import Flight
from edgebolt.common.federated.server import Server
from edgebolt.common.federated.visit import Closed, Outcome, Update, Visit

__all__ = ["FederatedLoop"]


class FederatedLoop:
    """Runs rounds, one visit at a time, and keeps the books.

    All visits of each idle lane's lowest stage are dispatched and run from the models of that instant; their
    updates wait with their finish times. When nothing can be dispatched, the stage that closes earliest is
    delivered: the clock advances, the algorithm aggregates, that lane's next stage may start. Plain federated
    learning is one lane; groups with their own frequencies are a lane each; asynchronous slots are a lane each.

    Args:
        algorithm: the server half.
        server: its state.
        fleet: what devices can do in each round, and when they die.
        devices: runs the device half, here or elsewhere.
        samples_in: visit, number of its steps -> samples in these steps.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        server: Server,
        fleet: Fleet,
        devices: DeviceHalf,
        samples_in: Callable[[Visit, int], int],
    ) -> None:
        self.algorithm, self.server, self.fleet, self.devices = algorithm, server, fleet, devices
        self.samples_in = samples_in
        self.enrolled = self.running = False
        self.visits: list[Visit] = []
        self.cuts: list[Cut | None] = []  # of each visit; nobody sees it before it has happened
        self.waiting: dict[str, dict[int, list[int]]] = {}  # lane -> stage, ascending -> indices of visits
        self.flights: dict[str, Flight] = {}
        self.planned_steps = self.steps = 0  # of the round, before and after the Trainer's limit; cuts included
        self.current: int | None = None
        self.done = 0
        self.torn = False  # an event between two steps has begun and not ended
        self.sent_bytes = 0
        self.free_at: dict[int, float] = {}  # client -> when it ends a visit that its stage did not wait for
        self.outcomes: list[Outcome] = []
        self.losses: list[float] = []
        self.sent: dict[int, Message] = {}  # visits that run before their turn: index -> what they were sent
        self.bytes_before = (0, 0)
        self.energy_before = 0.0
        self.history: list[dict[str, float]] = []

    # ---------------------------------------------------------------------------------------------- the round

    @property
    def visit(self) -> Visit | None:
        """The visit that is being trained."""
        return None if self.current is None else self.visits[self.current]

    @property
    def needed(self) -> int:
        """Steps that the visit trains until it ends or its device dies."""
        assert self.current is not None
        return self._needed(self.current)

    def _needed(self, index: int) -> int:
        cut = self.cuts[index]
        return self.visits[index].steps if cut is None else min(cut.steps, self.visits[index].steps)

    @property
    def opened(self) -> int:
        """Visits of the round that have been opened so far."""
        return len(self.visits) - sum(len(queue) for stages in self.waiting.values() for queue in stages.values())

    def begin_round(self, limit: Callable[[int], int]) -> None:
        """Plan a round, unless one is running. ``limit``: planned steps -> steps that will be run."""
        if self.running:
            return
        if not self.enrolled:
            self.torn = True
            self._enrol()
            self.torn = False
        self.visits = self._checked(self.algorithm.plan(self.server))
        self.cuts = [self.fleet.cut(v.client, v.steps, self.server.round, v.stage) for v in self.visits]
        self.planned_steps = sum(map(self._needed, range(len(self.visits))))
        self._clip(limit(self.planned_steps))
        self.devices.begin_round()
        self.steps = sum(map(self._needed, range(len(self.visits))))
        self.waiting = _queued(self.visits)
        self.outcomes, self.losses, self.running = [], [], True

    def advance(self) -> None:
        """Run events until a visit needs a batch or the round is over."""
        if self.current is not None and self.done < self.needed:
            return
        self.torn = True
        self._run_events()
        self.torn = False

    def _run_events(self) -> None:
        while self.running:
            visit = self.visit
            if visit is not None:
                if self.done < self.needed:
                    return
                self._close(visit)
            elif (index := self._next()) is not None:
                if self._needed(index):
                    return
                self.open(index)
            elif self.flights and (self.waiting or not self.algorithm.carries_over):
                self._deliver()
            else:
                self._finish()

    def open_next(self) -> Visit:
        """Open the visit that needs a batch next (or go on with the open one) and return it."""
        self.advance()
        if self.current is None:
            index = self._next()
            assert index is not None
            self.torn = True
            self.open(index)
            self.torn = False
        elif self.devices.parked is not None:
            self.devices.unpark(self.visits[self.current], self.server.round)
        return self.visits[self.current]  # type: ignore[index]  # open() has set it

    def step_done(self, loss: torch.Tensor | None) -> None:
        """Book one trained step."""
        self.done += 1
        self.devices.book(loss)

    def _next(self) -> int | None:
        """The waiting visit whose turn it is, if there is one before a stage closes."""
        return next(self._ready(), None)

    def _ready(self) -> Iterator[int]:
        """Waiting visits, in turn, that start from the models of this instant.

        These are those of a lane's lowest stage, if the lane is idle or runs that very stage.
        """
        for lane, stages in self.waiting.items():
            stage = next(iter(stages))
            flight = self.flights.get(lane)
            if flight is None or (flight.stage, flight.round) == (stage, self.server.round):
                yield from stages[stage]

    def _run_ahead(self) -> None:
        """Have visits run before their turn, where the device half can. What they come to waits for its turn."""
        for index in self._ready() if self.devices.ahead else ():
            if index not in self.sent:
                if len(self.sent) >= self.devices.ahead:
                    return
                self.sent[index] = message = self._download(index)
                visit, cut, steps = self.visits[index], self.cuts[index], self._needed(index)
                self.devices.submit(
                    visit,
                    None if cut is not None and cut.down < 1 else message,
                    self.server.round,
                    steps=steps,
                    samples=self.samples_in(visit, steps),
                    **self._ending(index),
                )

    def _timed(self, index: int, steps: int) -> int:
        """Steps of a visit, trained or probed, that cost time."""
        cut = self.cuts[index]
        return steps + (self.visits[index].probe if cut is None or cut.down == 1 else 0)

    def _ending(self, index: int) -> dict[str, bool]:
        """How a visit ends, as :meth:`DeviceHalf.close` wants to know it."""
        cut = self.cuts[index]
        return {
            "died": cut is not None and cut.up is None,
            "enrolling": not self.enrolled,
            "timed": self._timed(index, self._needed(index)) > 0,
        }

    def open(self, index: int) -> None:
        """Send the order and the model; the device installs them."""
        visit, server = self.visits[index], self.server
        self._run_ahead()
        message = self.sent.pop(index) if index in self.sent else self._download(index)
        stages = self.waiting[visit.lane]
        stages[visit.stage].remove(index)
        if not stages[visit.stage]:
            del stages[visit.stage]
        if not stages:
            del self.waiting[visit.lane]
        flight = self.flights.setdefault(visit.lane, Flight(visit.stage, server.round, server.now))
        cut = self.cuts[index]
        broken = cut is not None and cut.down < 1
        self.sent_bytes = int(cut.down * message.nbytes) if cut is not None else message.nbytes
        server.ledger.add(
            round=server.round,
            client=visit.client,
            direction="down",
            nbytes=self.sent_bytes,
            time=flight.opened,
            kind=self._kind,
            delivered=not broken,
        )
        self.current, self.done = index, 0
        self.devices.open(visit, None if broken else message, server.round)

    def _download(self, index: int) -> Message:
        """What a visit is sent."""
        visit, server = self.visits[index], self.server
        if visit.start is None:
            return Message({}, {"visit": visit.order()})
        if visit.start not in server.models:
            raise KeyError(f"{visit} starts from {visit.start!r}; the server has {sorted(server.models)}.")
        return self.algorithm.download(server, visit).with_header(visit=visit.order())

    @property
    def _kind(self) -> str:
        return "model" if self.enrolled else "enrolment"

    def _close(self, visit: Visit) -> None:
        server, flight = self.server, self.flights[visit.lane]
        assert self.current is not None
        cut = self.cuts[self.current]
        profile = self.fleet.profile(visit.client, server.round)
        message = self.devices.close(visit, **self._ending(self.current))
        timed = self._timed(self.current, self.done)
        samples = self.samples_in(visit, timed) if timed else 0
        flops, forward_flops = (samples * each for each in self.devices.sample_flops)
        down, compute = profile.download_seconds(self.sent_bytes), profile.compute_seconds(flops)
        up_bytes, up, reason = 0, 0.0, "failed"
        if message is not None:
            up_bytes = message.nbytes if cut is None else int(cast(float, cut.up) * message.nbytes)
            up = profile.upload_seconds(up_bytes)
            if cut is None:
                reason = "" if message.is_finite() else "non-finite"
        begun = flight.opened
        if visit.start is None:  # it goes on with what it has, and may still be busy with that
            begun = max(begun, self.free_at.get(visit.client, begun))
        finished = begun + down + compute + up
        if message is not None:
            server.ledger.add(
                round=server.round,
                client=visit.client,
                direction="up",
                nbytes=up_bytes,
                time=finished,
                kind=self._kind,
                delivered=not reason,
            )
        outcome = Outcome(
            visit=replace(visit, cut=cut),
            steps=self.done,
            samples=samples,
            delivered=not reason,
            reason=reason,
            started=flight.opened,
            finished=finished,
            down_seconds=down,
            compute_seconds=compute,
            up_seconds=up,
            down_bytes=self.sent_bytes,
            up_bytes=up_bytes,
            energy=profile.energy_joules(compute, down + up),
            forward_seconds=profile.compute_seconds(forward_flops),
            report={} if message is None or reason == "failed" else cast(dict[str, Any], message.header["report"]),
        )
        flight.arrivals.append((outcome, message if outcome.delivered else None))
        if self.done and outcome.delivered:
            self.losses.append(float(self.devices.loss_sum) / self.done)
        self.current = None

    def _deliver(self) -> None:
        """Close the stage that closes earliest: advance the clock, book what arrived, aggregate."""
        server = self.server
        closing = {lane: self._closing_time(flight) for lane, flight in self.flights.items()}
        lane = min(closing, key=lambda lane: (closing[lane], lane))
        flight = self.flights.pop(lane)
        server.clock.advance_to(max(server.now, closing[lane]))
        arrivals = [(_closed(outcome, closing[lane]), message) for outcome, message in flight.arrivals]
        arrivals.sort(key=lambda arrival: arrival[0].visit.client)
        updates = [
            Update(outcome, message) for outcome, message in arrivals if outcome.delivered and message is not None
        ]
        outcomes = [outcome for outcome, _ in arrivals]
        for outcome in outcomes:
            self.free_at.pop(outcome.visit.client, None)
            if outcome.finished > closing[lane]:
                self.free_at[outcome.visit.client] = outcome.finished
        self._book(outcomes)
        for update in updates if self.enrolled else []:
            self.devices.acknowledge(update.outcome.visit)
        self.algorithm.aggregate(server, Closed(lane, flight.stage, updates, outcomes))
        server.forget_shared()
        self.outcomes += outcomes

    def _closing_time(self, flight: Flight) -> float:
        """Enrolment waits for all: who is not enrolled would be unknown for good."""
        if not self.enrolled:
            return max(outcome.finished for outcome in flight.outcomes)
        return self.algorithm.closing_time(self.server, flight.outcomes)

    def _book(self, outcomes: list[Outcome]) -> None:
        """What the server learns of its devices when a stage has closed."""
        server = self.server
        for outcome in outcomes:
            server.clock.spend(outcome.energy)
        delivered = [outcome for outcome in outcomes if outcome.delivered]
        timed = [outcome for outcome in delivered if outcome.timed_steps]
        if self.enrolled:
            server.reports["visits"][[outcome.visit.client for outcome in outcomes]] += 1
            server.reports["last_round"][[outcome.visit.client for outcome in delivered]] = server.round
        measured = {
            "step_seconds": [(o.visit.client, o.compute_seconds / o.timed_steps) for o in timed],
            "forward_seconds": [(o.visit.client, o.forward_seconds / o.timed_steps) for o in timed],
            "sample_seconds": [(o.visit.client, o.compute_seconds / o.samples) for o in timed],
            "down_bps": [(o.visit.client, 8 * o.down_bytes / o.down_seconds) for o in delivered],
            "up_bps": [(o.visit.client, 8 * o.up_bytes / o.up_seconds) for o in delivered],
        }
        for name, pairs in measured.items():
            if pairs:
                clients, values = zip(*pairs, strict=True)
                server.reports[name][list(clients)] = torch.tensor(values, dtype=torch.float64)
        for outcome in delivered:
            server.record(outcome.visit.client, outcome.report)

    def _finish(self) -> None:
        self.algorithm.finish(self.server, self.outcomes)
        self.server.forget_shared()
        self.devices.put(self.server.models["global"])
        self.devices.seed_round(self.server.round)
        self.history.append(self._summary())
        self.server.round += 1
        self.running = False

    def _summary(self) -> dict[str, float]:
        """What is logged of a round: exact floats and ints."""
        server, ledger, outcomes = self.server, self.server.ledger, self.outcomes
        losses = torch.tensor(self.losses, dtype=torch.float64).sort().values  # sorted: any order, same sum
        summary: dict[str, float] = {
            "round": server.round,
            "round/sim_time": server.now,
            "round/bytes_up": ledger.up_bytes - self.bytes_before[0],
            "round/bytes_down": ledger.down_bytes - self.bytes_before[1],
            "round/energy": server.clock.energy_joules - self.energy_before,
            "round/visits": len(outcomes),
            "round/delivered": sum(outcome.delivered for outcome in outcomes),
            "round/failed": sum(outcome.reason == "failed" for outcome in outcomes),
            "round/late": sum(outcome.reason == "late" for outcome in outcomes),
            "round/rejected": sum(outcome.reason == "non-finite" for outcome in outcomes),
            "round/waiting_time": sum(sorted(o.waited for o in outcomes)) / max(1, len(outcomes)),
            **self.algorithm.figures(server, outcomes),
        }
        if len(losses):
            summary["client/train_loss"] = float(losses.mean())
            summary["client/train_loss_std"] = float(losses.std(correction=0))
        self.bytes_before = (ledger.up_bytes, ledger.down_bytes)
        self.energy_before = server.clock.energy_joules
        return summary

    def _enrol(self) -> None:
        """Visits before the first round: they train nothing, so they need no batch."""
        visits = self._checked(self.algorithm.enrol(self.server))
        for visit in visits:
            if visit.steps:
                raise ValueError(f"enrol() planned {visit}: enrolment trains nothing; time a step with probe=1.")
        self.visits, self.waiting, self.cuts = visits, _queued(visits), [None] * len(visits)
        while (index := self._next()) is not None or self.flights:
            if index is None:
                self._deliver()
                continue
            self.open(index)
            self._close(visits[index])
        self.enrolled = True
        if visits:
            self.algorithm.observe(self.server, self.outcomes)

    def _checked(self, visits: list[Visit]) -> list[Visit]:
        seen: set[tuple[int, int]] = set()
        for visit in visits:
            if (visit.client, visit.stage) in seen:
                raise ValueError(
                    f"{visit}: client {visit.client} is visited twice in stage {visit.stage}; use stages."
                )
            seen.add((visit.client, visit.stage))
            if visit.client >= self.server.population:
                raise ValueError(f"{visit}: the population has {self.server.population} clients, 0 to one less.")
        return visits

    def _clip(self, limit: int) -> None:
        """Clip the plan to a number of steps, or a limited Trainer would never reach the round's aggregation."""
        kept: list[tuple[Visit, Cut | None]] = []
        for index, visit in enumerate(self.visits):
            needed = self._needed(index)
            if needed <= limit:
                kept.append((visit, self.cuts[index]))
            elif limit:
                kept.append((replace(visit, steps=limit), None))
            limit -= min(needed, limit)
        self.visits, self.cuts = [visit for visit, _ in kept], [cut for _, cut in kept]

    # ---------------------------------------------------------------------------------------- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Everything, in tensors and built-ins."""
        return {
            "server": self.server.state_dict(),
            "devices": self.devices.state_dict(),
            "torn": self.torn,
            "enrolled": self.enrolled,
            "running": self.running,
            "visits": [visit.to_plain() for visit in self.visits],
            "cuts": [None if cut is None else asdict(cut) for cut in self.cuts],
            "waiting": {lane: {s: list(v) for s, v in stages.items()} for lane, stages in self.waiting.items()},
            "flights": {lane: flight.to_plain() for lane, flight in self.flights.items()},
            "planned_steps": self.planned_steps,
            "steps": self.steps,
            "current": self.current,
            "done": self.done,
            "sent_bytes": self.sent_bytes,
            "free_at": dict(self.free_at),
            "outcomes": [outcome.to_plain() for outcome in self.outcomes],
            "losses": list(self.losses),
            "loss_sum": torch.as_tensor(self.devices.loss_sum),
            "bytes_before": self.bytes_before,
            "energy_before": self.energy_before,
            "history": [dict(row) for row in self.history],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`.

        Raises:
            ValueError: if the state was taken while an error passed through a device's or the server's own code.
        """
        if state["torn"]:
            raise ValueError(
                "The checkpoint was written when an error or Ctrl-C broke off the sending, receiving or merging of a "
                "model, so that half of it was done: resume from the last checkpoint before it, or begin anew if it "
                "broke off the enrolment."
            )
        self.server.load_state_dict(state["server"])
        self.devices.load_state_dict(state["devices"])
        self.enrolled, self.running = state["enrolled"], state["running"]
        self.visits = [Visit.from_plain(visit) for visit in state["visits"]]
        self.cuts = [None if cut is None else Cut(**cut) for cut in state["cuts"]]
        self.waiting = state["waiting"]
        self.flights = {lane: Flight.from_plain(flight) for lane, flight in state["flights"].items()}
        self.planned_steps, self.steps = state["planned_steps"], state["steps"]
        self.current, self.done, self.sent_bytes = state["current"], state["done"], state["sent_bytes"]
        self.free_at = dict(state["free_at"])
        self.outcomes = [Outcome.from_plain(outcome) for outcome in state["outcomes"]]
        self.losses, self.devices.loss_sum = list(state["losses"]), state["loss_sum"]
        self.bytes_before, self.energy_before = tuple(state["bytes_before"]), state["energy_before"]
        self.history = list(state["history"])


def _closed(outcome: Outcome, closing: float) -> Outcome:
    """The outcome of a visit whose stage closes at a simulated instant."""
    if outcome.delivered and outcome.finished > closing:
        outcome = replace(outcome, delivered=False, reason="late")
    return replace(outcome, waited=max(0.0, closing - outcome.finished))


def _queued(visits: list[Visit]) -> dict[str, dict[int, list[int]]]:
    queue: dict[str, dict[int, list[int]]] = {}
    for index in sorted(range(len(visits)), key=lambda index: visits[index].stage):
        visit = visits[index]
        queue.setdefault(visit.lane, {}).setdefault(visit.stage, []).append(index)
    return queue
