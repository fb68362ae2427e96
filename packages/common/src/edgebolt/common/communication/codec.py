"""How a model becomes a message and a message a model."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from edgebolt.common.communication.header import JSON
from edgebolt.common.communication.message import Message, MessageError, Tensors

__all__ = ["FLOATING", "Codec", "Dense", "Float16", "dtype_name"]

FLOATING = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
"""The floating dtypes that travel, by their names in a header."""


class Codec(ABC):
    """Encodes tensors for the wire and decodes them with no side channel but the receiver's own memory.

    A subclass sets `name`, writes it into the header's ``"codec"`` field, and calls `check_name` before decoding.
    """

    name: ClassVar[str]

    @abstractmethod
    def encode(self, tensors: Tensors) -> Message:
        """Returns the message that carries `tensors`."""

    @abstractmethod
    def decode(self, message: Message, memory: Mapping[str, Any] | None = None) -> Tensors:
        """Returns the tensors that `message` carries, in an order that the message alone decides.

        Args:
            message: What `encode` made, perhaps on another machine.
            memory: The receiving device's own memory, for codecs that lean on its stale model; None on the server.

        Raises:
            MessageError: If the message is another codec's, or not consistent.
        """

    def with_settings(self, settings: Mapping[str, Any]) -> "Codec":
        """Returns the codec as a visit's settings want it; default: itself.

        Decoding takes no settings: whatever a receiver must know stands in the message.
        """
        return self

    def check_name(self, message: Message) -> None:
        """Raises MessageError unless `message` names this codec."""
        found = message.header.get("codec")
        if found != self.name:
            raise MessageError(
                f"{type(self).__name__} decodes messages of codec {self.name!r}, this one names {found!r}: "
                "give sender and receiver the same codec"
            )


class Dense(Codec):
    """Every tensor travels whole, in its own dtype; ``decode(encode(x))`` is `x` bit for bit.

    Nothing is copied (unless a tensor is not contiguous): by convention a tensor that was sent is never written to,
    and one that was received is copied before it is changed.

    Example::

        >>> codec = Dense()
        >>> message = codec.encode({"bias": torch.tensor([1.5, -2.0])})
        >>> codec.decode(message)
        {'bias': tensor([ 1.5000, -2.0000])}
    """

    name: ClassVar[str] = "dense"

    def encode(self, tensors: Tensors) -> Message:
        """Returns a message that shares the tensors."""
        return Message(tensors, {"codec": self.name})

    def decode(self, message: Message, memory: Mapping[str, Any] | None = None) -> Tensors:
        """Returns the message's own tensors; see `Codec.decode`."""
        self.check_name(message)
        return dict(message.tensors)


class Float16(Codec):
    """Floating tensors travel as float16 and come back in the dtype they had; all others travel as they are.

    ``decode(encode(x))`` is `x` rounded to float16 (relative error up to 2^-11 for magnitudes in [2^-14, 65504],
    absolute error up to 2^-25 below). Magnitudes from 65520 become infinities, which `Message.is_finite` shows.

    Header fields: ``"dtype"``, the most common former dtype, and ``"exceptions"``, {name: dtype} of the others, each
    left out when there is nothing to say.

    Example::

        >>> codec = Float16()
        >>> message = codec.encode({"bias": torch.tensor([1.5, 0.1])})
        >>> message.tensors["bias"].dtype, codec.decode(message)["bias"].dtype
        (torch.float16, torch.float32)
    """

    name: ClassVar[str] = "float16"

    def encode(self, tensors: Tensors) -> Message:
        """Returns a message with float16 in place of every floating dtype.

        Raises:
            TypeError: If a tensor has a floating dtype that no message can carry (float8 ...).
        """
        former = {name: dtype_name(name, t.dtype) for name, t in tensors.items() if t.is_floating_point()}
        header: dict[str, JSON] = {"codec": self.name}
        if former:
            # Ties go to the name, not to the order of the tensors, so that equal models give equal bytes.
            common = max(sorted(Counter(former.values()).items()), key=lambda item: item[1])[0]
            header["dtype"] = common
            exceptions: dict[str, JSON] = {name: dtype for name, dtype in former.items() if dtype != common}
            if exceptions:
                header["exceptions"] = exceptions
        halves = {name: tensor.to(torch.float16) if name in former else tensor for name, tensor in tensors.items()}
        return Message(halves, header)

    def decode(self, message: Message, memory: Mapping[str, Any] | None = None) -> Tensors:
        """Returns the tensors in their former dtypes; see `Codec.decode`."""
        self.check_name(message)
        floating = {name: tensor for name, tensor in message.tensors.items() if tensor.is_floating_point()}
        for name, tensor in floating.items():
            if tensor.dtype is not torch.float16:
                raise MessageError(f"tensor {name!r} travelled as {tensor.dtype}, codec 'float16' sends torch.float16")
        exceptions = message.header.get("exceptions", {})
        if not isinstance(exceptions, dict) or not exceptions.keys() <= floating.keys():
            raise MessageError(f"header['exceptions'] must name floating tensors of the message, got {exceptions!r}")
        if bool(floating) != ("dtype" in message.header):
            raise MessageError("header['dtype'] must be there if, and only if, the message has floating tensors")
        common = message.header.get("dtype")
        decoded = dict(message.tensors)
        for name, tensor in floating.items():
            decoded[name] = tensor.to(_floating_dtype(name, exceptions.get(name, common)))
        return decoded


def dtype_name(name: str, dtype: torch.dtype) -> str:
    """The name of a floating dtype in a header; TypeError, which names the tensor, if it does not travel."""
    text = str(dtype).removeprefix("torch.")
    if text not in FLOATING:
        raise TypeError(f"tensor {name!r} has dtype {dtype}: convert it with .to(...) to one of {list(FLOATING)}")
    return text


def _floating_dtype(name: str, dtype: JSON) -> torch.dtype:
    if not isinstance(dtype, str) or dtype not in FLOATING:
        raise MessageError(f"tensor {name!r} had dtype {dtype!r}, which is none of {list(FLOATING)}")
    return FLOATING[dtype]
