"""Messages that were valid once, against a server that serves others meanwhile."""

import random
import socket
from collections import Counter

import grpc
import pytest
from adversary import fuzzed
from tiny_hat import Served, autoregressive, goes_on, prompt, talk, until

from edgebolt.hat import Chunking, Dialogue, Limits
from edgebolt.hat.wire import SERVICE, hat_pb2

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("part", range(2))
def test_streams_that_are_bent_and_broken_harm_nobody_else(part):
    met = Counter()
    with Served(limits=Limits(batch_tokens=16)) as served, grpc.insecure_channel(served.address) as channel:
        call = channel.stream_stream(f"/{SERVICE}/Converse", bytes, hat_pb2.FromCloud.FromString)
        link = served.link(timeout=60)
        dialogue = None
        for seed in range(90 * part, 90 * (part + 1)):
            if dialogue is None:
                dialogue = Dialogue(talk(9 + seed % 5, 12), link, Chunking(4), retries=0)
                steps = iter(dialogue)
            stream = call(fuzzed(seed, served.options["fingerprint"]), timeout=60)
            if next(steps, None) is None:
                conversation = dialogue.conversation
                assert conversation.text == autoregressive(prompt(conversation.prompt_length), 12)
                met["texts"] += 1
                dialogue = None
            try:
                met.update(message.WhichOneof("kind") for message in stream)
            except grpc.RpcError as error:
                assert error.code() != grpc.StatusCode.DEADLINE_EXCEEDED, "the stream hangs"
                met[error.code().name] += 1
        assert not served.server._batches.done()
        link.close()
        goes_on(served)
        until(lambda: not served.server._streams)

        async def sweep():
            return served.engine.sweep() + served.engine.sweep()

        served.run(sweep())
        assert served.engine.conversations == served.engine.cached == 0
    print(dict(met))
    wanted = ("texts", "deep", "missing", "refused", "FAILED_PRECONDITION", "INVALID_ARGUMENT")
    assert min(met[kind] for kind in wanted) > 0


def test_bytes_that_are_no_http_harm_nobody(served):
    draw, preface = random.Random(0), b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    settings, headers = b"\x00\x00\x00\x04\x00\x00\x00\x00\x00", b"\x00\x00\x10\x01\x04\x00\x00\x00\x01"
    for start in (b"", b"GET / HTTP/1.1\r\n\r\n", preface, preface + settings, preface + settings + headers):
        for _ in range(4):
            with socket.create_connection(("127.0.0.1", served.port), 10) as raw:
                raw.sendall(start + draw.randbytes(draw.randrange(1, 3000)))
    goes_on(served)
