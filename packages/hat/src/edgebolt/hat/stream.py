"""One stream to the cloud, for as long as it lasts."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import grpc

from edgebolt.common.decoding import Link
from edgebolt.hat.link import DeviceRefusedError, LinkLostError
from edgebolt.hat.wire import SERVICE, hat_pb2

__all__ = ["Stream"]

GREETING = b""  # in place of a conversation's name, which has 16 bytes

# What gRPC tells of a handshake that will fail the next time too. A cloud that refuses the device's certificate is not
# among it: since TLS 1.3 that looks as if the cloud had gone away.
_REFUSED_CLOUD = {
    "CERTIFICATE_VERIFY_FAILED": "its certificate is not of the authority that was given, or no longer good",
    "Hostname Verification Check failed": "its certificate is for another host",
    "WRONG_VERSION_NUMBER": "it speaks plain text, and certificates were given",
}


class Stream:
    """One stream to the cloud; what comes is kept for the conversation that it belongs to.

    May be used by any number of threads, one a conversation. A stream that has ended stays so, and tells everyone who
    waits for an answer or asks for one.

    Args:
        address: of the cloud, for messages.
        channel: that it is on; it is closed with it.
        hello: that it begins with.
        shape: holds messages back as a link of so many bytes a second would.
        heard: is called with every message but the greeting, from the thread that reads.

    Attributes:
        lost: why it has ended; None while it has not.
    """

    def __init__(
        self,
        address: str,
        channel: Any,
        hello: hat_pb2.Hello,
        shape: Link | None,
        heard: Callable[[hat_pb2.FromCloud], None],
    ) -> None:
        self.address, self.shape = address, shape
        self.lost: ConnectionError | None = None
        self._channel, self._heard = channel, heard
        self._changed = threading.Condition()
        self._answers: dict[bytes, deque[hat_pb2.FromCloud]] = {GREETING: deque()}
        self._came = 0
        self._outgoing: queue.SimpleQueue[hat_pb2.FromDevice | None] = queue.SimpleQueue()
        self._outgoing.put(hat_pb2.FromDevice(hello=hello))
        call = channel.stream_stream(
            f"/{SERVICE}/Converse", hat_pb2.FromDevice.SerializeToString, hat_pb2.FromCloud.FromString
        )
        self._call = call(self._messages())
        self._reader = threading.Thread(target=self._read, name="hat-stream", daemon=True)
        self._reader.start()

    def _messages(self) -> Iterator[hat_pb2.FromDevice]:
        for message in iter(self._outgoing.get, None):
            if self.shape is not None:
                time.sleep(message.ByteSize() / self.shape.up)
            yield message

    def _read(self) -> None:
        ended: ConnectionError = LinkLostError(f"The link to {self.address} is lost: the cloud has closed the stream.")
        try:
            for message in self._call:
                if self.shape is not None:
                    time.sleep(message.ByteSize() / self.shape.down)
                kind = message.WhichOneof("kind")
                if kind != "welcome":
                    self._heard(message)
                name = GREETING if kind == "welcome" else getattr(message, kind).conversation
                with self._changed:
                    self._came += 1
                    if name in self._answers:  # else it is over
                        self._answers[name].append(message)
                    self._changed.notify_all()
        except grpc.RpcError as error:
            ended = self._why(error)
        finally:
            self._end(ended)

    def _why(self, error: grpc.RpcError) -> ConnectionError:
        if not isinstance(error, grpc.Call):
            return LinkLostError(f"The link to {self.address} is lost: {error}")
        details = error.details() or str(error.code())
        if error.code() == grpc.StatusCode.FAILED_PRECONDITION:
            return DeviceRefusedError(details)
        for sign, meaning in _REFUSED_CLOUD.items():
            if sign in details:
                return DeviceRefusedError(f"The cloud at {self.address} is not taken: {meaning} ({details})")
        return LinkLostError(f"The link to {self.address} is lost: {details}")

    def _end(self, why: ConnectionError) -> None:
        with self._changed:
            self.lost = self.lost or why
            self._changed.notify_all()

    def close(self, linger: float = 0.0) -> None:
        """End it, and the channel.

        Args:
            linger: seconds in which the cloud may read and answer what was sent.
        """
        self._end(LinkLostError(f"The link to {self.address} was closed."))
        self._outgoing.put(None)
        self._reader.join(linger)  # the cloud ends the stream when it has answered the last message
        self._call.cancel()
        self._channel.close()
        self._reader.join(1.0)

    def check(self) -> None:
        """Raise what has ended the stream, if it has ended."""
        if self.lost is not None:
            raise type(self.lost)(*self.lost.args)  # a new one, for each thread adds its own traceback

    def send(self, message: hat_pb2.FromDevice) -> None:
        """Queue a message; where the stream has ended it is lost."""
        self._outgoing.put(message)

    def expect(self, conversation: bytes) -> None:
        """Keep what comes for a conversation."""
        with self._changed:
            self._answers.setdefault(conversation, deque())

    def forget(self, conversation: bytes) -> None:
        """Drop what has come and comes for a conversation."""
        with self._changed:
            self._answers.pop(conversation, None)

    def ready(self, conversation: bytes) -> bool:
        """Whether :meth:`next` would return, or raise, at once."""
        with self._changed:
            return self.lost is not None or bool(self._answers.get(conversation))

    def next(self, conversation: bytes, timeout: float) -> hat_pb2.FromCloud:
        """The next message for a conversation, or the greeting.

        Raises:
            LinkLostError: if the stream has ended, or the message has not come for ``timeout`` seconds; if no other
                message has either, the stream has ended with that.
            DeviceRefusedError: if the stream has ended since cloud and device do not fit each other.
        """
        with self._changed:
            answers, before = self._answers.setdefault(conversation, deque()), self._came
            if not self._changed.wait_for(lambda: answers or self.lost is not None, timeout):
                late = LinkLostError(f"{self.address} has not answered for {timeout} seconds.")
                if self._came == before:
                    self._end(late)
                raise late
            if not answers:
                self.check()
            return answers.popleft()
