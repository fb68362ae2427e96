"""The header of a message: a small JSON object with one canonical spelling."""

import json
from collections.abc import Mapping
from typing import Any, TypeAlias

__all__ = ["JSON", "MAX_HEADER_BYTES", "canonical_header", "dump_header", "parse_header"]

JSON: TypeAlias = "bool | int | float | str | list[JSON] | dict[str, JSON] | None"
"""What a header value may be. Exact types only: neither tuples nor NumPy scalars, which a wire would change."""

MAX_HEADER_BYTES = 2**20
"""Longest header in bytes. A header is a note beside the tensors; parsed JSON takes some twenty times its length."""

_MAX_DEPTH = 32
_INT_RANGE = range(-(2**63), 2**64)
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), check_circular=False).encode


def canonical_header(header: Mapping[str, Any]) -> dict[str, JSON]:
    """Returns a private copy with sorted keys, the very object that a receiver parses from the wire.

    Args:
        header: Mapping of str to None, bool, int of 64 bits, float (NaN and infinities too), str, list, or dict of
            the same.

    Raises:
        TypeError: If a key or value is of any other type; the message names the key and says how to convert.
    """
    return {key: _canonical(header[key], key, 1) for key in _sorted_keys(header, "the header")}


def dump_header(header: Mapping[str, JSON]) -> bytes:
    """Spells a canonical header as compact UTF-8 JSON; NaN and the infinities as the bare words of Python's ``json``.

    Raises:
        ValueError: If the header is longer than `MAX_HEADER_BYTES`.
    """
    data = _encode(header).encode()
    if len(data) > MAX_HEADER_BYTES:
        raise ValueError(
            f"the header is {len(data)} bytes long, more than {MAX_HEADER_BYTES}: put long lists into the tensors"
        )
    return data


def parse_header(data: bytes) -> dict[str, JSON]:
    """Parses what `dump_header` wrote and accepts no other spelling.

    Raises:
        ValueError: If the bytes are not the canonical spelling of a header.
    """
    if len(data) > MAX_HEADER_BYTES:
        raise ValueError(f"it claims {len(data)} bytes, more than {MAX_HEADER_BYTES}")
    try:
        parsed = json.loads(data.decode())
        if type(parsed) is not dict:
            raise ValueError(f"it is a JSON {type(parsed).__name__}, not an object")
        header = canonical_header(parsed)
    except (TypeError, RecursionError) as error:
        raise ValueError(str(error)) from error
    if dump_header(header) != data:
        raise ValueError("it is not in canonical form (compact, sorted, unique keys)")
    return header


def _sorted_keys(mapping: Mapping[str, Any], where: str) -> list[str]:
    for key in mapping:
        if type(key) is not str:
            raise TypeError(f"key {key!r} of {where} is of type {type(key).__name__}: convert it with str(key)")
        _check_text(key, f"a key of {where}")
    return sorted(mapping)


def _canonical(value: Any, key: str, depth: int) -> JSON:
    kind = type(value)
    if kind is float or kind is bool or value is None:
        return value  # type: ignore[no-any-return]
    if kind is str:
        _check_text(value, f"header[{key!r}]")
        return value  # type: ignore[no-any-return]
    if kind is int:
        if value not in _INT_RANGE:
            raise TypeError(f"header[{key!r}] is an int of more than 64 bits: convert it with str(value)")
        return value  # type: ignore[no-any-return]
    if kind is list or kind is dict:
        if depth >= _MAX_DEPTH:
            raise TypeError(f"header[{key!r}] is a {kind.__name__} nested deeper than {_MAX_DEPTH}: flatten it")
        if kind is list:
            return [_canonical(item, key, depth + 1) for item in value]
        return {name: _canonical(value[name], key, depth + 1) for name in _sorted_keys(value, f"header[{key!r}]")}
    raise TypeError(f"header[{key!r}] is of type {kind.__module__}.{kind.__qualname__}: {_hint(value)}")


def _check_text(text: str, where: str) -> None:
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise TypeError(f"{where} is a str with a lone surrogate, which has no UTF-8 form: {text!r}") from error


def _hint(value: Any) -> str:
    if isinstance(value, Mapping):
        return "convert it with dict(value)"
    if isinstance(value, (tuple, set, frozenset)):
        return "convert it with list(value)"
    if hasattr(value, "tolist"):
        return "convert it with value.tolist(), or send it among the tensors"
    for builtin in (str, int, float):
        if isinstance(value, builtin):
            return f"convert it with {builtin.__name__}(value)"
    if isinstance(value, (bytes, bytearray, memoryview)):
        return "convert it with torch.frombuffer(...) and send it among the tensors"
    return "convert it to None, bool, int, float, str, list or dict"
