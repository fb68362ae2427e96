"""The device half of an algorithm: an ordinary Lightning callback with four more hooks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.callbacks import Callback

from edgebolt.common.communication import Tensors

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from edgebolt.common.federated.device import Device
    from edgebolt.common.federated.visit import Visit

__all__ = ["ClientCallback", "KeepMoments"]


class ClientCallback(Callback):
    """What a device does beside training; the same object works in simulation and on a device.

    All ordinary Lightning hooks work too and fire in the steps of every visit. A callback keeps what must
    outlast a step in ``device.memory`` and nothing in itself but what :meth:`on_client_start` sets anew.
    Several callbacks form a chain: ``install`` runs in order, ``upload`` in reverse order.

    Example: a device that keeps its classifier to itself::

        >>> class PrivateHead(ClientCallback):
        ...     def install(self, device, visit, tensors):
        ...         return {**tensors, **device.memory.get("head", {})}
        ...     def upload(self, device, visit, update):
        ...         return {name: change for name, change in update.items() if not name.startswith("head.")}
        ...     def on_client_end(self, trainer, module, device, visit):
        ...         head = module.head.named_parameters()
        ...         device.memory["head"] = {f"head.{name}": value.detach().clone() for name, value in head}
    """

    def install(self, device: Device, visit: Visit, tensors: Tensors) -> Tensors:
        """From the tensors that arrived (none if ``visit.start`` is None) to those that the module gets.

        A name that is missing gets the value with which the run began, which every device has. Return new
        tensors; never write into those that arrived.
        """
        return tensors

    def on_client_start(self, trainer: pl.Trainer, module: pl.LightningModule, device: Device, visit: Visit) -> None:
        """The module holds the installed tensors and the optimizer is empty.

        Runs again, with the same module and memory, when a run resumes in the middle of the visit.
        """

    def on_client_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, device: Device, visit: Visit
    ) -> dict[str, Any] | None:
        """The visit's steps are done. Returns entries for the report, which travels with the upload."""

    def upload(self, device: Device, visit: Visit, update: Tensors) -> Tensors:
        """From the differences ``local - start`` of all tensors (none at enrolment) to those that are sent."""
        return update


class KeepMoments(ClientCallback):
    """The optimizer's state stays on the device from visit to visit, instead of starting empty at each."""

    def on_client_start(self, trainer: pl.Trainer, module: pl.LightningModule, device: Device, visit: Visit) -> None:
        """Load the moments of the last visit."""
        kept = device.memory.get("moments", {})
        state = trainer.optimizers[0].state
        for name, parameter in module.named_parameters():
            if name in kept:
                state[parameter] = {key: _copy(value) for key, value in kept[name].items()}

    def on_client_end(self, trainer: pl.Trainer, module: pl.LightningModule, device: Device, visit: Visit) -> None:
        """Keep the moments for the next visit."""
        state = trainer.optimizers[0].state
        device.memory["moments"] = {
            name: {key: _copy(value) for key, value in state[parameter].items()}
            for name, parameter in module.named_parameters()
            if parameter in state
        }


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value
