"""The largest entries of a vector, and the codec that sends nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from edgebolt.common.communication.bits import bytes_for, select
from edgebolt.common.communication.header import JSON
from edgebolt.common.communication.packed import RatioCodec, Reader, Writer

__all__ = ["Largest", "TopK", "find_largest"]


class Largest(NamedTuple):
    """The largest entries of a vector, and what is known of the rest.

    Attributes:
        mask: bool ``[n]``, true at the largest.
        rest_max: largest magnitude of the rest, 0-dim.
        rest_mean: mean magnitude of the rest, 0-dim, summed in float64.
    """

    mask: Tensor
    rest_max: Tensor
    rest_mean: Tensor


def find_largest(vector: Tensor, count: int) -> Largest:
    """Finds the ``count`` entries of the largest magnitude; of equal ones those with the lowest index.

    Args:
        vector: floating ``[n]``, finite.
        count: 0 to ``n - 1``.

    Example::

        >>> find_largest(torch.tensor([1.0, -3.0, 1.0, 0.5]), 2).mask.tolist()
        [True, True, False, False]
    """
    rest = _smallest(vector.abs(), len(vector) - count)
    cut, mean = rest.max().to(vector.dtype), rest.sum(dtype=torch.float64) / len(rest)
    del rest
    mask = (vector > cut) | (vector < -cut)
    missing = count - int(torch.count_nonzero(mask))
    if missing:  # of those that are exactly at the cut
        ties = ((vector == cut) | (vector == -cut)).nonzero().view(-1)[:missing]
        mask[ties] = True
    return Largest(mask, cut, mean)


def _smallest(magnitudes: Tensor, count: int) -> Tensor:
    """The ``count`` smallest, in any order; on the CPU they share the memory of ``magnitudes``."""
    if magnitudes.device.type != "cpu":
        return torch.topk(magnitudes, count, largest=False, sorted=False).values
    array = (magnitudes.float() if magnitudes.dtype is torch.bfloat16 else magnitudes).numpy()
    array.partition(count - 1)  # in place, by NumPy: a fraction of the time of torch.topk
    return torch.from_numpy(array[:count])


@dataclass(frozen=True)
class TopK(RatioCodec):
    """The ``n - floor(θ n)`` entries of the largest magnitude travel, exactly; the others are zero, or what they were.

    Entries that are zero are not sent, however many may be. Where positions and values would take no fewer bytes than
    the whole vector (θ below 0.03 or so), the whole vector is sent.

    Args:
        ratio: ``θ``, the share that is dropped, 0 to below 1.
        setting: name of the visit's setting that takes the place of ``ratio``.
        fill: what the receiver puts in the dropped places: ``"zero"``, or ``"memory"``: its own former value
            (``memory["model"]``), zero where it has none.
        scope: ``"tensor"``: the largest of each tensor; ``"global"``: of all tensors together.
        min_numel: smaller tensors travel whole.

    Raises:
        ValueError: If an argument is out of range.

    Example::

        >>> codec = TopK(ratio=0.5)
        >>> message = codec.encode({"w": torch.tensor([[0.9, -0.1], [0.2, -0.6]])})
        >>> codec.decode(message)["w"]
        tensor([[ 0.9000,  0.0000],
                [ 0.0000, -0.6000]])
    """

    name: ClassVar[str] = "top-k"
    fill: Literal["zero", "memory"] = "zero"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fill not in ("zero", "memory"):
            raise ValueError(f"fill={self.fill!r}: use 'zero' or 'memory'.")

    def pack(self, vector: Tensor, writer: Writer) -> list[JSON] | None:
        """Positions and values of the largest."""
        n, kept = len(vector), self.kept(len(vector))
        if kept == n:
            return None
        largest = find_largest(vector, kept)
        mask = largest.mask
        if self.fill == "zero" and not largest.rest_max:  # then all that is not zero is among the largest
            mask = vector != 0
            kept = int(torch.count_nonzero(mask))
        if kept * vector.element_size() + bytes_for(n) >= vector.nbytes:
            return None
        writer.values(select(vector, mask))
        return writer.positions(mask, kept)

    def unpack(
        self, record: list[JSON], n: int, dtype: torch.dtype, reader: Reader, old: Callable[[], Tensor | None]
    ) -> Tensor:
        """The kept values in their places."""
        mask = reader.positions(record, n)
        values = reader.values(dtype, n if mask is None else int(record[1]))  # type: ignore[arg-type]  # checked
        if mask is None:
            return values.clone()
        former = old() if self.fill == "memory" else None
        if former is None:
            vector = torch.zeros(n, dtype=dtype, device=mask.device)
        else:
            vector = former.to(mask.device).nan_to_num(nan=0.0)
        vector.masked_scatter_(mask, values)
        return vector
