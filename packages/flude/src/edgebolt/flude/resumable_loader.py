"""A training loader that can begin in the middle of an epoch, with the random numbers it would have had there."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

__all__ = ["RandomStates", "ResumableLoader", "digest"]


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
        self._digest = ""
        self._drawn = 0

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

    def __iter__(self) -> ResumableLoader:
        self._drawn, self._first, self._now, self._iterator = 0, None, None, None
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
        batch = next(self._iterator)
        self._drawn += 1
        self._digest = digest(batch) if due or resumed is not None else ""
        if resumed is not None and resumed["digest"] and resumed["digest"] != self._digest:
            raise ValueError(
                f"Batch {self._drawn} of the epoch is not the one that was to come when the snapshot was taken: the "
                "data, their transforms, the batch size or the sampler have changed, or the loader is not repeatable "
                "(a generator inside the dataset, persistent workers). Put them back, or begin anew with another "
                "folder."
            )
        return batch

    def _go_to(self, place: Mapping[str, Any]) -> None:
        self._states.write(place["begun"])
        self._begun = place["begun"]
        self._iterator = iter(self.loader)
        if place["drawn"]:
            self._states.write(place["first"])
            self._first = place["first"]
            for _ in range(place["drawn"]):
                next(self._iterator)
        self._drawn = place["drawn"]
        if place["now"] is not None:
            self._states.write(place["now"])

    def place(self) -> dict[str, Any]:
        """Where the loader was before the batch that it has drawn last, which must have been due."""
        if self._now is None:
            raise RuntimeError("this place was not due")
        drawn = self._drawn - 1
        first = self._first if drawn else None
        place = {"begun": self._begun, "first": first, "now": self._now, "drawn": drawn, "digest": self._digest}
        return {**place, "length": len(self)}

    def place_after(self, epoch_is_over: bool) -> dict[str, Any]:
        """Where the loader is now, when all that it has drawn is trained."""
        now = self._states.read()
        about = {"length": len(self), "digest": ""}
        if epoch_is_over:
            return {"begun": now, "first": None, "now": None, "drawn": 0, **about}
        return {"begun": self._begun, "first": self._first, "now": now, "drawn": self._drawn, **about}


def digest(batch: Any) -> str:
    """SHA-256 of a batch's numbers and texts, nested anyhow; of other objects, what ``to_dict`` says or their type."""
    sha = hashlib.sha256()
    _feed(batch, sha.update)
    return sha.hexdigest()


def _feed(node: Any, update: Callable[[bytes], None]) -> None:
    if isinstance(node, torch.Tensor):
        update(f"{node.dtype}{tuple(node.shape)}".encode())
        if node.numel():
            update(node.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
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
    elif isinstance(node, str | bytes | int | float | bool | type(None)):
        update(repr(node).encode())
    elif hasattr(node, "to_dict"):
        _feed(node.to_dict(), update)
    else:
        update(type(node).__qualname__.encode())
