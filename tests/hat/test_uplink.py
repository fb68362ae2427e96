import pytest

from edgebolt.hat.uplink import Uplink

A, B = b"a", b"b"


def measured(*pairs, smallest=4096):
    """Uploads of conversations in turn: (size, sent at, come at)."""
    uplink = Uplink(smallest)
    for number, (size, at, _) in enumerate(pairs):
        uplink.sent((A, B)[number % 2], number, size, at)
    for number, (_, _, came) in enumerate(pairs):
        uplink.came((A, B)[number % 2], number, came)
    return uplink.speed


def link(speed, *uploads):
    """When uploads come, by the cloud's clock, on a link of so many bytes a second."""
    free, come = 0.0, []
    for size, at in uploads:
        free = max(free, at) + size / speed
        come.append((size, at, 1e6 + 0.05 + free))
    return come


@pytest.mark.parametrize("sizes", [(8000, 8000), (8000, 40000), (40000, 8000), (100, 8000)])
@pytest.mark.parametrize("apart", [0.0, 0.01, 0.1, 0.5, 1.0, 2.0, 3.99, 4.0, 4.01, 8.0, 20.0, 100.0])
def test_a_pair_gives_the_speed_of_the_link_or_nothing(sizes, apart):
    speed = measured(*link(2000.0, (sizes[0], 0.0), (sizes[1], apart)))
    waited = apart < sizes[0] / 2000.0
    if speed is not None:
        assert waited and speed == pytest.approx(2000.0)
    if 2 * apart < min(sizes) / 2000.0:
        assert speed is not None, "it went right behind the other"


def test_time_in_which_nothing_was_sent_is_not_the_links():
    assert measured(*link(1e6, (8000, 0.0), (8000, 5.0))) is None
    # behind a message that had long come and was not answered yet
    uplink = Uplink()
    uplink.sent(A, 1, 8000, 0.0)
    uplink.sent(B, 1, 8000, 5.0)
    uplink.came(A, 1, 71.0)
    uplink.came(B, 1, 76.0)
    assert uplink.speed is None


def test_small_uploads_tell_nothing_but_something_may_follow_them():
    assert measured(*link(2000.0, (4096, 0.0), (4095, 0.0))) is None
    assert measured(*link(2000.0, (4095, 0.0), (4096, 0.0))) == pytest.approx(2000.0)
    assert measured(*link(2000.0, (10, 0.0), (10, 0.0)), smallest=10) == pytest.approx(2000.0)


def test_three_conversations_at_once_give_one_speed():
    uplink = Uplink()
    come = link(5000.0, *[(8000 + 100 * number, 0.01 * number) for number in range(12)])
    for number, (size, at, _) in enumerate(come):
        uplink.sent(bytes([number % 3]), number, size, at)
    for number, (_, _, came) in enumerate(come):
        uplink.came(bytes([number % 3]), number, came)
    assert uplink.speed == pytest.approx(5000.0)


def test_what_is_unknown_breaks_the_pair():
    come = link(2000.0, (8000, 0.0), (8000, 0.0))
    for at in ((None, come[1][2]), (come[0][2], None)):
        assert measured(*((size, sent, given) for (size, sent, _), given in zip(come, at, strict=True))) is None
    # answered the other way round, forgotten, never sent, answered twice, or lost with the stream
    uplink = Uplink()
    uplink.came(A, 7, 1.0)
    uplink.sent(A, 1, 8000, 0.0)
    uplink.sent(B, 1, 8000, 0.0)
    uplink.came(B, 1, 75.0)
    uplink.came(A, 1, 71.0)
    uplink.came(A, 1, 71.0)
    uplink.sent(A, 2, 8000, 9.0)
    uplink.forget(A)
    uplink.came(A, 2, 99.0)
    uplink.sent(A, 3, 8000, 9.0)
    uplink.restart()
    uplink.sent(A, 4, 8000, 9.0)
    uplink.came(A, 3, 99.0)
    uplink.came(A, 4, 103.0)
    assert uplink.speed is None


def test_nothing_is_kept_of_what_is_answered():
    uplink = Uplink()
    for number in range(100):
        uplink.sent(A, number, 8000, float(number))
        uplink.came(A, number, float(number))
    kept, record = 0, uplink._last
    while record is not None:
        kept, record = kept + 1, record.before
    assert (kept, uplink._open) == (1, {})


def test_a_link_that_is_never_waited_for_has_a_least_speed():
    uplink = Uplink()
    assert uplink.least is None
    come = link(1e6, (8000, 0.0), (8000, 0.02), (8000, 0.03), (8000, 5.0), (100, 5.0))
    for number, (size, at, _) in enumerate(come):
        uplink.sent(A, number, size, at)
    for number, (_, _, came) in enumerate(come):
        uplink.came(A, number, came)
    assert uplink.speed is None and uplink.least == pytest.approx(8000 / 0.01)
