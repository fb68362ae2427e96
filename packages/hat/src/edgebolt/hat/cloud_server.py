"""The cloud over gRPC: one stream a device, continuous batching over all of them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from edgebolt.common.decoding import BatchDelay, MovingAverage
from edgebolt.hat.cloud_engine import Answer, CloudEngine
from edgebolt.hat.row_format import FORMATS, RowFormat
from edgebolt.hat.tls import ServerKeys, is_loopback
from edgebolt.hat.wire import PROTOCOL, SERVICE, hat_pb2, read_upload

__all__ = ["CloudServer"]

logger = logging.getLogger(__name__)


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
    ) -> None:
        self.engine, self.width, self.fingerprint, self.longest = engine, width, fingerprint, longest
        self.upload_rows, self.in_flight = min(upload_rows, longest), in_flight
        self.delay = BatchDelay([0.01] * 13) if delay is None else delay
        self.batch_tokens, self.batches = MovingAverage(), 0
        self._wake, self._finished, self._stopped = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._stopping = False
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="middle")
        self._server: grpc.aio.Server | None = None
        self._batches: asyncio.Task[None] | None = None
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
        self._server = grpc.aio.server(options=options)
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
        self._batches = asyncio.create_task(self._run())
        return port

    async def stop(self, grace: float = 5.0) -> None:
        """Report that no more is served, answer for ``grace`` seconds what has come in, and close."""
        await self._health.enter_graceful_shutdown()
        if self._server is not None:
            await self._server.stop(grace)
        self._stopping = True
        self._wake.set()
        if self._batches is not None:
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
        first = await anext(aiter(messages), None)
        if first is None:
            return
        if (problem := self._problem(first)) is not None:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, problem)
        # Conversations belong to the name in the certificate that they were begun with.
        peer = tuple(context.peer_identities() or ())
        outbox: asyncio.Queue[hat_pb2.FromCloud | None] = asyncio.Queue()
        outbox.put_nowait(hat_pb2.FromCloud(welcome=hat_pb2.Welcome(most_rows=self.upload_rows, state=self._state())))
        reader = asyncio.create_task(self._read(messages, peer, FORMATS[first.hello.rows], outbox))
        try:
            while (message := await outbox.get()) is not None:
                await context.write(message)
            await reader  # and raise what has ended it, such as bytes that are no message
        finally:
            reader.cancel()
            with suppress(asyncio.CancelledError):
                await reader

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

    async def _read(
        self,
        messages: AsyncIterator[hat_pb2.FromDevice],
        peer: tuple[bytes, ...],
        rows: RowFormat,
        outbox: asyncio.Queue[hat_pb2.FromCloud | None],
    ) -> None:
        """Take messages on; when the device has sent its last one and all is answered, end the stream."""
        keys: set[tuple[tuple[bytes, ...], bytes]] = set()
        try:
            async for message in messages:
                kind = message.WhichOneof("kind")
                if kind == "end":
                    self.engine.end((peer, message.end.conversation))
                    keys.discard((peer, message.end.conversation))
                elif kind == "upload":
                    key = (peer, message.upload.conversation[:16])
                    while self.engine.waiting(key) >= self.in_flight:
                        await self._finished.wait()
                    deliver = partial(self._deliver, key[1], rows, outbox, time.monotonic())
                    try:
                        upload = read_upload(message.upload, rows, self.width, self.upload_rows, self.longest)
                    except ValueError as error:
                        deliver(Answer(message.upload.sequence, refused=str(error)))
                        continue
                    self.engine.take(key, message.upload.sequence, upload, deliver)
                    keys.add(key)
                    self._wake.set()
            while any(self.engine.waiting(key) for key in keys):
                await self._finished.wait()
        finally:
            outbox.put_nowait(None)

    def _deliver(
        self,
        conversation: bytes,
        rows: RowFormat,
        outbox: asyncio.Queue[hat_pb2.FromCloud | None],
        received: float,
        answer: Answer,
    ) -> None:
        named: dict[str, Any] = {"conversation": conversation, "sequence": answer.sequence}
        if answer.deep is not None:
            try:
                deep = hat_pb2.Deep(**named, rows=rows.encode(answer.deep), state=self._state(), received=received)
                outbox.put_nowait(hat_pb2.FromCloud(deep=deep))
                return
            except OverflowError as error:
                answer = Answer(answer.sequence, refused=str(error))
        if answer.held is not None:
            outbox.put_nowait(hat_pb2.FromCloud(missing=hat_pb2.Missing(**named, held=answer.held)))
        else:
            outbox.put_nowait(hat_pb2.FromCloud(refused=hat_pb2.Refused(**named, reason=answer.refused or "")))

    def _state(self) -> hat_pb2.State:
        return hat_pb2.State(tokens=self.batch_tokens(1.0), delays=self.delay.seconds)

    # Batches

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while not self._stopping:
            batch = self.engine.batch()
            self._finished.set()  # whatever was answered: by the last batch, by its failure, or just now
            self._finished = asyncio.Event()
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
