"""The visits of a stage between their sending and its closing."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from edgebolt.common.communication import Message
from edgebolt.common.federated.visit import Outcome

__all__ = ["Flight"]


@dataclass
class Flight:
    """The visits of one (lane, stage) that have been dispatched and not yet closed."""

    stage: int
    round: int
    opened: float
    arrivals: list[tuple[Outcome, Message | None]] = field(default_factory=list)

    @property
    def outcomes(self) -> list[Outcome]:
        """Those of its visits that have run, delivered or not."""
        return [outcome for outcome, _ in self.arrivals]

    def to_plain(self) -> dict[str, Any]:
        """Tensors and built-ins, for checkpoints."""
        arrivals = [
            (outcome.to_plain(), None if message is None else (dict(message.tensors), dict(message.header)))
            for outcome, message in self.arrivals
        ]
        return {"stage": self.stage, "round": self.round, "opened": self.opened, "arrivals": arrivals}

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> Flight:
        """The inverse of :meth:`to_plain`."""
        arrivals = [
            (Outcome.from_plain(outcome), None if message is None else Message(*message))
            for outcome, message in plain["arrivals"]
        ]
        return cls(plain["stage"], plain["round"], plain["opened"], arrivals)
