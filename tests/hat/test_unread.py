"""Devices that upload and never read."""

import asyncio

import pytest
from adversary import Flood
from tiny_hat import ROWS, WIDTH, Served, goes_on, rows, until

from edgebolt.hat import Limits, Upload
from edgebolt.hat.wire import hat_pb2, written_upload

pytestmark = pytest.mark.slow


def numbered(name):
    return name.to_bytes(16)


def answered(number):
    """Uploads of 40 kB that are answered by as many bytes, all of one conversation."""
    for sequence in range(1, number + 1):
        yield {"upload": written_upload(bytes(16), sequence, Upload(0, rows(160), 160), ROWS)}


def many(number):
    """Each of a conversation of its own, that is not ended."""
    for name in range(number):
        yield {"upload": written_upload(numbered(name), 1, Upload(0, rows(160), 160), ROWS)}


def refused(number):
    """Small ones that are refused at length: none is run."""
    for sequence in range(1, number + 1):
        yield {"upload": hat_pb2.Upload(conversation=bytes(16), sequence=sequence, count=1 << 30)}


@pytest.mark.parametrize(
    ("messages", "number", "kind"),
    [(answered, 200, "deep"), (many, 200, "deep"), (refused, 3000, "refused")],
)
def test_a_device_that_never_reads_is_read_no_more(messages, number, kind):
    limits, most = Limits(conversations=16), 1 << 20
    with Served(limits=limits, waiting_bytes=most) as served:
        waiting, engine = [], served.engine
        original = served.server._deliver

        def deliver(conversation, device, received, answer):
            original(conversation, device, received, answer)
            if conversation[:8] == bytes(8):
                waiting.append(device.waiting(engine, WIDTH))

        served.server._deliver = deliver
        flood, before = Flood(served, messages(number)), -1
        while len(waiting) not in (before, number):  # others are served while nothing more of it is taken
            before = len(waiting)
            for _ in range(3):
                goes_on(served)
        assert len(waiting) < number, "all of it was taken, though no answer was read"
        # What waits is at most that, and the one that was on its way.
        assert max(waiting) <= most + 160 * ROWS.row_bytes(WIDTH) + 200
        assert len(engine._held) <= limits.conversations + most // (32 << 10) + 1
        found = [message.WhichOneof("kind") for message in flood.stream]  # nothing of it is lost
        assert found == ["welcome", *[kind] * number]
        flood.channel.close()
        goes_on(served)


def test_a_device_that_goes_without_having_read_leaves_nothing_behind():
    with Served(waiting_bytes=1 << 20) as served:
        tasks = len(asyncio.all_tasks(served.loop))
        flood = Flood(served, answered(400))
        until(lambda: served.server.batches > 10)
        assert len(served.server._streams) == 1
        flood.stream.cancel()
        flood.channel.close()
        until(lambda: not served.server._streams and len(asyncio.all_tasks(served.loop)) == tasks)
        goes_on(served)
