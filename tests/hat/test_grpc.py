import threading

import grpc
import pytest
from tiny_hat import LONGEST, ROWS, WIDTH, Served, Stub, autoregressive, engine, parts, prompt, spoken, talk, until

from edgebolt.common.decoding import Link
from edgebolt.hat import Chunking, DeviceRefusedError, Dialogue, InProcess, fingerprint
from edgebolt.hat.wire import PROTOCOL, SERVICE, hat_pb2


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


# The link as it is measured


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
