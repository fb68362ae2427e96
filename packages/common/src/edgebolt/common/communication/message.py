"""A message: tensors and a small header, whose length in bytes is known without serialising it."""

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TypeAlias

import torch
from safetensors import SafetensorError, deserialize
from torch import Tensor

from edgebolt.common.communication.header import JSON, canonical_header, dump_header, parse_header
from edgebolt.common.communication.layout import DTYPES, MAX_INDEX_BYTES, Layout, compute_layout, layout_of

__all__ = ["Message", "MessageError", "Tensors", "is_finite"]

Tensors: TypeAlias = dict[str, Tensor]
"""Named tensors, as in a state dict."""

_MAGIC = b"EBLT"
_VERSION = 1
_PREFIX = struct.Struct("<4sIIQ")  # magic, version, header length, blob length
_INDEX_LENGTH = struct.Struct("<Q")


class MessageError(ValueError):
    """Received bytes, or a received message, are not what the receiver can decode."""


@dataclass(frozen=True, eq=False, repr=False)
class Message:
    """What travels between server and device: encoded tensors and a small header.

    In one process the object itself is handed over; over a network `to_bytes` and `from_bytes` carry it. The receiver
    cannot tell which: the constructor already brings everything into the form that the wire gives back (tensors
    detached, contiguous and in wire order, header keys sorted, both mappings read-only). Only the device differs:
    tensors on an accelerator stay there in one process and arrive on the CPU over a network.

    A contiguous tensor is shared, not copied, so a tensor that was put into a message must never be written to.

    Wire format, little-endian: ``b"EBLT"``, u32 version, u32 header length, u64 blob length, the header as canonical
    JSON (compact, sorted keys), a safetensors blob. A message has exactly one byte string; no other spelling of the
    same content is accepted. A NaN in the header travels as ``NaN`` and arrives without its payload and sign;
    infinities as ``Infinity`` and ``-Infinity``. Tensors arrive bit for bit.

    Args:
        tensors: Encoded arrays of any shape, in float64/32/16, bfloat16, int64/32/16/8, uint8 or bool.
        header: JSON-able mapping (codec name, visit, report ...), at most 1 MiB once spelled.

    Raises:
        TypeError: If a tensor or header value cannot travel; says which, and how to convert it.
        ValueError: If the header, or the list of names and shapes, is too long.

    Example::

        >>> message = Message({"weight": torch.ones(2, 3)}, {"codec": "dense", "loss": 0.5})
        >>> message.nbytes == len(message.to_bytes())
        True
        >>> received = Message.from_bytes(message.to_bytes())
        >>> torch.equal(received.tensors["weight"], torch.ones(2, 3)), received.header["loss"]
        (True, 0.5)
    """

    tensors: Mapping[str, Tensor]
    header: Mapping[str, JSON] = field(default_factory=dict)
    _layout: Layout = field(init=False)
    _header_bytes: bytes = field(init=False)

    def __post_init__(self) -> None:
        plain = {name: _plain(name, tensor) for name, tensor in self.tensors.items()}
        layout = layout_of(tuple([(name, tensor.dtype, tensor.shape) for name, tensor in plain.items()]))
        self._fill({name: plain[name] for name in layout.names}, layout, self.header)

    def _fill(self, tensors: Tensors, layout: Layout, header: Mapping[str, JSON]) -> None:
        header = canonical_header(header)
        write = object.__setattr__  # the dataclass is frozen
        write(self, "tensors", MappingProxyType(tensors))
        write(self, "header", MappingProxyType(header))
        write(self, "_layout", layout)
        write(self, "_header_bytes", dump_header(header))

    @property
    def nbytes(self) -> int:
        """Exactly ``len(self.to_bytes())``; no tensor data is touched."""
        return _PREFIX.size + len(self._header_bytes) + self._layout.size

    def to_bytes(self) -> bytes:
        """Spells the message; tensors on an accelerator are copied to the CPU."""
        prefix = _PREFIX.pack(_MAGIC, _VERSION, len(self._header_bytes), self._layout.size)
        return b"".join([prefix, self._header_bytes, self._layout.head, *map(_data, self.tensors.values())])

    @classmethod
    def from_bytes(cls, data: bytes | bytearray | memoryview, max_bytes: int = 2**31) -> "Message":
        """Reads a message; the tensors are copies on the CPU.

        Every length is checked against the bytes that are there before anything is allocated, so garbage costs no
        more memory than a small multiple of its own length. Damage inside the tensor data itself is not detected:
        that is the transport's checksum.

        Args:
            data: The bytes of exactly one message.
            max_bytes: Longest message to accept.

        Raises:
            MessageError: If the bytes are truncated, corrupt, too long, or not a message at all.
            TypeError: If `data` is not bytes-like.

        Example::

            >>> try:
            ...     Message.from_bytes(b"garbage")
            ... except MessageError as error:
            ...     print(error)
            7 bytes are too few for a message, which has at least 30
        """
        view = memoryview(data).cast("B")
        header_bytes, blob = _split(view, max_bytes)
        try:
            header = parse_header(bytes(header_bytes))
        except ValueError as error:
            raise MessageError(f"the header is corrupt: {error}") from error
        message = object.__new__(cls)
        message._fill(*_read_tensors(blob), header)
        return message

    def with_header(self, /, **fields: JSON) -> "Message":
        """Returns a message with the same tensors (shared) and `fields` added to, or replacing those of, the header.

        Example::

            >>> Message({}, {"codec": "dense"}).with_header(visit=3).header["visit"]
            3
        """
        message = object.__new__(Message)
        message._fill(dict(self.tensors), self._layout, {**self.header, **fields})
        return message

    def to(self, device: torch.device) -> "Message":
        """Returns the message with its tensors on a device; itself where they are there.

        Example::

            >>> Message({"weight": torch.ones(2)}).to(torch.device("cpu")).nbytes
            102
        """
        if all(tensor.device == device for tensor in self.tensors.values()):
            return self
        message = object.__new__(Message)
        message._fill({name: tensor.to(device) for name, tensor in self.tensors.items()}, self._layout, self.header)
        return message

    def is_finite(self) -> bool:
        """Returns False if any floating tensor holds a NaN or an infinity; an empty message is finite."""
        return all(is_finite(tensor) for tensor in self.tensors.values() if tensor.is_floating_point())

    def __reduce__(self) -> tuple[object, tuple[bytes, int]]:
        # Copies and process pools go over the wire format too (and mapping proxies cannot be pickled).
        return Message.from_bytes, (self.to_bytes(), self.nbytes)

    def __repr__(self) -> str:
        return f"Message({len(self.tensors)} tensors, header={dict(self.header)}, nbytes={self.nbytes})"


def _plain(name: str, tensor: Tensor) -> Tensor:
    """The tensor as a receiver would get it; itself if it is that already."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"tensor {name!r} is of type {type(tensor).__name__}: convert it with torch.as_tensor(...)")
    if tensor.layout is not torch.strided:
        raise TypeError(f"tensor {name!r} has layout {tensor.layout}: convert it with .to_dense()")
    if type(tensor) is not Tensor or tensor.requires_grad:
        tensor = tensor.detach()
        if type(tensor) is not Tensor:
            raise TypeError(f"tensor {name!r} is a {type(tensor).__name__}: convert it to a plain torch.Tensor")
    if tensor.is_meta:
        raise TypeError(f"tensor {name!r} is on the meta device and has no data: materialise it first")
    return tensor.resolve_neg().contiguous()


def _data(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor, not copied if it is on the CPU."""
    # as_strided, not view: a contiguous tensor of one or no element may have any stride, which view would keep.
    return tensor.cpu().as_strided((tensor.numel(),), (1,)).view(torch.uint8).numpy().data


def is_finite(tensor: Tensor) -> bool:
    """Whether a floating tensor holds neither NaN nor infinity."""
    # A NaN or infinity survives every further addition, so a finite sum proves all terms finite. The reverse does not
    # hold (finite terms may overflow), hence the slow and exact second look.
    total = float(tensor.sum())
    return total - total == 0 or bool(torch.isfinite(tensor).all())


def _split(view: memoryview, max_bytes: int) -> tuple[memoryview, memoryview]:
    """Checks the lengths and returns (header, blob)."""
    least = _PREFIX.size + len(b"{}") + _INDEX_LENGTH.size
    if len(view) > max_bytes:
        raise MessageError(f"{len(view)} bytes are more than the limit of {max_bytes}: raise max_bytes if expected")
    if len(view) < least:
        raise MessageError(f"{len(view)} bytes are too few for a message, which has at least {least}")
    magic, version, header_length, blob_length = _PREFIX.unpack_from(view)
    if magic != _MAGIC:
        raise MessageError(f"the bytes start with {magic!r}, not {_MAGIC!r}: this is not a message")
    if version != _VERSION:
        raise MessageError(f"the message has wire version {version}, this receiver reads {_VERSION}: upgrade one side")
    if _PREFIX.size + header_length + blob_length != len(view):
        raise MessageError(
            f"the message claims {_PREFIX.size} + {header_length} + {blob_length} bytes, but {len(view)} arrived"
        )
    body = view[_PREFIX.size :]
    return body[:header_length], body[header_length:]


def _read_tensors(blob: memoryview) -> tuple[Tensors, Layout]:
    """Parses the blob: the safetensors library checks that shapes, offsets and length agree, we that it is ours."""
    if len(blob) < _INDEX_LENGTH.size:
        raise MessageError(f"{len(blob)} bytes are too few for a tensor index")
    (index_length,) = _INDEX_LENGTH.unpack_from(blob)
    if index_length > min(MAX_INDEX_BYTES, len(blob) - _INDEX_LENGTH.size):
        raise MessageError(f"the tensor index claims {index_length} bytes, but {len(blob)} arrived")
    try:
        entries = dict(deserialize(bytes(blob)))  # type: ignore[no-untyped-call]
    except SafetensorError as error:
        raise MessageError(f"the tensors are corrupt: {error}") from error
    for name, entry in entries.items():
        if entry["dtype"] not in DTYPES:
            raise MessageError(f"tensor {name!r} has dtype {entry['dtype']}, a message carries {list(DTYPES)}")
    try:
        layout = compute_layout(
            tuple((name, DTYPES[entry["dtype"]], tuple(entry["shape"])) for name, entry in entries.items())
        )
    except (TypeError, ValueError) as error:
        raise MessageError(f"the tensors are none that a message carries: {error}") from error
    if layout.size != len(blob) or layout.head != blob[: len(layout.head)]:
        raise MessageError("the tensor index is not in canonical form (sorted by dtype and name, no metadata)")
    return {name: _tensor(name, **entries[name]) for name in layout.names}, layout


def _tensor(name: str, dtype: str, shape: list[int], data: bytearray) -> Tensor:
    if not data:  # frombuffer takes no empty buffer
        return torch.empty(shape, dtype=DTYPES[dtype])
    if dtype == "BOOL" and data.translate(None, b"\0\1"):
        raise MessageError(f"tensor {name!r} is bool but holds bytes other than 0 and 1")
    return torch.frombuffer(data, dtype=DTYPES[dtype]).view(shape)
