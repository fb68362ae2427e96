"""What the cloud lets go, and when."""

import pytest
import torch
from tiny_hat import (
    ALWAYS,
    POSITION_BYTES,
    Middle,
    alone,
    autoregressive,
    close,
    conversation,
    engine,
    prompt,
    rows,
    texts,
)

from edgebolt.common.decoding import cache_bytes
from edgebolt.hat import Chunking, Dialogue, InProcess, Limits, Upload
from edgebolt.hat.dialogue import UploadRefusedError


def test_bytes_are_those_of_the_caches():
    cloud = engine()
    for key in range(3):
        cloud.take(key, 1, Upload(0, rows(4 + key), 1), lambda answer: None)
    assert cloud.cached == 0
    cloud.step()
    assert cloud.cached == sum(cache_bytes(held.cache) for held in cloud._held.values()) == 15 * POSITION_BYTES
    for key in range(3):
        cloud.end(key)
    cloud.end("nobody")
    assert cloud.cached == cloud.conversations == 0


@pytest.mark.parametrize("limits", [Limits(cache_bytes=60 * POSITION_BYTES), Limits(conversations=2)])
def test_what_was_let_go_is_sent_again(limits):
    link = InProcess(engine(limits))
    for _ in texts(link, 4, dialogues := []):
        assert link.engine.conversations <= limits.conversations and link.engine.cached <= limits.cache_bytes
    assert min(dialogue.recovered for dialogue in dialogues) > 0
    for key, dialogue in enumerate(dialogues):
        assert dialogue.conversation.text == autoregressive(prompt(9 + key), 20)
    assert link.engine.conversations == link.engine.cached == 0


def test_the_one_that_is_idle_longest_goes_first():
    cloud, answers = engine(Limits(cache_bytes=10 * POSITION_BYTES)), []
    for key in "abc":
        cloud.take(key, 1, Upload(0, rows(3), 3), answers.append)
        cloud.step()
    cloud.take("a", 2, Upload(3, rows(1), 1), answers.append)
    cloud.step()
    cloud.take("d", 1, Upload(0, rows(2), 1), answers.append)
    cloud.step()
    assert set(cloud._held) == {"a", "c", "d"} and len(answers) == 5


def test_a_conversation_is_not_let_go_for_the_number_while_it_waits():
    cloud, answers = engine(Limits(conversations=2)), []
    for key in "ab":
        cloud.take(key, 1, Upload(0, rows(3), 3), answers.append)
    cloud.step()
    for key in "ab":
        cloud.take(key, 2, Upload(3, rows(1), 1), answers.append)
    cloud.take("c", 1, Upload(0, rows(3), 3), answers.append)
    cloud.step()
    assert [answer.held for answer in answers] == [None] * 5
    cloud.take("d", 1, Upload(0, rows(3), 3), answers.append)
    assert set(cloud._held) == {"c", "d"}


def test_a_text_that_alone_is_too_large_is_refused_and_others_go_on():
    link = InProcess(engine(Limits(cache_bytes=30 * POSITION_BYTES)))
    small = Dialogue(conversation(4, 20, Middle(0.03), ALWAYS), link, Chunking(4))
    others = iter(small)
    next(others)
    with pytest.raises(UploadRefusedError, match=f"holds {30 * POSITION_BYTES} bytes at most, which this text"):
        for _ in Dialogue(conversation(25, 20, Middle(0.03), ALWAYS), link, Chunking(4)):
            pass
    for _ in others:
        pass
    assert small.conversation.text == autoregressive(prompt(4), 20)
    assert link.engine.conversations == 0


def test_a_refusal_does_not_hold_up_those_that_wait():
    cloud, answers = engine(Limits(cache_bytes=20 * POSITION_BYTES)), []
    cloud.take("b", 1, Upload(0, rows(4), 1), lambda answer: None)
    cloud.step()
    cloud.take("a", 1, Upload(0, rows(30), 1), answers.append)
    cloud.take("b", 2, Upload(4, rows(2), 1), answers.append)
    assert cloud.step() or answers[1:]  # else who drives the engine waits for what it does not wait for
    assert answers[0].refused is not None and (answers[1].deep is not None or answers[1].held == 0)


def test_two_that_fit_alone_but_not_together_both_end():
    # both wait at once, and neither is idle: one is let go, none is refused
    cloud, answers = engine(Limits(cache_bytes=20 * POSITION_BYTES)), []
    for key in "ab":
        cloud.take(key, 1, Upload(0, rows(9), 1), answers.append)
    cloud.step()
    for key in "ab":
        cloud.take(key, 2, Upload(9, rows(4, 1), 4), answers.append)
    while cloud.step():
        pass
    assert [(answer.sequence, answer.held, answer.refused) for answer in answers] == [
        (1, None, None),
        (1, None, None),
        (2, None, None),
        (2, 0, None),
    ]
    close(answers[2].deep, alone(torch.cat([rows(9), rows(4, 1)]))[9:])
    cloud.take("b", 3, Upload(0, rows(9), 0), answers.append)
    cloud.take("b", 4, Upload(9, rows(4, 1), 4), answers.append)
    while cloud.step():
        pass
    close(answers[-1].deep, answers[2].deep)
    assert set(cloud._held) == {"b"}


def test_a_batch_without_room_for_all_is_run_in_parts():
    cloud, answers = engine(Limits(cache_bytes=20 * POSITION_BYTES)), []
    cloud.take("small", 1, Upload(0, rows(1), 1), answers.append)  # from here on the cloud knows bytes a position
    cloud.step()
    cloud.end("small")
    for key in "abc":
        cloud.take(key, 1, Upload(0, rows(8), 1), answers.append)
    cloud.step()
    assert len(answers) == 3 and cloud.waiting("c") == 1
    cloud.step()
    assert len(answers) == 4 and set(cloud._held) == {"b", "c"}
    close(answers[3].deep, alone(rows(8))[-1:])


def test_a_prompt_whose_cache_went_between_its_parts_is_run_from_its_beginning():
    cloud, answers = engine(Limits(batch_tokens=4)), []
    cloud.take(0, 1, Upload(0, rows(10), 1), answers.append)
    cloud.step()
    assert cloud._evict()
    while cloud.step():
        pass
    close(answers[0].deep, alone(rows(10))[-1:])


@pytest.mark.parametrize("name", ["batch_tokens", "cache_bytes", "conversations"])
def test_limits_out_of_range_are_refused(name):
    with pytest.raises(ValueError, match=f"{name}=0: use a number above 0"):
        Limits(**{name: 0})


def test_conversations_that_stay_idle_are_swept_out():
    cloud, answers = engine(), []
    for key in ("gone", "there", "waiting"):
        cloud.take(key, 1, Upload(0, rows(3), 3), answers.append)
    while cloud.step():
        pass
    assert cloud.sweep() == 0, "so far they have just been answered"
    cloud.take("there", 2, Upload(3, rows(1), 1), answers.append)
    cloud.step()
    cloud.take("waiting", 2, Upload(3, rows(1), 1), answers.append)
    assert cloud.sweep() == 1
    assert cloud.conversations == 2 and cloud.cached == 7 * POSITION_BYTES
    assert cloud.sweep() == 1, "an upload that waits keeps its conversation, however long"
    assert cloud.waiting("waiting") == 1 and cloud.step() and answers[-1].deep is not None
    assert cloud.sweep() == 0 and cloud.sweep() == 1 and cloud.conversations == cloud.cached == 0
    cloud.take("gone", 2, Upload(3, rows(1), 1), answers.append)
    assert not cloud.step() and answers[-1].held == 0, "whoever comes back is told"
