"""Run steps of a module for their figures and leave no trace of them."""

from __future__ import annotations

import random
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torchmetrics import Metric, MetricCollection

__all__ = ["LogValue", "quiet"]

LogValue = float | Tensor | Metric
_CONTAINERS = (list, dict, set, OrderedDict, defaultdict, deque)
_Undo = Callable[[], object]


@contextmanager
def quiet(module: nn.Module) -> Iterator[dict[str, list[tuple[LogValue, int | None]]]]:
    """Open a space in which steps of ``module`` may run and after which everything is as before.

    While it is open, ``log`` and ``log_dict`` of every ``LightningModule`` in ``module`` write into the dict that is
    yielded and do not reach the Trainer, and every ``grad`` is None. On exit, after an error too, these are as before:

    * the random state of torch (CPU, CUDA, MPS), numpy and Python, and of generators that the modules hold;
    * buffers, metric states, ``training`` flags and all other attributes of all submodules: objects come back, and
      tensors, generators, lists, dicts and sets get their old content back in place, so that what was shared
      (the compute groups of a ``MetricCollection``) stays shared;
    * ``grad`` and ``requires_grad`` of all parameters.

    Not undone: in-place changes of parameter values (an optimizer step), of objects of other types, and of anything
    outside the module, such as ``self.logger.experiment``. The module may be attached to a Trainer or not; a step
    that reads ``self.trainer`` needs one.

    Args:
        module: The module whose ``training_step``, ``validation_step`` or ``forward`` is going to be called.

    Yields:
        Name to the list of what was logged under it, in order: ``(value, batch_size)`` with detached tensors, floats
        or ``torchmetrics.Metric`` objects, and ``batch_size`` None if the step did not state it. A ``Metric`` gets its
        old state back on exit, so ``reset()`` it at the beginning and call ``compute()`` before the end.

    Raises:
        ValueError: If the module has lazy parameters, which a step would make once and for all.

    Example::

        >>> import torch
        >>> from lightning.pytorch import LightningModule
        >>> from edgebolt.common.quiet import quiet
        >>> class Noisy(LightningModule):
        ...     def training_step(self, batch, batch_idx):
        ...         self.log("noise", torch.rand(()).item(), batch_size=len(batch))
        >>> module = Noisy()
        >>> _ = torch.manual_seed(0)
        >>> with quiet(module) as logged:
        ...     module.training_step([1, 2, 3], 0)
        >>> logged["noise"][0][1]
        3
        >>> logged["noise"][0][0] == torch.rand(()).item()      # the generator stands where it stood
        True
    """
    if any(is_lazy(parameter) for parameter in module.parameters()):
        raise ValueError(f"{type(module).__name__} has lazy parameters without a shape; run one forward before")
    undo = [*_random_states(), *_gradients(module), *_attributes(module)]
    logged: dict[str, list[tuple[LogValue, int | None]]] = {}
    try:
        for parameter in module.parameters():
            parameter.grad = None
        for part in module.modules():
            if isinstance(part, LightningModule):
                _capture(part, logged)
        yield logged
    finally:
        for step in undo:
            step()


def _capture(module: LightningModule, logged: dict[str, list[tuple[LogValue, int | None]]]) -> None:
    """Set instance attributes that hide ``log`` and ``log_dict``; restoring the attributes takes them away."""

    def log(name: str, value: LogValue, *args: object, batch_size: int | None = None, **kwargs: object) -> None:
        kept = value.detach().clone() if isinstance(value, Tensor) else value
        logged.setdefault(name, []).append((kept, batch_size))

    def log_dict(
        dictionary: Mapping[str, LogValue] | MetricCollection,
        *args: object,
        batch_size: int | None = None,
        **kwargs: object,
    ) -> None:
        if isinstance(dictionary, MetricCollection):  # by reference: nothing is gained by copies of states
            dictionary = dict(dictionary.items(keep_base=False, copy_state=False))
        for name, value in dictionary.items():
            log(name, value, batch_size=batch_size)

    # Through the dict: nn.Module and LightningModule would have their say about setattr.
    vars(module).update(log=log, log_dict=log_dict)


def _random_states() -> Iterator[_Undo]:
    yield partial(torch.set_rng_state, torch.get_rng_state())
    yield partial(np.random.set_state, np.random.get_state())
    yield partial(random.setstate, random.getstate())
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        yield partial(torch.cuda.set_rng_state_all, torch.cuda.get_rng_state_all())
    if torch.backends.mps.is_available():
        yield partial(torch.mps.set_rng_state, torch.mps.get_rng_state())


def _gradients(module: nn.Module) -> Iterator[_Undo]:
    for parameter in module.parameters():
        yield partial(parameter.requires_grad_, parameter.requires_grad)
        # The tensor itself comes back: the steps inside begin with None and write to another one.
        yield partial(setattr, parameter, "grad", parameter.grad)


def _attributes(module: nn.Module) -> Iterator[_Undo]:
    seen: set[int] = set()
    for part in module.modules():
        # The dict of attributes is a container like any other; `_buffers` and `_modules` are dicts inside it.
        yield from _content(vars(part), seen)


def _content(value: Any, seen: set[int]) -> Iterator[_Undo]:
    """Ways back to the present content of a mutable value; nothing for a value that is of another type."""
    if id(value) in seen or not isinstance(value, (Tensor, torch.Generator, np.random.Generator, *_CONTAINERS)):
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        # What torch refuses to write in place (expanded tensors) no step has changed; sparse ones are left alone.
        writable = value.layout is torch.strided and 0 not in value.stride()
        if writable and not isinstance(value, nn.Parameter):
            yield _tensor(value)
    elif isinstance(value, torch.Generator):
        yield partial(value.set_state, value.get_state())
    elif isinstance(value, np.random.Generator):
        yield partial(setattr, value.bit_generator, "state", value.bit_generator.state)
    elif type(value) in _CONTAINERS:
        yield _container(value)
        for child in list(value.values() if isinstance(value, dict) else value):
            yield from _content(child, seen)


def _tensor(value: Tensor) -> _Undo:
    def same_mode() -> AbstractContextManager[Any]:  # metric states made in a validation loop are inference tensors
        return torch.inference_mode(value.is_inference())

    with same_mode(), torch.no_grad():
        saved = value.detach().clone()

    def restore() -> None:
        with same_mode(), torch.no_grad():
            value.copy_(saved)

    return restore


def _container(value: Any) -> _Undo:
    saved = value.copy()

    def restore() -> None:
        value.clear()
        value.extend(saved) if isinstance(value, (list, deque)) else value.update(saved)

    return restore
