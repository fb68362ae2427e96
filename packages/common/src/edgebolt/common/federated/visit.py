"""What travels between server and device besides tensors: the order for a visit, and what became of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from edgebolt.common.communication import Message
from edgebolt.common.devices import Cut

__all__ = ["Closed", "Evaluation", "Outcome", "Update", "Visit"]


@dataclass(frozen=True)
class Visit:
    """One order of the server to one device: plain data, checkpointed and sent as it is.

    Args:
        client: index of the device in the population.
        steps: local optimizer steps that the server asks for. 0 is legal: repeat an upload, report, enrol.
        start: name of the server model that is sent. ``None``: no tensors travel down, the device goes on from
            its own memory.
        lane: lanes run side by side in simulated time.
        stage: barriers hold inside ``(lane, stage)``; a lane's next stage starts when the former has closed.
        batch_size: local batch size; ``None``: the batch size of the user's loader.
        optimizer: values for the optimizer's ``param_groups`` during this visit, such as ``{"lr": 0.01}``.
        settings: depth, ranks, rates, masks: read by the device half. Built-ins only.
        cut: where the device died. Drawn by the environment; nobody sees it before the visit's :class:`Outcome`.
        probe: steps that are run only to be timed: their work is thrown away, their time and energy count. This is
            how a server asks a device what it can do, at enrolment too.
        base: round of the visit that this one goes on with, after it was interrupted; its batches and random numbers
            are those that would have come next in that visit. None: a visit of its own.
        done: steps that were done in that visit.

    Raises:
        ValueError: if ``client``, ``steps``, ``batch_size``, ``probe``, ``base`` or ``done`` is out of range.

    Example::

        >>> Visit(client=3, steps=12, settings={"depth": 4}).order()
        {'client': 3, 'steps': 12, 'settings': {'depth': 4}}
    """

    client: int
    steps: int
    start: str | None = "global"
    lane: str = "0"
    stage: int = 0
    batch_size: int | None = None
    optimizer: dict[str, float] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    cut: Cut | None = None
    probe: int = 0
    base: int | None = None
    done: int = 0

    def __post_init__(self) -> None:
        if self.client < 0:
            raise ValueError(f"Visit(client={self.client!r}): a client is an index of the population, 0 or more.")
        if self.steps < 0:
            raise ValueError(f"Visit(steps={self.steps!r}): ask for 0 or more local steps.")
        if self.probe < 0:
            raise ValueError(f"Visit(probe={self.probe!r}): time 0 or more steps.")
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"Visit(batch_size={self.batch_size!r}): use 1 or more, or None for the loader's own.")
        if self.done < 0 or (self.base is None and self.done) or (self.base is not None and self.base < 0):
            raise ValueError(
                f"Visit(base={self.base!r}, done={self.done!r}): name the round of the visit to go on with and its "
                "steps so far, or neither."
            )

    def order(self) -> dict[str, Any]:
        """What the device is told: client, steps and every field that differs from its default; not the cut."""
        return {name: value for name, value in vars(self).items() if name != "cut" and value != _UNSAID.get(name)}

    def origin(self, round: int) -> int:
        """The round whose batches and random numbers the visit uses, if it takes place in ``round``."""
        return round if self.base is None else self.base

    def to_plain(self) -> dict[str, Any]:
        """Built-ins only, for checkpoints."""
        return asdict(self)

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> Visit:
        """The inverse of :meth:`to_plain`."""
        cut = plain["cut"]
        return cls(**{**plain, "cut": None if cut is None else Cut(**cut)})


_UNSAID = {name: value for name, value in vars(Visit(0, 0)).items() if name not in ("client", "steps")}


@dataclass(frozen=True)
class Outcome:
    """What became of a visit, as the server sees it once the visit's stage has closed.

    Attributes:
        visit: the order.
        steps: steps that were trained.
        samples: samples in the steps that were trained and probed, each as often as it was seen.
        delivered: whether a usable update arrived in time.
        reason: ``""`` if delivered, else ``"failed"`` (the device died), ``"non-finite"`` (NaN or infinity in the
            update) or ``"late"`` (it arrived after the stage had closed).
        started, finished: simulated seconds since the start of the run.
        down_seconds, compute_seconds, up_seconds: the parts of that time.
        forward_seconds: what the forward passes took of the compute time.
        down_bytes, up_bytes: encoded bytes; what had been sent when the device died.
        energy: joules spent by the device.
        waited: seconds between the end of the visit and the closing of its stage.
        report: what the device said in its upload.
    """

    visit: Visit
    steps: int
    delivered: bool
    reason: str
    started: float
    finished: float
    down_seconds: float
    compute_seconds: float
    up_seconds: float
    down_bytes: int
    up_bytes: int
    energy: float
    waited: float = 0.0
    forward_seconds: float = 0.0
    samples: int = 0
    report: dict[str, Any] = field(default_factory=dict)

    @property
    def timed_steps(self) -> int:
        """Steps in ``compute_seconds``: those that were trained and those that were probed."""
        return self.steps + self.visit.probe

    def to_plain(self) -> dict[str, Any]:
        """Built-ins only, for checkpoints."""
        return asdict(self)

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> Outcome:
        """The inverse of :meth:`to_plain`."""
        return cls(**{**plain, "visit": Visit.from_plain(plain["visit"])})


@dataclass(frozen=True)
class Update:
    """A delivered update: its outcome and the encoded message that the device sent."""

    outcome: Outcome
    message: Message

    @property
    def client(self) -> int:
        """Index of the device."""
        return self.outcome.visit.client


@dataclass(frozen=True)
class Closed:
    """A closed ``(lane, stage)``: the updates that arrived, by client, and the outcomes of all its visits."""

    lane: str
    stage: int
    updates: list[Update]
    outcomes: list[Outcome]


@dataclass(frozen=True)
class Evaluation:
    """One model to validate: on the user's validation loader, or on one client's own validation split.

    Args:
        model: name of a server model.
        client: ``None``: the Trainer's validation loader. An index: that client's ``val`` split, with what the
            device half installs there (private layers).
    """

    model: str = "global"
    client: int | None = None
