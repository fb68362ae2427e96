"""Floating-point operations of a training step, counted once for every configuration."""

from __future__ import annotations

import inspect
import json
import math
import weakref
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import chain
from statistics import fmean
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from edgebolt.common.devices.saved import SavedBytes
from edgebolt.common.quiet import quiet

__all__ = ["CostModel", "StepCost", "count_step"]

_FORWARD_SHARE = 1 / 3


@dataclass(frozen=True)
class StepCost:
    """What one training step costs.

    Attributes:
        flops: Floating-point operations of forward and backward, a multiply-add being two.
        forward_flops: Those of the forward pass.
        saved_bytes: Bytes that autograd keeps between forward and backward, parameters and buffers excluded.
    """

    flops: int
    forward_flops: int
    saved_bytes: int


def count_step(module: LightningModule, batch: Any) -> StepCost:
    """Run the module's own ``training_step`` and backward once, count, and leave no trace (see :func:`quiet`).

    Operations that torch's counter does not know count 0: elementwise ones, normalisations, lookups, sparse and
    scatter operations. The optimizer does not run.

    Args:
        module: The module in the configuration that is to be counted; attached to a Trainer or not.
        batch: A batch for ``training_step``, on the module's device.

    Raises:
        ValueError: If the module optimizes manually, or ``training_step`` gives no loss.

    Example::

        >>> import torch
        >>> from lightning.pytorch import LightningModule
        >>> from edgebolt.common.devices import count_step
        >>> class Net(LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layer = torch.nn.Linear(10, 3)
        ...     def training_step(self, batch, batch_idx):
        ...         return self.layer(batch).sum()
        >>> count_step(Net(), torch.ones(4, 10)).flops == 2 * 4 * 10 * 3 * 2    # forward, and d loss / d weight
        True
    """
    if not module.automatic_optimization:
        raise ValueError(
            f"{type(module).__name__} optimizes manually, so its training_step cannot run without changing the "
            "weights; give CostModel(flops_per_sample=...) or a method flops(settings, batch_size) of the module"
        )
    resident = chain(module.parameters(), module.buffers())
    counter = FlopCounterMode(display=False)
    with torch.inference_mode(False), torch.enable_grad(), quiet(module), counter:
        with _precision(module), SavedBytes(resident) as saved:
            loss = _loss(module, batch)
        forward = counter.get_total_flops()
        if loss.requires_grad:
            torch.autograd.backward(loss)
    return StepCost(counter.get_total_flops(), forward, saved.nbytes)


class CostModel:
    """Floating-point operations per sample, counted once for every configuration of a module.

    The count comes from the first of these that is there:

    1. ``flops_per_sample`` of this object;
    2. the module's own ``flops(settings, batch_size) -> float``: operations of one whole training step;
    3. :func:`count_step` on the nominal batch.

    The first two do not say what the forward pass costs; it is assumed to be a third, since backward costs twice as
    much as forward where all weights are trained.

    One object serves one module: another module makes it forget what it has counted. A module whose operations depend
    on the data (lengths, graphs) costs what the nominal batch costs.

    Args:
        flops_per_sample: Operations of forward and backward for one sample, the same in every configuration; for
            modules made of operations that the counter does not know. None: count.

    Raises:
        ValueError: If ``flops_per_sample`` is not above 0.

    Example::

        >>> import torch
        >>> from lightning.pytorch import LightningModule
        >>> from edgebolt.common.devices import CostModel
        >>> class Net(LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layer = torch.nn.Linear(10, 3)
        ...     def training_step(self, batch, batch_idx):
        ...         return self.layer(batch).sum()
        >>> CostModel().sample_flops(Net(), torch.ones(4, 10), batch_size=4, settings={"depth": 1})
        120.0
        >>> CostModel(flops_per_sample=7e9).sample_flops(Net(), torch.ones(4, 10), 4, {})
        7000000000.0
    """

    def __init__(self, flops_per_sample: float | None = None) -> None:
        if flops_per_sample is not None:
            _check_count(flops_per_sample, "flops_per_sample")
        self.flops_per_sample = flops_per_sample
        self._counted: dict[str, tuple[float, float]] = {}  # all operations, those of the forward pass
        self._module: weakref.ref[LightningModule] | None = None

    def sample_flops(
        self,
        module: LightningModule,
        batch: Any,
        batch_size: int,
        settings: Mapping[str, Any],
    ) -> float:
        """Operations of forward and backward for one sample, in the module's present configuration.

        See :meth:`sample_parts`.
        """
        return self.sample_parts(module, batch, batch_size, settings)[0]

    def sample_parts(
        self,
        module: LightningModule,
        batch: Any,
        batch_size: int,
        settings: Mapping[str, Any],
    ) -> tuple[float, float]:
        """Operations for one sample, in the module's present configuration: all, and those of the forward pass.

        Args:
            module: The module, already configured as ``settings`` say.
            batch: The nominal batch, on the module's device. It is used at the first call for these settings only.
            batch_size: Samples in ``batch``.
            settings: What distinguishes this configuration from others (depth, ranks, rates ...): numbers, strings,
                lists and dicts of them, arrays. Equal settings are counted once.

        Returns:
            Floating-point operations per sample, of forward and backward and of forward alone.

        Raises:
            TypeError: If ``settings`` hold something that JSON cannot say.
            ValueError: If the count is 0 or not finite, ``batch_size`` is below 1, the module optimizes manually, or
                ``training_step`` gives no loss.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1 sample, got {batch_size!r}")
        if self.flops_per_sample is not None:
            return float(self.flops_per_sample), self.flops_per_sample * _FORWARD_SHARE
        if self._module is None or self._module() is not module:
            if self._module is not None:
                self._counted.clear()
            self._module = weakref.ref(module)
        key = _key(settings)
        if key not in self._counted:
            every, forward = self._count(module, batch, batch_size, settings)
            self._counted[key] = every / batch_size, forward / batch_size
        return self._counted[key]

    def known(self, settings: Mapping[str, Any]) -> tuple[float, float] | None:
        """What has been counted or stated for such settings, as in :meth:`sample_parts`; ``None``: nothing yet."""
        if self.flops_per_sample is not None:
            return float(self.flops_per_sample), self.flops_per_sample * _FORWARD_SHARE
        return self._counted.get(_key(settings))

    def mean(self) -> float:
        """Operations of forward and backward for one sample, over all settings that were counted; 1 before."""
        return fmean([every for every, _ in self._counted.values()] or [self.flops_per_sample or 1.0])

    def note(self, settings: Mapping[str, Any], parts: tuple[float, float]) -> None:
        """Take what another process has counted for such settings."""
        if self.flops_per_sample is None:
            self._counted.setdefault(_key(settings), parts)

    def state_dict(self) -> dict[str, tuple[float, float]]:
        """What has been counted, by the canonical JSON of the settings: a resumed run keeps its nominal batch."""
        return dict(self._counted)

    def load_state_dict(self, state: Mapping[str, tuple[float, float]]) -> None:
        """Take the counts of :meth:`state_dict`; they hold for the module of the next call."""
        self._counted = {str(key): (float(every), float(forward)) for key, (every, forward) in state.items()}
        self._module = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_module": None}  # a weak reference cannot travel to another process

    def _count(
        self,
        module: LightningModule,
        batch: Any,
        batch_size: int,
        settings: Mapping[str, Any],
    ) -> tuple[float, float]:
        own = getattr(module, "flops", None)
        if callable(own):
            flops = own(settings, batch_size)
            _check_count(flops, f"{type(module).__name__}.flops(settings, batch_size)")
            return float(flops), flops * _FORWARD_SHARE
        counted = count_step(module, batch)
        if counted.flops == 0:
            raise ValueError(
                f"the training_step of {type(module).__name__} counts 0 operations: torch's counter does not know "
                "sparse, scatter and elementwise operations and lookups; give CostModel(flops_per_sample=...) or a "
                "method flops(settings, batch_size) of the module"
            )
        return float(counted.flops), float(counted.forward_flops)


def _check_count(flops: float, what: str) -> None:
    if isinstance(flops, bool) or not isinstance(flops, (int, float)) or not math.isfinite(flops) or flops <= 0:
        raise ValueError(f"{what} must be a finite number of operations above 0, got {flops!r}")


def _key(settings: Mapping[str, Any]) -> str:
    return "{}" if not settings else json.dumps(settings, sort_keys=True, separators=(",", ":"), default=_jsonable)


def _jsonable(value: object) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, (Tensor, np.ndarray, np.generic)):
        return value.tolist()
    raise TypeError(f"settings must hold numbers, strings, lists, dicts and arrays alone, got {value!r}")


def _loss(module: LightningModule, batch: Any) -> Tensor:
    # As the Trainer does: hand over the index of the batch if the step takes one.
    parameters = inspect.signature(module.training_step).parameters
    takes_index = "batch_idx" in parameters or len(parameters) > 1
    output = module.training_step(batch, 0) if takes_index else module.training_step(batch)
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if not isinstance(loss, Tensor):
        raise ValueError(
            f"the training_step of {type(module).__name__} must return a loss tensor or a dict with 'loss' for the "
            f"nominal batch, got {output!r}"
        )
    return loss


def _precision(module: LightningModule) -> AbstractContextManager[Any]:
    try:
        trainer = module.trainer
    except RuntimeError:  # not attached: the public way to learn it
        return nullcontext()
    return trainer.precision_plugin.train_step_context() if isinstance(trainer, Trainer) else nullcontext()
