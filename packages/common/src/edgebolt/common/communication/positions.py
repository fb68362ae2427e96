"""Which entries of a vector were kept: spelled as a bitmap, a list, or Golomb code, whichever is shortest."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from edgebolt.common.communication.bits import (
    bytes_for,
    pack_bits,
    pack_numbers,
    unpack_bits,
    unpack_numbers,
)
from edgebolt.common.communication.header import JSON
from edgebolt.common.communication.message import MessageError

__all__ = ["MAX_ENTRIES_PER_BYTE", "decode_positions", "encode_positions", "golomb_parameter"]

MAX_ENTRIES_PER_BYTE = 1024
"""Longest vector that a byte of positions may stand for; bounds what a forged message makes a receiver allocate."""

_RECORD_BYTES = 16  # what the vector's record in the header takes at the least: these bytes count, too

_WIDTHS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_SIGNED = {2: 2**16, 4: 2**32}


def golomb_parameter(density: float) -> int:
    """``b* = max(0, 1 + floor(log2(log(φ - 1) / log(1 - p))))``: low bits of a gap that are spelled out.

    Source: Sattler et al., "Robust and Communication-Efficient Federated Learning from Non-IID Data" (STC), 2019,
    after Golomb, "Run-Length Encodings", 1966; φ is the golden ratio and p the density.

    Example::

        >>> golomb_parameter(0.01), golomb_parameter(0.4)
        (6, 0)
    """
    golden = (1 + math.sqrt(5)) / 2
    return max(0, 1 + math.floor(math.log2(math.log(golden - 1) / math.log1p(-density))))


def encode_positions(mask: Tensor, kept: int) -> tuple[list[JSON], Tensor]:
    """Spells the places of the ``kept`` true entries of a bool vector in the fewest bytes.

    Returns:
        A record ``[coding, kept, ...]`` for the header, and uint8 bytes. Codings: ``"all"`` (no bytes), ``"bitmap"``
        (a bit an entry), ``"list"`` (an index of 1, 2, 4 or 8 bytes each), ``"golomb"`` (of each gap the high part
        in unary, all of them together, then all low parts of ``record[2]`` bits; ``record[3]`` is the length in bytes
        of the first).

    Example: two places of a thousand in three bytes::

        >>> mask = torch.zeros(1000, dtype=torch.bool)
        >>> mask[[3, 700]] = True
        >>> record, data = encode_positions(mask, 2)
        >>> record, len(data)
        (['golomb', 2, 8, 1], 3)
    """
    n = len(mask)
    if kept == n:
        return ["all", kept], mask.new_empty(0, dtype=torch.uint8)
    best = bytes_for(n)
    width = next(width for width in _WIDTHS if n <= 256**width)
    # Golomb code takes at least b + 1 bits an entry: where that is more than a bitmap there is no need to try.
    low = golomb_parameter(kept / n) if kept else 0
    listed = kept * width < best and _is_bounded(n, kept * width)
    if listed or (low and bytes_for(kept * (low + 1)) < best):
        indices = mask.nonzero().view(-1)
        record: list[JSON] = ["bitmap", kept]
        data: Tensor | None = None
        if listed:
            best, record = kept * width, ["list", kept]
            data = indices.to(_WIDTHS[width]).view(torch.uint8)
        if low:
            gaps = torch.diff(indices, prepend=indices.new_tensor([-1])) - 1
            ends = torch.cumsum((gaps >> low) + 1, 0)
            unary = int(ends[-1])
            size = bytes_for(unary) + bytes_for(kept * low)
            if size < best and _is_bounded(n, size):
                bits = torch.zeros(unary, dtype=torch.bool, device=mask.device)
                bits[ends - 1] = True
                lowest = pack_numbers(gaps & (2**low - 1), low)
                record, data = ["golomb", kept, low, bytes_for(unary)], torch.cat([pack_bits(bits), lowest])
        if data is not None:
            return record, data
    return ["bitmap", kept], pack_bits(mask)


def decode_positions(record: list[JSON], n: int, take: Callable[[int], Tensor]) -> Tensor | None:
    """The inverse of :func:`encode_positions`.

    Args:
        record: as it came.
        n: length of the vector, of which no more is known than that it is not negative.
        take: the next so many bytes; raises MessageError if they are not there.

    Returns:
        Bool ``[n]``; exactly ``record[1]`` are true. None: all, however many they are.

    Raises:
        MessageError: If record and bytes do not agree; before anything larger than the bytes allow is allocated.
    """
    if len(record) < 2 or type(record[1]) is not int or not 0 <= record[1] <= n:
        raise MessageError(f"positions are recorded as [coding, kept of {n}, ...], got {record!r}")
    coding, kept = record[0], record[1]
    if coding not in ("all", "bitmap", "list", "golomb"):
        raise MessageError(f"no coding of positions is called {coding!r}")
    if coding == "all":
        if kept != n:
            raise MessageError(f"{kept} of {n} entries are said to be all")
        return None
    if coding == "bitmap":
        mask = unpack_bits(take(bytes_for(n)), n)
        found = int(torch.count_nonzero(mask))
        if found != kept:
            raise MessageError(f"the bitmap marks {found} entries, the header says {kept}")
        return mask
    indices = _list(n, kept, take) if coding == "list" else _golomb(record, n, kept, take)
    if kept and (int(indices[0]) < 0 or int(indices[-1]) >= n or bool((torch.diff(indices) <= 0).any())):
        raise MessageError(f"positions must ascend from 0 to {n - 1}")
    mask = torch.zeros(n, dtype=torch.bool, device=indices.device)
    mask[indices] = True
    return mask


def _list(n: int, kept: int, take: Callable[[int], Tensor]) -> Tensor:
    width = next(width for width in _WIDTHS if n <= 256**width or width == 8)
    _check_expansion(n, kept * width)
    data = take(kept * width).clone()  # a copy begins at an address that fits any width
    indices = data.view(_WIDTHS[width]).long()
    return indices % _SIGNED[width] if width in _SIGNED else indices


def _golomb(record: list[JSON], n: int, kept: int, take: Callable[[int], Tensor]) -> Tensor:
    if len(record) != 4 or not all(type(value) is int and 0 <= value < 2**48 for value in record[2:]):
        raise MessageError(f"a golomb record is [coding, kept, low bits, bytes], got {record!r}")
    low, length = record[2], record[3]
    assert isinstance(low, int) and isinstance(length, int)
    if not 1 <= low <= 48:
        raise MessageError(f"golomb code has 1 to 48 low bits, got {low}")
    _check_expansion(n, length + bytes_for(kept * low))
    data = take(length)
    ends = unpack_bits(data, 8 * length).nonzero().view(-1)
    if len(ends) != kept or (kept and bytes_for(int(ends[-1]) + 1) != length) or (not kept and length):
        raise MessageError(f"the unary part marks {len(ends)} entries in {length} bytes, the header says {kept}")
    high = torch.diff(ends, prepend=ends.new_tensor([-1])) - 1
    lowest = unpack_numbers(take(bytes_for(kept * low)), kept, low)
    # high < 2**51 and low <= 48 may overflow 64 bits: a gap that large is refused before it is added up.
    if kept and int(high.max()) > n >> low:
        raise MessageError(f"a gap of golomb code is longer than the vector of {n}")
    return torch.cumsum((high << low) + lowest + 1, 0) - 1


def _is_bounded(n: int, size: int) -> bool:
    return n <= MAX_ENTRIES_PER_BYTE * (size + _RECORD_BYTES)


def _check_expansion(n: int, size: int) -> None:
    if not _is_bounded(n, size):
        raise MessageError(
            f"{size} bytes of positions stand for {n} entries, more than {MAX_ENTRIES_PER_BYTE} a byte: refused, so "
            "that a few bytes cannot fill the memory"
        )
