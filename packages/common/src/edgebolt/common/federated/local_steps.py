"""One local step inside ``Trainer.fit``: what a visit changes of it, and what it may skip."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor
from torch.optim import Optimizer

from edgebolt.common.federated.shortcuts import Shortcuts, SilentProfiler

if TYPE_CHECKING:
    from edgebolt.common.federated.client import ClientCallback
    from edgebolt.common.federated.device_half import DeviceHalf

__all__ = ["LocalSteps"]


class LocalSteps(SingleDeviceStrategy):
    """A strategy whose optimizer steps belong to visits."""

    _shortcuts = Shortcuts()
    client_callbacks: Sequence[ClientCallback] = ()

    @property
    def _device_half(self) -> DeviceHalf:
        """Where visits are opened and closed."""
        raise NotImplementedError

    @property
    def _trainer(self) -> pl.Trainer:
        assert self.lightning_module is not None
        return self.lightning_module.trainer

    def on_train_start(self) -> None:
        """See which hooks of a step nobody implements."""
        super().on_train_start()
        self._shortcuts = Shortcuts.of(self._trainer, self.client_callbacks)
        trainer: Any = self._trainer
        if type(trainer.profiler) is PassThroughProfiler:
            trainer.profiler = SilentProfiler()

    def teardown(self) -> None:
        """Give the Trainer its own profiler back."""
        trainer: Any = self._trainer
        if type(trainer.profiler) is SilentProfiler:
            trainer.profiler = PassThroughProfiler()
        super().teardown()

    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        """The batch on the device, by the module's own hooks."""
        if self._shortcuts.transfer and device is None:
            return batch
        return super().batch_to_device(batch, device, dataloader_idx)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own, but for the idle batches of a round in which nobody trains, or somebody elsewhere."""
        return super().training_step(*args, **kwargs) if self._device_half.trains else None

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        """Back-propagate."""
        if not self._shortcuts.backward:
            return super().backward(closure_loss, optimizer, *args, **kwargs)
        closure_loss.backward(*args, **kwargs)  # type: ignore[no-untyped-call]
        return closure_loss.detach()

    def optimizer_step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        model: pl.LightningModule | torch.nn.Module | None = None,
        **kwargs: Any,
    ) -> Any:
        """One local step, with the values that the visit sets for the optimizer's groups."""
        if not self._device_half.trains:
            return closure()  # an idle batch
        with self._device_half.group_values(optimizer):
            if self._shortcuts.step:
                return optimizer.step(closure=closure, **kwargs)
            return super().optimizer_step(optimizer, closure, model, **kwargs)

    def _to_device(self, batch: Any) -> Any:
        return self.batch_to_device(self.precision_plugin.convert_input(batch))
