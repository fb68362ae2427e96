"""The link over gRPC, from the device's side."""

from __future__ import annotations

import threading
import time
from collections import deque
from time import monotonic

import grpc

from edgebolt.common.decoding import BatchDelay, Link
from edgebolt.hat.cloud_engine import Answer
from edgebolt.hat.link import DeviceRefusedError, LinkLostError
from edgebolt.hat.row_format import FORMATS
from edgebolt.hat.stream import GREETING, Stream
from edgebolt.hat.tls import DeviceKeys, is_loopback
from edgebolt.hat.uplink import Uplink
from edgebolt.hat.upload import Upload
from edgebolt.hat.wire import MOST_ANSWERED, PROTOCOL, hat_pb2, written_upload

__all__ = ["DeviceRefusedError", "GrpcLink"]


class GrpcLink:
    """One stream to the cloud, for any number of conversations at a time, each in one thread.

    A stream that is lost is lost for all of them. The first one that opens it anew does so for all: the others find it
    open, or failed in the same way, and send again what was not answered.

    Args:
        address: ``host:port``.
        width: of hidden states.
        fingerprint: of the model, which the cloud must have too.
        rows: format of rows, a key of ``FORMATS``.
        keys: certificates; without them only a loopback address is taken.
        timeout: seconds without an answer after which the link counts as lost, for one conversation if others are
            answered meanwhile.
        backoff: seconds before the link is opened anew, twice as many each time, at most 10.
        shape: holds messages back as a link of so many bytes a second would; its latency is not applied. For
            experiments on one machine.

    Raises:
        ValueError: for an address on another machine without keys, or an unknown format.
        LinkLostError: if the cloud cannot be reached.
        DeviceRefusedError: if it has another model or protocol, or a certificate that is not to be taken.
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
        self._uplink = Uplink()
        self._delay: BatchDelay | None = None
        self._batch = 1.0
        self._counting = threading.Lock()  # what is sent, counted and measured, and the order in which it is
        self._opening = threading.Lock()
        self._tried, self._failed, self._closed = 0, 0, False
        self._streams: dict[bytes, Stream] = {}  # that each conversation has last sent on
        self._over: deque[bytes] = deque(maxlen=64)  # conversations whose end may have been lost with a stream
        self._open()

    # Opening and closing

    def _open(self) -> None:
        most = MOST_ANSWERED * max(found.row_bytes(self.width) for found in FORMATS.values()) + (64 << 10)
        options = [("grpc.max_receive_message_length", most), ("grpc.max_send_message_length", -1)]
        if self.keys is None:
            # a proxy of the environment would take what is meant for this machine to another, in plain text
            channel = grpc.insecure_channel(self.address, [*options, ("grpc.enable_http_proxy", 0)])
        else:
            channel = grpc.secure_channel(self.address, self.keys.credentials(), options)
        hello = hat_pb2.Hello(protocol=PROTOCOL, model=self.fingerprint, rows=self.format.name)
        with self._counting:
            self._uplink.restart()
            self._stream = Stream(self.address, channel, hello, self.shape, self._hear)
            for conversation in self._over:
                self._stream.send(hat_pb2.FromDevice(end=hat_pb2.End(conversation=conversation)))
        try:
            welcome = self._stream.next(GREETING, self.timeout).welcome
        except ConnectionError:
            self._stream.close()
            raise
        self.most_rows = int(welcome.most_rows)
        self._take(welcome.state)
        if self._closed:  # by another thread, meanwhile
            self._stream.close()

    def close(self) -> None:
        """Close the stream and the channel, once what was sent has come to the cloud, or after a second."""
        self._closed = True
        self._stream.close(linger=1.0)

    def reopen(self) -> None:
        """Open the stream anew, after a pause; if another conversation has done so, that will do."""
        tried = self._tried
        with self._opening:
            if self._tried == tried and self._stream.lost is not None and not self._closed:
                self._stream.close()
                time.sleep(min(self.backoff * 2 ** min(self._failed, 10), 10.0))
                self._tried += 1
                self._failed += 1
                self._open()
                self._failed = 0
            self._stream.check()

    # Messages

    def send(self, conversation: bytes, sequence: int, upload: Upload) -> None:
        """Queue an upload."""
        message = written_upload(conversation, sequence, upload, self.format)
        with self._counting:
            stream = self._streams[conversation] = self._stream
            stream.expect(conversation)
            self.sent += message.ByteSize()
            self._uplink.sent(conversation, sequence, message.ByteSize(), monotonic())
            stream.send(hat_pb2.FromDevice(upload=message))

    def end(self, conversation: bytes) -> None:
        """Say that a conversation is over."""
        with self._counting:
            self._streams.pop(conversation, self._stream).forget(conversation)
            self._uplink.forget(conversation)
            self._over.append(conversation)
            self._stream.send(hat_pb2.FromDevice(end=hat_pb2.End(conversation=conversation)))

    def arrived(self, conversation: bytes) -> bool:
        """Whether an answer to one of the conversation's uploads has come, or the link is lost."""
        return self._streams.get(conversation, self._stream).ready(conversation)

    def receive(self, conversation: bytes) -> Answer:
        """Wait for an answer to one of the conversation's uploads."""
        # From the stream that they were sent on: on another one they would be waited for in vain.
        message = self._streams.get(conversation, self._stream).next(conversation, self.timeout)
        kind = message.WhichOneof("kind")
        if kind == "missing":
            return Answer(int(message.missing.sequence), held=int(message.missing.held))
        if kind == "refused":
            return Answer(int(message.refused.sequence), refused=message.refused.reason)
        data = message.deep.rows
        try:
            rows = self.format.decode(data, len(data) // self.format.row_bytes(self.width), self.width)
        except ValueError as error:
            raise LinkLostError(f"The cloud has sent rows that cannot be read: {error}") from error
        return Answer(int(message.deep.sequence), rows)

    # What is known of link and cloud

    def _hear(self, message: hat_pb2.FromCloud) -> None:
        kind = str(message.WhichOneof("kind"))
        answer = getattr(message, kind)
        with self._counting:
            self.received += message.ByteSize()
            self._uplink.came(answer.conversation, answer.sequence, answer.received if kind == "deep" else None)
        if kind == "deep":
            self._take(answer.state)

    def _take(self, state: hat_pb2.State) -> None:
        self._batch = float(state.tokens)
        if len(state.delays) >= 2 and min(state.delays) > 0:
            self._delay = BatchDelay(list(state.delays))

    def row_seconds(self) -> float | None:
        """``A / β``; None while the uplink has not been measured."""
        speed = self._uplink.speed or self._uplink.least
        return None if speed is None else self.format.row_bytes(self.width) / speed

    def cloud_seconds(self, tokens: float) -> float:
        """``g`` as the cloud has last said."""
        return 0.0 if self._delay is None else self._delay(tokens)

    def batch_tokens(self) -> float:
        """``μ`` as the cloud has last said."""
        return self._batch
