"""Visits on the ranks of ``torchrun``: the same script in several processes, on one machine or more."""

from __future__ import annotations

import io
import os
import sys
import traceback
from contextlib import nullcontext, suppress
from dataclasses import asdict, replace
from datetime import timedelta
from itertools import count
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import distributed
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from edgebolt.common.communication import Message
from edgebolt.common.devices import DeviceProfile
from edgebolt.common.engines.engine import Answer, Engine, Order
from edgebolt.common.engines.job import Job, already_set_up
from edgebolt.common.engines.travel import same_tensors

if TYPE_CHECKING:
    from edgebolt.common.federated.strategy import FederatedStrategy

__all__ = ["Ranks"]

_GRACE = timedelta(seconds=10)

Sent: TypeAlias = list[tuple[Any, torch.Tensor]]

_fits = count()  # of this process: each has a group, and all ranks count alike


class Ranks(Engine):
    """Trains visits on all ranks of ``torchrun --nproc-per-node=4 script.py``, each a process that runs the script.

    Rank 0 is the server: it alone logs, saves, validates and shows a bar, and it trains too. The others serve it in
    their call of ``Trainer.fit``, which returns when the run is over, with the final model in the module and the last
    metrics in ``trainer.callback_metrics``. Each rank makes its data itself, as the script does.

    The visits of an instant are spread by what they are expected to cost. Lightning is told of one process; the ranks
    talk in a process group of their own, over gloo: what they exchange are encoded messages, which lie on the host.
    On a machine with GPUs, ranks take them in turn. What a rank raises, all raise.

    Args:
        timeout: after which a rank that hears nothing gives up.

    Raises:
        RuntimeError: if the script was not started by ``torchrun``.
    """

    def __init__(self, timeout: timedelta = timedelta(hours=12)) -> None:
        missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if missing:
            raise RuntimeError(
                f"Ranks() needs several processes, and {missing[0]} is not set: start the script with "
                "`torchrun --nproc-per-node=2 script.py`, or use engine='serial'."
            )
        self.rank, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.timeout = timeout
        self.ahead, self.collective = 2**31, True
        self._group: Any = None
        self._module: Any = None
        self._waiting: list[Order] = []  # submitted, and not yet given to a rank
        self._owner: dict[int, int] = {}
        self._given: dict[int, Sent] = {}  # orders of other ranks, until they are answered
        self._early: dict[int, dict[str, Any]] = {}  # answers that came before their turn
        self._sending: Sent = []  # on rank 0 the weights, elsewhere answers

    def __repr__(self) -> str:
        return f"Ranks() with {self.size} processes"

    @property
    def serves(self) -> bool:
        """Whether this process trains what rank 0 asks for."""
        return self.rank > 0

    def device(self, chosen: torch.device) -> torch.device:
        """The ranks of a machine take its GPUs in turn."""
        if chosen.type != "cuda":
            return chosen
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())

    # ------------------------------------------------------------------------------------------------- rank 0

    def begin(self, job: Job) -> None:
        """Give all ranks the weights of this one."""
        self._connect()
        self._module = job.module
        state = {
            "versions": job.versions,
            "samples": torch.as_tensor(job.samples),
            "batches": job.batches,
            "horizon": job.horizon,
            "round": job.round,
            "initial": job.initial,
            "tensors": dict(_tensors(job.module)),
        }
        self._sending = [work for rank in range(1, self.size) for work in self._send(rank, {"begin": state})]

    def submit(self, order: Order) -> None:
        """Note an order; those of an instant are given out together, once the first has its turn."""
        self._waiting.append(order)

    def here(self, order: Order) -> bool:
        """Whether rank 0 trains it itself."""
        if self._waiting:
            self._give_out()
        if self._owner[order.number]:
            return False
        del self._owner[order.number]
        return True

    def _give_out(self) -> None:
        orders, self._waiting = self._waiting, []
        self._owner.update(spread(orders, self.size))
        for rank in range(1, self.size):
            mine = [order for order in orders if self._owner[order.number] == rank]
            if mine:
                sent = self._send(rank, {"orders": _plain_orders(mine)})
                self._given.update((order.number, sent) for order in mine)

    def answer(self, order: Order) -> Answer:
        """Receive what a rank has made of a visit."""
        rank = self._owner.pop(order.number)
        while order.number not in self._early:
            try:
                received = self._receive(rank)
            except RuntimeError as error:
                raise RuntimeError(
                    f"Rank {rank} is gone; if it was killed, perhaps for want of memory, use fewer ranks or a smaller "
                    "batch_size. The last checkpoint is whole."
                ) from error
            if "error" in received:
                raise RuntimeError(f"Rank {rank} failed:\n{received['error']}")
            number = received.pop("number")
            self._early[number] = received
            _wait(self._given.pop(number))  # it has been answered, so it has arrived
        answer = self._early.pop(order.number)
        message, memory = answer.pop("message"), answer.pop("memory")
        return Answer(
            None if message is None else Message.from_bytes(message.numpy().data),
            memory=None if memory is None else memory.numpy().tobytes(),
            **answer,
        )

    def put(self, memory: bytes) -> bytes:
        """Memories lie with rank 0 and travel with their visits."""
        return memory

    def get(self, stored: bytes) -> bytes:
        """As it was put."""
        return stored

    def end(self) -> None:
        """Let the other ranks go: with the final model, or with the error that ends the run."""
        if self._group is None or self.serves:
            return
        trainer = self._module.trainer
        end: dict[str, Any] = {"tensors": dict(_tensors(self._module)), "metrics": trainer.callback_metrics}
        failed = trainer.interrupted
        if failed:
            end = {"error": "".join(traceback.format_exception(sys.exc_info()[1]))}
        try:
            with suppress(RuntimeError) if failed else nullcontext():  # a rank that is gone hides no error
                sent = [work for rank in range(1, self.size) for work in self._send(rank, {"end": end})]
                (_wait_a_little if failed else _wait)(sent)
        finally:
            self._disconnect()

    def give_up(self) -> None:
        """The ranks that wait for a beginning raise what ends the run; they may have met it themselves."""
        if self.serves:
            return
        error = "".join(traceback.format_exception(sys.exc_info()[1]))
        with suppress(RuntimeError):
            self._connect(_GRACE)
            for rank in range(1, self.size):
                _wait_a_little(self._send(rank, {"end": {"error": error}}))
        self._disconnect()

    # -------------------------------------------------------------------------------------------- other ranks

    def serve(self, strategy: FederatedStrategy, loader: Any) -> None:
        """Train what rank 0 asks for until it ends the run; its model and metrics are then here too."""
        from edgebolt.common.engines.worker import work

        module = strategy.lightning_module
        assert module is not None
        trainer: Any = module.trainer
        datamodule = trainer.datamodule
        job = Job.of(strategy, loader if datamodule is None else datamodule, {})
        self._connect()
        orders = _Orders(self)
        try:
            if not strategy.optimizers:
                raise ValueError(
                    "configure_optimizers() asks for trainer.estimated_stepping_batches, which on ranks only the "
                    "first knows: write the number of rounds there, or use engine='serial'."
                )
            received = self._receive(0)
            if "end" in received:
                orders.ended(received["end"])
            begun = received["begin"]
            if begun["versions"] != job.versions:
                raise RuntimeError(
                    f"Rank {self.rank} has {job.versions}, rank 0 {begun['versions']}: install the same versions."
                )
            known = {name: begun[name] for name in ("batches", "horizon", "round", "initial")}
            job = replace(job, samples=begun["samples"].numpy(), **known)
            _load_tensors(module, begun["tensors"])
            device = strategy.root_device
            chosen = ("gpu", [device.index]) if device.type == "cuda" else ("cpu", 1)
            with nullcontext() if datamodule is None else already_set_up(datamodule):
                work(job, orders, self._finish, *chosen)
        except BaseException as error:
            _wait_a_little(self._send(0, {"error": "".join(traceback.format_exception(error))}))
            raise
        finally:
            self._disconnect()
        _load_tensors(module, orders.end["tensors"])
        module.trainer = trainer
        trainer.callback_metrics.update(orders.end["metrics"])

    def _finish(self, order: Order, answer: Answer) -> None:
        self._sending += self._send(
            0,
            {
                "number": order.number,
                "message": None if answer.message is None else _bytes(answer.message.to_bytes()),
                "memory": None if answer.memory is None else _bytes(answer.memory),
                "loss_sum": answer.loss_sum,
                "sample_flops": answer.sample_flops,
            },
        )

    # ------------------------------------------------------------------------------------------------ the wire

    def _connect(self, timeout: timedelta | None = None) -> None:
        """A group that is not torch's default one: with that, Lightning would wait for all ranks at every fit."""
        if distributed.is_initialized():
            raise RuntimeError(
                "torch.distributed is initialized, so Lightning would wait for ranks that do not come: leave out "
                "init_process_group; Ranks() connects the processes itself."
            )
        store, _, _ = next(rendezvous("env://", self.rank, self.size))
        own = PrefixStore(f"edgebolt/{next(_fits)}", store)
        self._group = distributed.ProcessGroupGloo(own, self.rank, self.size, timeout or self.timeout)

    def _disconnect(self) -> None:
        self._group = self._module = None
        self._waiting, self._owner, self._given, self._early, self._sending = [], {}, {}, {}, []

    def _send(self, rank: int, what: dict[str, Any]) -> Sent:
        """Tensors and built-ins, without waiting for them to arrive; what is returned must be kept until then."""
        buffer = io.BytesIO()
        torch.save(what, buffer)
        blob = _bytes(buffer.getvalue())
        return [(self._group.send([tensor], rank, 0), tensor) for tensor in (torch.tensor([len(blob)]), blob)]

    def wait(self) -> None:
        """Until rank 0 has all that it was answered. It takes answers in any order, so it gets to them."""
        _wait(self._sending)
        self._sending = []

    def _receive(self, rank: int) -> dict[str, Any]:
        length = torch.zeros(1, dtype=torch.int64)
        self._group.recv([length], rank, 0).wait()
        blob = torch.empty(int(length), dtype=torch.uint8)
        self._group.recv([blob], rank, 0).wait()
        found: dict[str, Any] = torch.load(io.BytesIO(blob.numpy().data), map_location="cpu", weights_only=True)
        return found


class _Orders:
    """The orders that rank 0 sends, one at a time."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._kept: list[Order] = []
        self.end: dict[str, Any] = {}

    def ended(self, end: dict[str, Any]) -> None:
        """Rank 0's run is over: note its model and metrics, or raise its error."""
        self.end = end
        if "error" in end:
            raise RuntimeError(f"Rank 0 failed:\n{end['error']}")

    def __call__(self) -> tuple[Order, bytes | None] | None:
        if not self._kept:
            received = self._ranks._receive(0)
            if "end" in received:
                self.ended(received["end"])
                return None
            self._ranks.wait()
            self._kept = _orders(received["orders"])
        order = self._kept.pop(0)
        return order, order.memory


def spread(orders: list[Order], ranks: int) -> dict[int, int]:
    """Which rank trains which order.

    Rank 0 takes the first of them, whose turn comes while the others are being trained. The rest go by what they cost,
    the dearest first, each to the rank that has least.

    Returns:
        number of an order -> rank.

    Example::

        >>> spread([], ranks=2)
        {}
    """
    costs = {order.number: order.flops or 1.0 for order in orders}  # a visit without steps costs something too
    share = sum(costs.values()) / ranks
    owner: dict[int, int] = {}
    own = 0.0
    for number, cost in costs.items():
        if ranks > 1 and owner and own + cost / 2 > share:
            break
        owner[number] = 0
        own += cost
    load = dict.fromkeys(range(1, ranks), 0.0)
    for number in sorted(costs.keys() - owner.keys(), key=lambda number: (-costs[number], number)):
        rank = min(load, key=lambda rank: load[rank])
        owner[number] = rank
        load[rank] += costs[number]
    return owner


def _plain_orders(orders: list[Order]) -> dict[str, Any]:
    """Tensors and built-ins; a message that several visits are sent is there once."""
    messages: dict[Any, torch.Tensor] = {}
    plain = []
    for order in orders:
        key = same_tensors(order.message)
        if key not in messages:
            messages[key] = _bytes(order.message.with_header(visit=None).to_bytes())
        plain.append(
            {
                **{name: getattr(order, name) for name in order.__dataclass_fields__},
                "visit": order.visit.to_plain(),
                "profile": asdict(order.profile),
                "message": list(messages).index(key),
                "memory": None if order.memory is None else _bytes(order.memory),
                "delivered": [(visit.to_plain(), round) for visit, round in order.delivered],
            }
        )
    return {"messages": list(messages.values()), "orders": plain}


def _orders(received: dict[str, Any]) -> list[Order]:
    from edgebolt.common.federated.visit import Visit

    messages = [Message.from_bytes(blob.numpy().data) for blob in received["messages"]]
    found = []
    for plain in received["orders"]:
        visit = Visit.from_plain(plain["visit"])
        found.append(
            Order(
                **{
                    **plain,
                    "visit": visit,
                    "profile": DeviceProfile(**plain["profile"]),
                    "message": messages[plain["message"]].with_header(visit=visit.order()),
                    "memory": None if plain["memory"] is None else plain["memory"].numpy().tobytes(),
                    "delivered": [(Visit.from_plain(told), round) for told, round in plain["delivered"]],
                }
            )
        )
    return found


def _wait(sent: Sent) -> None:
    """Until it has arrived; a second wait for one sending would not end, so they are forgotten."""
    while sent:
        sent.pop()[0].wait()


def _wait_a_little(sent: Sent) -> None:
    """For somebody who may have failed too, and will not take it."""
    try:
        for work, _ in sent:
            work.wait(_GRACE)
    except RuntimeError:
        pass


def _bytes(blob: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(blob), dtype=torch.uint8)


def _tensors(module: Any) -> list[tuple[str, torch.Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]


def _load_tensors(module: Any, tensors: dict[str, torch.Tensor]) -> None:
    here = dict(_tensors(module))
    if here.keys() != tensors.keys():
        odd = sorted(here.keys() ^ tensors.keys())
        raise ValueError(f"The module of this rank is not that of rank 0: {odd[0]} is in one of them alone.")
    with torch.no_grad():
        for name, tensor in here.items():
            if tensor.shape == tensors[name].shape:
                tensor.copy_(tensors[name])
            else:  # visits may change shapes
                tensor.data = tensors[name].to(tensor)
