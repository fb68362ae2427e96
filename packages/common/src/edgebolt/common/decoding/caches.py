"""Key-value caches of transformers: cut back, thin out, measure.

``DynamicCache.crop`` changed its meaning inside transformers 5: up to 5.13 a positive number is the length to keep and
0 deletes everything, from 5.23 on a positive number is an error; a negative number removes that many in all of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from transformers import DynamicCache

__all__ = ["cache_bytes", "cache_length", "crop", "keep", "new_cache"]


def new_cache() -> DynamicCache:
    """An empty cache that keeps every position of every layer.

    It is built without a model's configuration, so that sliding windows, which cannot be cut back, do not come in.
    """
    from transformers import DynamicCache

    return DynamicCache()


def cache_length(cache: DynamicCache) -> int:
    """Positions in a cache.

    Example::

        >>> import torch
        >>> cache = new_cache()
        >>> _ = cache.update(torch.zeros(1, 2, 5, 4), torch.zeros(1, 2, 5, 4), 0)
        >>> cache_length(cache)
        5
    """
    return int(cache.get_seq_length())


def crop(cache: DynamicCache, length: int) -> None:
    """Keep the first ``length`` positions.

    Args:
        cache: changed in place.
        length: positions to keep, 0 among them.

    Raises:
        ValueError: if the cache has fewer; it is unchanged then.

    Example::

        >>> import torch
        >>> cache = new_cache()
        >>> _ = cache.update(torch.zeros(1, 2, 5, 4), torch.zeros(1, 2, 5, 4), 0)
        >>> crop(cache, 3)
        >>> cache_length(cache)
        3
    """
    there = cache_length(cache)
    if not 0 <= length <= there:
        raise ValueError(f"length={length}: the cache has {there} positions, of which 0 to {there} can be kept.")
    if length < there:
        cache.crop(length - there)


def keep(cache: DynamicCache, positions: Tensor) -> None:
    """Keep some positions, in the order given, and let the memory of the others go.

    Keys are stored with their rotation, which goes by the position that a token was given: a path of a tree that is
    taken out this way is what it would be without the other branches.

    Args:
        cache: changed in place, in every layer.
        positions: indices into the cache, shape ``[kept]``, integer.

    Raises:
        ValueError: for an index outside the cache; it is unchanged then.

    Example::

        >>> import torch
        >>> cache = new_cache()
        >>> rows = torch.arange(5.0).view(1, 1, 5, 1)
        >>> _ = cache.update(rows, rows, 0)
        >>> keep(cache, torch.tensor([0, 3]))
        >>> cache.layers[0].keys.flatten().tolist()
        [0.0, 3.0]
    """
    there = cache_length(cache)
    if positions.numel() and not 0 <= int(positions.min()) <= int(positions.max()) < there:
        raise ValueError(f"positions={positions.tolist()}: the cache has {there} positions, 0 to {there - 1}.")
    layers: list[Any] = cache.layers
    for layer in layers:
        if layer.get_seq_length():
            layer.keys = layer.keys.index_select(2, positions.to(layer.keys.device))
            layer.values = layer.values.index_select(2, positions.to(layer.values.device))


def cache_bytes(cache: DynamicCache) -> int:
    """Bytes of a cache's keys and values, those that a cut has left behind included.

    Example::

        >>> import torch
        >>> cache = new_cache()
        >>> _ = cache.update(torch.zeros(1, 2, 5, 4), torch.zeros(1, 2, 5, 4), 0)
        >>> cache_bytes(cache)
        320
    """
    layers: list[Any] = cache.layers
    held = [
        part.untyped_storage() for layer in layers if layer.keys is not None for part in (layer.keys, layer.values)
    ]
    return sum({storage.data_ptr(): int(storage.nbytes()) for storage in held}.values())
