"""What carries a device's uploads to the cloud, and the answers back."""

from __future__ import annotations

from collections import deque
from typing import Protocol

from edgebolt.hat.cloud_engine import Answer, CloudEngine
from edgebolt.hat.row_format import FORMATS
from edgebolt.hat.upload import Upload

__all__ = ["CloudLink", "DeviceRefusedError", "InProcess", "LinkLostError"]


class LinkLostError(ConnectionError):
    """The link has broken, or nothing has come for too long."""


class DeviceRefusedError(ConnectionError):
    """Cloud and device do not fit: another model or protocol, or a cloud whose certificate is not to be taken.

    Trying again does not help.
    """


class CloudLink(Protocol):
    """One device's link, for any number of conversations.

    Answers come in any order and may be missing; every upload may be sent again.

    Attributes:
        most_rows: of an upload, which the cloud takes.
    """

    most_rows: int

    def send(self, conversation: bytes, sequence: int, upload: Upload) -> None:
        """Send an upload, or queue it.

        Raises:
            LinkLostError: if the link has broken.
        """

    def receive(self, conversation: bytes) -> Answer:
        """Wait for the next answer to one of the conversation's uploads.

        Raises:
            LinkLostError: if the link has broken, or nothing has come for too long.
        """

    def arrived(self, conversation: bytes) -> bool:
        """Whether :meth:`receive` would return, or raise, at once."""

    def reopen(self) -> None:
        """Open the link anew after it was lost; if another conversation has done so, that will do.

        Raises:
            LinkLostError: if that does not succeed.
        """

    def end(self, conversation: bytes) -> None:
        """Say that a conversation is over."""

    def row_seconds(self) -> float | None:
        """``A / β``: seconds that a row is on the uplink, as measured so far; None while nothing is known."""

    def cloud_seconds(self, tokens: float) -> float:
        """``g``: seconds that the cloud takes for a batch of so many tokens, as it says."""

    def batch_tokens(self) -> float:
        """``μ``: tokens of a batch, as the cloud says."""


class InProcess:
    """A link to an engine in the same process, which runs when an answer is waited for.

    Args:
        engine: the cloud.
        rows: format that rows pass on both ways, a key of ``FORMATS``; None: none.
        steps: how often :meth:`arrived` says no before an answer is waited for: steps of look-ahead.
    """

    def __init__(self, engine: CloudEngine, rows: str | None = None, steps: int = 4) -> None:
        self.engine, self.format, self.steps = engine, None if rows is None else FORMATS[rows], steps
        self.most_rows = 1 << 30
        self._answers: dict[bytes, deque[Answer]] = {}
        self._polled: dict[bytes, int] = {}

    def send(self, conversation: bytes, sequence: int, upload: Upload) -> None:
        """Hand an upload to the engine."""
        self._polled[conversation] = 0
        if self.format is not None:
            passed = self.format.passed(upload.rows)
            upload = Upload(upload.start, passed, upload.reply, upload.kept, upload.parents)
        self.engine.take(conversation, sequence, upload, self._answers.setdefault(conversation, deque()).append)

    def receive(self, conversation: bytes) -> Answer:
        """Run the engine until there is an answer."""
        waiting = self._answers.setdefault(conversation, deque())
        while not waiting:
            if not self.engine.step() and not waiting:
                raise LinkLostError("The engine has nothing to run, and an answer is waited for.")
        answer = waiting.popleft()
        if self.format is not None and answer.deep is not None:
            answer = Answer(answer.sequence, self.format.passed(answer.deep))
        return answer

    def arrived(self, conversation: bytes) -> bool:
        """No for ``steps`` times, then yes."""
        self._polled[conversation] = self._polled.get(conversation, 0) + 1
        return self._polled[conversation] > self.steps

    def reopen(self) -> None:
        """Nothing to open."""

    def end(self, conversation: bytes) -> None:
        """Let the conversation's cache go."""
        self.engine.end(conversation)
        self._answers.pop(conversation, None)
        self._polled.pop(conversation, None)

    def row_seconds(self) -> float | None:
        """There is nothing on the way."""
        return 0.0

    def cloud_seconds(self, tokens: float) -> float:
        """Nothing is measured."""
        return 0.0

    def batch_tokens(self) -> float:
        """Nothing is measured."""
        return 0.0
