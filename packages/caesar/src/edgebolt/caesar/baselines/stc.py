"""Sparse ternary compression both ways: devices are sent the compressed steps that they have missed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from edgebolt.caesar.ratios import dense_bytes
from edgebolt.common.communication import (
    Codec,
    Message,
    MessageError,
    SparseTernary,
    Tensors,
)
from edgebolt.common.federated import (
    Algorithm,
    ClientCallback,
    Closed,
    Device,
    ErrorFeedback,
    Server,
    Visit,
    WeightedMean,
)

__all__ = ["STC", "KeepReceived", "MissedSteps"]

_KEY = "stc"


class MissedSteps(Codec):
    """The server's compressed steps since the one that the receiver has, or the whole model.

    A step is a message of :class:`~edgebolt.common.communication.SparseTernary`; a receiver adds those that it has
    not yet added, in order, exactly as the server did. Header: ``"first"``, the number of the first step that is sent,
    and ``"steps"``, their headers; or neither, and the tensors are the model.

    The receiver's model is ``memory["received"]``, its number of steps ``memory["version"]``.
    """

    name: ClassVar[str] = "missed-steps"

    def __init__(self, step_codec: Codec) -> None:
        self.step_codec = step_codec

    def encode(self, tensors: Tensors) -> Message:
        """The whole model."""
        return Message(tensors, {"codec": self.name})

    def encode_steps(self, first: int, steps: list[Message]) -> Message:
        """The given steps, ``first`` being the number of steps before them."""
        tensors = {f"{i}/{name}": t for i, step in enumerate(steps) for name, t in step.tensors.items()}
        return Message(tensors, {"codec": self.name, "first": first, "steps": [dict(step.header) for step in steps]})

    def decode(self, message: Message, memory: Mapping[str, Any] | None = None) -> Tensors:
        """The model, whole or from the receiver's own and the missed steps.

        Raises:
            MessageError: if the receiver's model is not one of those that the steps continue.
        """
        self.check_name(message)
        if "steps" not in message.header:
            return dict(message.tensors)
        memory, steps, first = memory or {}, message.header["steps"], message.header.get("first")
        if type(first) is not int or type(steps) is not list or not all(type(step) is dict for step in steps):
            raise MessageError(f"header['first'] and ['steps'] should be a number and a list, got {first!r}")
        model, version = dict(memory.get("received", {})), memory.get("version", -1)
        if not first <= version <= first + len(steps):
            raise MessageError(f"steps {first} to {first + len(steps)} are sent to a device that has made {version}")
        for i in range(version - first, len(steps)):
            own = {n.removeprefix(f"{i}/"): t for n, t in message.tensors.items() if n.startswith(f"{i}/")}
            model = add(model, self.step_codec.decode(Message(own, steps[i])))  # type: ignore[arg-type]  # checked
        return model


def add(model: Tensors, step: Tensors) -> Tensors:
    """``model + step``, on server and device alike."""
    return {name: tensor + step[name].to(tensor) if name in step else tensor for name, tensor in model.items()}


class KeepReceived(ClientCallback):
    """The device keeps the global model as it was received, and the number of steps in it."""

    def install(self, device: Device, visit: Visit, tensors: Tensors) -> Tensors:
        """Keep it."""
        device.memory["received"], device.memory["version"] = tensors, visit.settings["version"]
        return tensors


class STC(Algorithm):
    """Sparse ternary compression, up and down, with a residual on both sides.

    Source: Sattler et al., "Robust and Communication-Efficient Federated Learning from Non-IID Data", 2019, as
    remembered. The server compresses the mean update, plus what it dropped before, into a step; devices are sent the
    steps that they have missed, or the whole model where that is shorter. Where a device has received more than the
    server knows (it died later), it leaves out the steps that it has.

    Args:
        ratio: ``θ``, the share that becomes zero, in both directions; 0.6 is the upper
            end of the range that Caesar's paper gives all schemes.
        error_feedback: whether devices keep what they dropped, too.
        min_numel: tensors with fewer entries travel whole.

    Example::

        >>> STC(ratio=0.99).up.ratio
        0.99
    """

    def __init__(self, ratio: float = 0.6, error_feedback: bool = True, min_numel: int = 1024) -> None:
        codec = SparseTernary(ratio, min_numel=min_numel)
        callbacks: list[ClientCallback] = [ErrorFeedback(codec)] if error_feedback else []
        super().__init__(
            aggregator=WeightedMean("uniform"),
            down=MissedSteps(codec),
            up=codec,
            callbacks=[*callbacks, KeepReceived()],
        )

    def plan(self, server: Server) -> list[Visit]:
        """Visits that say how many steps the model has that is sent."""
        made = _History.of(server).made
        return [replace(v, settings={**v.settings, "version": made}) for v in super().plan(server)]

    def download(self, server: Server, visit: Visit) -> Message:
        """The missed steps, or the model."""
        assert isinstance(self.down, MissedSteps)
        down, history = self.down, _History.of(server)
        model = server.models["global"]
        received = server.reports.get("received")
        has = -1 if received is None else int(received[visit.client].nan_to_num(nan=-1))
        missed = None if has < 0 else history.since(has)
        if missed is None:
            return server.once("whole", lambda: down.encode(model))
        return server.once(("steps", has), lambda: down.encode_steps(has, missed))

    def aggregate(self, server: Server, closed: Closed) -> None:
        """Compress the mean update and the residual into a step, and make it."""
        if not closed.updates:
            return
        model, history = server.models["global"], _History.of(server)
        updates = [(update.outcome, self.up.decode(update.message)) for update in closed.updates]
        zeros = {name: torch.zeros_like(tensor) for name, tensor in model.items()}
        total = add(history.residual or zeros, self.aggregator(server, zeros, updates))
        message = self.up.encode(total)
        step = self.up.decode(message)
        residual = {name: tensor - step[name] for name, tensor in total.items()}
        steps = [*history.steps, message]
        while sum(step.nbytes for step in steps) >= dense_bytes(model):
            del steps[0]  # whoever has missed it is sent the model, which is shorter
        _History(history.made + 1, steps, residual).keep(server)
        server.models["global"] = add(model, step)
        for update in closed.updates:  # they have received what their visit sent
            server.record(update.client, {"received": update.outcome.visit.settings["version"]})


@dataclass
class _History:
    """What the server keeps: the number of steps made, the messages of the last ones, and what was dropped."""

    made: int
    steps: list[Message]
    residual: Tensors

    @classmethod
    def of(cls, server: Server) -> _History:
        kept = server.memory.get(_KEY, {"made": 0, "steps": [], "residual": {}})
        return cls(kept["made"], [Message(*step) for step in kept["steps"]], kept["residual"])

    def keep(self, server: Server) -> None:
        steps = [(dict(step.tensors), dict(step.header)) for step in self.steps]
        server.memory[_KEY] = {"made": self.made, "steps": steps, "residual": self.residual}

    def since(self, version: int) -> list[Message] | None:
        """The steps after the first ``version``; None if they are no longer kept."""
        missed = self.made - version
        return None if missed > len(self.steps) else self.steps[len(self.steps) - missed :]
