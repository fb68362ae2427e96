"""The link over gRPC, from the device's side."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from typing import Any

import grpc

from edgebolt.common.decoding import BatchDelay, Link, MovingAverage
from edgebolt.hat.cloud_engine import Answer
from edgebolt.hat.link import LinkLostError
from edgebolt.hat.row_format import FORMATS
from edgebolt.hat.tls import DeviceKeys, is_loopback
from edgebolt.hat.upload import Upload
from edgebolt.hat.wire import PROTOCOL, SERVICE, hat_pb2, written_upload

__all__ = ["DeviceRefusedError", "GrpcLink"]


class DeviceRefusedError(ConnectionError):
    """The cloud does not talk to this device: another model or protocol. Trying again does not help."""


class GrpcLink:
    """One stream to the cloud.

    Args:
        address: ``host:port``.
        width: of hidden states.
        fingerprint: of the model, which the cloud must have too.
        rows: format of rows, a key of ``FORMATS``.
        keys: certificates; without them only a loopback address is taken.
        timeout: seconds without an answer after which the link counts as lost.
        backoff: seconds before the link is opened anew, twice as many each time, at most 10.
        shape: holds messages back as a link of so many bytes a second would; its latency is not applied. For
            experiments on one machine.

    Raises:
        ValueError: for an address on another machine without keys, or an unknown format.
        LinkLostError: if the cloud cannot be reached.
        DeviceRefusedError: if it has another model or protocol.
    """

    def __init__(
        self,
        address: str,
        width: int,
        fingerprint: str,
        rows: str = "float32",
        keys: DeviceKeys | None = None,
        timeout: float = 30.0,
        backoff: float = 0.2,
        shape: Link | None = None,
    ) -> None:
        host = address.rpartition(":")[0]
        if not host or not address.rpartition(":")[2].isdigit():
            raise ValueError(f"address={address!r}: write host:port, such as 127.0.0.1:50051.")
        if keys is None and not is_loopback(host):
            raise ValueError(
                f"address={address!r} is on another machine, and without certificates everybody could read "
                "along: give keys (--tls-cert, --tls-key, --ca), or use a tunnel to 127.0.0.1."
            )
        if rows not in FORMATS:
            raise ValueError(f"rows={rows!r}: use one of {sorted(FORMATS)}.")
        self.address, self.width, self.fingerprint, self.format = address, width, fingerprint, FORMATS[rows]
        self.keys, self.timeout, self.backoff, self.shape = keys, timeout, backoff, shape
        self.sent, self.received = 0, 0
        self._up = MovingAverage()  # bytes a second
        self._delay: BatchDelay | None = None
        self._batch = 1.0
        self._lost = 0
        self._open()

    # Opening and closing

    def _open(self) -> None:
        options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
        if self.keys is None:
            self._channel = grpc.insecure_channel(self.address, options)
        else:
            self._channel = grpc.secure_channel(self.address, self.keys.credentials(), options)
        call: Any = self._channel.stream_stream(
            f"/{SERVICE}/Converse", hat_pb2.FromDevice.SerializeToString, hat_pb2.FromCloud.FromString
        )
        self._outgoing: queue.SimpleQueue[hat_pb2.FromDevice | None] = queue.SimpleQueue()
        self._incoming: queue.SimpleQueue[hat_pb2.FromCloud | grpc.RpcError] = queue.SimpleQueue()
        self._outgoing.put(
            hat_pb2.FromDevice(hello=hat_pb2.Hello(protocol=PROTOCOL, model=self.fingerprint, rows=self.format.name))
        )
        self._sizes: dict[tuple[bytes, int], int] = {}  # of uploads that were sent right behind another
        self._open_uploads, self._came = 0, 0.0
        self._stream = call(self._messages(self._outgoing))
        self._reader = threading.Thread(target=self._read, args=(self._stream, self._incoming), daemon=True)
        self._reader.start()
        welcome = self._next().welcome
        self.most_rows = int(welcome.most_rows)
        self._hear(welcome.state)
        self._lost = 0

    def _messages(self, outgoing: queue.SimpleQueue[hat_pb2.FromDevice | None]) -> Iterator[hat_pb2.FromDevice]:
        for message in iter(outgoing.get, None):
            if self.shape is not None:
                time.sleep(message.ByteSize() / self.shape.up)
            yield message

    def _read(self, stream: Iterator[hat_pb2.FromCloud], incoming: queue.SimpleQueue[Any]) -> None:
        try:
            for message in stream:
                if self.shape is not None:
                    time.sleep(message.ByteSize() / self.shape.down)
                incoming.put(message)
            incoming.put(LinkLostError("The cloud has closed the stream."))
        except grpc.RpcError as error:
            incoming.put(error)

    def close(self) -> None:
        """Close the stream and the channel, once what was sent has come to the cloud, or after a second."""
        self._outgoing.put(None)
        self._reader.join(1.0)  # the cloud ends the stream when it has read the last message
        self._stream.cancel()
        self._channel.close()

    def reopen(self) -> None:
        """Open the stream anew, after a pause."""
        self.close()
        time.sleep(min(self.backoff * 2**self._lost, 10.0))
        self._lost += 1
        self._open()

    # Messages

    def send(self, conversation: bytes, sequence: int, upload: Upload) -> None:
        """Queue an upload."""
        message = written_upload(conversation, sequence, upload, self.format)
        self.sent += message.ByteSize()
        if self._open_uploads:
            self._sizes[conversation, sequence] = message.ByteSize()
        self._open_uploads += 1
        self._outgoing.put(hat_pb2.FromDevice(upload=message))

    def end(self, conversation: bytes) -> None:
        """Say that a conversation is over."""
        self._outgoing.put(hat_pb2.FromDevice(end=hat_pb2.End(conversation=conversation)))

    def arrived(self) -> bool:
        """Whether an answer has come."""
        return not self._incoming.empty()

    def receive(self, conversation: bytes) -> Answer:
        """Wait for an answer to one of the conversation's uploads."""
        while True:
            message = self._next()
            self.received += message.ByteSize()
            kind = message.WhichOneof("kind")
            self._open_uploads = max(self._open_uploads - 1, 0)
            if kind == "deep" and message.deep.conversation == conversation:
                self._hear(message.deep.state)
                self._measure(message.deep)
                data = message.deep.rows
                try:
                    rows = self.format.decode(data, len(data) // self.format.row_bytes(self.width), self.width)
                except ValueError as error:
                    raise LinkLostError(f"The cloud has sent rows that cannot be read: {error}") from error
                return Answer(int(message.deep.sequence), rows)
            if kind == "missing" and message.missing.conversation == conversation:
                return Answer(int(message.missing.sequence), held=int(message.missing.held))
            if kind == "refused" and message.refused.conversation == conversation:
                return Answer(int(message.refused.sequence), refused=message.refused.reason)

    def _next(self) -> hat_pb2.FromCloud:
        try:
            found = self._incoming.get(timeout=self.timeout)
        except queue.Empty:
            raise LinkLostError(f"{self.address} has not answered for {self.timeout} seconds.") from None
        if isinstance(found, hat_pb2.FromCloud):
            return found
        if isinstance(found, grpc.Call) and found.code() == grpc.StatusCode.FAILED_PRECONDITION:
            raise DeviceRefusedError(found.details() or "The cloud refuses this device.")
        reason = found.details() if isinstance(found, grpc.Call) else found
        raise LinkLostError(f"The link to {self.address} is lost: {reason}")

    # What is known of link and cloud

    def _hear(self, state: hat_pb2.State) -> None:
        self._batch = float(state.tokens)
        if len(state.delays) >= 2 and min(state.delays) > 0:
            self._delay = BatchDelay(list(state.delays))

    def _measure(self, deep: hat_pb2.Deep) -> None:
        """The uplink's speed, from when uploads that were sent one right behind the other came to the cloud."""
        size = self._sizes.pop((deep.conversation, deep.sequence), 0)
        took = deep.received - self._came
        if size >= 4096 and self._came and took > 0:  # smaller ones tell more about the latency
            self._up.update(size / took)
        self._came = deep.received

    def row_seconds(self) -> float | None:
        """``A / β``; None while the uplink has not been measured."""
        return None if self._up.value is None else self.format.row_bytes(self.width) / self._up.value

    def cloud_seconds(self, tokens: float) -> float:
        """``g`` as the cloud has last said."""
        return 0.0 if self._delay is None else self._delay(tokens)

    def batch_tokens(self) -> float:
        """``μ`` as the cloud has last said."""
        return self._batch
