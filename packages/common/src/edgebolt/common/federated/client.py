"""The device half of an algorithm: an ordinary Lightning callback with five more hooks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.callbacks import Callback

from edgebolt.common.communication import Codec, Tensors

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from edgebolt.common.federated.device import Device
    from edgebolt.common.federated.visit import Visit

__all__ = ["ClientCallback", "ErrorFeedback", "KeepModel", "KeepMoments", "ReportLoss"]


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

    def on_client_delivered(self, device: Device, visit: Visit) -> None:
        """The server has answered that it took the update of a visit: in time, and whole.

        A device that hears nothing does not know whether its update was lost on the way, came late or was refused.
        """

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
                state[parameter] = {key: copy_of(value) for key, value in kept[name].items()}

    def on_client_end(self, trainer: pl.Trainer, module: pl.LightningModule, device: Device, visit: Visit) -> None:
        """Keep the moments for the next visit."""
        state = trainer.optimizers[0].state
        device.memory["moments"] = {
            name: {key: copy_of(value) for key, value in state[parameter].items()}
            for name, parameter in module.named_parameters()
            if parameter in state
        }


class KeepModel(ClientCallback):
    """The model stays on the device as it stood after its last training, ``memory["model"]``: name -> tensor.

    Codecs lean on it that fill in what they did not send: :class:`~edgebolt.common.communication.HybridSign` and
    :class:`~edgebolt.common.communication.TopK` with ``fill="memory"``. A device that died before its upload keeps
    what it had.
    """

    def on_client_end(self, trainer: pl.Trainer, module: pl.LightningModule, device: Device, visit: Visit) -> None:
        """Keep what was trained, uncompressed; what a visit has frozen stays as it was kept before."""
        if not visit.steps:
            return
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        floating = {name: b for name, b in module.named_buffers() if b.is_floating_point()}
        model = {name: tensor.detach().clone() for name, tensor in {**trained, **floating}.items()}
        device.memory["model"] = {**device.memory.get("model", {}), **model}


class ReportLoss(ClientCallback):
    """The device reports ``"loss"``, the mean training loss of its visit's steps, which a server may select by."""

    _device: Device

    def install(self, device: Device, visit: Visit, tensors: Tensors) -> Tensors:
        """A new visit: begin at zero. What was summed lies in the device's memory, so that a visit can be resumed."""
        device.memory["loss_sum"] = torch.zeros(())
        return tensors

    def on_client_start(self, trainer: pl.Trainer, module: pl.LightningModule, device: Device, visit: Visit) -> None:
        """Whose steps follow."""
        self._device = device

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: torch.Tensor) -> None:
        """Add a step's loss."""
        memory = self._device.memory
        memory["loss_sum"] = memory["loss_sum"].to(loss.device) + loss.detach().float()

    def on_client_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, device: Device, visit: Visit
    ) -> dict[str, Any] | None:
        """The mean."""
        total = float(device.memory.pop("loss_sum", 0.0))
        return {"loss": total / visit.steps} if visit.steps else None


class ErrorFeedback(ClientCallback):
    """What a lossy codec drops from an update stays on the device and is added to its next one.

    Source: Seide et al., "1-Bit Stochastic Gradient Descent", 2014; Karimireddy et al., "Error Feedback Fixes
    SignSGD", 2019: ``p = Δ + e``, ``C(p)`` is sent, ``e <- p - C(p)``. A device that comes back after many rounds
    sends old remainders. The codec is called twice: one that draws random numbers must draw them from its input.

    Args:
        codec: the one that the updates are sent with, ``algorithm.up``. Put this callback first: it must see what the
            others leave of an update.

    Example::

        >>> from edgebolt.common.communication import SparseTernary
        >>> from edgebolt.common.federated import Algorithm
        >>> codec = SparseTernary(ratio=0.99)
        >>> algorithm = Algorithm(up=codec, callbacks=[ErrorFeedback(codec)])
    """

    def __init__(self, codec: Codec) -> None:
        self.codec = codec

    def upload(self, device: Device, visit: Visit, update: Tensors) -> Tensors:
        """The update and what was left of the last ones; the new remainder stays."""
        kept = device.memory.get("residual", {})
        total = {
            name: change + kept[name] if name in kept and kept[name].shape == change.shape else change
            for name, change in update.items()
        }
        codec = self.codec.with_settings(visit.settings)
        sent = codec.decode(codec.encode(total))
        device.memory["residual"] = {**kept, **{name: total[name] - sent[name] for name in total}}
        return total


def copy_of(value: Any) -> Any:
    """A tensor of its own, anything else as it is."""
    return value.clone() if isinstance(value, torch.Tensor) else value
