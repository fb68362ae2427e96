"""Caesar's codec: the large entries whole, of the small ones a sign, which the receiver's old model fills in."""

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

__all__ = ["HybridSign"]


@dataclass(frozen=True)
class HybridSign(RatioCodec):
    """The largest entries travel whole; of the others one sign bit each, and their mean and largest magnitude.

    Source: J. Liu et al., "Caesar: A Low-deviation Compression Approach for Efficient Federated Learning" (arXiv
    2412.19989), as a re-implementation of the paper has it (FedProC, ``strategies/Caesar.py``). For a degraded entry
    with sign ``s`` and the receiver's own former value ``v`` (``memory["model"]``)::

        ŵ = v          if sign(v) = s and |v| <= max     the former value is possible: trust it
        ŵ = s * mean   otherwise, and where there is no former value

    A sign bit is ``x >= 0`` on both sides, a convention of ours: a zero has no sign of its own. Whether the paper cuts
    each tensor or the whole model is unknown, hence ``scope``. Signs take ``θ / 32`` of a float32 model beside a
    bitmap's 1/32. Where all that takes no fewer bytes than the vector itself, the vector is sent.

    Recovery beats the sign alone where the former values are close, in comparison with what is degraded: a fresh
    model and a large θ. With stale models and a small θ it can lose.

    Args:
        ratio: ``θ``, the share that is degraded, 0 to below 1; ``n - floor(θ n)`` entries travel whole.
        setting: name of the visit's setting that takes the place of ``ratio``.
        scope: ``"tensor"``: mean, largest and cut of each tensor; ``"global"``: of all tensors together.
        min_numel: smaller tensors travel whole: degrading most of a normalisation layer's weights destroys it.

    Raises:
        ValueError: If an argument is out of range.

    Example: a device with an old model, and one without::

        >>> codec = HybridSign(ratio=0.5)
        >>> message = codec.encode({"w": torch.tensor([0.9, -0.05, 0.01, -0.6, 0.8, 0.7, -0.03, 0.03])})
        >>> old = torch.tensor([0.7, -0.02, -0.03, -0.5, 0.9, 0.6, -0.01, 0.09])
        >>> codec.decode(message, {"model": {"w": old}})["w"]
        tensor([ 0.9000, -0.0200,  0.0300, -0.6000,  0.8000,  0.7000, -0.0100,  0.0300])
        >>> codec.decode(message)["w"]
        tensor([ 0.9000, -0.0300,  0.0300, -0.6000,  0.8000,  0.7000, -0.0300,  0.0300])
    """

    name: ClassVar[str] = "hybrid-sign"

    def pack(self, vector: Tensor, writer: Writer) -> list[JSON] | None:
        """Positions and values of the largest, signs and two scalars of the rest."""
        n, kept = len(vector), self.kept(len(vector))
        rest = n - kept
        # Positions take at most a bitmap, and hardly less where so many are kept that this matters.
        if kept * vector.element_size() + bytes_for(n) + bytes_for(rest) + 8 >= vector.nbytes:
            return None
        largest = find_largest(vector, kept)
        writer.values(select(vector, largest.mask))
        record = writer.positions(largest.mask, kept)
        writer.bytes(pack_bits(select(vector >= 0, ~largest.mask)))
        writer.scalars(largest.rest_mean, largest.rest_max)
        return record

    def unpack(
        self, record: list[JSON], n: int, dtype: torch.dtype, reader: Reader, old: Callable[[], Tensor | None]
    ) -> Tensor:
        """Whole entries in their places, the others recovered."""
        mask = reader.positions(record, n)
        if mask is None:
            return reader.values(dtype, n).clone()
        kept = int(record[1])  # type: ignore[arg-type]  # checked with the positions
        values = reader.values(dtype, kept)
        signs = unpack_bits(reader.bytes(bytes_for(n - kept)), n - kept)
        mean, largest = reader.scalars(2).to(dtype)
        positive = torch.zeros_like(mask)
        positive.masked_scatter_(~mask, signs)
        former = old()
        if former is None:
            vector = torch.where(positive, mean, -mean)
        else:  # in place where it can be: a model may be large
            former = former.to(mask.device)
            trusted = (former >= 0) == positive
            trusted &= former <= largest
            trusted &= former >= -largest  # never true of a NaN
            vector = torch.where(positive, mean, -mean)
            torch.where(trusted, former, vector, out=vector)
        vector.masked_scatter_(mask, values)
        return vector
