"""The frame of all codecs that spell floating tensors in another way than one number after the other."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from edgebolt.common.communication.codec import FLOATING, Codec, dtype_name
from edgebolt.common.communication.header import JSON
from edgebolt.common.communication.message import Message, MessageError, Tensors, is_finite
from edgebolt.common.communication.positions import decode_positions, encode_positions

__all__ = ["PackedCodec", "RatioCodec", "Reader", "Scope", "Writer"]

Scope = Literal["tensor", "global"]
_BYTES, _SCALARS = "#bytes", "#scalars"


class Writer:
    """What a codec writes of the vectors of one message: bytes, float32 scalars, and values in a dtype of theirs."""

    def __init__(self) -> None:
        self._parts: dict[str, list[Tensor]] = {}

    def bytes(self, data: Tensor) -> None:
        """Append uint8 ``[k]``."""
        self._parts.setdefault(_BYTES, []).append(data)

    def scalars(self, *values: Tensor) -> None:
        """Append numbers, as float32."""
        self._parts.setdefault(_SCALARS, []).extend(value.view(-1).float() for value in values)

    def values(self, values: Tensor) -> None:
        """Append floating ``[k]``."""
        self._parts.setdefault(_section(values.dtype), []).append(values)

    def positions(self, mask: Tensor, kept: int) -> list[JSON]:
        """Append the places of the true entries and return their record."""
        record, data = encode_positions(mask, kept)
        self.bytes(data)
        return record

    def tensors(self) -> Tensors:
        """The sections of the message."""
        joined = {
            name: parts[0].contiguous() if len(parts) == 1 else torch.cat(parts) for name, parts in self._parts.items()
        }
        return {name: tensor for name, tensor in joined.items() if len(tensor)}


class Reader:
    """Gives back, in order, what a :class:`Writer` wrote; asks never for more than is there."""

    def __init__(self, sections: Tensors) -> None:
        self._sections = sections
        self._read = dict.fromkeys(sections, 0)

    def bytes(self, count: int) -> Tensor:
        """The next uint8 ``[count]``."""
        return self._take(_BYTES, torch.uint8, count)

    def scalars(self, count: int) -> Tensor:
        """The next float32 ``[count]``."""
        return self._take(_SCALARS, torch.float32, count)

    def values(self, dtype: torch.dtype, count: int) -> Tensor:
        """The next floating ``[count]``."""
        return self._take(_section(dtype), dtype, count)

    def positions(self, record: list[JSON], n: int) -> Tensor | None:
        """The mask of the kept of ``n`` entries; None: all."""
        return decode_positions(record, n, self.bytes)

    def _take(self, name: str, dtype: torch.dtype, count: int) -> Tensor:
        section = self._sections.get(name)
        if not count:
            return torch.empty(0, dtype=dtype, device=None if section is None else section.device)
        start = self._read.get(name, 0)
        if section is None or section.dtype is not dtype or section.ndim != 1 or count > len(section) - start:
            raise MessageError(f"{count} more entries of {name!r} are announced, and they are not there")
        self._read[name] = start + count
        return section[start : start + count]

    def finish(self) -> None:
        """Refuse what nobody has read."""
        for name, section in self._sections.items():
            if self._read[name] != section.numel():
                raise MessageError(f"{section.numel() - self._read[name]} entries of {name!r} belong to nothing")


@dataclass(frozen=True)
class PackedCodec(Codec):
    """Spells floating tensors as vectors in a way of its own; a subclass says how, for one vector.

    Tensors of other dtypes, those with fewer than ``min_numel`` entries, and those that hold a NaN or an infinity
    (which the receiver must see, see `Message.is_finite`) travel as they are, under their own names. All others leave
    their parts in common sections: ``#bytes``, ``#scalars`` (float32), ``#values.<dtype>``. The header has
    ``"packed"``: {dtype: {"shapes": {name: shape}, "records": [a list for each vector]}}, and ``"scope"`` unless it is
    ``"tensor"``. Codecs are values: equal arguments make equal codecs, so that one encoding can serve many receivers.

    Args:
        scope: ``"tensor"``: each tensor is a vector; ``"global"``: all tensors of a dtype together are one.
        min_numel: smaller tensors travel as they are.

    Raises:
        ValueError: If an argument is out of range.
    """

    scope: Scope = field(default="tensor", kw_only=True)
    min_numel: int = field(default=1, kw_only=True)
    name: ClassVar[str]

    def __post_init__(self) -> None:
        if self.scope not in ("tensor", "global"):
            raise ValueError(f"scope={self.scope!r}: use 'tensor' or 'global'.")
        if type(self.min_numel) is not int or self.min_numel < 1:
            raise ValueError(f"min_numel={self.min_numel!r}: use a whole number of entries, 1 or more.")

    @abstractmethod
    def pack(self, vector: Tensor, writer: Writer) -> list[JSON] | None:
        """Write one finite vector and return its record for the header; None: as it is would be shorter."""

    @abstractmethod
    def unpack(
        self, record: list[JSON], n: int, dtype: torch.dtype, reader: Reader, old: Callable[[], Tensor | None]
    ) -> Tensor:
        """Read one vector.

        Args:
            record: what `pack` returned, or what a forger wrote: check it before using it.
            n: entries that the header claims; allocate as many only once the bytes justify it.
            dtype: of the vector.
            reader: of what `pack` wrote.
            old: returns the receiver's own former values, ``[n]``, NaN where it has none; None: it has none.

        Raises:
            MessageError: If record and bytes do not agree.
        """

    def encode(self, tensors: Tensors) -> Message:
        """Returns the message that carries `tensors`.

        Raises:
            TypeError: If a tensor has a floating dtype that no message can carry (float8 ...).
            ValueError: If a name begins with ``#``.
        """
        sent: Tensors = {}
        groups: dict[str, list[str]] = {}
        for name in sorted(tensors):
            tensor = tensors[name]
            if name.startswith("#"):
                raise ValueError(f"tensor {name!r}: names that begin with '#' are the codec's own; rename it.")
            dtype = dtype_name(name, tensor.dtype) if tensor.is_floating_point() else None
            if dtype is not None and tensor.numel() >= self.min_numel and is_finite(tensor):
                groups.setdefault(dtype, []).append(name)
            else:
                sent[name] = tensor
        writer = Writer()
        packed: dict[str, JSON] = {}
        for dtype, names in sorted(groups.items()):
            shapes: dict[str, JSON] = {}
            records: list[JSON] = []
            for unit in [names] if self.scope == "global" else [[name] for name in names]:
                parts = [tensors[name].detach().reshape(-1) for name in unit]
                record = self.pack(parts[0] if len(parts) == 1 else torch.cat(parts), writer)
                if record is None:
                    sent.update((name, tensors[name]) for name in unit)
                else:
                    shapes.update((name, list(tensors[name].shape)) for name in unit)
                    records.append(record)
            if records:
                packed[dtype] = {"shapes": shapes, "records": records}
        header: dict[str, JSON] = {"codec": self.name, "packed": packed}
        if self.scope != "tensor":
            header["scope"] = self.scope
        return Message({**sent, **writer.tensors()}, header)

    def decode(self, message: Message, memory: Mapping[str, Any] | None = None) -> Tensors:
        """Returns the tensors that `message` carries, by name; see `Codec.decode`.

        ``memory["model"]``, name -> tensor, is the receiving device's own former model, where a codec leans on it.
        """
        self.check_name(message)
        decoded = {name: tensor for name, tensor in message.tensors.items() if not name.startswith("#")}
        reader = Reader({name: tensor for name, tensor in message.tensors.items() if name.startswith("#")})
        model = {} if memory is None else memory.get("model", {})
        packed = _object(message.header.get("packed"))
        scope = message.header.get("scope", "tensor")
        if scope not in ("tensor", "global") or not packed.keys() <= FLOATING.keys():
            raise MessageError(f"the message has scope {scope!r} and packs {list(packed)}, of {list(FLOATING)}")
        for dtype in sorted(packed):
            shapes, records = _group(packed[dtype])
            names = sorted(shapes)
            units = [names] if scope == "global" else [[name] for name in names]
            if len(units) != len(records) or decoded.keys() & shapes.keys():
                raise MessageError(f"{len(records)} records stand for {len(units)} vectors of {dtype}")
            for unit, record in zip(units, records, strict=True):
                sizes = [prod(shapes[name]) for name in unit]
                old = partial(_old, model, unit, shapes, FLOATING[dtype])
                vector = self.unpack(record, sum(sizes), FLOATING[dtype], reader, old)
                for name, part in zip(unit, torch.split(vector, sizes), strict=True):
                    decoded[name] = part.view(shapes[name])
        reader.finish()
        return {name: decoded[name] for name in sorted(decoded)}


@dataclass(frozen=True)
class RatioCodec(PackedCodec):
    """A :class:`PackedCodec` that degrades a share of the entries.

    Args:
        ratio: ``θ``, the share of the entries that is degraded, 0 to below 1; ``n - floor(θ n)`` are kept whole.
        setting: name of the visit's setting that takes the place of ``ratio``, if the visit has it.
        scope, min_numel: see :class:`PackedCodec`.
    """

    ratio: float = 0.35
    setting: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.ratio < 1:
            raise ValueError(f"ratio={self.ratio!r}: use the share of entries to degrade, 0 to below 1.")

    def with_settings(self, settings: Mapping[str, Any]) -> RatioCodec:
        """The codec with the visit's own ratio."""
        if self.setting is None or self.setting not in settings:
            return self
        return replace(self, ratio=settings[self.setting])

    def kept(self, n: int) -> int:
        """How many of ``n`` entries are kept whole.

        A product that is a whole number but for rounding counts as that number: 0.7 of 10 is 7.
        """
        return n - int(self.ratio * n * (1 + 1e-12) + 1e-9)


def _section(dtype: torch.dtype) -> str:
    return "#values." + str(dtype).removeprefix("torch.")


def _object(value: JSON) -> dict[str, JSON]:
    if type(value) is not dict:
        raise MessageError(f"the header should hold an object here, got {value!r}")
    return value


def _group(value: JSON) -> tuple[dict[str, list[int]], list[list[JSON]]]:
    group = _object(value)
    if group.keys() != {"shapes", "records"}:
        raise MessageError(f"a group has shapes and records, got {list(group)}")
    shapes, records = _object(group["shapes"]), group["records"]
    for name, shape in shapes.items():
        if type(shape) is not list or not _is_shape(shape) or name.startswith("#"):
            raise MessageError(f"tensor {name!r} cannot have shape {shape!r}")
    if type(records) is not list or not all(type(record) is list for record in records):
        raise MessageError("records must be a list of lists")
    return shapes, records  # type: ignore[return-value]  # just checked


def _is_shape(sizes: list[JSON]) -> bool:
    return len(sizes) <= 64 and all(type(size) is int and size >= 1 for size in sizes) and prod(sizes) < 2**48  # type: ignore[arg-type]


def _old(
    model: Mapping[str, Tensor], names: list[str], shapes: dict[str, list[int]], dtype: torch.dtype
) -> Tensor | None:
    """The receiver's former values of these tensors as one vector; NaN where it has none, or of another shape."""
    held = [name for name in names if name in model and list(model[name].shape) == shapes[name]]
    if not held:
        return None
    device = model[held[0]].device
    parts = [
        model[name].to(dtype).reshape(-1)
        if name in held
        else torch.full((prod(shapes[name]),), float("nan"), dtype=dtype, device=device)
        for name in names
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)
