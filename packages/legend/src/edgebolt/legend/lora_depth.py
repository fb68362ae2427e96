"""The device's half of LEGEND: ranks that grow towards the output, and training of the top layers alone."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from edgebolt.common.communication import Tensors
from edgebolt.common.devices import count_step
from edgebolt.common.federated import FederatedStrategy
from edgebolt.common.lora import LoraRanks, adapter_layers, layers_held, set_depth
from edgebolt.legend.ranks import rank_distribution

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from edgebolt.common.federated import Device, Visit

__all__ = ["LoraDepth", "Ranks"]

Ranks = Literal["increasing", "uniform", "decreasing"] | Sequence[int] | None


class LoraDepth(LoraRanks):
    """Trains LoRA in the layers near the output alone, at ranks that grow towards it.

    The two observations that LEGEND builds on (Liu et al. 2025, abstract): LoRA near the output costs less, for
    backward and the stored activations end at the lowest trained layer, and with higher ranks there it reaches
    comparable accuracy.

    In a plain ``Trainer`` the depth is the argument's. In a federated run each visit's ``settings["depth"]`` comes
    first, and what the device did not train is not sent.

    Args:
        depth: layers that are trained, counted from the output; None: all.
        ranks: ``"increasing"``: see :func:`~edgebolt.legend.rank_distribution`; ``"decreasing"``: the same, reversed;
            ``"uniform"``; a sequence, input first; None: the ranks of the module.
        budget: sum of all ranks; None: that of the module.
        step: difference of neighbouring ranks.

    Raises:
        ValueError: for arguments that are out of range; in ``setup``, if the module has no LoRA.

    Example::

        >>> import lightning as L
        >>> trainer = L.Trainer(callbacks=[LoraDepth(depth=4, ranks="increasing", budget=96)], accelerator="cpu",
        ...                     logger=False)
    """

    def __init__(
        self, depth: int | None = None, ranks: Ranks = "increasing", budget: int | None = None, step: float = 1.0
    ) -> None:
        named = ("increasing", "uniform", "decreasing")
        if isinstance(ranks, str) and ranks not in named:
            raise ValueError(
                f"ranks={ranks!r}: use one of {named}, a sequence of ranks, or None for the module's own."
            )
        super().__init__(None if isinstance(ranks, str) else ranks)
        if depth is not None and (type(depth) is not int or depth < 1):
            raise ValueError(f"depth={depth!r}: use a whole number of layers, 1 or more, or None for all.")
        if budget is not None and (type(budget) is not int or budget < 1):
            raise ValueError(f"budget={budget!r}: use a sum of ranks, 1 or more, or None for the module's own.")
        if not step >= 0:
            raise ValueError(f"step={step!r}: use 0 or more; ranks='decreasing' turns the order round.")
        self.depth, self.kind, self.budget, self.step = depth, ranks, budget, step
        self._saved: tuple[weakref.ref[Any], int, int] | None = None

    def choose(self, ranks: list[int]) -> list[int]:
        """The ranks that the module gets, from those that it has."""
        if not isinstance(self.kind, str):
            return super().choose(ranks)
        step = {"increasing": self.step, "uniform": 0.0, "decreasing": -self.step}[self.kind]
        return rank_distribution(len(ranks), sum(ranks) if self.budget is None else self.budget, step)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Set ranks and, in a plain fit, the depth, before the optimizer is made."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        layers = layers_held(name for name, _ in pl_module.named_parameters())
        set_depth(pl_module, layers if self.depth is None else self.depth)
        if isinstance(trainer.strategy, FederatedStrategy):
            set_depth(pl_module, layers)  # all that is ever trained must require gradients at the beginning

    def on_client_start(self, trainer: pl.Trainer, module: pl.LightningModule, device: Device, visit: Visit) -> None:
        """Freeze the layers below the visit's depth."""
        set_depth(module, self._depth(visit, layers_held(name for name, _ in module.named_parameters())))

    def on_client_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, device: Device, visit: Visit
    ) -> dict[str, Any] | None:
        """A probed device says how many layers its memory can train."""
        if not visit.probe:
            return None
        return {"max_depth": self._most(trainer, module, device)}

    def upload(self, device: Device, visit: Visit, update: Tensors) -> Tensors:
        """Leave out the LoRA of the layers that were frozen."""
        layers = adapter_layers(update)
        lowest = 0 if not layers else (top := max(layers.values()) + 1) - self._depth(visit, top)
        return {name: change for name, change in update.items() if layers.get(name, lowest) >= lowest}

    def _depth(self, visit: Visit, layers: int) -> int:
        depth: int = visit.settings.get("depth", layers if self.depth is None else self.depth)
        return depth

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """After a federated fit all LoRA is trainable again, as it was before."""
        if stage == "fit" and isinstance(trainer.strategy, FederatedStrategy):
            set_depth(pl_module, layers_held(name for name, _ in pl_module.named_parameters()))

    def _most(self, trainer: pl.Trainer, module: pl.LightningModule, device: Device) -> int:
        """The largest depth whose memory fits: weights, gradients and moments, and what backward needs (assumed).

        What is saved for the backward pass is counted at depth 1 and at full depth, and grows evenly between.
        """
        layers = layers_held(name for name, _ in module.named_parameters())
        if self._saved is None or self._saved[0]() is not module:
            batch = trainer.strategy.batch_to_device(next(iter(device.data())))
            set_depth(module, 1)
            one = count_step(module, batch).saved_bytes
            set_depth(module, layers)
            self._saved = weakref.ref(module), one, count_step(module, batch).saved_bytes
        resident = sum(p.nbytes for p in module.parameters()) + sum(b.nbytes for b in module.buffers())
        resident += 3 * sum(p.nbytes for p in module.parameters() if p.requires_grad)
        _, one, full = self._saved
        a_layer = (full - one) / max(1, layers - 1)
        free = device.profile.memory_bytes - resident - one
        if free < 0:
            return 0
        return layers if a_layer <= 0 else min(layers, 1 + int(free // a_layer))
