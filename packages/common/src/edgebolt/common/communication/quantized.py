"""Codecs that spell every entry in a few bits: QSGD, scaled signs, whole numbers of 8 bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

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
from edgebolt.common.communication.packed import PackedCodec, Reader, Writer
from edgebolt.common.random import derive

__all__ = ["QSGD", "Int8", "SignSGD"]


@dataclass(frozen=True)
class QSGD(PackedCodec):
    """Each entry is rounded at random to one of ``s = 2^(bits-1) - 1`` levels of its bucket's norm, without bias.

    Source: Alistarh et al., "QSGD: Communication-Efficient SGD via Gradient Quantization and Encoding", 2017:
    ``Q(v_i) = ‖v‖ · sgn(v_i) · ξ_i``, where ``ξ_i`` is ``l/s`` or ``(l+1)/s`` around ``|v_i| / ‖v‖``, with
    probabilities that make it right in the mean. Levels are spelled in ``bits`` bits each, the sign included (the
    paper's Elias code is shorter only where almost all are zero).

    The random numbers are a function of ``seed`` and of the norms, so that equal tensors give equal messages,
    whichever process encodes them.

    Args:
        bits: of an entry, 2 to 8.
        bucket: entries with a norm of their own.
        norm: ``"l2"`` (the paper's analysis), or ``"max"``, the largest magnitude, which has less variance.
        seed: of the rounding.
        scope, min_numel: see :class:`PackedCodec`.

    Raises:
        ValueError: If an argument is out of range.

    Example::

        >>> codec = QSGD(bits=8, norm="max")
        >>> vector = torch.linspace(-1, 1, 1000)
        >>> bool((codec.decode(codec.encode({"w": vector}))["w"] - vector).abs().max() <= 1 / 127)
        True
    """

    name: ClassVar[str] = "qsgd"
    bits: int = 4
    bucket: int = 512
    norm: Literal["l2", "max"] = "l2"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.bits) is not int or not 2 <= self.bits <= 8:
            raise ValueError(f"bits={self.bits!r}: use 2 to 8 bits an entry.")
        if type(self.bucket) is not int or self.bucket < 1:
            raise ValueError(f"bucket={self.bucket!r}: use a whole number of entries, 1 or more.")
        if self.norm not in ("l2", "max"):
            raise ValueError(f"norm={self.norm!r}: use 'l2' or 'max'.")

    def pack(self, vector: Tensor, writer: Writer) -> list[JSON] | None:
        """The norms, and a number an entry."""
        n, wide = len(vector), torch.promote_types(vector.dtype, torch.float32)
        rows = torch.nn.functional.pad(vector.to(wide), (0, -n % self.bucket)).view(-1, self.bucket)
        # In float64, or norms of the largest float32 numbers would overflow.
        norms = rows.abs().amax(1).double() if self.norm == "max" else rows.double().norm(dim=1)
        norms = norms.clamp(max=torch.finfo(torch.float32).max).float()
        levels = 2 ** (self.bits - 1) - 1
        generator = torch.Generator(device=vector.device)
        generator.manual_seed(derive(self.seed, "qsgd", n, repr(float(norms.double().sum()))))
        scaled = rows.abs() / norms.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(1).to(wide) * levels
        noise = torch.rand(scaled.shape, generator=generator, device=vector.device)
        numbers = (scaled + noise).floor_().clamp_(max=levels).to(torch.uint8)
        numbers += (rows < 0).to(torch.uint8) << self.bits - 1
        writer.scalars(norms)
        writer.bytes(pack_numbers(numbers.view(-1)[:n], self.bits))
        return [self.bits, self.bucket]

    def unpack(
        self, record: list[JSON], n: int, dtype: torch.dtype, reader: Reader, old: Callable[[], Tensor | None]
    ) -> Tensor:
        """Levels times norms."""
        if len(record) != 2 or not all(type(value) is int for value in record):
            raise MessageError(f"a record of QSGD is [bits, bucket], got {record!r}")
        bits, bucket = record
        assert isinstance(bits, int) and isinstance(bucket, int)
        if not 2 <= bits <= 8 or not 1 <= bucket < 2**48:
            raise MessageError(f"QSGD has 2 to 8 bits and buckets of 1 or more, got {record!r}")
        numbers = unpack_numbers(reader.bytes(bytes_for(n * bits)), n, bits)
        norms = reader.scalars(-(-n // bucket))
        sign, levels = 1 << bits - 1, 2 ** (bits - 1) - 1
        wide = torch.promote_types(dtype, torch.float32)
        values = (numbers & sign - 1).to(wide) / levels
        values = torch.where(numbers >= sign, -values, values)
        return (values * norms.to(wide).repeat_interleave(min(bucket, n))[:n]).to(dtype)


@dataclass(frozen=True)
class SignSGD(PackedCodec):
    """A sign an entry (``x >= 0``) and one magnitude for all: the mean of ``|x|``, or a number of your choice.

    Source: Bernstein et al., "signSGD", 2018, for the signs; the mean as their scale is that of Karimireddy et al.,
    "Error Feedback Fixes SignSGD", 2019.

    Args:
        scale: ``"mean"``, or the magnitude that every entry gets: 1.0 gives bare signs.
        scope, min_numel: see :class:`PackedCodec`.

    Raises:
        ValueError: If an argument is out of range.

    Example::

        >>> SignSGD().decode(SignSGD().encode({"w": torch.tensor([0.5, -0.1, 0.3])}))["w"]
        tensor([ 0.3000, -0.3000,  0.3000])
    """

    name: ClassVar[str] = "signsgd"
    scale: float | Literal["mean"] = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scale != "mean" and not (isinstance(self.scale, int | float) and self.scale > 0):
            raise ValueError(f"scale={self.scale!r}: use 'mean' or a number above 0.")

    def pack(self, vector: Tensor, writer: Writer) -> list[JSON] | None:
        """Signs and magnitude."""
        mean = vector.abs().sum(dtype=torch.float64) / len(vector)
        writer.scalars(mean if self.scale == "mean" else torch.full_like(mean, self.scale))
        writer.bytes(pack_bits(vector >= 0))
        return []

    def unpack(
        self, record: list[JSON], n: int, dtype: torch.dtype, reader: Reader, old: Callable[[], Tensor | None]
    ) -> Tensor:
        """Plus or minus the magnitude."""
        positive = unpack_bits(reader.bytes(bytes_for(n)), n)
        magnitude = reader.scalars(1).to(dtype)
        return torch.where(positive, magnitude, -magnitude)


@dataclass(frozen=True)
class Int8(PackedCodec):
    """Whole numbers from -127 to 127, times a scale of each vector: ``x ≈ q · max|x| / 127``, rounded to the nearest.

    The error of an entry is at most half a step, ``max|x| / 254`` (and the rounding of the dtype).

    Args:
        scope, min_numel: see :class:`PackedCodec`.

    Example::

        >>> Int8().decode(Int8().encode({"w": torch.tensor([1.27, -0.5, 0.004])}))["w"]
        tensor([ 1.2700, -0.5000,  0.0000])
    """

    name: ClassVar[str] = "int8"

    def pack(self, vector: Tensor, writer: Writer) -> list[JSON] | None:
        """The scale, and a byte an entry."""
        wide = vector.to(torch.promote_types(vector.dtype, torch.float32))
        step = (wide.abs().amax().double() / 127).float()
        scaled = wide / step.clamp(min=torch.finfo(torch.float32).tiny).to(wide.dtype)
        writer.scalars(step)
        writer.bytes(scaled.round_().clamp_(-127, 127).to(torch.int8).view(torch.uint8))
        return []

    def unpack(
        self, record: list[JSON], n: int, dtype: torch.dtype, reader: Reader, old: Callable[[], Tensor | None]
    ) -> Tensor:
        """Numbers times the scale."""
        numbers = reader.bytes(n).view(torch.int8)
        wide = torch.promote_types(dtype, torch.float32)
        return (numbers.to(wide) * reader.scalars(1).to(wide)).to(dtype)
