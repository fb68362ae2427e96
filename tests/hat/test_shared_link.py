"""Several conversations at a time on one link."""

import itertools
import threading

import pytest
from tiny_hat import LONGEST, Gated, Served, autoregressive, free_port, goes_on, prompt, rows, spoken, talk, until

from edgebolt.common.decoding import Link
from edgebolt.hat import Chunking, CloudEngine, Dialogue, GrpcLink, LinkLostError, Upload

pytestmark = pytest.mark.slow

A, B = b"a" * 16, b"b" * 16


@pytest.fixture
def opened(monkeypatch):
    """Grows whenever a link is opened."""
    found, original = [], GrpcLink._open
    monkeypatch.setattr(GrpcLink, "_open", lambda self: (found.append(1), original(self)))
    return found


def cut(link):
    """The network's doing."""
    link._stream._channel.close()


def at_once(*work):
    """In threads; what they raise is raised."""
    failed = []

    def run(each):
        try:
            each()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=(each,), daemon=True) for each in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    if failed:
        raise failed[0]


def right(*dialogues):
    for dialogue in dialogues:
        talk = dialogue.conversation
        assert talk.text == autoregressive(talk.text[: talk.prompt_length], talk.new_tokens)
    return True


def test_conversations_in_turns(served, link, opened):
    dialogues = [Dialogue(talk(9 + number, 12), link, Chunking(4)) for number in range(4)]
    for _ in itertools.zip_longest(*dialogues):
        pass
    assert right(*dialogues) and not opened and sum(each.recovered for each in dialogues) == 0
    until(lambda: served.engine.conversations == 0)


def test_conversations_from_threads(served, link, opened):
    dialogues = [Dialogue(talk(9 + number, 12), link, Chunking(4)) for number in range(8)]
    at_once(*(lambda each=each: spoken(each) for each in dialogues))
    assert right(*dialogues) and not opened and sum(each.recovered for each in dialogues) == 0
    until(lambda: served.engine.conversations == 0)
    assert not link._streams and set(link._stream._answers) == {b""}, "of what is over nothing is kept"


def test_answers_wait_for_the_conversation_that_asks_for_them(served, link):
    for name, number in ((A, 1), (B, 1), (A, 2)):
        link.send(name, number, Upload(4 * (number - 1), rows(4), 2 + number))
    assert [len(link.receive(name).deep) for name in (B, A, A)] == [3, 3, 4]
    link.send(A, 3, Upload(8, rows(1), 1))
    link.send(B, 2, Upload(99, rows(1), 1))
    assert (link.receive(B).held, len(link.receive(A).deep)) == (4, 1)
    for name in (A, B):
        link.end(name)
    until(lambda: served.engine.conversations == 0)


def test_what_comes_for_a_conversation_that_is_over_is_dropped(link):
    link.send(A, 1, Upload(99, rows(1), 1))
    link.end(A)
    link.send(B, 1, Upload(99, rows(1), 1))
    link.receive(B)  # behind the answer to A
    assert set(link._stream._answers) == {b"", B}
    link.end(B)


def test_whether_an_answer_has_come_is_told_of_each_conversation():
    model = Gated()
    with Served(cloud=CloudEngine(model)) as served:
        link = served.link()
        link.send(A, 1, Upload(0, rows(3), 1))
        assert model.begun.wait(10)
        link.send(B, 1, Upload(50, rows(3), 1))  # refused without being run, once the batch has
        model.gate.set()
        until(lambda: link.arrived(A) and link.arrived(B))
        link.receive(B)
        assert link.arrived(A) and not link.arrived(B)
        link.receive(A)
        assert not link.arrived(A) and not link.arrived(bytes(16))
        cut(link)
        until(lambda: link.arrived(A) and link.arrived(B))  # that it is lost
        link.close()


# Lost for all, opened once


@pytest.mark.parametrize("first", [0, 1])
def test_a_link_that_is_lost_is_opened_once_for_all(served, link, opened, first):
    dialogues = [Dialogue(talk(9 + number), link, Chunking(4)) for number in range(3)]
    steps = [iter(each) for each in dialogues]
    for each in steps:
        next(each)
    cut(link)
    for each in [*steps[first:], *steps[:first]]:
        for _ in each:
            pass
    assert right(*dialogues) and len(opened) == 1
    assert sum(each.recovered for each in dialogues) == 0, "the cloud has kept what it had"
    until(lambda: served.engine.conversations == 0)


def test_a_link_that_is_lost_again_and_again_under_threads(served, link):
    dialogues = [Dialogue(talk(9 + number), link, Chunking(4), retries=50) for number in range(6)]

    def speak(dialogue):
        for number, _ in enumerate(dialogue):
            if number % 2 == 0:
                cut(link)

    at_once(*(lambda each=each: speak(each) for each in dialogues))
    assert right(*dialogues)
    cut(link)
    until(lambda: link.arrived(A))  # that it is lost
    link.reopen()
    until(lambda: served.engine.conversations == 0)  # though messages that say so were lost


def test_an_answer_is_not_waited_for_on_another_stream_than_the_upload_was_sent_on(served, opened):
    link = served.link(timeout=20)
    for name in (A, B):
        link.send(name, 1, Upload(0, rows(4), 4))
        link.receive(name)
    cut(link)
    link.send(A, 2, Upload(4, rows(1), 1))
    link.send(B, 2, Upload(4, rows(1), 1))
    with pytest.raises(LinkLostError, match=r"is lost|was closed"):
        link.receive(A)
    link.reopen()
    assert link.arrived(B), "that it must send again"
    with pytest.raises(LinkLostError, match=r"is lost|was closed"):
        link.receive(B)
    link.reopen()
    assert len(opened) == 2
    for name in (B, A):
        link.send(name, 2, Upload(4, rows(1), 1))
        assert len(link.receive(name).deep) == 1
        link.end(name)
    link.close()


def test_a_try_that_fails_has_failed_for_all_who_wait_for_it(monkeypatch, opened):
    with Served() as served:
        link = served.link()
    until(lambda: link.arrived(A))
    opened.clear()
    entered, caught = [], []

    def pause(_):
        until(lambda: len(entered) == 6)
        threading.Event().wait(0.2)  # until they are at the lock too

    monkeypatch.setattr("edgebolt.hat.grpc_link.time.sleep", pause)

    def device():
        entered.append(1)
        with pytest.raises(LinkLostError) as error:
            link.reopen()
        caught.append(error.value)

    monkeypatch.setattr("tiny_hat.time.sleep", lambda _: threading.Event().wait(0.005))
    at_once(*[device] * 6)
    assert len(opened) < 6, "each has tried itself"
    assert len(set(map(id, caught))) == 6 and all("is lost" in str(each) for each in caught)
    link.close()


def test_one_conversation_that_is_not_answered_does_not_end_the_others(opened):
    with Served() as served:
        link = served.link(timeout=0.4)
        link.send(A, 5, Upload(0, rows(2), 1))
        assert link.receive(A).sequence == 5
        link.send(A, 3, Upload(0, rows(2), 1))  # older than the newest: dropped, and never answered
        late, texts = [], []

        def wait():
            with pytest.raises(LinkLostError, match=r"has not answered for 0\.4 seconds"):
                link.receive(A)
            late.append(1)

        def speak():
            while not late:
                texts.append(spoken(Dialogue(talk(5, 4), link, retries=0)))

        at_once(wait, speak)
        assert set(map(tuple, texts)) == {tuple(autoregressive(prompt(5), 4))}
        link.reopen()
        assert len(opened) == 1 and not link.arrived(B), "it was never lost"
        # and now nobody is answered
        with pytest.raises(LinkLostError, match="has not answered"):
            link.receive(A)
        assert link.arrived(B)
        link.reopen()
        assert len(opened) == 2 and spoken(Dialogue(talk(5, 4), link)) == autoregressive(prompt(5), 4)
        link.close()


def test_a_cloud_that_is_killed_under_several_conversations(opened):
    port = free_port()
    with Served(port) as first:
        link = first.link(backoff=0.05)
        dialogues = [Dialogue(talk(9 + number), link, Chunking(4), retries=20) for number in range(4)]
        steps = [iter(each) for each in dialogues]
        for each in steps:
            next(each)
    with Served(port) as second:
        at_once(*(lambda each=each: list(each) for each in steps))
        assert right(*dialogues) and [each.recovered for each in dialogues] == [1] * 4
        link.close()
        until(lambda: second.engine.conversations == 0)


# The end


def test_an_end_that_was_lost_with_the_stream_is_said_again(served, link):
    link.send(A, 1, Upload(0, rows(4), 4))
    link.receive(A)
    cut(link)
    link.end(A)
    until(lambda: link.arrived(B))  # that it is lost
    assert served.engine.conversations == 1
    link.reopen()
    until(lambda: served.engine.conversations == 0)


def test_a_link_that_is_closed_stays_closed(opened):
    with Served() as served:
        link = served.link(timeout=600)

        def wait():
            with pytest.raises(LinkLostError, match="was closed"):
                link.receive(A)

        at_once(wait, link.close)
        with pytest.raises(LinkLostError, match="was closed"):
            spoken(Dialogue(talk(), link))
        assert len(opened) == 1
        link.close()
        goes_on(served)


def test_no_thread_is_left(served):
    def threads():
        return [each for each in threading.enumerate() if each not in before]

    before = threading.enumerate()
    for end in (GrpcLink.close, cut, lambda link: (cut(link), until(lambda: link.arrived(A)), link.reopen())):
        link = served.link()
        dialogues = [Dialogue(talk(9 + number, 4), link) for number in range(3)]
        at_once(*(lambda each=each: spoken(each) for each in dialogues))
        end(link)
        link.close()
    with pytest.raises(ConnectionError):
        served.link(fingerprint="another")
    with pytest.raises(ConnectionError):
        GrpcLink(f"127.0.0.1:{free_port()}", LONGEST, "any")
    until(lambda: not threads())


# The uplink


def test_time_between_the_uploads_of_two_conversations_is_not_the_links():
    model = Gated()
    with Served(cloud=CloudEngine(model)) as served:
        link = served.link(shape=Link(up=1e6, down=1e9))
        link.send(A, 1, Upload(0, rows(32), 1))
        assert model.begun.wait(10)  # it has come, and is not answered yet
        threading.Event().wait(0.2)
        link.send(B, 1, Upload(0, rows(32), 1))
        until(lambda: served.engine.waiting(((), B)))
        model.gate.set()
        for name in (A, B):
            assert len(link.receive(name).deep) == 1
        assert link._uplink.speed is None, "0.2 seconds with nothing on the link count as those of 8 kB"
        link.close()


def test_uploads_of_two_conversations_right_behind_each_other_measure_the_link(monkeypatch):
    monkeypatch.setattr("edgebolt.hat.grpc_link.monotonic", lambda: 0.0)  # right behind, on however slow a machine
    with Served() as served:
        link = served.link(shape=Link(up=200e3, down=1e9))  # a row of 256 bytes takes 1.28 ms
        link.send(A, 1, Upload(0, rows(32), 1))
        link.send(B, 1, Upload(0, rows(32), 1))
        for name in (A, B):
            link.receive(name)
        assert link.row_seconds() > 1.2e-3  # sleeps are never shorter than asked for
        link.close()


def test_uploads_on_two_streams_are_no_pair(monkeypatch):
    monkeypatch.setattr("edgebolt.hat.grpc_link.monotonic", lambda: 0.0)
    with Served() as served:
        link = served.link()
        for number in (1, 2):
            link.send(A, number, Upload(0, rows(32), 1))
            link.receive(A)
            cut(link)
            until(lambda: link.arrived(B))  # that it is lost
            link.reopen()
        assert link.row_seconds() is None, "the cloud may be another one, with another clock"
        link.close()
