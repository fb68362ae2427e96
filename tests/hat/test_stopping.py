import socket
import threading

import grpc
import pytest
from adversary import Flood
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tiny_hat import LONGEST, ROWS, Gated, Served, Stub, autoregressive, free_port, prompt, rows, talk, until

from edgebolt.hat import Chunking, CloudEngine, Dialogue, LinkLostError, Upload
from edgebolt.hat.wire import SERVICE, written_upload

pytestmark = pytest.mark.slow


def test_health():
    with Served() as mine, grpc.insecure_channel(mine.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for service in ("", SERVICE):
            found = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=10)
            assert found.status == health_pb2.HealthCheckResponse.SERVING
        watch = stub.Watch(health_pb2.HealthCheckRequest(service=SERVICE), timeout=10)
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        stopping = threading.Thread(target=mine.stop, args=(60.0,), daemon=True)
        stopping.start()
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        stopping.join(10)  # whoever watches on does not hold it up
        assert not stopping.is_alive()


def stopping(served, grace=60.0):
    """The server is told to stop, by a thread that is returned."""
    found = threading.Thread(target=served.stop, args=(grace,), daemon=True)
    found.start()
    return found


def ended(thread, seconds=20.0):
    thread.join(seconds)
    return not thread.is_alive()


def test_stopping_answers_what_is_in_flight_and_ends_all_else_at_once():
    model = Gated()
    with Served(cloud=CloudEngine(model)) as served:
        busy, idle, link = Stub(served), Stub(served), served.link(timeout=60)
        busy.hear(), idle.hear()
        for sequence in (1, 2, 3):
            busy.upload(bytes(16), sequence, 3 * (sequence - 1), rows(3), 3)
        assert model.begun.wait(10)
        until(lambda: served.engine.waiting(((), bytes(16))) == 3)
        stop = stopping(served)
        with pytest.raises(StopIteration):
            idle.hear()
        with pytest.raises(LinkLostError, match="the cloud has closed the stream"):
            link.receive(bytes(16))
        with pytest.raises(LinkLostError, match="The cloud is stopping"):
            served.link()
        assert stop.is_alive(), "one is still to be answered"
        busy.upload(bytes(16), 4, 9, rows(3), 3)  # too late
        model.gate.set()
        assert [busy.hear().sequence for _ in range(3)] == [1, 2, 3]
        with pytest.raises(StopIteration):
            busy.hear()
        assert ended(stop)
        link.close()


def test_stopping_does_not_wait_for_devices_that_are_idle():
    with Served() as served:
        link, other = served.link(timeout=60), Stub(served)
        other.hear()
        steps = iter(Dialogue(talk(), link))
        next(steps)
        silent = socket.create_connection(("127.0.0.1", served.port))
        assert ended(stopping(served, 300.0)), "it waits for somebody who has nothing to be answered"
        silent.close()
        with pytest.raises(StopIteration):
            other.hear()
        link.close()


def test_a_device_that_does_not_read_its_answers_has_the_grace_alone():
    with Served() as served:
        given, names = Upload(0, rows(LONGEST), LONGEST), [number.to_bytes(16) for number in range(40)]
        flood = Flood(served, [{"upload": written_upload(name, 1, given, ROWS)} for name in names])
        until(lambda: served.server.batches > 5)
        stop = stopping(served, 0.5)
        assert ended(stop)
        with pytest.raises(grpc.RpcError):
            list(flood.stream)
        flood.channel.close()


def test_a_device_finds_the_cloud_that_is_started_again():
    port = free_port()
    with Served(port) as first:
        link = first.link(timeout=60, backoff=0.05)
        dialogue = Dialogue(talk(), link, Chunking(4), retries=20)
        steps = iter(dialogue)
        next(steps)
        first.stop(300.0)
    with Served(port):
        for _ in steps:
            pass
        assert dialogue.conversation.text == autoregressive(prompt(9), 16) and dialogue.recovered == 1
        link.close()


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
