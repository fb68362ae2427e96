"""Sparse ternary compression: the largest entries, all at the same magnitude."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from edgebolt.common.communication.bits import bytes_for, pack_bits, select, unpack_bits
from edgebolt.common.communication.header import JSON
from edgebolt.common.communication.packed import RatioCodec, Reader, Writer
from edgebolt.common.communication.top_k import find_largest

__all__ = ["SparseTernary"]


@dataclass(frozen=True)
class SparseTernary(RatioCodec):
    """The ``n - floor(θ n)`` largest entries become ``±μ``, ``μ`` their mean magnitude; all others zero.

    Source: Sattler et al., "Robust and Communication-Efficient Federated Learning from Non-IID Data", 2019
    (STC), and its Golomb code for positions. STC keeps what is lost as a residual for the next message; that is
    the sender's part: see :class:`~edgebolt.common.federated.ErrorFeedback`.

    Args:
        ratio: ``θ``, the share that becomes zero.
        setting: name of the visit's setting that takes the place of ``ratio``.
        scope: ``"tensor"``: one ``μ`` a tensor; ``"global"``: one for all.
        min_numel: smaller tensors travel whole.

    Raises:
        ValueError: If an argument is out of range.

    Example::

        >>> codec = SparseTernary(ratio=0.5)
        >>> codec.decode(codec.encode({"w": torch.tensor([0.9, -0.1, 0.2, -0.7])}))["w"]
        tensor([ 0.8000,  0.0000,  0.0000, -0.8000])
    """

    name: ClassVar[str] = "sparse-ternary"

    def pack(self, vector: Tensor, writer: Writer) -> list[JSON] | None:
        """Positions, signs and the common magnitude of the largest."""
        n, kept = len(vector), self.kept(len(vector))
        mask = torch.ones_like(vector, dtype=torch.bool) if kept == n else find_largest(vector, kept).mask
        mask &= vector != 0  # a zero has no sign: it stays zero
        kept = int(torch.count_nonzero(mask))
        values = select(vector, mask)
        magnitude = values.abs().sum(dtype=torch.float64) / max(1, kept)
        writer.scalars(magnitude)
        record = writer.positions(mask, kept)
        writer.bytes(pack_bits(values > 0))
        return record

    def unpack(
        self, record: list[JSON], n: int, dtype: torch.dtype, reader: Reader, old: Callable[[], Tensor | None]
    ) -> Tensor:
        """``±μ`` in the places."""
        magnitude = reader.scalars(1).to(dtype)
        mask = reader.positions(record, n)
        kept = n if mask is None else int(record[1])  # type: ignore[arg-type]  # checked with the positions
        signs = unpack_bits(reader.bytes(bytes_for(kept)), kept)
        values = torch.where(signs, magnitude, -magnitude)
        if mask is None:
            return values
        vector = torch.zeros(n, dtype=dtype, device=mask.device)
        vector.masked_scatter_(mask, values)
        return vector
