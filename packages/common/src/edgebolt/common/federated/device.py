"""What a device knows: its memory, its data, its profile. Lives where the client runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from torchmetrics import Metric

from edgebolt.common.devices import DeviceProfile
from edgebolt.common.quiet import quiet
from edgebolt.common.random import stream

if TYPE_CHECKING:
    import lightning.pytorch as pl

__all__ = ["Device"]


class Device:
    """One device during a visit, as the device half of an algorithm sees it.

    Attributes:
        id: index of the client in the population.
        memory: the device's own notes, which persist from visit to visit and are checkpointed: tensors and
            built-ins only. Tensors in it are replaced, never written into.
        profile: effective speed, memory, power and links in this round.
        samples: number of training samples.
        visiting: whether the visit is still open. Lightning's hooks also run in rounds in which nobody trains.
        groups: values of the optimizer's groups, a dict a group, as they were when the round began.
        optimizer: values for the optimizer's groups, a dict a group, that a callback sets in ``on_client_start`` for
            the visit; the order's own come on top. Empty: the groups as they are.
    """

    def __init__(
        self,
        id: int,
        memory: dict[str, Any],
        *,
        samples: int,
        profile: DeviceProfile,
        loader: Callable[[str, int | None], DataLoader[Any]],
        to_device: Callable[[Any], Any] = lambda batch: batch,
        seed: int = 0,
        round: int = 0,
    ) -> None:
        self.id, self.memory, self.samples, self.profile = id, memory, samples, profile
        self.round = round
        self.visiting = True
        self.groups: list[dict[str, Any]] = []
        self.optimizer: list[dict[str, Any]] = []
        self._loader, self._to_device, self._seed = loader, to_device, seed

    def data(self, split: str = "train", batch_size: int | None = None) -> DataLoader[Any]:
        """This client's samples in their stored order.

        Args:
            split: ``"train"``, ``"val"`` or ``"test"``.
            batch_size: ``None``: the batch size of the user's loader.

        Raises:
            ValueError: if the client has no such split.
        """
        return self._loader(split, batch_size)

    def rng(self, purpose: str) -> np.random.Generator:
        """A generator that depends on (run seed, purpose, round, client) alone."""
        return stream(self._seed, purpose, self.round, self.id)

    def evaluate(self, module: pl.LightningModule, split: str = "val", batches: int | None = None) -> dict[str, float]:
        """Run ``module.validation_step`` over this client's split and return what it logs.

        Args:
            module: with the weights to evaluate.
            split: ``"train"``, ``"val"`` or ``"test"``.
            batches: at most so many; ``None``: all.

        Returns:
            Logged name -> mean, weighted by batch size; torchmetrics objects are computed and left as they were.
            Nothing reaches the Trainer's loggers, and the module, its metrics and all random states are left as
            they were.
        """
        loader: Iterable[Any] = self.data(split)
        with quiet(module) as logged, torch.no_grad():
            module.eval()
            for part in module.modules():
                if isinstance(part, Metric):
                    part.reset()  # a state that the Trainer left is not this client's; it is put back afterwards
            for index, batch in enumerate(islice(loader, batches)):
                module.validation_step(self._to_device(batch), index)
            return {name: _mean(values) for name, values in logged.items()}


def _mean(values: list[tuple[Any, int | None]]) -> float:
    last = values[-1][0]
    if isinstance(last, Metric):  # it has accumulated over the batches by itself
        return float(last.compute())
    weights = [1 if size is None else size for _, size in values]
    return sum(float(value) * weight for (value, _), weight in zip(values, weights, strict=True)) / sum(weights)
