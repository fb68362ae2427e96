"""A worker: an ordinary ``Trainer.fit`` whose batches are those of the visits that it is given."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.callbacks import Callback

from edgebolt.common.engines.engine import Answer, Order
from edgebolt.common.engines.job import Job, already_set_up, digest
from edgebolt.common.engines.memory import dump_memory, load_memory
from edgebolt.common.federated.client_data import ClientData, make_client_data
from edgebolt.common.federated.device import Device
from edgebolt.common.federated.device_half import DeviceHalf
from edgebolt.common.federated.round_loader import visit_batches
from edgebolt.common.federated.strategy import FederatedStrategy

__all__ = ["WorkerStrategy", "work"]


class WorkerStrategy(FederatedStrategy):
    """Trains the visits that it receives, until there are no more; an epoch is a round, or what is seen of it here.

    Args:
        job: what is the same for all visits.
        receive: waits for the next order, and the memory that goes with it; ``None``: there is none any more.
        finish: takes what a visit has come to; the device's memory in bytes.
    """

    strategy_name = "federated-worker"

    def __init__(
        self,
        job: Job,
        receive: Callable[[], tuple[Order, bytes | None] | None],
        finish: Callable[[Order, Answer], None],
    ) -> None:
        super().__init__(job.algorithm, clients=job.clients, cost=job.cost, seed=job.seed)
        self.client_callbacks = job.callbacks
        self.job, self._receive, self._finish = job, receive, finish
        self._visits: VisitLoader | None = None
        self._compared = False  # the data with the server's

    @property
    def _device_half(self) -> DeviceHalf:
        return self.visits.devices

    @property
    def visits(self) -> VisitLoader:
        """Those that this worker is given."""
        assert self._visits is not None
        return self._visits

    @property
    def epoch(self) -> int:
        """The round of the visit that is trained."""
        return 0 if self._visits is None else self._visits.epoch

    def setup_environment(self) -> None:
        """Nothing of the user's Trainer is here but the device half."""
        super(FederatedStrategy, self).setup_environment()
        trainer: Any = self._trainer
        trainer.horizon = self.job.horizon  # Lightning has read the worker's own
        trainer.callbacks[:] = [*self.job.callbacks, WorkerHooks(self)]
        trainer.reload_dataloaders_every_n_epochs = 1

    def setup(self, trainer: pl.Trainer) -> None:
        """The module as it came."""
        super(FederatedStrategy, self).setup(trainer)

    def setup_optimizers(self, trainer: pl.Trainer) -> None:
        """The module's optimizer; each order brings the values of its groups, so no schedule runs here."""
        super().setup_optimizers(trainer)
        self.lr_scheduler_configs = []

    def process_dataloader(self, dataloader: object) -> object:
        """The user's loader says how batches are made."""
        if self._visits is None:
            self._visits = self._prepare(dataloader)
        asked_for = self.epoch
        self._visits.begin_epoch()
        datamodule = self.job.data if isinstance(self.job.data, pl.LightningDataModule) else None
        if datamodule is not None and self.epoch != asked_for:  # it may make another loader for this round
            dataloader = datamodule.train_dataloader()
        self._visits.data.renew(dataloader)
        unknown, self._compared = not self._compared, True
        if unknown and self.job.batches and self.epoch == self.job.round:
            self._compare(self._visits.data)
        return self._visits

    def _compare(self, data: ClientData) -> None:
        if digest(data) != self.job.batches:
            raise ValueError(
                "This worker's data are not those of the server: its clients have as many samples, and the first ones "
                "are others. Let setup() and the partition depend on seeds of their own."
            )

    def _prepare(self, loader: Any) -> VisitLoader:
        job, module = self.job, self.lightning_module
        assert module is not None
        self._data = data = make_client_data(job.clients, loader, len(job.samples))
        if data.samples.tolist() != job.samples.tolist():
            raise ValueError(
                f"This worker's data are not those of the server: {int(data.samples.sum())} samples of "
                f"{len(data.samples)} clients here, {int(job.samples.sum())} of {len(job.samples)} there, or not "
                "the same. Let setup() and the partition depend on seeds of their own."
            )

        def make_device(client: int, memory: dict[str, Any]) -> Device:
            order = visits.order
            assert order is not None
            return Device(
                client,
                memory,
                samples=int(data.samples[client]),
                profile=order.profile,
                loader=lambda split, batch_size: data.loader(client, split, batch_size),
                to_device=self._to_device,
                seed=job.seed,
                round=order.round,
            )

        devices = DeviceHalf(
            trainer=self._trainer,
            module=module,
            algorithm=job.algorithm,
            callbacks=job.callbacks,
            make_device=make_device,
            count=self._count,
            seed=job.seed,
        )
        devices.initial = move_data_to_device(job.initial, self.root_device)
        visits = VisitLoader(devices, data, self._receive, self._finish)
        return visits

    def show_global(self) -> None:
        """There is no global model here."""


class VisitLoader:
    """The batches of the visits that a worker is given; an epoch ends where a visit of another round comes.

    Args:
        devices: opens and closes visits.
        data: the clients' batches.
        receive, finish: as in :class:`WorkerStrategy`.
    """

    def __init__(
        self,
        devices: DeviceHalf,
        data: ClientData,
        receive: Callable[[], tuple[Order, bytes | None] | None],
        finish: Callable[[Order, Answer], None],
    ) -> None:
        self.devices, self.data = devices, data
        self._receive, self._finish = receive, finish
        self.order: Order | None = None
        self._next: tuple[Order, bytes | None] | None = None  # received, and not begun
        self.done = 0
        self.over = False  # there is no visit any more
        self.epoch = 0

    def __len__(self) -> int:
        """More than there will be: Lightning does not prefetch from a loader that has a length."""
        return 2**40

    @property
    def steps(self) -> int:
        """Of the open visit."""
        return 0 if self.order is None else self.order.steps

    def begin_epoch(self) -> None:
        """Wait for a visit; the epoch is the round in which it takes place."""
        if self.order is not None:
            raise RuntimeError(f"{self.order.visit} was left before its end: on_train_batch_start gave -1 there.")
        if self._next is None:
            self._next = self._receive()
        if self._next is None:
            self.over = self.devices.trainer.should_stop = True
        else:
            self.epoch = self._next[0].round

    def __iter__(self) -> Iterator[Any]:
        while self._next is not None and self._next[0].round == self.epoch:
            (order, memory), self._next = self._next, None
            self.open(order, memory)
            if order.steps:
                yield from visit_batches(self.data, self.devices, order.visit, order.round, order.steps)
            else:
                self.close()
            self._next = self._receive()
        if self._next is None:
            self.over = self.devices.trainer.should_stop = True
        self.epoch += 1  # or later: Lightning asks for a loader anew where the epoch has moved on

    def open(self, order: Order, memory: bytes | None) -> None:
        """The device takes up what it remembers, hears what it has not heard yet, and installs what it is sent."""
        devices = self.devices
        self.order, self.done = order, 0
        for optimizer in devices.trainer.optimizers:
            for group, values in zip(optimizer.param_groups, order.groups, strict=False):
                group.update(values)
        devices.groups = order.groups
        held = {} if memory is None else move_data_to_device(load_memory(memory), devices.module.device)
        devices.memories = {order.visit.client: held}
        if order.delivered:
            devices.hear(devices.make_device(order.visit.client, held), order.delivered)
        device = devices.module.device
        devices.open(order.visit, order.message.to(device), order.round)

    def step_done(self, loss: torch.Tensor | None) -> None:
        """Book a step; the last one closes the visit."""
        self.done += 1
        self.devices.book(loss)
        if self.done == self.steps:
            self.close()

    def close(self) -> None:
        """Hand over what the visit has come to."""
        order, devices = self.order, self.devices
        assert order is not None
        message = devices.close(order.visit, died=order.died, enrolling=order.enrolling, timed=order.timed)
        memory = devices.memories[order.visit.client]
        self.order = None
        flops = devices.sample_flops if order.timed else (0.0, 0.0)
        self._finish(order, Answer(message, float(devices.loss_sum), flops, dump_memory(memory) if memory else None))


class WorkerTrainer(pl.Trainer):
    """Its epoch is the round of the visit that is trained, and its end is that of the user's Trainer."""

    horizon: tuple[Any, Any] = (None, None)

    @property
    def max_epochs(self) -> int | None:
        """What the module reads; the worker itself goes on until there are no more visits."""
        return super().max_epochs if self.horizon[0] is None else self.horizon[0]

    @property
    def estimated_stepping_batches(self) -> int | float:
        """What the module reads."""
        return float("inf") if self.horizon[1] is None else self.horizon[1]

    @property
    def current_epoch(self) -> int:
        """What the module reads."""
        return self.strategy.epoch if isinstance(self.strategy, WorkerStrategy) else super().current_epoch


class WorkerHooks(Callback):
    """Books the steps, behind the device half's callbacks.

    Args:
        strategy: of the worker.
    """

    def __init__(self, strategy: WorkerStrategy) -> None:
        self._strategy = strategy

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """A step is done."""
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        self._strategy.visits.step_done(loss if isinstance(loss, torch.Tensor) else None)


def work(
    job: Job,
    receive: Callable[[], tuple[Order, bytes | None] | None],
    finish: Callable[[Order, Answer], None],
    accelerator: str = "auto",
    devices: list[int] | int = 1,
) -> None:
    """Train visits until there are no more, in this thread.

    Args:
        job: what is the same for all visits.
        receive: waits for the next order, and the memory that goes with it; ``None``: there is none any more.
        finish: takes what a visit has come to; the device's memory in bytes.
        accelerator: on which the module is trained.
        devices: which one, as in a Trainer.
    """
    strategy = WorkerStrategy(job, receive, finish)
    trainer = WorkerTrainer(
        **job.trainer,
        accelerator=accelerator,
        devices=devices,
        strategy=strategy,
        max_epochs=-1,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    torch.set_float32_matmul_precision(job.matmul_precision)
    with already_set_up(job.module):
        if isinstance(job.data, pl.LightningDataModule):
            trainer.fit(job.module, datamodule=job.data)
        else:
            trainer.fit(job.module, job.data)
    if not strategy.visits.over:
        raise RuntimeError(
            "Training was stopped in a worker, by trainer.should_stop perhaps: raise an error there, or stop in a "
            "callback that is no ClientCallback."
        )
