"""What a worker gets once, before its first visit."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.fabric.utilities.apply_func import apply_to_collection  # type: ignore[attr-defined]
from lightning.pytorch.plugins import DoublePrecision, HalfPrecision, MixedPrecision, Precision
from lightning.pytorch.utilities.seed import isolate_rng

from edgebolt.common.communication import Tensors

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from edgebolt.common.devices import CostModel
    from edgebolt.common.federated.algorithm import Algorithm
    from edgebolt.common.federated.client import ClientCallback
    from edgebolt.common.federated.client_data import ClientData, Clients
    from edgebolt.common.federated.strategy import FederatedStrategy

__all__ = ["Job", "already_set_up", "digest", "versions"]


@dataclass
class Job:
    """A run as its workers know it.

    Attributes:
        module: as it is after ``setup`` and ``configure_model``.
        callbacks: the device half, in order.
        algorithm: for its codecs.
        clients: the partition, which every worker makes anew, or what the clients brought.
        data: the ``LightningDataModule``, from before its ``setup``, or the training loader where there is none.
        samples: training samples of each client, shape ``[population]``; a worker that comes to others is refused.
        batches: digest of a few of their batches, for the same end; empty: there is none.
        trainer: arguments of the worker's ``Trainer``.
        horizon: the user's ``max_epochs`` and ``estimated_stepping_batches``, as they were when the job was made, for
            which the module may ask; ``None``: it is not known.
        matmul_precision: of float32, as ``torch.set_float32_matmul_precision`` takes it.
        round: in which the job was made.
        cost: what has been counted, and how the rest is.
        seed: of the run.
        initial: what every device has from the beginning.
        versions: of the packages whose disagreement would change results.
    """

    module: pl.LightningModule
    callbacks: list[ClientCallback]
    algorithm: Algorithm
    clients: Clients
    data: Any
    samples: np.ndarray
    batches: str
    trainer: dict[str, Any]
    horizon: tuple[Any, Any]
    matmul_precision: str
    round: int
    cost: CostModel
    seed: int
    initial: Tensors
    versions: dict[str, str]

    @classmethod
    def of(cls, strategy: FederatedStrategy, data: Any, initial: Tensors, known: ClientData | None = None) -> Job:
        """What a fit's strategy knows, and what it has been given for its workers; ``known``: the server's data."""
        module = strategy.lightning_module
        assert module is not None
        trainer = module.trainer
        return cls(
            module=module,
            callbacks=strategy.client_callbacks,
            algorithm=strategy.algorithm,
            clients=strategy.clients,
            data=data,
            samples=np.zeros(0) if known is None else known.samples,
            batches="" if known is None else digest(known),
            trainer=_trainer_arguments(trainer),
            horizon=(None, None) if known is None else (trainer.max_epochs, _steps_ahead(trainer)),
            matmul_precision=torch.get_float32_matmul_precision(),
            round=0 if strategy.loop is None else strategy.loop.server.round,
            cost=strategy.cost,
            seed=strategy.seed,
            initial=initial,
            versions=versions(),
        )


@contextmanager
def already_set_up(part: Any) -> Iterator[None]:
    """No hook that sets up a module or datamodule does anything, nor the one that undoes it.

    Those of the instance hide those of its class.
    """
    hooks = ("setup", "configure_model", "prepare_data", "teardown")
    for hook in hooks:
        setattr(part, hook, lambda *args, **kwargs: None)
    try:
        yield
    finally:
        for hook in hooks:
            delattr(part, hook)


def digest(data: ClientData) -> str:
    """One line for the first sample of the first and the last client.

    Dense tensors, arrays of numbers and strings in it count. Empty, if two looks differ: such data are made anew each
    time.
    """

    def look() -> str:
        found = hashlib.sha256()

        def add(part: Any) -> Any:
            if isinstance(part, str):
                found.update(part.encode())
            elif isinstance(part, np.ndarray) and part.dtype != object:
                found.update(part.tobytes())
            elif isinstance(part, torch.Tensor) and part.layout == torch.strided:
                found.update(part.detach().cpu().flatten().clone().view(torch.uint8).numpy().tobytes())
            return part

        with isolate_rng():
            torch.manual_seed(0)
            np.random.seed(0)
            random.seed(0)
            for client in sorted({0, len(data.samples) - 1}):
                if data.samples[client]:
                    apply_to_collection(
                        next(iter(data.loader(client, batch_size=1))), (torch.Tensor, np.ndarray, str), add
                    )
        return found.hexdigest()

    first = look()
    return first if look() == first else ""


def versions() -> dict[str, str]:
    """What runs here."""
    return {name: version(name) for name in ("edgebolt-common", "lightning", "torch")}


def _steps_ahead(trainer: pl.Trainer) -> float | None:
    """What enrolment, which takes place before the first round is planned, cannot know."""
    planned = trainer.train_dataloader is not None  # else the Trainer would ask for it, and so for the first round
    return trainer.estimated_stepping_batches if planned else None


def _trainer_arguments(trainer: pl.Trainer) -> dict[str, Any]:
    """What a worker's Trainer shares with the user's: how a step is computed.

    Raises:
        ValueError: for a precision plugin of the user's own.
    """
    found: Any = trainer
    plugin = type(found.precision_plugin)
    if plugin not in (Precision, MixedPrecision, HalfPrecision, DoublePrecision):
        raise ValueError(
            f"The Trainer has a precision plugin, {plugin.__name__}, that workers cannot make anew from "
            "Trainer(precision=...): use one of '32-true', '64-true', '16-true', 'bf16-true', '16-mixed' and "
            "'bf16-mixed', or engine='serial'."
        )
    deterministic: bool | str = torch.are_deterministic_algorithms_enabled()
    if deterministic and torch.is_deterministic_algorithms_warn_only_enabled():
        deterministic = "warn"
    return {
        "precision": found.precision,
        "gradient_clip_val": found.gradient_clip_val,
        "gradient_clip_algorithm": found.gradient_clip_algorithm,
        "detect_anomaly": torch.is_anomaly_enabled(),
        "deterministic": deterministic,
        "benchmark": torch.backends.cudnn.benchmark,
    }
