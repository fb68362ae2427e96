"""How hidden states are written for the link."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["FORMATS", "RowFormat"]


@dataclass(frozen=True)
class RowFormat:
    """Rows to bytes and back; a row's bytes depend on that row alone, so that chunks and batches change nothing.

    Decoding is lossless in this sense: the text is the one that the model gives token by token where its hidden
    states pass the same format at both cuts. Written in the dtype that the model computes in, that is the model's own
    text; a model in float32 over ``float16``, ``bfloat16`` or ``int8`` is another, slightly different target.

    Args:
        name: key in :data:`FORMATS`.
        dtype: of an element.
        scaled: whether a float32 scale, the row's largest magnitude over 127, goes before each row.

    Example::

        >>> rows = torch.randn(2, 6)
        >>> data = FORMATS["float32"].encode(rows)
        >>> len(data), torch.equal(FORMATS["float32"].decode(data, 2, 6), rows)
        (48, True)
        >>> len(FORMATS["int8"].encode(rows))
        20
    """

    name: str
    dtype: torch.dtype
    scaled: bool = False

    def row_bytes(self, width: int) -> int:
        """Bytes of one row."""
        return width * self.dtype.itemsize + 4 * self.scaled

    def encode(self, rows: Tensor) -> bytes:
        """Bytes of rows, shape ``[rows, width]``, in little-endian order.

        Raises:
            OverflowError: where a number is too large for the format, which float16 has up to 65,504.
        """
        rows = rows.detach().cpu()
        if not self.scaled:
            written = rows.to(self.dtype)
            if not written.isfinite().all():
                raise OverflowError(
                    f"Hidden states of up to {rows.abs().max().item():.3g} do not fit {self.name}: use 'bfloat16' or "
                    "'float32'."
                )
            return _bytes(written)
        scales = (rows.float().abs().amax(1, keepdim=True) / 127).clamp_min(torch.finfo(torch.float32).tiny)
        if not scales.isfinite().all():
            raise OverflowError("Hidden states that are not finite have no scale.")
        levels = (rows.float() / scales).round().clamp(-127, 127).to(torch.int8)
        return b"".join(_bytes(scale) + _bytes(level) for scale, level in zip(scales, levels, strict=True))

    def decode(self, data: bytes, count: int, width: int) -> Tensor:
        """Rows of bytes, shape ``[count, width]``; float32 where rows are scaled, else the format's dtype.

        Raises:
            ValueError: if the bytes are not those of so many rows, or hold numbers that are not finite.
        """
        if len(data) != count * self.row_bytes(width):
            raise ValueError(
                f"{len(data)} bytes for {count} rows: {count * self.row_bytes(width)} as {self.name} of width {width}."
            )
        if not count:
            return torch.empty(0, width, dtype=torch.float32 if self.scaled else self.dtype)
        raw = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(count, -1)
        if self.scaled:
            scales = raw[:, :4].flatten().view(torch.float32).unsqueeze(1)
            rows = raw[:, 4:].contiguous().view(torch.int8).float() * scales
        else:
            rows = raw.view(self.dtype)
        if not rows.isfinite().all():
            raise ValueError("Rows with numbers that are not finite.")
        return rows

    def passed(self, rows: Tensor) -> Tensor:
        """Rows as the other side gets them, in the dtype and on the device of ``rows``."""
        return self.decode(self.encode(rows), *rows.shape).to(rows)


def _bytes(rows: Tensor) -> bytes:
    return rows.contiguous().view(torch.uint8).numpy().tobytes()


_PLAIN = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

FORMATS = {
    **{(name := str(dtype).removeprefix("torch.")): RowFormat(name, dtype) for dtype in _PLAIN},
    "int8": RowFormat("int8", torch.int8, scaled=True),
}
"""Name -> format: ``"float64"``, ``"float32"``, ``"float16"``, ``"bfloat16"``, and ``"int8"`` with a scale a row."""
