"""Devices and networks that do what they should not."""

import asyncio
import itertools
import queue
import random
import threading
from collections import Counter

import grpc
from tiny_hat import LONGEST, ROWS, Stub, rows

from edgebolt.hat import FORMATS, Upload
from edgebolt.hat.stream import Stream
from edgebolt.hat.wire import PROTOCOL, SERVICE, hat_pb2, written_upload

# Streams that were valid once


EDGES = [0, 1, 2, 3, 7, 8, LONGEST - 1, LONGEST, LONGEST + 1, 2**31 - 1, 2**31, 2**32 - 1]


def valid(draw, model):
    """A stream as a device could send it: prompts in chunks, drafts, trees, ends."""
    yield hat_pb2.FromDevice(hello=hat_pb2.Hello(protocol=PROTOCOL, model=model, rows="float64"))
    held, numbers, trees = {}, Counter(), {}
    for _ in range(draw.randint(4, 16)):
        name = bytes([draw.randrange(3)]) * 16
        if draw.random() < 0.1:
            held.pop(name, None), numbers.pop(name, None), trees.pop(name, None)
            yield hat_pb2.FromDevice(end=hat_pb2.End(conversation=name))
            continue
        numbers[name] += 1
        start, count = held.get(name, 0), draw.randint(1, 9)
        given, kept = rows(count, draw.randrange(99)), ()
        if name in trees and draw.random() < 0.7:
            kept = (start,)
            start += 1
        tree = draw.random() < 0.3
        parents = tuple(draw.randint(-1, node - 1) if node else -1 for node in range(count - 1)) if tree else None
        trees.pop(name, None)
        if tree:
            trees[name] = True
        else:
            held[name] = start + count
        upload = Upload(start, given, draw.choice([0, 1, count]), kept, parents)
        yield hat_pb2.FromDevice(upload=written_upload(name, numbers[name], upload, ROWS))


def bent(message, draw):
    """A field has another value; all of it still is a message."""
    kind = message.WhichOneof("kind")
    inner = getattr(message, kind)
    name = draw.choice([field.name for field in inner.DESCRIPTOR.fields])
    value = getattr(inner, name)
    if isinstance(value, bool):
        setattr(inner, name, not value)
    elif isinstance(value, int):
        setattr(inner, name, draw.choice([*EDGES, value + 1, max(value - 1, 0)]) % 2**32)
    elif isinstance(value, str):
        setattr(inner, name, draw.choice(["", value[1:], value + "x", "\x00" * 5, *FORMATS]))
    elif isinstance(value, bytes) and name == "rows" and draw.random() < 0.5:
        setattr(
            inner, name, value[:-8] + draw.choice([b"\xff" * 8, b"\xff" * 6 + b"\xef\x7f", bytes(8)])
        )  # nan, 1e308
    elif isinstance(value, bytes):
        setattr(inner, name, draw.choice([b"", value[:-1], value + b"x", value[::-1], value * 2]))
    else:  # positions that are kept, or parents
        low = 0 if name == "kept" else -1
        getattr(inner, name).extend(draw.choice([low, *EDGES[:-2]]) for _ in range(draw.randint(1, 3)))
        if draw.random() < 0.5:
            inner.tree = True
    return message


def broken(data, draw):
    """Bytes are other ones, too many, or too few; mostly no message any more."""
    found = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(found) + 1)
        match draw.randrange(5):
            case 0 if at < len(found):
                found[at] ^= 1 << draw.randrange(8)
            case 1:
                del found[at : at + draw.randint(1, 20)]
            case 2:
                found[at:at] = draw.randbytes(draw.randint(1, 20))
            case 3:
                found[at:at] = b"\xff" * draw.randint(1, 10)  # numbers without an end, lengths beyond it
            case 4:
                found += found[: draw.randint(1, 50)]
    return bytes(found)


def fuzzed(seed, model):
    draw = random.Random(seed)
    messages = list(valid(draw, model))
    if draw.random() < 0.3:
        messages.insert(draw.randrange(len(messages)), draw.choice(messages))  # twice
    if draw.random() < 0.3:
        messages[1:] = draw.sample(messages[1:], len(messages) - 1)  # in another order
    wrong = set(draw.sample(range(len(messages)), draw.randint(1, 3)))
    if draw.random() < 0.6:
        wrong.discard(0)  # else no more of the stream is looked at
    for number, message in enumerate(messages):
        if number in wrong and draw.random() < 0.8:
            message = bent(message, draw)
        data = message.SerializeToString()
        yield broken(data, draw) if number in wrong and draw.random() < 0.25 else data


# Devices


class Flood(Stub):
    """Sends whatever it is let."""

    def __init__(self, served, messages) -> None:
        hello = hat_pb2.Hello(protocol=PROTOCOL, model=served.options["fingerprint"], rows="float64")
        # Without probes the connection holds 64 kB that are not read, and not what fits the way to another continent.
        self.channel = grpc.insecure_channel(served.address, [("grpc.http2.bdp_probe", 0)])
        call = self.channel.stream_stream(f"/{SERVICE}/Converse", bytes, hat_pb2.FromCloud.FromString)
        messages = [{"hello": hello}, *messages]
        self.stream = call((hat_pb2.FromDevice(**each).SerializeToString() for each in messages), timeout=60)


class RoughStream(Stream):
    """Uploads come twice, and behind later ones; nothing else is touched."""

    met, seeds = Counter(), itertools.count()

    def _messages(self):
        draw, held = random.Random(next(self.seeds)), []
        while True:
            try:
                message = self._outgoing.get(timeout=0.02 if held else None)
            except queue.Empty:
                message = hat_pb2.FromDevice()  # nothing has come that could go first
            if message is None or message.WhichOneof("kind") != "upload":
                yield from held
                held.clear()
                if message is None:
                    return
                if message.WhichOneof("kind"):
                    yield message
            elif len(held) < 3 and draw.random() < 0.1:
                self.met["reordered"] += 1
                held.append(message)
            else:
                yield message
                if draw.random() < 0.1:
                    self.met["doubled"] += 1
                    held.append(message)

    def next(self, conversation, timeout):
        try:
            return super().next(conversation, timeout)
        except ConnectionError as error:
            self.met["silences"] += "has not answered" in str(error)
            raise


# Networks


class Wire:
    """Carries bytes to a port and back, until it is cut; then it carries those of new connections.

    ``with`` opens and ends it.
    """

    def __init__(self, port) -> None:
        self.target, self.loop = port, asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.open = []

    def __enter__(self):
        self.thread.start()
        started = asyncio.run_coroutine_threadsafe(asyncio.start_server(self._carry, "127.0.0.1", 0), self.loop)
        self.server = started.result(10)
        self.port = self.server.sockets[0].getsockname()[1]
        return self

    async def _carry(self, reader, writer):
        try:
            theirs, ours = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            writer.close()
            return
        ends = (writer.transport, ours.transport)
        self.open.append(ends)
        await asyncio.gather(self._pump(reader, ours), self._pump(theirs, writer), return_exceptions=True)
        for each in ends:
            each.abort()
        self.open.remove(ends)

    async def _pump(self, reader, writer):
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
        writer.close()

    def cut(self, draw) -> int:
        """One of the connections, without a word to either end; returns how many were cut."""
        return asyncio.run_coroutine_threadsafe(self._cut(draw), self.loop).result(10)

    async def _cut(self, draw):
        for each in draw.sample(self.open, min(1, len(self.open))):
            for end in each:
                end.abort()
            return 1
        return 0

    async def _end(self):
        self.server.close()
        for ends in self.open:
            for each in ends:
                each.abort()
        await asyncio.sleep(0.05)

    def __exit__(self, *_) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self.loop).result(10)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(10)
        self.loop.close()
