"""Nested built-ins and tensors as bytes: a message of ours, so no pickle, and every float bit for bit."""

from __future__ import annotations

from enum import Enum
from typing import Any

import torch

from edgebolt.common.communication import JSON, Message, MessageError, Tensors

__all__ = ["dump_plain", "load_plain"]


def dump_plain(value: Any) -> bytes:
    """Spell None, bools, numbers, strings, tensors, and lists, tuples and dicts of them.

    Raises:
        TypeError: for anything else, and for numbers that no header carries.

    Example::

        >>> load_plain(dump_plain({"betas": (0.9, 0.999), 3: None}))
        {'betas': (0.9, 0.999), 3: None}
    """
    tensors: Tensors = {}
    header = {"plain": _spell(value, tensors)}
    return Message(tensors, header).to_bytes()


def load_plain(blob: bytes) -> Any:
    """Read what :func:`dump_plain` has written.

    Raises:
        MessageError: for other bytes.
    """
    message = Message.from_bytes(blob)
    try:
        return _read(message.header["plain"], message)
    except (KeyError, TypeError, ValueError) as error:
        raise MessageError(f"the bytes are a message, and none of built-ins: {error!r}") from error


def _spell(value: Any, tensors: Tensors) -> JSON:
    if isinstance(value, Enum):
        return _spell(value.value, tensors)
    if isinstance(value, torch.Tensor):
        tensors[str(len(tensors))] = value
        return {"tensor": str(len(tensors) - 1)}
    if isinstance(value, dict):
        return {"dict": [[_spell(key, tensors), _spell(item, tensors)] for key, item in value.items()]}
    if isinstance(value, tuple):
        return {"tuple": [_spell(item, tensors) for item in value]}
    if isinstance(value, list):
        return [_spell(item, tensors) for item in value]
    return value  # type: ignore[no-any-return]  # the message refuses what no header carries


def _read(value: JSON, message: Message) -> Any:
    if isinstance(value, list):
        return [_read(item, message) for item in value]
    if not isinstance(value, dict):
        return value
    kind: str
    inner: Any
    ((kind, inner),) = value.items()
    if kind == "tensor":
        return message.tensors[inner]
    if kind == "tuple":
        return tuple(_read(item, message) for item in inner)
    if kind == "dict":
        return {_read(key, message): _read(item, message) for key, item in inner}
    raise ValueError(f"unknown kind {kind!r}")
