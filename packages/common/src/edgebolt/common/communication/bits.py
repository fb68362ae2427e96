"""Bits and small numbers packed into bytes, lowest bit first; NumPy on the CPU, torch elsewhere."""

import numpy as np
import torch
from torch import Tensor

from edgebolt.common.communication.message import MessageError

__all__ = ["bytes_for", "pack_bits", "pack_numbers", "select", "unpack_bits", "unpack_numbers"]

# What NumPy has no name for is moved as integers of the same size.
_MOVED_AS = {torch.bfloat16: torch.int16}
_CHUNK = 2**20


def bytes_for(bits: int) -> int:
    """Bytes that hold so many bits."""
    return (bits + 7) // 8


def pack_bits(bits: Tensor) -> Tensor:
    """Bool ``[n]`` to uint8 ``[ceil(n / 8)]``; the last byte is filled up with zeros.

    Example::

        >>> pack_bits(torch.tensor([True, False, True, False, False, False, False, False, True])).tolist()
        [5, 1]
    """
    if bits.device.type == "cpu":
        return torch.from_numpy(np.packbits(bits.numpy(), bitorder="little"))
    padded = torch.nn.functional.pad(bits.to(torch.uint8), (0, -len(bits) % 8)).view(-1, 8)
    return (padded << torch.arange(8, dtype=torch.uint8, device=bits.device)).sum(1, dtype=torch.uint8)


def unpack_bits(data: Tensor, count: int) -> Tensor:
    """The inverse of :func:`pack_bits`, for ``count`` bits.

    Raises:
        MessageError: If ``data`` is not as long as that, or the filling is not zero.
    """
    if len(data) != bytes_for(count):
        raise MessageError(f"{count} bits take {bytes_for(count)} bytes, there are {len(data)}")
    if count % 8 and int(data[-1]) >> count % 8:
        raise MessageError("the bits that fill up the last byte are not zero")
    if data.device.type == "cpu":
        return torch.from_numpy(np.unpackbits(data.numpy(), count=count, bitorder="little").view(np.bool_))
    places = torch.arange(8, dtype=torch.uint8, device=data.device)
    return ((data.unsqueeze(1) >> places) & 1).view(-1)[:count].bool()


def pack_numbers(numbers: Tensor, width: int) -> Tensor:
    """Whole numbers below ``2 ** width``, ``[n]``, to uint8 ``[ceil(n * width / 8)]``.

    Example::

        >>> unpack_numbers(pack_numbers(torch.tensor([5, 0, 6]), 3), 3, 3).tolist()
        [5, 0, 6]
    """
    if width == 8:
        return numbers.to(torch.uint8)
    places = torch.arange(width, device=numbers.device)
    return pack_bits(((numbers.unsqueeze(1) >> places) & 1).view(-1).bool())


def unpack_numbers(data: Tensor, count: int, width: int) -> Tensor:
    """The inverse of :func:`pack_numbers`: int64 ``[count]``.

    Raises:
        MessageError: If ``data`` is not as long as that.
    """
    if width == 8 and len(data) == count:
        return data.long()
    bits = unpack_bits(data, count * width).view(count, width)
    numbers = torch.zeros(count, dtype=torch.int64, device=data.device)
    for place in range(width):  # a pass a bit, at most 63: no table of int64 a bit
        numbers |= bits[:, place].long() << place
    return numbers


def select(values: Tensor, mask: Tensor) -> Tensor:
    """``values[mask]`` of a vector; on the CPU by NumPy, which is several times as fast."""
    if values.device.type != "cpu":
        return values[mask]
    chosen, moved = mask.numpy(), values.view(_MOVED_AS.get(values.dtype, values.dtype)).numpy()
    selected = np.empty(np.count_nonzero(chosen), moved.dtype)
    stop = 0
    for begin in range(0, len(chosen), _CHUNK):  # NumPy makes a list of indices, eight bytes each, of what it is given
        part = slice(begin, begin + _CHUNK)
        start, stop = stop, stop + int(np.count_nonzero(chosen[part]))
        np.compress(chosen[part], moved[part], out=selected[start:stop])
    return torch.from_numpy(selected).view(values.dtype)
