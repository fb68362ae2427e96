"""The cloud over gRPC: one stream a device, continuous batching over all of them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from edgebolt.common.decoding import BatchDelay, MovingAverage
from edgebolt.hat.cloud_engine import Answer, CloudEngine
from edgebolt.hat.row_format import FORMATS, RowFormat
from edgebolt.hat.tls import ServerKeys, is_loopback
from edgebolt.hat.wire import PROTOCOL, SERVICE, hat_pb2, read_upload

__all__ = ["CloudServer"]

logger = logging.getLogger(__name__)

LEAST_BYTES = 32 << 10  # that an upload or an answer counts as where bytes are bounded, for their number is to be too


class _Device:
    """A device's stream: what waits of it, to be run or to be read.

    Args:
        peer: names in its certificate; conversations belong to those that they were begun with.
        rows: format of its rows.
    """

    def __init__(self, peer: tuple[bytes, ...], rows: RowFormat) -> None:
        self.peer, self.rows = peer, rows
        self.outbox: asyncio.Queue[hat_pb2.FromCloud | None] = asyncio.Queue()
        self.unread = 0  # bytes of what is in the outbox, and of what is just being written
        self.keys: set[tuple[tuple[bytes, ...], bytes]] = set()  # of conversations whose uploads may wait

    def put(self, **message: Any) -> None:
        """Queue a message to the device."""
        self.outbox.put_nowait(found := hat_pb2.FromCloud(**message))
        self.unread += max(found.ByteSize(), LEAST_BYTES)

    def written(self, message: hat_pb2.FromCloud) -> None:
        """It has been taken over by the connection."""
        self.unread -= max(message.ByteSize(), LEAST_BYTES)

    def waiting(self, engine: CloudEngine, width: int) -> int:
        """Bytes of uploads that wait, and of answers that have not been read."""
        self.keys = {key for key in self.keys if engine.waiting(key)}
        uploads = [rows * self.rows.row_bytes(width) for key in self.keys for rows in engine.waiting_rows(key)]
        return self.unread + sum(max(size, LEAST_BYTES) for size in uploads)


class CloudServer:
    """Serves the middle layers to devices, one process, inside a running asyncio loop.

    Args:
        engine: conversations and batches.
        width: of hidden states.
        fingerprint: of the model, which devices must have too (:func:`edgebolt.hat.fingerprint`).
        longest: tokens of a text.
        upload_rows: of one upload at most.
        in_flight: uploads of one conversation that wait at most; more are not read, so that the device waits.
        delay: ``g`` to begin with; it is measured from then on.
        waiting_bytes: of uploads and unread answers of one device; above, its messages are not read.
        idle: seconds after which conversations of which nothing is heard are let go, at the latest after twice as
            many: their devices have vanished, and those that have not upload their texts anew.
        streams: of all devices at a time; more are refused.
    """

    def __init__(
        self,
        engine: CloudEngine,
        width: int,
        fingerprint: str,
        longest: int,
        upload_rows: int = 4096,
        in_flight: int = 8,
        delay: BatchDelay | None = None,
        waiting_bytes: int = 64 << 20,
        idle: float = 600.0,
        streams: int = 1024,
    ) -> None:
        self.engine, self.width, self.fingerprint, self.longest = engine, width, fingerprint, longest
        self.upload_rows, self.in_flight = min(upload_rows, longest), in_flight
        self.delay = BatchDelay([0.01] * 13) if delay is None else delay
        self.waiting_bytes, self.idle, self.streams = waiting_bytes, idle, streams
        self.batch_tokens, self.batches = MovingAverage(), 0
        self._wake, self._finished, self._stopped = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._stopping, self._closing = False, False
        self._streams: dict[asyncio.Task[Any], asyncio.Task[None]] = {}  # what answers a device: what reads from it
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="middle")
        self._server: grpc.aio.Server | None = None
        self._batches: asyncio.Task[None] | None = None
        self._sweeps: asyncio.Task[None] | None = None
        self._health = health.aio.HealthServicer()

    async def start(self, host: str = "127.0.0.1", port: int = 50051, keys: ServerKeys | None = None) -> int:
        """Listen.

        Args:
            host: to listen on.
            port: to listen on; 0 takes a free one.
            keys: certificate, key and the devices' authority; without them only a loopback address is taken.

        Returns:
            The port.

        Raises:
            ValueError: for an address that others reach, without keys.
            OSError: if the port is taken.
        """
        if keys is None and not is_loopback(host):
            raise ValueError(
                f"host={host!r} is reached from other machines, and without certificates everybody could read "
                "along: give --tls-cert, --tls-key and --client-ca, or listen on 127.0.0.1."
            )
        most = self.upload_rows * max(found.row_bytes(self.width) for found in FORMATS.values()) + (64 << 10)
        options = [
            ("grpc.max_receive_message_length", most),
            ("grpc.max_send_message_length", most),
            ("grpc.so_reuseport", 0),  # a second cloud on the same port is an error, not half of the devices
        ]
        self._server = grpc.aio.server(options=options, maximum_concurrent_rpcs=self.streams)
        handler = grpc.stream_stream_rpc_method_handler(
            self._converse, hat_pb2.FromDevice.FromString, hat_pb2.FromCloud.SerializeToString
        )
        self._server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(SERVICE, {"Converse": handler})])
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        address = f"{f'[{host}]' if ':' in host else host}:{port}"
        try:
            if keys is None:
                port = self._server.add_insecure_port(address)
            else:
                port = self._server.add_secure_port(address, keys.credentials())
        except RuntimeError as error:
            raise OSError(f"{address} cannot be listened on: {error}") from error
        await self._server.start()
        for service in ("", SERVICE):
            await self._health.set(service, health_pb2.HealthCheckResponse.SERVING)
        self._batches, self._sweeps = asyncio.create_task(self._run()), asyncio.create_task(self._sweep())
        return port

    async def stop(self, grace: float = 5.0) -> None:
        """Report that no more is served, answer what has come in, and close.

        Args:
            grace: seconds for that, of which streams that have nothing to be answered take none.
        """
        await self._health.enter_graceful_shutdown()
        self._closing = True
        if self._server is not None:
            for reading in self._streams.values():
                reading.cancel()
            if self._streams:
                await asyncio.wait(list(self._streams), timeout=grace)
            await self._server.stop(min(grace, 0.2))  # whoever watches the health service is to hear of it
        self._stopping = True
        self._wake.set()
        if self._batches is not None and self._sweeps is not None:
            self._sweeps.cancel()
            await self._batches
        self._worker.shutdown()
        self._stopped.set()

    async def wait(self) -> None:
        """Until the server has been stopped."""
        await self._stopped.wait()

    # Streams

    async def _converse(
        self, messages: AsyncIterator[hat_pb2.FromDevice], context: grpc.aio.ServicerContext[Any, Any]
    ) -> None:
        try:
            await self._answer(messages, context)
        except DecodeError:  # which gRPC would log with a traceback each time
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "The device has sent bytes that are no message.")

    async def _answer(
        self, messages: AsyncIterator[hat_pb2.FromDevice], context: grpc.aio.ServicerContext[Any, Any]
    ) -> None:
        first = await anext(aiter(messages), None)
        if first is None:
            return
        if (problem := self._problem(first)) is not None:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, problem)
        if self._closing:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "The cloud is stopping.")
        device = _Device(tuple(context.peer_identities() or ()), FORMATS[first.hello.rows])
        device.put(welcome=hat_pb2.Welcome(most_rows=self.upload_rows, state=self._state()))
        reading = asyncio.create_task(self._read(messages, device))
        ending = asyncio.create_task(self._end(reading, device))
        if (mine := asyncio.current_task()) is not None:
            self._streams[mine] = reading
            mine.add_done_callback(self._streams.pop)  # not before gRPC has told the device that the stream has ended
        try:
            while (message := await device.outbox.get()) is not None:
                await context.write(message)
                device.written(message)
                self._announce()
            if not reading.cancelled():
                await reading  # and raise what has ended it, such as bytes that are no message
        finally:
            reading.cancel()
            ending.cancel()
            await asyncio.gather(reading, ending, return_exceptions=True)

    def _problem(self, message: hat_pb2.FromDevice) -> str | None:
        """Why a stream cannot begin with ``message``."""
        hello = message.hello
        if message.WhichOneof("kind") != "hello":
            return "A stream begins with Hello."
        if hello.protocol != PROTOCOL:
            return f"The device speaks protocol {hello.protocol}, the cloud {PROTOCOL}: install the same edgebolt-hat."
        if hello.rows not in FORMATS:
            return f"Rows as {hello.rows[:40]!r} are not known: use one of {sorted(FORMATS)}."
        if hello.model != self.fingerprint:
            return (
                f"The device has model {hello.model[:40]!r}, the cloud {self.fingerprint!r}: give both the same "
                "checkpoint and the same --device-layers."
            )
        return None

    async def _read(self, messages: AsyncIterator[hat_pb2.FromDevice], device: _Device) -> None:
        """Take messages on, until the device has sent its last one or the cloud is stopped."""
        async for message in messages:
            received, kind = time.monotonic(), message.WhichOneof("kind")
            while device.waiting(self.engine, self.width) >= self.waiting_bytes:
                await self._finished.wait()
            if kind == "end":
                self.engine.end((device.peer, message.end.conversation))
            elif kind == "upload":
                await self._take(message.upload, device, received)

    async def _take(self, message: hat_pb2.Upload, device: _Device, received: float) -> None:
        key = (device.peer, message.conversation[:16])
        while self.engine.waiting(key) >= self.in_flight:
            await self._finished.wait()
        deliver = partial(self._deliver, key[1], device, received)
        try:
            upload = read_upload(message, device.rows, self.width, self.upload_rows, self.longest)
        except ValueError as error:
            deliver(Answer(message.sequence, refused=str(error)))
            return
        self.engine.take(key, message.sequence, upload, deliver)
        device.keys.add(key)
        self._wake.set()

    async def _end(self, reading: asyncio.Task[None], device: _Device) -> None:
        """End a stream when no more is read from it and all is answered."""
        await asyncio.wait([reading])
        while any(self.engine.waiting(key) for key in device.keys):
            await self._finished.wait()
        device.outbox.put_nowait(None)

    def _deliver(self, conversation: bytes, device: _Device, received: float, answer: Answer) -> None:
        named: dict[str, Any] = {"conversation": conversation, "sequence": answer.sequence}
        if answer.deep is not None:
            try:
                rows = device.rows.encode(answer.deep)
                device.put(deep=hat_pb2.Deep(**named, rows=rows, state=self._state(), received=received))
                return
            except OverflowError as error:
                answer = Answer(answer.sequence, refused=str(error))
        if answer.held is not None:
            device.put(missing=hat_pb2.Missing(**named, held=answer.held))
        else:
            device.put(refused=hat_pb2.Refused(**named, reason=answer.refused or ""))

    def _announce(self) -> None:
        """Let those go on who wait for answers that are given, or written."""
        self._finished.set()
        self._finished = asyncio.Event()

    def _state(self) -> hat_pb2.State:
        return hat_pb2.State(tokens=self.batch_tokens(1.0), delays=self.delay.seconds)

    # Batches

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while not self._stopping:
            batch = self.engine.batch()
            self._announce()  # whatever was answered: by the last batch, by its failure, or just now
            if not batch:
                self._wake.clear()
                await self._wake.wait()
                continue
            started = time.perf_counter()
            try:
                results = await loop.run_in_executor(self._worker, self.engine.run, batch)
            except Exception:  # one batch must not end all others
                logger.exception("A batch has failed; its conversations are refused")
                self.engine.fail(batch, "The cloud could not run this upload; its log says why.")
                continue
            tokens = sum(rows for _, rows in batch)
            self.delay.update(tokens, time.perf_counter() - started)
            self.batch_tokens.update(tokens)
            self.batches += 1
            self.engine.finish(batch, results)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(self.idle)
            if swept := self.engine.sweep():
                logger.info("%d conversations were idle for %g seconds and are let go", swept, self.idle)
