"""A training loader that can begin in the middle of an epoch, with the random numbers it would have had there."""

from __future__ import annotations

import dataclasses
import hashlib
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

__all__ = ["RandomStates", "ResumableLoader", "digest"]

_OVER = object()


class RandomStates:
    """All global random states, and those of generators that a loader and its samplers bring.

    Args:
        loader: whose generators belong to it; None: none.
        cuda: whether those of all CUDA devices belong to it.
    """

    def __init__(self, loader: Any = None, cuda: bool = False) -> None:
        samplers = [getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)]
        samplers.append(getattr(samplers[1], "sampler", None))
        found = [getattr(holder, "generator", None) for holder in (loader, *samplers)]
        self.generators = list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())
        self.cuda = cuda

    def read(self) -> dict[str, Any]:
        """The states: tensors and built-ins."""
        kind, keys, *rest = np.random.get_state(legacy=True)
        version, words, gauss = random.getstate()
        return {
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if self.cuda else [],
            "numpy": (str(kind), np.array(keys), *rest),
            "python": (version, np.array(words), gauss),  # as an array: 625 numbers one by one take milliseconds
            "generators": [generator.get_state() for generator in self.generators],
        }

    def write(self, states: Mapping[str, Any]) -> None:
        """The inverse of :meth:`read`."""
        torch.set_rng_state(states["torch"])
        if states["cuda"]:
            torch.cuda.set_rng_state_all(states["cuda"])
        np.random.set_state(states["numpy"])
        version, words, gauss = states["python"]
        random.setstate((version, tuple(words.tolist()), gauss))
        for generator, state in zip(self.generators, states["generators"], strict=True):
            generator.set_state(state)


class ResumableLoader:
    """The user's loader, which notes where it is and can be put there again.

    It draws the batches of the epoch up to that place once more and drops them, so that shuffling, samplers and
    workers come to the same state; then the random states of that place are put back. It changes no batch and draws no
    random number of its own.

    Args:
        loader: any sized loader.
        due: whether the place before the batch that is about to be drawn may be asked for.
        resume: a place that :meth:`place` had given, of the epoch that is about to begin; None: from its beginning.
        cuda: whether the random states of CUDA devices belong to a place.
    """

    def __init__(
        self, loader: Any, due: Callable[[], bool], resume: Mapping[str, Any] | None = None, cuda: bool = False
    ) -> None:
        self.loader, self._due, self._resume = loader, due, resume
        self._states = RandomStates(loader, cuda)
        self._iterator: Iterator[Any] | None = None
        self._begun: dict[str, Any] | None = None  # random states when this epoch's iterator was made
        self._first: dict[str, Any] | None = None  # and before its first batch
        self._now: dict[str, Any] | None = None  # and before its last batch, if the place was due
        self._mark = ""  # digest of this epoch's first batch
        self._digest = ""
        self._drawn = 0
        self._over = False  # it was asked for a batch and had none left; its fellows may have

    def __len__(self) -> int:
        return len(self.loader)

    def __getattr__(self, name: str) -> Any:
        # Its samplers, dataset and settings; not the places that a loader of another make would give of itself, which
        # count the batch that has been drawn and not trained.
        if name in ("state_dict", "load_state_dict", "loader"):
            raise AttributeError(name)
        return getattr(self.loader, name)

    @property
    def worker_init_fn(self) -> Any:
        """The loader's own, which Lightning sets."""
        return getattr(self.loader, "worker_init_fn", None)

    @worker_init_fn.setter
    def worker_init_fn(self, value: Any) -> None:
        self.loader.worker_init_fn = value

    def resume_at(self, place: Mapping[str, Any]) -> None:
        """Begin the epoch at a place that :meth:`place` or :meth:`place_after` had given.

        Raises:
            ValueError: if the first batch of an epoch that has ended cannot be drawn again, for then the data are
                others.
        """
        self._resume = place
        begun = place.get("last_epoch")
        if begun is None:
            return
        here = self._states.read()
        batch_sampler = getattr(self.loader, "batch_sampler", None)
        for sampler in (getattr(self.loader, "sampler", None), getattr(batch_sampler, "sampler", None)):
            if sampler is not None and callable(getattr(sampler, "set_epoch", None)):
                sampler.set_epoch(begun["epoch"])  # Lightning sets it anew before it draws
        self._states.write(begun["begun"])
        iterator = iter(self.loader)
        self._states.write(begun["first"])
        if digest(next(iterator, None)) != begun["digest"]:
            raise self._other_data(1)
        self._states.write(here)

    def __iter__(self) -> ResumableLoader:
        self._drawn, self._first, self._now, self._iterator, self._over = 0, None, None, None, False
        if self._resume is None:
            self._begun = self._states.read()
            self._iterator = iter(self.loader)
        return self

    def __next__(self) -> Any:
        resumed, self._resume = self._resume, None
        if resumed is not None:  # not before the first batch: by then samplers know the epoch
            self._go_to(resumed)
        if self._iterator is None:
            raise RuntimeError("call iter() on the loader first")
        due = self._due()
        if self._first is None:
            self._first = self._states.read()
        self._now = self._states.read() if due else None
        batch = next(self._iterator, _OVER)
        self._over = batch is _OVER
        if self._over:
            self._digest = "over"
        else:
            self._drawn += 1
            self._digest = digest(batch) if due or resumed is not None or self._drawn == 1 else ""
        if self._drawn == 1 and not self._over:
            self._mark = self._digest
        if resumed is not None and resumed["digest"] and resumed["digest"] != self._digest:
            raise self._other_data(resumed["drawn"] + 1)
        if self._over:
            raise StopIteration
        return batch

    def _other_data(self, number: int) -> ValueError:
        return ValueError(
            f"Batch {number} of the epoch is not the one that it was when the snapshot was taken: the data, their "
            "transforms, the batch size or the sampler have changed, or the loader is not repeatable (a generator "
            "inside the dataset, persistent workers). Put them back, or begin anew with another folder."
        )

    def _go_to(self, place: Mapping[str, Any]) -> None:
        self._states.write(place["begun"])
        self._begun = place["begun"]
        self._iterator = iter(self.loader)
        if place["drawn"]:
            self._states.write(place["first"])
            self._first = place["first"]
            for number in range(place["drawn"]):
                batch = next(self._iterator, None)
                if not number:
                    self._mark = digest(batch)
        self._drawn = place["drawn"]
        if place["now"] is not None:
            self._states.write(place["now"])

    def place(self) -> dict[str, Any]:
        """Where the loader was before it was asked last, which must have been due."""
        if self._now is None:
            raise RuntimeError("this place was not due")
        drawn = self._drawn - (not self._over)
        first = self._first if drawn else None
        place = {"begun": self._begun, "first": first, "now": self._now, "drawn": drawn, "digest": self._digest}
        return {**place, "length": len(self)}

    def place_after(self, epoch_is_over: bool, epoch: int) -> dict[str, Any]:
        """Where the loader is now, when all that it has drawn in this epoch is trained."""
        now = self._states.read()
        about: dict[str, Any] = {"length": len(self), "digest": "", "last_epoch": None}
        if self._first is not None:
            begun = {"epoch": epoch, "begun": self._begun, "first": self._first, "digest": self._mark}
            about["last_epoch"] = begun
        if epoch_is_over:
            return {"begun": now, "first": None, "now": None, "drawn": 0, **about}
        return {"begun": self._begun, "first": self._first, "now": now, "drawn": self._drawn, **about}


def digest(batch: Any) -> str:
    """SHA-256 of a batch's numbers and texts, nested anyhow; of other objects, what ``to_dict`` says or their type.

    Objects that are neither dataclasses nor have ``to_dict`` are told apart by their type alone.
    """
    sha = hashlib.sha256()
    _feed(batch, sha.update)
    return sha.hexdigest()


def _feed(node: Any, update: Callable[[bytes], None]) -> None:
    if isinstance(node, torch.Tensor):
        if node.is_nested or node.layout != torch.strided:
            update(f"{node.layout}".encode())
            for part in node.unbind() if node.is_nested else _parts(node):
                _feed(part, update)
            return
        update(f"{node.dtype}{tuple(node.shape)}".encode())
        if node.numel():
            update(node.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(node, np.ndarray) and node.dtype.hasobject:  # its bytes are addresses
        _feed(node.tolist(), update)
    elif isinstance(node, np.ndarray):
        update(f"{node.dtype}{node.shape}".encode() + node.tobytes())
    elif isinstance(node, Mapping):
        for key, value in node.items():
            update(repr(key).encode())
            _feed(value, update)
    elif isinstance(node, list | tuple):
        update(f"{type(node).__name__}{len(node)}".encode())
        for item in node:
            _feed(item, update)
    elif isinstance(node, str | bytes | int | float | bool | np.generic | type(None)):
        update(repr(node).encode())
    elif dataclasses.is_dataclass(node) and not isinstance(node, type):
        update(type(node).__qualname__.encode())
        for field in dataclasses.fields(node):
            _feed(getattr(node, field.name), update)
    elif hasattr(node, "to_dict"):
        _feed(node.to_dict(), update)
    else:
        update(type(node).__qualname__.encode())


def _parts(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The dense tensors of a sparse one."""
    if tensor.layout == torch.sparse_coo:
        tensor = tensor.coalesce()
        return torch.tensor(tensor.shape), tensor.indices(), tensor.values()
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return torch.tensor(tensor.shape), tensor.crow_indices(), tensor.col_indices(), tensor.values()
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return torch.tensor(tensor.shape), tensor.ccol_indices(), tensor.row_indices(), tensor.values()
    return (tensor.to_dense(),)
