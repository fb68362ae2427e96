"""Where each tensor lies in a safetensors blob: a function of names, dtypes and shapes alone."""

import json
from functools import lru_cache
from math import prod
from typing import NamedTuple, TypeAlias

import torch

__all__ = ["DTYPES", "MAX_INDEX_BYTES", "Layout", "Signature", "compute_layout", "layout_of"]

Signature: TypeAlias = tuple[tuple[str, torch.dtype, tuple[int, ...]], ...]
"""(name, dtype, shape) of every tensor."""

MAX_INDEX_BYTES = 2**24
"""Longest index in bytes (some 150 000 tensors); bounds what a forged index can make a receiver allocate."""

# In the order of the safetensors library, which puts the most strictly aligned first and sorts by name within a dtype.
DTYPES = {
    "I64": torch.int64,
    "F64": torch.float64,
    "F32": torch.float32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The dtypes that travel, by their names on the wire."""

_WIRE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_RANK = {dtype: rank for rank, dtype in enumerate(_WIRE_NAMES)}
_MAX_DIMENSIONS = 64  # torch's own limit in most kernels


class Layout(NamedTuple):
    """The plan of a blob: the bytes before the data, the names in wire order, the length in bytes of it all."""

    head: bytes
    names: tuple[str, ...]
    size: int


def compute_layout(signature: Signature) -> Layout:
    """Returns the blob's layout, the same bytes that the safetensors library writes.

    Raises:
        TypeError: If a name or dtype cannot travel.
        ValueError: If a shape or the index is too large.
    """
    entries: dict[str, dict[str, object]] = {}
    offset = 0
    for name, dtype, shape in sorted(signature, key=_wire_order):
        stop = offset + _length(name, dtype, shape)
        entries[name] = {"dtype": _WIRE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, stop]}
        offset = stop
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_INDEX_BYTES:
        raise ValueError(f"the index of {len(entries)} tensors takes {len(text)} bytes, more than {MAX_INDEX_BYTES}")
    head = len(text).to_bytes(8, "little") + text
    return Layout(head, tuple(entries), len(head) + offset)


layout_of = lru_cache(maxsize=512)(compute_layout)
"""`compute_layout`, remembered. For what this side sends: what arrives must not be able to fill a cache."""


def _wire_order(entry: tuple[str, torch.dtype, tuple[int, ...]]) -> tuple[int, str]:
    name, dtype, _ = entry
    if type(name) is not str:
        raise TypeError(f"tensor name {name!r} is of type {type(name).__name__}: convert it with str(name)")
    if name == "__metadata__":
        raise TypeError("the tensor name '__metadata__' is reserved by safetensors: rename the tensor")
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise TypeError(f"tensor name {name!r} has a lone surrogate, which has no UTF-8 form") from error
    if dtype not in _RANK:
        raise TypeError(f"tensor {name!r} has dtype {dtype}: convert it with .to(...) to one of {list(_RANK)}")
    return _RANK[dtype], name


def _length(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    if len(shape) > _MAX_DIMENSIONS:
        raise ValueError(f"tensor {name!r} has {len(shape)} dimensions, more than {_MAX_DIMENSIONS}")
    # Empty dimensions count as 1: torch computes strides, and overflows, for empty tensors as well.
    if prod(max(size, 1) for size in shape) * dtype.itemsize >= 2**63:
        raise ValueError(f"tensor {name!r} has shape {list(shape)}, whose size overflows 64 bits")
    return prod(shape) * dtype.itemsize
