"""The device half of a run: opens and closes visits on a module, tensors in, difference out."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from edgebolt.common.communication import Message, Tensors
from edgebolt.common.engines.engine import AWAY, UNHEARD
from edgebolt.common.federated.algorithm import Algorithm
from edgebolt.common.federated.client import ClientCallback, copy_of
from edgebolt.common.federated.device import Device
from edgebolt.common.federated.visit import Visit
from edgebolt.common.random import derive

if TYPE_CHECKING:
    import lightning.pytorch as pl

__all__ = ["DeviceHalf"]


class DeviceHalf:
    """Opens and closes visits: tensors in, optimizer emptied, callbacks called, difference out.

    Between visits the module holds the global model. A visit's randomness is a function of (run seed, round,
    stage, client, step), set before each batch is fetched, so that it depends neither on the order of execution
    nor on where a run was resumed, and no random state needs saving.

    Args:
        trainer, module: of the running fit.
        algorithm: for its codecs.
        callbacks: the device half, in order.
        make_device: client -> :class:`Device` with the given memory.
        count: FLOPs of a sample, as the module stands and by a visit's settings: all, and those of the forward pass.
        seed: the run's seed.

    Attributes:
        memories: client -> what the device remembers. Only device code may touch it.
        ahead: visits that may run before their turn; 0: each runs in its turn, here.
        memories_stay: memories are on real devices, and checkpoints have their names alone.
        loss_sum: of the open visit's steps, or of the last one.
        sample_flops: of the visit that was closed last, if its steps are timed: all, and those of forward passes.
    """

    ahead = 0
    memories_stay = False

    def __init__(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        algorithm: Algorithm,
        callbacks: list[ClientCallback],
        make_device: Callable[[int, dict[str, Any]], Device],
        count: Callable[[Visit], tuple[float, float]],
        seed: int,
    ) -> None:
        self.trainer, self.module, self.algorithm, self.callbacks = trainer, module, algorithm, callbacks
        self.make_device, self.count, self.seed = make_device, count, seed
        self.memories: dict[int, dict[str, Any]] = {}
        self.touched: set[int] = set()  # clients whose memory may have changed since the last checkpoint
        self.device: Device | None = None  # whose visit is open
        self.visit: Visit | None = None
        self.start: Tensors = {}
        self.parked: dict[str, Any] | None = None
        self.groups: list[dict[str, Any]] = []
        self.loss_sum: torch.Tensor | float = 0.0
        self.sample_flops = (0.0, 0.0)
        self._step_seed = 0
        self._on_cuda = module.device.type == "cuda"
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        persistent = module.state_dict().keys()
        buffers = {name: b for name, b in module.named_buffers() if name in persistent}
        # Integer counters do not travel, nor do masks of infinities, whose differences would be NaN.
        averaged = {name: b for name, b in buffers.items() if b.is_floating_point() and bool(b.isfinite().all())}
        self.places: Tensors = {**trained, **averaged}
        self.counters = {name: (b, b.clone()) for name, b in buffers.items() if name not in averaged}
        self.initial = self.tensors()  # what every device has from the beginning
        self.precision = dict(trainer.precision_plugin.state_dict())  # a gradient scaler's beginning; else empty

    def check_places(self) -> None:
        """Refuse parameters that were unfrozen after the beginning: they would go from client to client unseen.

        Raises:
            ValueError: with the remedy.
        """
        late = [n for n, p in self.module.named_parameters() if p.requires_grad and n not in self.places]
        if late:
            raise ValueError(
                f"{late[0]} and {len(late) - 1} more parameters were unfrozen after fit began: let all that is ever "
                "trained require gradients at the beginning, and freeze it in ClientCallback.on_client_start."
            )

    def tensors(self) -> Tensors:
        """A copy of what is federated: trainable parameters and floating buffers, as they are now."""
        return {name: place.detach().clone() for name, place in self.places.items()}

    def put(self, tensors: Tensors) -> None:
        """Write tensors into the module; a parameter of another shape stays the same object with new data."""
        with torch.no_grad():
            for name, tensor in tensors.items():
                place = self.places[name]
                if place.shape == tensor.shape:
                    place.copy_(tensor)
                else:
                    # Contiguous, whatever arrived: strides, and so last bits, must not depend on the visit before.
                    new = tensor.detach().to(place, copy=True, memory_format=torch.contiguous_format)
                    place.grad, place.data = None, new
            for counter, value in self.counters.values():
                counter.copy_(value)

    def begin_round(self) -> None:
        """Forget the optimizer's groups; the round's first visit notes them, after ``on_train_epoch_start``."""
        self.groups = []

    def note_groups(self) -> None:
        """Note the optimizer's groups, once a round: its last visits are opened after the schedule has moved on."""
        if self.groups:
            return
        groups = [group for optimizer in self.trainer.optimizers for group in optimizer.param_groups]
        self.groups = [{name: copy_of(value) for name, value in g.items() if name != "params"} for g in groups]

    def _device_of(self, visit: Visit) -> Device:
        self.touched.add(visit.client)
        device = self.make_device(visit.client, self._memory_for(visit.client))
        self.note_groups()
        device.groups = self.groups
        if visit.base is not None:
            device.round = visit.base  # it goes on with the random numbers of that round
        return device

    def _memory_for(self, client: int) -> dict[str, Any]:
        return self.memories.setdefault(client, {})

    def open(self, visit: Visit, message: Message | None, round: int) -> None:
        """The device receives the message, installs it and gets ready to train; None: it died before it had it."""
        self.loss_sum = 0.0
        self.device = self._device_of(visit)
        if message is None:
            return
        self._seed_visit(visit, round)
        memory = self.device.memory
        tensors = {} if visit.start is None else self.algorithm.down.decode(message, memory)
        for callback in self.callbacks:
            tensors = callback.install(self.device, visit, tensors)
        unknown = tensors.keys() - self.places.keys()
        if unknown:
            raise KeyError(f"install() returned tensors that the module does not train: {sorted(unknown)}.")
        self.start = {**self.initial, **tensors}
        self.put(self.start)
        self._begin(visit, round)

    def _begin(self, visit: Visit, round: int) -> None:
        assert self.device is not None
        self.visit = visit
        self._seed_visit(visit, round)  # once more: installing may have drawn
        if self.trainer.optimizers:
            self.trainer.optimizers[0].state.clear()
        if self.precision:
            self.trainer.precision_plugin.load_state_dict(self.precision)
        for callback in self.callbacks:
            callback.on_client_start(self.trainer, self.module, self.device, visit)

    def _seed_visit(self, visit: Visit, round: int) -> None:
        self._step_seed = visit.done + derive(self.seed, "visit", visit.origin(round), visit.stage, visit.client)
        self.seed_step(0)

    def seed_round(self, round: int) -> None:
        """Set the global random states for what follows a round, such as validation: no visit's are left over."""
        self._step_seed = derive(self.seed, "round", round)
        self.seed_step(0)

    def seed_step(self, step: int) -> None:
        """Set the global random states for one step; a few microseconds."""
        seed = (self._step_seed + step) % 2**63
        torch.default_generator.manual_seed(seed)
        if self._on_cuda:
            torch.cuda.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)

    @property
    def trains(self) -> bool:
        """Whether the open visit's steps are trained here."""
        return self.device is not None

    def book(self, loss: torch.Tensor | None) -> None:
        """Add a step's loss. It stays where it is until the visit closes: reading it would wait for it."""
        if loss is not None:
            self.loss_sum = self.loss_sum + loss.detach().float()

    @contextmanager
    def group_values(self, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        """The optimizer's groups with the values that the device and its visit set, for one step."""
        assert self.device is not None and self.visit is not None
        own, ordered = self.device.optimizer, self.visit.optimizer
        if not own and not ordered:
            yield
            return
        groups = optimizer.param_groups
        values = [{**group, **ordered} for group in own or [{}] * len(groups)]
        before = [{name: group[name] for name in new} for group, new in zip(groups, values, strict=True)]
        for group, new in zip(groups, values, strict=True):
            group.update(new)
        try:
            yield
        finally:
            for group, old in zip(groups, before, strict=True):
                group.update(old)

    @property
    def listeners(self) -> list[ClientCallback]:
        """The callbacks that want to know that an update was taken."""
        return [c for c in self.callbacks if type(c).on_client_delivered is not ClientCallback.on_client_delivered]

    def acknowledge(self, visit: Visit) -> None:
        """Tell a device that its update was taken."""
        if self.listeners:
            device = self._device_of(visit)
            self.hear(device, [(visit, device.round)])

    def submit(self, visit: Visit, message: Message | None, round: int, **what: Any) -> None:
        """Let a visit run before its turn; called where :attr:`ahead` is more than 0."""
        raise NotImplementedError

    def hear(self, device: Device, delivered: list[tuple[Visit, int]]) -> None:
        """Tell a device of updates that were taken: visits, and the rounds in which they were."""
        for visit, round in delivered:
            device.round = visit.origin(round)
            for callback in self.listeners:
                callback.on_client_delivered(device, visit)

    def close(self, visit: Visit, *, died: bool, enrolling: bool, timed: bool) -> Message | None:
        """The device's answer, or None if it died; either way the optimizer is emptied.

        At enrolment there is no update: the callbacks' ``upload`` may put something into an empty one. The steps are
        ``timed`` if there are any, trained or probed; their cost is that of the module as the visit has left it.
        """
        assert self.device is not None
        if timed:
            self.sample_flops = self.count(visit)
        message = None
        if not died:
            report: dict[str, Any] = {}
            for callback in self.callbacks:
                report.update(callback.on_client_end(self.trainer, self.module, self.device, visit) or {})
            start = {} if enrolling else self.start
            with torch.no_grad():
                update = {name: self.places[name].detach() - tensor for name, tensor in start.items()}
            for callback in reversed(self.callbacks):
                update = callback.upload(self.device, visit, update)
            codec = self.algorithm.up.with_settings(visit.settings)
            message = codec.encode(update).with_header(client=visit.client, report=report)
        if self.trainer.optimizers:
            self.trainer.optimizers[0].state.clear()
        self.device.visiting = False
        self.device, self.start = None, {}
        return message

    def memory(self, client: int) -> dict[str, Any]:
        """What one device remembers."""
        return self.memories.get(client, {})

    def end(self) -> None:
        """The run is over, or has failed."""

    def show(self, model: str, tensors: Tensors, client: int | None) -> None:
        """Put a model in place for evaluation, with what a client's device half would install; leaves no trace."""
        if client is not None:
            device = self.make_device(client, dict(self.memory(client)))
            for callback in self.callbacks:
                tensors = callback.install(device, Visit(client, 0, start=model), tensors)
        self.put({**self.initial, **tensors})

    def park(self, shown: Tensors) -> None:
        """Show the given (global) weights instead of a client's; keep an open visit's weights and moments aside."""
        if self.device is not None and self.parked is None:
            self.parked = self._local()
        self.put(shown)

    def _local(self) -> dict[str, Any]:
        return {
            "tensors": {**self.tensors(), **{name: counter.clone() for name, (counter, _) in self.counters.items()}},
            "moments": dict(self.trainer.optimizers[0].state),
            "precision": dict(self.trainer.precision_plugin.state_dict()),
        }

    def unpark(self, visit: Visit, round: int) -> None:
        """Go on with the open visit: as at its start, then with the weights and moments that it had reached."""
        assert self.parked is not None
        local, self.parked = self.parked, None
        self.device = self._device_of(visit)
        self.put(self.start)
        self._begin(visit, round)
        self.put({name: tensor for name, tensor in local["tensors"].items() if name in self.places})
        for name, (counter, _) in self.counters.items():
            counter.copy_(local["tensors"][name])
        state = self.trainer.optimizers[0].state
        state.clear()
        state.update(local["moments"])
        if local["precision"]:
            self.trainer.precision_plugin.load_state_dict(local["precision"])

    def state_dict(self) -> dict[str, Any]:
        """Device memories and the open visit; moments and scaler travel with the optimizer and the precision."""
        local = self.parked or (self._local() if self.device is not None else None)
        return {
            "memories": self.memories,
            "initial": self.initial,
            "precision": self.precision,
            "start": self.start,
            "groups": self.groups,
            "local": None if local is None else local["tensors"],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`; call it once the optimizer's state is loaded.

        Raises:
            ValueError: for one that names memories which are elsewhere.
        """
        if not self.memories_stay and any(AWAY in m or UNHEARD in m for m in state["memories"].values()):
            raise ValueError(
                "The checkpoint is of a run whose device memories have stayed on the devices: resume it there, with "
                "the engine that has written it."
            )
        self.memories, self.initial, self.start = state["memories"], state["initial"], state["start"]
        self.precision, self.groups = state["precision"], state["groups"]
        self.device = None
        self.parked = None
        if state["local"] is not None:
            self.parked = {
                "tensors": state["local"],
                "moments": dict(self.trainer.optimizers[0].state),
                "precision": dict(self.trainer.precision_plugin.state_dict()),
            }
