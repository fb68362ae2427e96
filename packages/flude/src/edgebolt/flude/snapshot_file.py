"""A nested state in one safetensors file, its structure as JSON in the header, written at once or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from edgebolt.common.files import replaced

__all__ = ["read_snapshot", "write_snapshot"]

_FORMAT = "edgebolt.snapshot/1"
_PLAIN = (str, int, float, bool, type(None))


def write_snapshot(path: Path, state: Mapping[str, Any]) -> None:
    """Write a state; whoever reads, at any instant and after any crash, finds the former file or this one, whole.

    The file is written beside its place under another name, flushed to the disk, and renamed; then the folder is
    flushed, so that the name is on the disk too. What an interrupted write has left is removed by the next one.

    Args:
        path: the file; its folder must exist.
        state: dicts, lists, tuples and sets of tensors, numpy arrays, numbers, strings, bytes and None. Keys of dicts
            are such plain values or tuples of them.

    Raises:
        TypeError: for anything else, with its place in the state. Nothing is written then.
    """
    tensors: dict[str, torch.Tensor] = {}
    structure = json.dumps(_packed(state, "state", tensors), separators=(",", ":"))
    for stale in path.parent.glob(f".{path.name}.*.partial"):
        stale.unlink(missing_ok=True)
    with replaced(path, durable=True) as partial:
        save_file(tensors, partial, metadata={"format": _FORMAT, "structure": structure})


def read_snapshot(path: Path) -> dict[str, Any]:
    """The state that :func:`write_snapshot` wrote, tensors on the CPU.

    Raises:
        ValueError: if the file is damaged, or none of its.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise ValueError(f"its format is {metadata.get('format')!r}, not {_FORMAT!r}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no dict
            state: dict[str, Any] = _unpacked(json.loads(metadata["structure"]), tensors)
    except (SafetensorError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is no whole snapshot ({error}): remove it to begin anew.") from error
    return state


def _packed(node: Any, place: str, tensors: dict[str, torch.Tensor]) -> Any:
    """Plain values as they are, all else as a list that begins with the name of its kind."""
    if type(node) in _PLAIN:
        return node
    if isinstance(node, torch.Tensor):
        if node.layout != torch.strided or node.is_complex() or node.is_quantized:
            raise TypeError(f"{place} is a {node.dtype} {node.layout} tensor, which a snapshot cannot hold.")
        name = str(len(tensors))
        tensors[name] = node.detach().cpu().clone().contiguous()  # a copy: safetensors refuses shared storage
        return ["tensor", name]
    if isinstance(node, np.ndarray) and node.dtype.kind in "biuf":
        return ["array", str(node.dtype), _packed(torch.from_numpy(_signed(node)), place, tensors)]
    if isinstance(node, np.generic):
        return _packed(node.item(), place, tensors)
    if isinstance(node, bytes):
        return ["bytes", node.hex()]
    if isinstance(node, Mapping):
        pairs = [
            (_packed(k, f"a key of {place}", tensors), _packed(v, f"{place}[{k!r}]", tensors)) for k, v in node.items()
        ]
        return ["dict", pairs]
    for kind in (list, tuple, set, frozenset):
        if isinstance(node, kind):
            return [kind.__name__, [_packed(item, f"{place}[{i}]", tensors) for i, item in enumerate(node)]]
    if isinstance(node, str):  # a text of a class of its own, which `str` may call by another name
        return str.__str__(node)
    for plain in (int, float):
        if isinstance(node, plain):
            return plain(node)
    raise TypeError(
        f"{place} is a {type(node).__name__}, and a snapshot holds tensors, arrays, numbers, strings, and dicts, "
        "lists, tuples and sets of them, never pickles: return such things from state_dict() or on_save_checkpoint()."
    )


def _signed(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """A contiguous copy in a dtype that torch has everywhere; unsigned integers keep their bits."""
    array = np.array(array, order="C")
    return array.view(f"i{array.dtype.itemsize}") if array.dtype.kind == "u" and array.dtype.itemsize > 1 else array


def _unpacked(node: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    if not isinstance(node, list):
        return node
    kind, content = node[0], node[1]
    if kind == "tensor":
        return tensors[content]
    if kind == "array":
        return _unpacked(node[2], tensors).numpy().view(content)
    if kind == "bytes":
        return bytes.fromhex(content)
    if kind == "dict":
        return {_unpacked(key, tensors): _unpacked(value, tensors) for key, value in content}
    kinds = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}
    return kinds[kind](_unpacked(item, tensors) for item in content)
