"""Bytes that autograd keeps for the backward pass."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

__all__ = ["SavedBytes"]


class SavedBytes:
    """Context manager that adds up what the forward pass inside it saves for backward.

    A storage counts once, in full, however many tensors view it: that is what stays in memory. Parameters and buffers
    are resident anyway and do not count. Parts under activation checkpointing save their inputs alone, as in truth.

    Args:
        resident: Tensors whose storages do not count, e.g. parameters and buffers.

    Attributes:
        nbytes: Bytes so far.

    Example::

        >>> import torch
        >>> from edgebolt.common.devices.saved import SavedBytes
        >>> layer = torch.nn.Linear(10, 3)
        >>> with SavedBytes(layer.parameters()) as saved:
        ...     loss = layer(torch.ones(4, 10)).relu().sum()
        >>> saved.nbytes == 4 * 10 * 4 + 4 * 3 * 4      # the input of the layer and the output of relu, float32
        True
    """

    def __init__(self, resident: Iterable[Tensor] = ()) -> None:
        self._resident = list(resident)  # kept alive, so that no other storage can take an address of theirs
        self._seen = {part.untyped_storage().data_ptr() for tensor in self._resident for part in _dense_parts(tensor)}
        self._hooks = saved_tensors_hooks(self._pack, lambda tensor: tensor)
        self.nbytes = 0

    def __enter__(self) -> SavedBytes:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)

    def _pack(self, tensor: Tensor) -> Tensor:
        for part in _dense_parts(tensor):
            storage = part.untyped_storage()
            if storage.data_ptr() not in self._seen:
                self._seen.add(storage.data_ptr())
                self.nbytes += storage.nbytes()
        return tensor


def _dense_parts(tensor: Tensor) -> Iterator[Tensor]:
    if tensor.layout is torch.sparse_coo:
        tensor = tensor.coalesce()
        yield from (tensor.indices(), tensor.values())
    elif tensor.layout is torch.sparse_csr:
        yield from (tensor.crow_indices(), tensor.col_indices(), tensor.values())
    elif tensor.layout is torch.strided:
        yield tensor
