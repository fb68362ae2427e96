import queue
import socket
import time

import grpc
import pytest
import torch
from tiny_hat import (
    LONGEST,
    ROWS,
    WIDTH,
    Gated,
    Served,
    Stub,
    autoregressive,
    deep,
    goes_on,
    parts,
    prompt,
    rows,
    spoken,
    talk,
    until,
)

from edgebolt.hat import CloudEngine, CloudModel, Dialogue, Limits, Upload, UploadRefusedError, fingerprint
from edgebolt.hat.wire import PROTOCOL, SERVICE, hat_pb2, written_upload

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("data", [b"\xff\xff\xff", bytes(1 << 20)], ids=["garbage", "oversize"])
def test_bytes_that_are_no_message_end_their_stream_alone(served, data, early):
    channel = grpc.insecure_channel(served.address)
    call = channel.stream_stream(f"/{SERVICE}/Converse", bytes, hat_pb2.FromCloud.FromString)
    hello = hat_pb2.Hello(protocol=PROTOCOL, model=fingerprint(parts()), rows="float64")
    messages = queue.SimpleQueue()
    for each in [data] if early else [hat_pb2.FromDevice(hello=hello).SerializeToString(), data]:
        messages.put(each)
    began = time.monotonic()
    with pytest.raises(grpc.RpcError) as caught:
        list(call(iter(messages.get, None), timeout=15))
    messages.put(None)
    channel.close()
    assert caught.value.code() != grpc.StatusCode.DEADLINE_EXCEEDED and time.monotonic() - began < 10
    goes_on(served)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"count": 4}, "bytes for 4 rows"),
        ({"count": 2**32 - 1}, "an upload has 1 to 160"),
        ({"start": 2**32 - 1}, "at most 160 tokens"),
        ({"rows": b"123"}, "3 bytes for 3 rows"),
        ({"rows": b"\xff" * 3 * WIDTH * 8}, "not finite"),
        ({"sequence": 0}, "numbered from 1"),
        ({"parents": [5]}, "Parents belong to a tree"),
    ],
)
def test_a_wrong_upload_is_refused_and_its_stream_goes_on(served, stub, changed, message):
    stub.hear()
    sent = written_upload(bytes(16), 1, Upload(0, rows(3), 3), ROWS)
    wrong = hat_pb2.Upload()
    wrong.CopyFrom(sent)
    for name, value in changed.items():
        wrong.ClearField(name)
        wrong.MergeFrom(hat_pb2.Upload(**{name: value}))
    stub.send(upload=wrong)
    refused = stub.hear()
    assert message in refused.reason and refused.conversation == bytes(16)
    stub.send(upload=sent)
    assert deep(stub.hear()).shape == (3, WIDTH)
    stub.send(end=hat_pb2.End(conversation=bytes(16)))
    until(lambda: served.engine.conversations == 0)


def test_a_refusal_reaches_the_text(served, link):
    original = link.send
    link.send = lambda name, sequence, upload: original(name, sequence, Upload(500, upload.rows, upload.reply))
    with pytest.raises(UploadRefusedError, match="a text has at most 160 tokens"):
        spoken(Dialogue(talk(), link))
    goes_on(served)


def test_what_overflows_the_format_is_refused_with_the_way_out():
    class Large(CloudModel):
        def run(self, work):
            return [1e6 * deep for deep in super().run(work)]

    with Served(cloud=CloudEngine(Large(parts().middle))) as served:
        link = served.link(rows="float16")
        with pytest.raises(UploadRefusedError, match="do not fit float16: use 'bfloat16' or 'float32'"):
            spoken(Dialogue(talk(), link))
        link.close()
        wide = served.link(rows="bfloat16")
        assert len(spoken(Dialogue(talk(9, 5), wide))) == 14
        wide.close()


async def _ended(served):
    """Let all conversations go, those that a test has left there."""
    for key in list(served.engine._held):
        served.engine.end(key)


def test_a_tree_whose_answer_is_short_does_not_fail_the_batch_of_others():
    with Served(limits=Limits(batch_tokens=4)) as served:
        stub = Stub(served)
        stub.hear()
        tree = Upload(0, rows(9), 1, (), (-1,) * 8)
        stub.send(upload=written_upload(bytes(16), 1, tree, ROWS))
        assert deep(stub.hear()).shape == (1, WIDTH)
        stub.close()
        goes_on(served)


def test_a_batch_that_fails_is_refused_and_others_go_on():
    class Fails(CloudModel):
        def run(self, work):
            if any(len(upload.rows) == 7 for _, upload in work):
                raise RuntimeError("out of memory")
            return super().run(work)

    with Served(cloud=CloudEngine(Fails(parts().middle))) as served:
        found = served.link()
        with pytest.raises(UploadRefusedError, match="its log says why"):
            spoken(Dialogue(talk(7), found))
        assert served.engine.conversations == 0
        assert spoken(Dialogue(talk(6), found)) == autoregressive(prompt(6), 16)
        found.close()


def test_doubled_and_reordered_messages(stub, served):
    given, name, other = rows(8), bytes(15) + b"1", bytes(15) + b"2"
    whole = CloudModel(parts().middle)
    from edgebolt.common.decoding import new_cache

    (wanted,) = whole.run([(new_cache(), Upload(0, given, 8))])
    assert stub.hear().most_rows == LONGEST
    stub.upload(name, 1, 0, given[:3], 1)
    first = stub.hear()
    torch.testing.assert_close(deep(first), wanted[2:3], rtol=1e-11, atol=1e-11)
    batches = served.server.batches
    stub.upload(name, 1, 0, given[:3], 1)
    again = stub.hear()
    assert (again.sequence, again.rows) == (1, first.rows) and served.server.batches == batches
    # the third before the second: it is told what is held, and the second, an old one now, is dropped
    stub.upload(name, 3, 5, given[5:], 3)
    stub.upload(name, 2, 3, given[3:5], 2)
    stub.upload(other, 1, 0, given, 8)
    missing, others = stub.hear(), stub.hear()
    assert (missing.sequence, missing.held, missing.conversation) == (3, 3, name)
    assert others.conversation == other
    torch.testing.assert_close(deep(others), wanted, rtol=1e-11, atol=1e-11)
    stub.upload(name, 4, 3, given[3:5], 0)
    stub.upload(name, 5, 5, given[5:], 3)
    silent, last = stub.hear(), stub.hear()
    assert (silent.sequence, silent.rows, last.sequence) == (4, b"", 5)
    torch.testing.assert_close(deep(last), wanted[5:], rtol=1e-11, atol=1e-11)
    for each in (name, other):
        stub.send(end=hat_pb2.End(conversation=each))
    until(lambda: served.engine.conversations == 0)


def test_what_was_sent_before_the_stream_is_closed_is_answered(served):
    channel = grpc.insecure_channel(served.address)
    call = channel.stream_stream(f"/{SERVICE}/Converse", bytes, hat_pb2.FromCloud.FromString)
    hello = hat_pb2.Hello(protocol=PROTOCOL, model=fingerprint(parts()), rows="float64")
    messages = [hat_pb2.FromDevice(hello=hello)]
    messages += [
        hat_pb2.FromDevice(upload=written_upload(bytes([number] * 16), 1, Upload(0, rows(4), 4), ROWS))
        for number in range(5)
    ]
    found = list(call((each.SerializeToString() for each in messages), timeout=10))
    assert [each.WhichOneof("kind") for each in found] == ["welcome"] + ["deep"] * 5
    channel.close()
    served.run(_ended(served))


def test_a_stalled_device_holds_nobody_up():
    with Served(in_flight=2) as served:
        stalled = Stub(served)
        stalled.hear()
        # uploads without end whose answers are not read
        for sequence in range(1, 60):
            stalled.upload(bytes(16), sequence, 0, rows(100), 100)
        silent = Stub(served)  # greets, begins a text and says no more
        silent.upload(bytes(15) + b"s", 1, 0, rows(5), 0)
        connected = socket.create_connection(("127.0.0.1", served.port))  # says nothing at all
        goes_on(served)
        connected.close()
        stalled.close()
        silent.close()


def test_more_uploads_than_may_wait_are_read_later():
    model = Gated()
    with Served(cloud=CloudEngine(model), in_flight=2) as served:
        stub = Stub(served)
        stub.hear()
        for sequence in range(1, 13):
            stub.upload(bytes(16), sequence, 3 * (sequence - 1), rows(3), 0)
        until(lambda: served.engine.waiting(((), bytes(16))) == 2)
        time.sleep(0.1)
        assert served.engine.waiting(((), bytes(16))) == 2
        model.gate.set()
        assert [stub.hear().sequence for _ in range(12)] == list(range(1, 13))
        # more that all miss what they build on: no batch is run, and yet the next ones are read
        for sequence in range(20, 30):
            stub.upload(bytes(16), sequence, 100, rows(3), 0)
        assert [stub.hear().held for _ in range(10)] == [36] * 10
        stub.close()


def test_conversations_of_devices_that_have_vanished_are_let_go():
    with Served(idle=0.1) as served:
        stub, link = Stub(served), served.link()
        stub.hear()
        stub.upload(bytes(16), 1, 0, rows(5), 1)
        assert deep(stub.hear()).shape == (1, WIDTH)
        stub.close()  # without a word that it is over
        dialogue = Dialogue(talk(), link)
        steps = iter(dialogue)
        next(steps)
        until(lambda: served.engine.conversations == served.engine.cached == 0)  # this one's too: it has said nothing
        for _ in steps:
            pass
        assert dialogue.conversation.text == autoregressive(prompt(9), 16) and dialogue.recovered >= 1
        link.close()
