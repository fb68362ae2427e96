"""What a worker gets once, before its first visit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from edgebolt.common.communication import Tensors

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from edgebolt.common.devices import CostModel
    from edgebolt.common.federated.algorithm import Algorithm
    from edgebolt.common.federated.client import ClientCallback
    from edgebolt.common.federated.client_data import Clients
    from edgebolt.common.federated.strategy import FederatedStrategy

__all__ = ["Job", "already_set_up", "versions"]


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
        trainer: arguments of the worker's ``Trainer``.
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
    trainer: dict[str, Any]
    cost: CostModel
    seed: int
    initial: Tensors
    versions: dict[str, str]

    @classmethod
    def of(cls, strategy: FederatedStrategy, data: Any, samples: np.ndarray, initial: Tensors) -> Job:
        """What a fit's strategy knows, and what it has been given for its workers."""
        module = strategy.lightning_module
        assert module is not None
        return cls(
            module=module,
            callbacks=strategy.client_callbacks,
            algorithm=strategy.algorithm,
            clients=strategy.clients,
            data=data,
            samples=samples,
            trainer=_trainer_arguments(module.trainer),
            cost=strategy.cost,
            seed=strategy.seed,
            initial=initial,
            versions=versions(),
        )


@contextmanager
def already_set_up(part: Any) -> Iterator[None]:
    """No hook that sets up a module or datamodule does anything: those of the instance hide those of its class."""
    hooks = ("setup", "configure_model", "prepare_data")
    for hook in hooks:
        setattr(part, hook, lambda *args, **kwargs: None)
    try:
        yield
    finally:
        for hook in hooks:
            delattr(part, hook)


def versions() -> dict[str, str]:
    """What runs here."""
    return {name: version(name) for name in ("edgebolt-common", "lightning", "torch")}


def _trainer_arguments(trainer: pl.Trainer) -> dict[str, Any]:
    """What a worker's Trainer shares with the user's: how a step is computed.

    Raises:
        ValueError: for a precision plugin of the user's own.
    """
    found: Any = trainer
    plugin = type(found.precision_plugin)
    if not plugin.__module__.startswith("lightning."):
        raise ValueError(
            f"The Trainer has a precision plugin of its own, {plugin.__name__}, and workers make theirs from "
            "Trainer(precision=...): use that, or engine='serial'."
        )
    return {
        "precision": found.precision,
        "gradient_clip_val": found.gradient_clip_val,
        "gradient_clip_algorithm": found.gradient_clip_algorithm,
        "detect_anomaly": torch.is_anomaly_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }
