import itertools
import queue
import socket
import threading
import time

import grpc
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tiny_hat import (
    LONGEST,
    ROWS,
    WIDTH,
    Served,
    Stub,
    autoregressive,
    deep,
    engine,
    free_port,
    parts,
    prompt,
    rows,
    spoken,
    talk,
    until,
)

from edgebolt.common.decoding import Link
from edgebolt.hat import (
    Chunking,
    CloudEngine,
    CloudModel,
    DeviceRefusedError,
    Dialogue,
    GrpcLink,
    InProcess,
    Limits,
    LinkLostError,
    Upload,
    UploadRefusedError,
    fingerprint,
)
from edgebolt.hat.wire import PROTOCOL, SERVICE, hat_pb2, written_upload


@pytest.fixture(scope="module")
def served():
    with Served() as found:
        yield found


@pytest.fixture
def link(served):
    found = served.link()
    yield found
    found.close()


@pytest.fixture
def stub(served):
    found = Stub(served)
    yield found
    found.close()


def goes_on(served):
    """The server serves others."""
    found = served.link()
    try:
        assert spoken(Dialogue(talk(3, 4), found)) == autoregressive(prompt(3), 4)
    finally:
        found.close()


@pytest.mark.parametrize("chunk", [3, 160])
def test_the_text_over_grpc_is_the_text_in_process_and_the_models(served, link, chunk):
    dialogue, there = Dialogue(talk(), link, Chunking(chunk)), Dialogue(talk(), InProcess(engine()), Chunking(chunk))
    text = spoken(dialogue)
    assert text == spoken(there) == autoregressive(prompt(9), 16)
    mine, other = dialogue.conversation, there.conversation
    assert (mine.drafted, mine.accepted, mine.rounds) == (other.drafted, other.accepted, other.rounds)
    assert dialogue.recovered == 0
    until(lambda: served.engine.conversations == served.engine.cached == 0)


def test_bytes_on_the_link_are_rows_and_a_little_more(link):
    dialogue = Dialogue(talk(), link, Chunking(3))
    spoken(dialogue)
    mine = dialogue.conversation
    up = (9 + mine.drafted + mine.rounds) * ROWS.row_bytes(WIDTH)
    down = (1 + mine.drafted + mine.rounds) * ROWS.row_bytes(WIDTH)
    messages = 3 + mine.rounds
    assert up < link.sent < up + 40 * messages and down < link.received < down + 120 * messages


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16", "int8"])
def test_other_formats_give_what_they_give_in_process(served, name):
    found = served.link(rows=name)
    text = spoken(Dialogue(talk(), found))
    found.close()
    assert text == spoken(Dialogue(talk(), InProcess(engine(), name)))


def test_devices_talk_at_once(served):
    texts = {}

    def device(length):
        mine = served.link()
        texts[length] = spoken(Dialogue(talk(length, 10), mine, Chunking(4)))
        mine.close()

    threads = [threading.Thread(target=device, args=(length,), daemon=True) for length in (2, 5, 9, 14)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert texts == {length: autoregressive(prompt(length), 10) for length in (2, 5, 9, 14)}


def test_what_the_cloud_measures_is_heard(served, link):
    before = served.server.batches
    spoken(Dialogue(talk(), link))
    assert served.server.batches > before
    assert link.cloud_seconds(4) > 0 and link.batch_tokens() > 1 and link.most_rows == LONGEST
    assert link.cloud_seconds(1) <= link.cloud_seconds(1000)


# Greeting


@pytest.mark.parametrize(
    ("hello", "message"),
    [
        ({"model": "another"}, "device has model 'another', the cloud .*same checkpoint and the same --device-layers"),
        ({"model": "m" * 999}, "device has model 'mmm"),
        ({"protocol": 2}, "protocol 2, the cloud 1: install the same edgebolt-hat"),
        ({"protocol": 0}, "protocol 0"),
        ({"rows": "float8"}, "'float8' are not known: use one of"),
        ({"rows": ""}, "'' are not known"),
    ],
)
def test_a_wrong_greeting_is_refused_with_the_way_out(served, hello, message):
    right = {"protocol": PROTOCOL, "model": fingerprint(parts()), "rows": "float64"}
    stub = Stub(served, hat_pb2.Hello(**{**right, **hello}))
    with pytest.raises(grpc.RpcError, match=message) as caught:
        stub.hear()
    assert caught.value.code() == grpc.StatusCode.FAILED_PRECONDITION and len(caught.value.details()) < 300
    stub.close()


def test_a_device_with_another_model_or_protocol_is_told_the_way_out(served, monkeypatch):
    with pytest.raises(DeviceRefusedError, match="give both the same checkpoint and the same --device-layers"):
        served.link(fingerprint="another")
    monkeypatch.setattr("edgebolt.hat.grpc_link.PROTOCOL", 7)
    with pytest.raises(DeviceRefusedError, match="protocol 7, the cloud 1: install the same edgebolt-hat"):
        served.link()


def test_an_upload_before_the_greeting_is_refused(served):
    stub = Stub.__new__(Stub)
    stub.channel = grpc.insecure_channel(served.address)
    call = stub.channel.stream_stream(f"/{SERVICE}/Converse", bytes, hat_pb2.FromCloud.FromString)
    first = hat_pb2.FromDevice(end=hat_pb2.End(conversation=bytes(16))).SerializeToString()
    with pytest.raises(grpc.RpcError, match="A stream begins with Hello"):
        next(call(iter([first]), timeout=10))
    assert list(call(iter([]), timeout=10)) == []
    stub.channel.close()


# Faults of devices


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


class Gated(CloudModel):
    """Runs nothing before it is let."""

    def __init__(self) -> None:
        super().__init__(parts().middle)
        self.begun, self.gate = threading.Event(), threading.Event()

    def run(self, work):
        self.begun.set()
        assert self.gate.wait(20)
        return super().run(work)


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


# Lost links


def cut(link):
    """The network's doing: the channel is gone, and the device does not know yet."""
    link._channel.close()


@pytest.mark.parametrize("when", [0, 1, 2])
def test_a_stream_that_is_cut_in_mid_text_is_opened_anew(served, when):
    link, reopened = served.link(), []
    again = link.reopen
    link.reopen = lambda: (reopened.append(1), again())
    dialogue = Dialogue(talk(), link)
    for number, _ in enumerate(dialogue):
        if number == when:
            cut(link)
    link.close()
    assert dialogue.conversation.text == autoregressive(prompt(9), 16)
    assert len(reopened) == 1 and dialogue.recovered == 0, "the cloud has kept what it had"
    until(lambda: served.engine.conversations == 0)


def test_a_stream_that_is_cut_while_an_answer_is_waited_for_is_opened_anew(served):
    link, sent = served.link(), itertools.count(1)
    original = link.send

    def send(*message):
        original(*message)
        if next(sent) in (2, 5):
            cut(link)

    link.send = send
    dialogue = Dialogue(talk(), link, Chunking(4))
    assert spoken(dialogue) == autoregressive(prompt(9), 16)
    link.close()


def test_a_server_that_is_killed_and_started_again_gets_what_it_lost():
    port = free_port()
    with Served(port) as first:
        link = first.link()
        link.backoff = 0.05
        dialogue = Dialogue(talk(), link, Chunking(4))
        steps = iter(dialogue)
        next(steps)
    second = Served(port)
    # it comes up while the device is already trying
    timer = threading.Timer(0.2, second.__enter__)
    timer.start()
    for _ in steps:
        pass
    timer.join(10)
    assert dialogue.conversation.text == autoregressive(prompt(9), 16) and dialogue.recovered == 1
    link.close()
    until(lambda: second.engine.conversations == 0)
    second.__exit__()


def test_a_server_that_stays_away_is_given_up():
    with Served() as served:
        link = served.link(backoff=0.001)
        dialogue = Dialogue(talk(), link, retries=3)
        steps = iter(dialogue)
        next(steps)
    tried, again = [], link.reopen
    link.reopen = lambda: (tried.append(1), again())
    with pytest.raises(LinkLostError, match=f"The link to {served.address} is lost"):
        next(steps)
    assert len(tried) == 3
    link.close()
    with pytest.raises(LinkLostError):
        served.link()


def test_a_server_that_comes_back_with_another_model_is_not_tried_again():
    port = free_port()
    with Served(port) as first:
        link = first.link()
        steps = iter(Dialogue(talk(), link))
        next(steps)
    with Served(port, fingerprint="another"), pytest.raises(DeviceRefusedError, match="the same checkpoint"):
        next(steps)
    link.close()


def test_a_server_that_is_silent_is_given_up():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        began = time.monotonic()
        with pytest.raises(LinkLostError, match=r"has not answered for 0\.3 seconds"):
            GrpcLink(f"127.0.0.1:{silent.getsockname()[1]}", WIDTH, "any", timeout=0.3)
        assert time.monotonic() - began < 5


def test_the_pause_before_the_next_try_doubles(monkeypatch):
    with Served() as served:
        link = served.link(backoff=0.01)
    pauses = []
    monkeypatch.setattr("edgebolt.hat.grpc_link.time.sleep", pauses.append)
    for _ in range(12):
        with pytest.raises(LinkLostError):
            link.reopen()
    assert pauses == [min(0.01 * 2**number, 10.0) for number in range(12)]
    link.close()


def test_memory_that_is_short_costs_no_token_over_grpc_either():
    from tiny_hat import POSITION_BYTES

    with Served(limits=Limits(batch_tokens=8, cache_bytes=60 * POSITION_BYTES)) as served:
        links = [served.link() for _ in range(3)]
        dialogues = [Dialogue(talk(9 + number), each, Chunking(4)) for number, each in enumerate(links)]
        for _ in itertools.zip_longest(*dialogues):
            pass
        for number, dialogue in enumerate(dialogues):
            assert dialogue.conversation.text == autoregressive(prompt(9 + number), 16)
        assert sum(dialogue.recovered for dialogue in dialogues) > 0
        for each in links:
            each.close()
        until(lambda: served.engine.conversations == 0)


# Stopping


def test_health(served):
    with Served() as mine, grpc.insecure_channel(mine.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for service in ("", SERVICE):
            found = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=10)
            assert found.status == health_pb2.HealthCheckResponse.SERVING
        watch = stub.Watch(health_pb2.HealthCheckRequest(service=SERVICE), timeout=10)
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        stopping = threading.Thread(target=mine.stop, args=(5.0,), daemon=True)
        stopping.start()
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        watch.cancel()
        stopping.join(10)
        assert not stopping.is_alive()


def test_stopping_answers_what_is_in_flight():
    model = Gated()
    with Served(cloud=CloudEngine(model)) as served:
        stub = Stub(served)
        stub.hear()
        stub.upload(bytes(16), 1, 0, rows(3), 3)
        assert model.begun.wait(10)
        stopping = threading.Thread(target=served.stop, args=(10.0,), daemon=True)
        stopping.start()
        time.sleep(0.05)
        model.gate.set()
        assert deep(stub.hear()).shape == (3, WIDTH)
        stub.close()
        stopping.join(10)
        assert not stopping.is_alive()


def test_a_stopped_server_has_stopped():
    with Served() as served:
        waiting = threading.Thread(target=served.run, args=(served.server.wait(),), daemon=True)
        waiting.start()
        served.stop()
        waiting.join(10)
        assert not waiting.is_alive()
        with pytest.raises(ConnectionError):
            socket.create_connection(("127.0.0.1", served.port), 1)


def test_a_taken_port_is_told(served):
    with pytest.raises(OSError, match=f"127.0.0.1:{served.port} cannot be listened on"):
        Served(served.port).__enter__()


# Who may talk


def test_the_uplink_is_measured_and_chunks_follow():
    shape = Link(up=200e3, down=1e9)  # a row of 256 bytes takes 1.28 ms
    with Served() as cloud:
        found = cloud.link(shape=shape)
        sent, send = [], found.send

        def noted(conversation, sequence, upload):
            sent.append(len(upload.rows))
            send(conversation, sequence, upload)

        found.send, found.cloud_seconds = noted, lambda tokens: 1e-3  # the machine that tests may be slow
        dialogue = Dialogue(talk(140, 2), found, Chunking(first=32))
        assert found.row_seconds() is None
        assert spoken(dialogue) == autoregressive(prompt(140), 2)
        assert found.row_seconds() > 1.2e-3  # sleeps are never shorter than asked for
        # The third goes when the first is answered, and only the second tells of the link; then the smallest will do.
        assert sent == [32] * 3 + [8] * 5 + [4, 1]
        found.close()


def test_a_cloud_that_takes_few_rows_gets_few():
    with Served(upload_rows=16) as cloud:
        found = cloud.link()
        assert found.most_rows == 16
        dialogue = Dialogue(talk(100, 8), found)
        for number, _ in enumerate(dialogue):
            if number == 1:  # and so when it is given anew what it does not hold
                cloud.loop.call_soon_threadsafe(cloud.engine.end, ((), dialogue.name))
        assert dialogue.conversation.text == autoregressive(prompt(100), 8)
        found.close()


@pytest.mark.parametrize("rows", ["float32", "float16", "bfloat16", "int8"])
def test_a_coarser_format_gives_what_it_gives_in_process(served, rows):
    found = served.link(rows=rows)
    over = spoken(Dialogue(talk(noise=0.02), found, Chunking(4)))
    found.close()
    assert over == spoken(Dialogue(talk(noise=0.02), InProcess(engine(), rows), Chunking(4)))
