"""The devices' side: a Flower ``ClientApp`` that trains orders in an ordinary ``Trainer.fit``."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.supercore.utils import get_flwr_home
from torch.utils.data import DataLoader

from edgebolt.common.devices import CostModel
from edgebolt.common.engines.engine import Answer, Order
from edgebolt.common.engines.job import Job
from edgebolt.common.engines.job import versions as job_versions
from edgebolt.common.engines.worker import work
from edgebolt.common.federated import Algorithm, ClientCallback
from edgebolt.flower.beginning import digest, federated_tensors
from edgebolt.flower.device_memories import DeviceMemories
from edgebolt.flower.records import Facts, RecordError, answer_records, facts_records, read_order, versions

__all__ = ["client_app"]


def client_app(
    module_factory: Callable[[], L.LightningModule],
    data_factory: Callable[[Context], DataLoader[Any]],
    algorithm: Algorithm,
    callbacks: Sequence[ClientCallback] = (),
    state_dir: str | os.PathLike[str] | None = None,
    keep: int = 4,
    accelerator: str = "auto",
) -> ClientApp:
    """A ``ClientApp`` that trains what a :class:`~edgebolt.flower.FlowerEngine` asks for.

    Which client a node is, its ``--node-config`` says: ``'partition-id=0'``. There may also be a ``state-dir``, the
    folder in which the device remembers; it must outlast restarts, and serve one experiment.

    Args:
        module_factory: makes the module, with the same weights on every device and the server. Its hooks ``setup`` and
            ``configure_model`` are called, without a Trainer.
        data_factory: makes this client's training loader; its ``node_config`` says which client that is.
        algorithm: the same as on the server.
        callbacks: the device half beside the algorithm's own. Those that implement ``on_client_delivered`` go to the
            server's Trainer too.
        state_dir: where ``--node-config`` has none; default: ``edgebolt`` in Flower's home. A folder for each client
            is made in it.
        keep: versions of the device's memory.
        accelerator: as in a Trainer.

    Example::

        >>> import torch
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> from edgebolt.common.federated import FedAvg
        >>> def my_data(context):
        ...     torch.manual_seed(context.node_config["partition-id"])  # or read the device's own files
        ...     return DataLoader(TensorDataset(torch.randn(100, 8)), batch_size=10, shuffle=True)
        >>> app = client_app(L.LightningModule, my_data, FedAvg())
    """
    app = ClientApp()

    def own_data(context: Context) -> DataLoader[Any]:
        loader = data_factory(context)
        if not isinstance(loader, DataLoader):
            raise TypeError(f"data_factory gave a {type(loader).__name__}: give this client's DataLoader.")
        return loader

    @app.query()
    def who_are_you(message: Message, context: Context) -> Message:
        loader, module = own_data(context), _module(module_factory)
        facts = Facts(
            client=_client(context),
            samples=len(loader.dataset),  # type: ignore[arg-type]
            batch_size=loader.batch_size or 1,
            drop_last=loader.drop_last,
            versions=versions(),
            beginning=digest(module, federated_tensors(module)),
        )
        return Message(facts_records(facts), reply_to=message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        order, run = read_order(message.content)
        client = _client(context)
        if order.visit.client != client:
            raise RecordError(f"the order is for client {order.visit.client}, this is client {client}")
        chosen = context.node_config.get("state-dir") or state_dir or get_flwr_home() / "edgebolt"
        memories = DeviceMemories(Path(str(chosen)).expanduser() / f"client-{client}", keep)
        memory = None if order.memory is None else memories.get(order.memory)
        answers: list[Answer] = []
        orders: list[tuple[Order, bytes | None]] = [(order, memory)]
        job = _job(_module(module_factory), own_data(context), algorithm, callbacks, client, run)
        work(job, lambda: orders.pop() if orders else None, lambda _, answer: answers.append(answer), accelerator)
        (answer,) = answers
        kept = None if answer.memory is None else memories.put(answer.memory)
        figures = Answer(answer.message, answer.loss_sum, answer.sample_flops, kept)
        return Message(answer_records(figures), reply_to=message)

    return app


def _client(context: Context) -> int:
    client = context.node_config.get("partition-id")
    if type(client) is not int or client < 0:
        raise ValueError(
            f"This node's partition-id is {client!r}: start its SuperNode with --node-config 'partition-id=0', "
            "another number from 0 for each."
        )
    return client


def _module(factory: Callable[[], L.LightningModule]) -> L.LightningModule:
    module = factory()
    module.setup("fit")
    module.configure_model()
    return module


def _job(
    module: L.LightningModule,
    loader: DataLoader[Any],
    algorithm: Algorithm,
    callbacks: Sequence[ClientCallback],
    client: int,
    run: dict[str, Any],
) -> Job:
    """What a worker needs, of which this device knows most itself.

    Its own data stand for those of all clients up to its own number: so its index is right, and what is counted for
    the whole population is counted on its own first batch.
    """
    cost = CostModel(run["flops_per_sample"])
    cost.load_state_dict(run["counted"])
    return Job(
        module=module,
        callbacks=[*algorithm.callbacks, *callbacks],
        algorithm=algorithm,
        clients=[loader] * (client + 1),
        data=loader,
        samples=np.full(client + 1, len(loader.dataset)),  # type: ignore[arg-type]
        batches="",
        trainer=run["trainer"],
        horizon=run["horizon"],
        matmul_precision=run["matmul_precision"],
        round=0,
        cost=cost,
        seed=run["seed"],
        initial=federated_tensors(module),
        versions=job_versions(),
    )
