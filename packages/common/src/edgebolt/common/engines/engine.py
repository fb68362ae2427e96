"""Where the visits of a federated run are trained: what an engine is, and the one that needs nothing."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from edgebolt.common.communication import Message

if TYPE_CHECKING:
    from edgebolt.common.devices import DeviceProfile
    from edgebolt.common.engines.job import Job
    from edgebolt.common.federated.strategy import FederatedStrategy
    from edgebolt.common.federated.visit import Visit

__all__ = ["AWAY", "UNHEARD", "Answer", "Engine", "Order", "Serial"]

AWAY = "edgebolt.away"
"""Key of a note that stands, in a checkpoint, for a memory that stays with its device."""
UNHEARD = "edgebolt.unheard"
"""Key, beside it, of the visits of which that device has not yet heard that their updates were taken."""


@dataclass(frozen=True)
class Order:
    """One visit for a worker, with all that the worker does not keep itself.

    Attributes:
        number: of the order in its run, from 0; answers are taken in this order.
        visit: what the server asks for.
        round: in which it takes place.
        steps: that are trained until it ends or its device dies.
        died: it dies before it has sent anything.
        enrolling: it takes place before the first round, and no update travels back.
        timed: some of its steps, trained or probed, cost time, so that their FLOPs are asked for.
        message: what it is sent; visits that are sent the same share it.
        profile: of the device, in this round.
        groups: values of the optimizer's groups when the round began.
        memory: what the device remembers, as the engine's :meth:`Engine.put` has stored it; ``None``: nothing.
        delivered: visits of which the device has not yet heard that their updates were taken, with their rounds.
        flops: that its steps are expected to take, for engines that balance.
    """

    number: int
    visit: Visit
    round: int
    steps: int
    died: bool
    enrolling: bool
    timed: bool
    message: Message
    profile: DeviceProfile
    groups: list[dict[str, Any]] = field(default_factory=list)
    memory: Any = None
    delivered: list[tuple[Visit, int]] = field(default_factory=list)
    flops: float = 0.0


@dataclass(frozen=True)
class Answer:
    """What a visit has come to.

    Attributes:
        message: the encoded update; ``None``: the device died.
        loss_sum: of its steps.
        sample_flops: of a sample in it, if the order is timed: all, and those of the forward pass.
        memory: what the device remembers now, as the engine stores it; ``None``: nothing.
        failure: why the visit could not be run at all; empty: it was.
    """

    message: Message | None
    loss_sum: float = 0.0
    sample_flops: tuple[float, float] = (0.0, 0.0)
    memory: Any = None
    failure: str = ""


class Engine(ABC):
    """Runs visits on workers, each of which has the module, the data and the device half's callbacks.

    The server half, the clock, the ledger and validation stay in the process of the user's ``Trainer``. Visits are
    submitted before their turn, as many as :attr:`ahead`, and answered in their turn: so a run is the same run,
    whatever trains it.

    Attributes:
        ahead: visits that are submitted and not yet answered, at most.
        collective: other processes wait for the beginning, even where there is no visit.
        failures: visits in a row that could not be run, which end the run.
        memories_stay: device memories stay with the devices. What :meth:`get` gives is then a note in place of one,
            for checkpoints: ``{AWAY: name}``, which :meth:`put` takes back; no hook of the device half sees it.
    """

    ahead: int = 0
    collective: bool = False
    failures: int = 5
    memories_stay: bool = False

    @abstractmethod
    def begin(self, job: Job) -> None:
        """Start the workers and give each what it keeps for the whole run. Called before the first visit."""

    @abstractmethod
    def submit(self, order: Order) -> None:
        """Let a worker run a visit, some time before :meth:`answer` asks for it."""

    @abstractmethod
    def answer(self, order: Order) -> Answer:
        """Wait for a visit.

        Raises:
            Exception: what the worker's code raised, with its traceback.
        """

    @property
    def serves(self) -> bool:
        """Whether the ``Trainer.fit`` of this process trains what that of another asks for; default: no."""
        return False

    def serve(self, strategy: FederatedStrategy, loader: Any) -> None:
        """Train what the other asks for, where this one :attr:`serves`, until it ends the run."""
        raise NotImplementedError

    def device(self, chosen: torch.device) -> torch.device:
        """On which this process trains, of the kind that the accelerator has chosen; default: the chosen one."""
        return chosen

    def here(self, order: Order) -> bool:
        """Whether the visit, whose turn it is, is to be trained in the Trainer's own process; default: never."""
        return False

    @abstractmethod
    def put(self, memory: bytes) -> Any:
        """Store a device memory; orders carry what is returned."""

    @abstractmethod
    def get(self, stored: Any) -> bytes:
        """The inverse of :meth:`put`."""

    def give_up(self) -> None:  # noqa: B027
        """An error ends the run before :meth:`begin`: tell processes that wait for it; default: there are none."""

    @abstractmethod
    def end(self) -> None:
        """Stop the workers; also after an error, and if :meth:`begin` was never called."""


class Serial:
    """The default engine: visits run one after the other, in this process, on the Trainer's own module.

    Exact, debuggable, and the only one whose runs can be saved and resumed in mid-round.
    """

    serves = False

    def __repr__(self) -> str:
        return "Serial()"

    def device(self, chosen: torch.device) -> torch.device:
        """The one that the accelerator has chosen."""
        return chosen
