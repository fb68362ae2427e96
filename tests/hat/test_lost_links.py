import itertools
import socket
import threading
import time

import pytest
from tiny_hat import WIDTH, Served, autoregressive, free_port, prompt, spoken, talk, until

from edgebolt.hat import Chunking, DeviceRefusedError, Dialogue, GrpcLink, Limits, LinkLostError

pytestmark = pytest.mark.slow


def cut(link):
    """The network's doing: the channel is gone, and the device does not know yet."""
    link._stream._channel.close()


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
    until(lambda: link.arrived(bytes(16)))  # that it is lost
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
