"""Visits on real devices, each a node of Flower."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from flwr.app import Message
from flwr.serverapp.grid import Grid
from torch.utils.data import DataLoader

from edgebolt.common.communication import MessageError
from edgebolt.common.engines.engine import AWAY, Answer, Engine, Order
from edgebolt.common.engines.job import Job
from edgebolt.common.engines.memory import dump_memory, load_memory
from edgebolt.common.engines.travel import same_tensors
from edgebolt.common.federated import Algorithm
from edgebolt.flower.beginning import digest
from edgebolt.flower.nodes import Nodes, reason_of
from edgebolt.flower.records import RecordError, model_bytes, order_records, read_answer
from edgebolt.flower.stand_in import stand_in

__all__ = ["FlowerEngine"]


@dataclass
class _Asked:
    """An order on its way, or why it is not."""

    message: str = ""
    until: float = 0.0
    failure: str = ""


class FlowerEngine(Engine):
    """Trains visits on the devices that are connected to Flower's SuperLink; runs inside its ``ServerApp``.

    Each client is a node and keeps its data and its memory. All visits of an instant are under way at once; Flower
    carries an order to a node when that node asks for one. A visit is a failed one, as if its device had died, when
    its client has no node at present, when no answer comes in time, or when the answer is an error or cannot be read.

    Args:
        grid: Flower's, as the ``ServerApp`` is given it.
        timeout: seconds from the sending of an order to its answer, training included.
        failures: visits in a row that fail and so end the run; ``None``: as many as there are clients, at least 5.
        poll: seconds between two looks for answers.

    Raises:
        ValueError: for arguments that make no sense.

    Example::

        >>> import lightning as L
        >>> from edgebolt.common.federated import FedAvg, FederatedStrategy
        >>> def fit(engine, context):
        ...     loader = held_out()  # samples of the server's own
        ...     strategy = FederatedStrategy(FedAvg(), clients=engine.clients(loader, min_clients=3), engine=engine)
        ...     L.Trainer(max_epochs=3, strategy=strategy).fit(Net(), loader)
    """

    memories_stay = True

    def __init__(self, grid: Grid, timeout: float = 600.0, failures: int | None = None, poll: float = 0.2) -> None:
        if not timeout > 0 or not poll > 0:
            raise ValueError(f"timeout={timeout!r}, poll={poll!r}: use seconds above 0.")
        if failures is not None and (type(failures) is not int or failures < 1):
            raise ValueError(f"failures={failures!r}: use a whole number of 1 or more, or None.")
        self.grid, self.timeout, self.poll = grid, timeout, poll
        self._failures = failures
        self.ahead = 2**31
        self.nodes = Nodes(grid)
        self._clients: list[DataLoader[Any]] | None = None
        self._job: Job | None = None
        self._run: dict[str, Any] = {}
        self._waiting: list[Order] = []  # submitted and not yet pushed
        self._asked: dict[int, _Asked] = {}  # number of an order -> it
        self._replies: dict[str, Any] = {}

    def __repr__(self) -> str:
        return f"FlowerEngine(timeout={self.timeout:g}) with {len(self.nodes.facts)} clients"

    @property
    def failures(self) -> int:  # type: ignore[override]
        """Visits in a row that fail and so end the run."""
        return self._failures or max(5, len(self.nodes.facts))

    def clients(self, loader: DataLoader[Any], min_clients: int = 2, wait: float = 300.0) -> list[DataLoader[Any]]:
        """Wait for the clients and give what stands for their data on the server: ``FederatedStrategy(clients=...)``.

        The population is who is there then. A client that goes away fails until it comes back.

        Args:
            loader: the one that ``Trainer.fit`` is given too: samples of the server's own, in the clients' shape.
            min_clients: of so many, numbered from 0 without a gap.
            wait: seconds.

        Raises:
            TimeoutError: if they are not there by then; it says who is missing and what was refused, and why.
            TypeError, ValueError: for arguments that make no sense.
        """
        if not isinstance(loader, DataLoader) or not hasattr(loader.dataset, "__getitem__"):
            raise TypeError(f"loader={loader!r}: pass a DataLoader of a dataset with an index, as fit is given it.")
        if type(min_clients) is not int or min_clients < 1:
            raise ValueError(f"min_clients={min_clients!r}: use a whole number of 1 or more.")
        self._clients = [stand_in(facts, loader) for facts in self.nodes.wait(min_clients, wait, self.poll)]
        return self._clients

    def begin(self, job: Job) -> None:
        """Compare the clients with the server; the devices make the rest themselves.

        Raises:
            ValueError: for clients that are not those of :meth:`clients`, or begin with other weights, for an
                algorithm that evaluates what stays on the devices, and for a precision that converts the weights.
        """
        if job.clients is not self._clients:
            raise ValueError(
                "FlowerEngine trains the clients that it has found: use FederatedStrategy(..., "
                "clients=engine.clients(loader), engine=engine)."
            )
        if type(job.algorithm).evaluation is not Algorithm.evaluation:
            raise ValueError(
                f"{type(job.algorithm).__name__}.evaluation() may need what clients remember and their own validation "
                "samples, which stay on the devices: leave it as it is in Algorithm, which validates the global "
                "model, and let devices report what they measure (ClientCallback.on_client_end)."
            )
        precision = job.trainer["precision"]
        if precision.endswith("-true") and precision != "32-true":
            raise ValueError(
                f"precision={precision!r} changes the module's weights before the run, and clients begin with theirs "
                "as they were: use '32-true' or a mixed precision."
            )
        here = digest(job.module, job.initial)
        other = [facts.client for facts in self.nodes.facts.values() if facts.beginning != here]
        if other:
            raise ValueError(
                f"Clients {sorted(other)} begin with other weights than the server: the module must come out the same "
                "everywhere. Seed what makes it, or let it load a file."
            )
        self._job = job
        self._run = {
            "seed": job.seed,
            "trainer": job.trainer,
            "horizon": job.horizon,
            "matmul_precision": job.matmul_precision,
            "flops_per_sample": job.cost.flops_per_sample,
        }

    def submit(self, order: Order) -> None:
        """Note an order; those of an instant are pushed together, once the first has its turn."""
        self._waiting.append(order)

    def _push(self) -> None:
        """Push what waits for the clients' nodes; a model that several are sent alike is spelled once."""
        assert self._job is not None
        orders, self._waiting = self._waiting, []
        run = {**self._run, "counted": self._job.cost.state_dict()}
        self.nodes.look()
        models: dict[tuple[object, ...], bytes] = {}
        messages: dict[int, Message] = {}
        for order in orders:
            node = self.nodes.of(order.visit.client)
            if node is None:
                self._asked[order.number] = _Asked(failure="it is not connected")
                continue
            same = same_tensors(order.message)
            if same not in models:
                models[same] = model_bytes(order.message)
            records = order_records(order, run, models[same])
            messages[order.number] = Message(records, node, "train", ttl=self.timeout, group_id=str(order.round))
        pushed = list(self.grid.push_messages(list(messages.values()))) if messages else []
        until = time.monotonic() + self.timeout
        for number, name in zip(messages, [*pushed, *[""] * len(messages)], strict=False):
            self._asked[number] = (
                _Asked(name, until) if name else _Asked(failure="Flower has not taken its order; see the SuperLink")
            )

    def answer(self, order: Order) -> Answer:
        """Wait for a visit, at most until its time is over."""
        if self._waiting:
            self._push()
        asked = self._asked[order.number]
        while not asked.failure and asked.message not in self._replies:
            self._pull()
            if asked.message in self._replies:
                break
            if time.monotonic() > asked.until:
                asked.failure = f"it has not answered within {self.timeout:g} s"
            else:
                time.sleep(self.poll)
                self.nodes.look()  # who comes back is asked who it is in the meantime
        del self._asked[order.number]
        if asked.failure:
            return Answer(None, failure=asked.failure)
        return self._read(self._replies.pop(asked.message), order)

    def _pull(self) -> None:
        """Take all answers that are there: Flower forgets them when the order's time is over."""
        open_ = [a.message for a in self._asked.values() if not a.failure and a.message not in self._replies]
        for reply in self.grid.pull_messages(open_):
            self._replies[reply.metadata.reply_to_message_id] = reply

    def _read(self, reply: Any, order: Order) -> Answer:
        assert self._job is not None
        if reply.has_error():
            return Answer(None, failure=reason_of(reply))
        try:
            answer = read_answer(reply.content, order)
            if answer.message is not None:
                self._job.algorithm.up.with_settings(order.visit.settings).decode(answer.message)
        except (RecordError, MessageError) as error:
            return Answer(None, failure=str(error))
        return answer

    def put(self, memory: bytes) -> str:
        """The name in a checkpoint's note.

        Raises:
            ValueError: for a memory that is there itself.
        """
        note = load_memory(memory)
        if set(note) != {AWAY}:
            raise ValueError(
                "The checkpoint holds what devices remember, and real devices keep that themselves: resume it with "
                "the engine that has written it, or begin a run on devices with its weights alone."
            )
        name: str = note[AWAY]
        return name

    def get(self, stored: str) -> bytes:
        """A note for a checkpoint: the name of what stays on the device."""
        return dump_memory({AWAY: stored})

    def end(self) -> None:
        """Forget what is under way. Nodes stay connected, and drop orders whose time is over."""
        self._waiting, self._asked, self._replies = [], {}, {}
