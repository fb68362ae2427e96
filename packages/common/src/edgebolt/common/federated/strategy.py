"""The Lightning face: one epoch of ``Trainer.fit`` is one federated round."""

from __future__ import annotations

import math
from collections.abc import Mapping
from copy import copy
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins import AsyncCheckpointIO, CheckpointIO, Precision
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.seed import isolate_rng
from torch.optim import Optimizer

from edgebolt.common.communication import Tensors, TrafficLedger
from edgebolt.common.devices import Clock, CostModel, Fleet
from edgebolt.common.engines.choice import EngineLike, chosen_engine
from edgebolt.common.engines.engine import Serial
from edgebolt.common.engines.job import Job
from edgebolt.common.federated.algorithm import Algorithm
from edgebolt.common.federated.checks import (
    check_automatic,
    check_beginning,
    check_clients,
    check_engine,
    check_same_loader,
    check_trainable,
    check_trainer,
    ignore_warnings,
    several_optimizers,
)
from edgebolt.common.federated.client import ClientCallback
from edgebolt.common.federated.client_data import ClientData, Clients, make_client_data
from edgebolt.common.federated.device import Device
from edgebolt.common.federated.device_files import DeviceFiles
from edgebolt.common.federated.device_half import DeviceHalf
from edgebolt.common.federated.epoch_counters import align_counters
from edgebolt.common.federated.local_steps import LocalSteps
from edgebolt.common.federated.loop import FederatedLoop
from edgebolt.common.federated.partition import IID
from edgebolt.common.federated.remote_visits import RemoteVisits
from edgebolt.common.federated.round_hooks import RoundHooks
from edgebolt.common.federated.round_loader import EvaluationLoader, RoundLoader
from edgebolt.common.federated.server import Server
from edgebolt.common.federated.shortcuts import Shortcuts
from edgebolt.common.federated.visit import Evaluation, Outcome, Visit

__all__ = ["FederatedStrategy"]

_KEY = "federated"


class FederatedStrategy(LocalSteps):
    """Trains a ``LightningModule`` federatedly, in an ordinary ``Trainer``: one epoch is one communication round.

    Progress bar, loggers, ``EarlyStopping``, ``ModelCheckpoint``, precision and ``ckpt_path=`` keep working and
    count rounds. Clients are simulated one after the other on the module itself; simulated seconds come from the
    fleet and the counted FLOPs, bytes from encoded messages.

    Args:
        algorithm: what is done in a round.
        clients: a partition of the training loader's dataset, or each client's own dataset or loader (a sequence,
            or a callable client -> dataset; a callable needs ``fleet`` to say how many there are).
        per_round: size of a cohort; ``None``: everybody.
        local_epochs: passes over a client's samples in a visit. Default 1.
        local_steps: instead: optimizer steps in a visit.
        fleet: one device per client; ``None``: equal devices that never fail.
        cost: FLOPs of a step.
        seed: of everything that is drawn here: cohorts, shuffling, dropout. The partition and the fleet have
            their own.
        engine: where visits are trained: an :class:`~edgebolt.common.engines.Engine` or its name, ``"serial"`` (here,
            one after the other; the default), ``"ranks"`` or ``"ray"``.
        accelerator, checkpoint_io, precision_plugin: as in any Lightning strategy; usually set by the ``Trainer``.

    Attributes:
        clock: simulated time; ``clock.now`` in seconds.
        ledger: every message; ``ledger.total_bytes``, ``up_bytes``, ``down_bytes``, exact.
        server: the server's state, once ``fit`` has begun.
        history: a dict of exact figures per finished round.
        client_callbacks: the device half of the running fit: the algorithm's callbacks, then the Trainer's own.

    Raises:
        ValueError, TypeError: for arguments, loaders, modules and Trainer arguments that cannot be federated; each
            message names the way out.

    Example::

        >>> import lightning as L
        >>> from edgebolt.common.federated import FedAvg, FederatedStrategy, IID
        >>> strategy = FederatedStrategy(FedAvg(), clients=IID(20), per_round=5)
        >>> trainer = L.Trainer(max_epochs=3, strategy=strategy, accelerator="cpu", logger=False,
        ...                     enable_checkpointing=False)
    """

    strategy_name = "federated"

    def __init__(
        self,
        algorithm: Algorithm,
        clients: Clients | None = None,
        per_round: int | None = None,
        local_epochs: int | None = None,
        local_steps: int | None = None,
        fleet: Fleet | None = None,
        cost: CostModel | None = None,
        seed: int = 0,
        engine: EngineLike = "serial",
        accelerator: Accelerator | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
    ) -> None:
        super().__init__(accelerator=accelerator, checkpoint_io=checkpoint_io, precision_plugin=precision_plugin)
        if not isinstance(algorithm, Algorithm):
            raise TypeError(f"algorithm={algorithm!r}: pass an Algorithm such as FedAvg().")
        for name, value in {"per_round": per_round, "local_epochs": local_epochs, "local_steps": local_steps}.items():
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"{name}={value!r}: use a whole number of 1 or more.")
        if clients is not None:
            check_clients(clients)
        if local_epochs is not None and local_steps is not None:
            raise ValueError(f"local_epochs={local_epochs} and local_steps={local_steps}: give one of them.")
        self.algorithm = algorithm
        self.clients: Clients = IID(10) if clients is None else clients
        self.per_round, self.local_epochs, self.local_steps = per_round, local_epochs or 1, local_steps
        self.fleet, self.cost, self.seed = fleet, cost or CostModel(), seed
        self.engine = chosen_engine(engine)
        self._devices: list[torch.device] = []
        self.clock, self.ledger = Clock(), TrafficLedger()
        self.loop: FederatedLoop | None = None
        self._data: ClientData | None = None
        self._datamodule: Any = None  # as it was before its setup
        self._saved: dict[str, Any] | None = None  # a checkpoint's state, until there is a loop to take it
        self._open_epoch = False
        self._nominal: tuple[Any, int] | None = None  # batch and its size
        self._files = DeviceFiles()
        self._shortcuts = Shortcuts()
        self._hooks = RoundHooks(self)
        self.client_callbacks: list[ClientCallback] = []

    def __repr__(self) -> str:
        """Names the import that a foreign Trainer, which prints this, is missing."""
        return (
            f"{type(self).__name__}({type(self.algorithm).__name__}) of lightning, for "
            "`import lightning as L; L.Trainer(strategy=...)`"
        )

    # ------------------------------------------------------------------------------------------------ set-up

    @property
    def root_device(self) -> torch.device:
        """The one device that the accelerator chose."""
        chosen = self._devices[0] if self._devices else torch.device("cpu")
        return self.engine.device(chosen)

    @property
    def parallel_devices(self) -> list[torch.device] | None:
        """Nothing, so that the strategy may serve another Trainer; set by each Trainer's accelerator."""
        return None

    @parallel_devices.setter
    def parallel_devices(self, devices: list[torch.device]) -> None:
        self._devices = devices

    @property
    def server(self) -> Server:
        """The server's state.

        Raises:
            RuntimeError: before ``fit``.
        """
        return self._running.server

    @property
    def history(self) -> list[dict[str, float]]:
        """Exact figures of each finished round."""
        return [] if self.loop is None else self.loop.history

    @property
    def outcomes(self) -> list[Outcome]:
        """What became of the visits of the last round that was finished (or of the running one, so far)."""
        return [] if self.loop is None else self.loop.outcomes

    @property
    def _running(self) -> FederatedLoop:
        if self.loop is None:
            raise RuntimeError("The server exists once Trainer.fit has begun.")
        return self.loop

    @property
    def _device_half(self) -> DeviceHalf:
        return self._running.devices

    def setup_environment(self) -> None:
        """Refuse what cannot work and take our place among the callbacks, before any of their hooks runs."""
        super().setup_environment()
        trainer = self._trainer
        if trainer.state.fn != TrainerFn.FITTING:
            return
        check_trainer(trainer, len(self._devices))
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        ours = [self._hooks, *self.algorithm.callbacks]
        theirs = [callback for callback in callbacks if not any(callback is mine for mine in ours)]
        self.client_callbacks = [
            *self.algorithm.callbacks,
            *(callback for callback in theirs if isinstance(callback, ClientCallback)),
        ]
        # The device half first, so that its hooks run while the visit is open; then the round's own, which close it;
        # then the user's, which see the aggregated model.
        others = [callback for callback in theirs if not isinstance(callback, ClientCallback)]
        callbacks[:] = [*self.client_callbacks, self._hooks, *others]
        # Without this, rounds of different length would be cut or cycled at the first round's length.
        trainer.reload_dataloaders_every_n_epochs = 1  # type: ignore[attr-defined]
        if (datamodule := trainer.datamodule) is not None:  # type: ignore[attr-defined]
            self._datamodule = copy(datamodule)
            self._datamodule.trainer = None
        if self.engine.serves:
            callbacks[:] = self.client_callbacks
            trainer.num_sanity_val_steps = 0
        if type(self.algorithm).evaluation is not Algorithm.evaluation:
            trainer.num_sanity_val_steps = 0  # its loader would serve round 0 too
        ignore_warnings(workers=not isinstance(self.engine, Serial))

    def setup(self, trainer: pl.Trainer) -> None:
        """Begin afresh; a checkpoint, if there is one, is loaded after this."""
        if trainer.state.fn == TrainerFn.FITTING:
            assert self.lightning_module is not None
            check_trainable(self.lightning_module)
            check_beginning(trainer)
            self.loop = self._data = self._saved = None
            self._open_epoch = False
            self._files.begin_run()
            self.clock, self.ledger, self._nominal = Clock(), TrafficLedger(), None
            self._shortcuts = Shortcuts()
        super().setup(trainer)

    def setup_optimizers(self, trainer: pl.Trainer) -> None:
        """Create the module's one optimizer; its state is swapped at each visit, its groups stay."""
        assert self.lightning_module is not None
        check_automatic(self.lightning_module)
        try:
            super().setup_optimizers(trainer)
        except RuntimeError as error:
            if "multiple optimizers" in str(error):  # Lightning's way out, manual optimization, is none here
                raise ValueError(several_optimizers(self.lightning_module)) from error
            raise
        if len(self.optimizers) != 1:
            raise ValueError(several_optimizers(self.lightning_module))
        if not isinstance(self.engine, Serial):
            check_engine(trainer)

    def process_dataloader(self, dataloader: object) -> object:
        """While training, the user's loader becomes this round's; otherwise it passes through."""
        trainer = self._trainer
        if trainer.training:
            return self._round_loader(dataloader)
        if trainer.validating and trainer.state.fn == TrainerFn.FITTING and self.loop is not None:
            evaluations = self.algorithm.evaluation(self.server)
            if evaluations != [Evaluation()]:
                return self._evaluation_loader(evaluations, dataloader)
        return dataloader

    def _round_loader(self, loader: Any) -> Any:
        if not isinstance(self.engine, Serial) and self.engine.serves:
            self.engine.serve(self, loader)
            return []  # rank 0's fit is over, and so is this one
        if self.loop is None:
            self.loop = self._begin(loader)
            self._restore()
        else:
            if not isinstance(self.engine, Serial) and self._datamodule is None and not self.engine.memories_stay:
                check_same_loader(self._client_data.template, loader)
            self._client_data.renew(loader)
        self.loop.devices.check_places()
        limit = self._trainer.limit_train_batches  # a number of steps, or a share of the round's
        if self._open_epoch:
            # The checkpoint was written after the validation of a round and before its epoch's end: Lightning closes
            # the epoch by comparing with that round's length, draws no batch, and then asks for the next round.
            self._open_epoch = False
        else:
            self.loop.begin_round(lambda total: min(total, limit) if isinstance(limit, int) else int(total * limit))
        # A round without steps: Lightning multiplies by the share and wants at least one batch.
        steps = self.loop.planned_steps or (1 if isinstance(limit, int) else math.ceil(1 / limit))
        return RoundLoader(self.loop, self._client_data, steps, self._nominal_batch)

    def _restore(self) -> None:
        """Give the loop what a checkpoint has kept for it, once both are there."""
        if self.loop is None or self._saved is None:
            return
        saved, here = len(self._saved["server"]["reports"]["samples"]), self.server.population
        if saved != here:
            raise ValueError(
                f"The checkpoint has {saved} clients and this run has {here}: resume with the same clients."
            )
        self.loop.load_state_dict(self._saved)
        self._open_epoch, self._saved = self._saved["open_epoch"], None

    def _evaluation_loader(self, evaluations: list[Evaluation], default: Any) -> EvaluationLoader:
        data = self._client_data
        kept = [e for e in evaluations if e.client is None or len(data.dataset(e.client, "val"))]  # type: ignore[arg-type]
        loaders = [default if e.client is None else data.loader(e.client, "val") for e in kept or evaluations]
        return EvaluationLoader(self._running, kept or evaluations, loaders)

    def _begin(self, loader: Any) -> FederatedLoop:
        module = self.lightning_module
        assert module is not None
        data = make_client_data(self.clients, loader, None if self.fleet is None else len(self.fleet))
        population = len(data.samples)
        fleet = Fleet.uniform(population) if self.fleet is None else self.fleet
        if len(fleet) != population:
            raise ValueError(f"fleet has {len(fleet)} devices and there are {population} clients: one device each.")
        per_round = population if self.per_round is None else self.per_round
        if per_round > population:
            raise ValueError(f"per_round={per_round} is more than the {population} clients there are.")
        self._data = data

        def steps_of(client: int, batch_size: int | None) -> int:
            return self.local_steps or self.local_epochs * data.steps_an_epoch(client, batch_size)

        def make_device(client: int, memory: dict[str, Any]) -> Device:
            return Device(
                client,
                memory,
                samples=int(data.samples[client]),
                profile=fleet.profile(client, server.round),
                loader=lambda split, batch_size: data.loader(client, split, batch_size),
                to_device=self._to_device,
                seed=self.seed,
                round=server.round,
            )

        server = Server(
            data.samples,
            steps_of=steps_of,
            online=lambda round: fleet.at(round).online,
            per_round=per_round,
            seed=self.seed,
            clock=self.clock,
            ledger=self.ledger,
        )
        half: dict[str, Any] = {
            "trainer": self._trainer,
            "module": module,
            "algorithm": self.algorithm,
            "callbacks": self.client_callbacks,
            "make_device": make_device,
            "count": self._count,
            "seed": self.seed,
        }
        devices: DeviceHalf
        if isinstance(self.engine, Serial):
            devices = DeviceHalf(**half)
        else:
            source = loader if self._datamodule is None else self._datamodule

            def job(initial: Tensors) -> Job:
                return Job.of(self, source, initial, data)

            devices = RemoteVisits(self.engine, job, self.cost, **half)
        server.models["global"] = dict(devices.initial)
        return FederatedLoop(self.algorithm, server, fleet, devices, self._samples_in)

    def teardown(self) -> None:
        """Let the engine's workers go."""
        if self.loop is not None:
            self.loop.devices.end()
        elif self._trainer.interrupted and not isinstance(self.engine, Serial):
            self.engine.give_up()
        super().teardown()

    @property
    def _client_data(self) -> ClientData:
        assert self._data is not None
        return self._data

    # ---------------------------------------------------------------------------------------- the global model

    def on_validation_start(self) -> None:
        """Lightning also validates when it is told to stop in mid-round: show it the global model, not a client's."""
        super().on_validation_start()
        self.show_global()

    def on_validation_end(self) -> None:
        """After per-client evaluation, put the global model back."""
        super().on_validation_end()
        self.show_global()

    def show_global(self) -> None:
        """The module gets the global model; an open visit's weights and moments are kept aside."""
        if self.loop is not None and self._trainer.state.fn == TrainerFn.FITTING:
            self.loop.devices.park(self.server.models["global"])

    def _nominal_batch(self) -> Any:
        """The first samples of client 0 in their stored order: the shape for which FLOPs are stated."""
        with isolate_rng():  # a resumed run draws it once more
            return next(iter(self._client_data.loader(0)))

    def _count(self, visit: Visit) -> tuple[float, float]:
        """FLOPs of a sample at the nominal shape: all, and those of the forward pass."""
        module, data = self.lightning_module, self._client_data
        assert module is not None
        if self._nominal is None:
            size = min(data.template_of(0).batch_size or 1, int(data.samples[0]))
            self._nominal = self._to_device(self._nominal_batch()), size
        return self.cost.sample_parts(module, *self._nominal, visit.settings)

    def _samples_in(self, visit: Visit, steps: int) -> int:
        """Samples in a visit's first steps."""
        data, client, size = self._client_data, visit.client, visit.batch_size
        return data.samples_in(client, visit.done + steps, size) - data.samples_in(client, visit.done, size)

    # ------------------------------------------------------------------------------------------- checkpoints

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The global model, in mid-round too."""
        state = super().lightning_module_state_dict()
        if self.loop is None or self._trainer.state.fn != TrainerFn.FITTING:
            return state
        assert self.lightning_module is not None
        state.update({name: value for name, (_, value) in self.loop.devices.counters.items()})
        canonical = {id(p): name for name, p in self.lightning_module.named_parameters()}
        for name, parameter in self.lightning_module.named_parameters(remove_duplicate=False):
            shared = canonical[id(parameter)]  # tied weights appear under each of their names
            if shared in self.server.models["global"]:
                state[name] = self.server.models["global"][shared]
        state.update({name: t for name, t in self.server.models["global"].items() if name in state})
        return state

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The optimizer's own state and the run's: server, devices, clock, ledger and the open round."""
        state = dict(super().optimizer_state(optimizer))
        if self.loop is None:
            return state
        return {**state, _KEY: {**self.loop.state_dict(), "cost": self.cost.state_dict()}}

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Go on exactly where the checkpoint was written."""
        saved = dict(checkpoint["optimizer_states"][0])
        if _KEY not in saved and not checkpoint["global_step"]:  # saved before the first step, as Tuner.lr_find does
            super().load_optimizer_state_dict(checkpoint)
            return
        if _KEY not in saved:
            raise ValueError(
                "The checkpoint was not written by a federated run, so there is no round to go on with: load its "
                "weights with YourModule.load_from_checkpoint(path) and start fit() without ckpt_path."
            )
        self._saved = saved.pop(_KEY)
        devices = self._saved["devices"]
        devices["memories"] = self._files.get(devices["memories"], checkpoint[_KEY])
        for part in (
            devices,
            self._saved["flights"],
            self._saved["server"]["models"],
            self._saved["server"]["memory"],
        ):
            part.update(move_data_to_device(part, self.root_device))
        self.cost.load_state_dict(self._saved["cost"])
        super().load_optimizer_state_dict({"optimizer_states": [saved]})
        if self.loop is not None:  # the module asked for trainer.estimated_stepping_batches, which plans round 0
            self._restore()
            self._open_epoch &= self._trainer.current_epoch > 0  # in epoch 0 that loader stays

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Write large device memories beside the checkpoint, then the checkpoint; nothing on a rank that serves."""
        if self.engine.serves:
            return
        states = checkpoint.get("optimizer_states") or [{}]
        if _KEY in states[0] and self.loop is not None:
            devices = self.loop.devices
            touched, devices.touched = devices.touched, set() if devices.device is None else {devices.device.id}
            state = states[0][_KEY]["devices"]
            memories = self._files.put(state["memories"], touched, filepath)
            states[0][_KEY]["devices"] = {**state, "memories": memories}
        super().save_checkpoint(checkpoint, filepath, storage_options)
        if not isinstance(self.checkpoint_io, AsyncCheckpointIO):  # else the checkpoint may not be on disk yet
            self._files.sweep()

    def remove_checkpoint(self, filepath: Any) -> None:
        """Delete a checkpoint and the device memories that only it needs."""
        super().remove_checkpoint(filepath)
        self._files.forget(filepath)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint and let Lightning's counters agree with the round's."""
        checkpoint = super().load_checkpoint(checkpoint_path, weights_only)
        states = checkpoint.get("optimizer_states") or [{}]
        if _KEY in states[0]:
            checkpoint[_KEY] = str(checkpoint_path)  # large device memories lie beside it
            states[0][_KEY]["open_epoch"] = align_counters(
                checkpoint["loops"]["fit_loop"],
                running=states[0][_KEY]["running"],
                by_steps=self._trainer.max_steps != -1,
            )
        return checkpoint
