"""Which of Lightning's per-step hooks nobody implements, so that a step need not call them one by one.

With small models on small batches, calling empty hooks takes as long as the arithmetic. What is skipped here has
no effect by definition: the module, the datamodule and every callback have inherited it unchanged.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins import Precision
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.utilities.model_helpers import is_overridden

__all__ = ["Shortcuts", "SilentProfiler"]

_NOTHING: AbstractContextManager[None] = nullcontext()


class SilentProfiler(PassThroughProfiler):
    """Lightning's profiler that profiles nothing, without a new generator for each of a step's twenty hooks."""

    def profile(self, action_name: str) -> AbstractContextManager[None]:  # type: ignore[override]
        """Do nothing."""
        return _NOTHING


@dataclass(frozen=True)
class Shortcuts:
    """What a training step may skip.

    Attributes:
        transfer: moving the batch: it is on the CPU and stays there.
        backward: the hooks around ``loss.backward()``.
        step: the hooks before ``optimizer.step()`` and gradient clipping.
    """

    transfer: bool = False
    backward: bool = False
    step: bool = False

    @classmethod
    def of(cls, trainer: pl.Trainer, callbacks: Sequence[Callback] = ()) -> Shortcuts:
        """Look at everybody who takes part in this fit, ``callbacks`` too, which may take part later."""
        module, datamodule = trainer.lightning_module, trainer.datamodule  # type: ignore[attr-defined]
        takers = [module, *callbacks, *trainer.callbacks]  # type: ignore[attr-defined]

        def unused(*hooks: str) -> bool:
            return not any(is_overridden(hook, taker) for hook in hooks for taker in takers if hasattr(taker, hook))

        transfers = ("transfer_batch_to_device", "on_after_batch_transfer")
        plain = type(trainer.strategy.precision_plugin) is Precision
        return cls(
            transfer=trainer.strategy.root_device.type == "cpu"
            and unused(*transfers)
            and not any(datamodule is not None and is_overridden(hook, datamodule) for hook in transfers),
            backward=plain and unused("on_before_backward", "backward", "on_after_backward"),
            step=plain
            and not trainer.gradient_clip_val
            and unused("on_before_optimizer_step", "configure_gradient_clipping"),
        )
