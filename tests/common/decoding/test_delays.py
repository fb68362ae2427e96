import dataclasses
import itertools
import random

import pytest

from edgebolt.common.decoding import BatchDelay, Link, MovingAverage


def test_the_first_value_is_taken_as_it_is_and_then_history_weighs_08():
    average, values = MovingAverage(), []
    assert average.value is None
    for new in (1.0, 2.0, 0.0, 10.0):
        average.update(new)
        values.append(average.value)
    assert values == pytest.approx([1.0, 1.2, 0.96, 2.768], abs=1e-15)


def test_a_value_to_begin_with_counts_as_history():
    average = MovingAverage(value=5.0)
    average.update(0.0)
    assert average.value == pytest.approx(4.0)
    nothing = MovingAverage(value=0.0)  # 0 is a value
    nothing.update(1.0)
    assert nothing.value == pytest.approx(0.2)


@pytest.mark.parametrize("history", [0.0, 0.5, 0.99])
def test_the_weight_of_history_is_the_one_given(history):
    average = MovingAverage(history, value=1.0)
    average.update(3.0)
    assert average.value == pytest.approx(history + 3 * (1 - history))


def test_a_default_holds_while_nothing_is_known():
    average = MovingAverage()
    assert average(7.0) == 7.0 and average.value is None
    average.update(0.0)
    assert average(7.0) == 0.0


@pytest.mark.parametrize("history", [-0.1, 1.0, 2.0, float("nan")])
def test_a_weight_outside_0_and_1_is_refused(history):
    with pytest.raises(ValueError, match="the weight of what was before"):
        MovingAverage(history)


CURVE = [0.010, 0.011, 0.013, 0.021, 0.040]  # of 1, 2, 4, 8 and 16 tokens


def test_buckets_lie_at_powers_of_two():
    delay = BatchDelay(CURVE)
    assert [delay(2**bucket) for bucket in range(5)] == pytest.approx(CURVE)
    assert delay.seconds == CURVE


@pytest.mark.parametrize(
    ("tokens", "seconds"), [(3, 0.012), (5, 0.015), (6, 0.017), (7, 0.019), (10, 0.02575), (12, 0.0305), (2.5, 0.0115)]
)
def test_between_buckets_is_a_straight_line(tokens, seconds):
    assert BatchDelay(CURVE)(tokens) == pytest.approx(seconds)


@pytest.mark.parametrize(("tokens", "seconds"), [(17, 0.042375), (24, 0.059), (32, 0.078), (160, 0.382)])
def test_beyond_the_last_bucket_the_last_line_goes_on(tokens, seconds):
    assert BatchDelay(CURVE)(tokens) == pytest.approx(seconds)


def test_less_than_a_token_takes_as_long_as_one():
    assert BatchDelay(CURVE)(0) == BatchDelay(CURVE)(0.5) == 0.010


@pytest.mark.parametrize("bucket", range(5))
def test_a_bucket_is_an_exact_moving_average(bucket):
    delay, average = BatchDelay(CURVE), MovingAverage(value=CURVE[bucket])
    for number in range(1, 8):
        new = CURVE[bucket] * (1 + 0.02 * number)
        delay.update(2**bucket, new)
        average.update(new)
        assert delay(2**bucket) == pytest.approx(average.value, rel=1e-12)
    others = [value for place, value in enumerate(delay.seconds) if place != bucket]
    assert others == CURVE[:bucket] + CURVE[bucket + 1 :]


def test_the_weight_of_history_is_the_one_given_here_too():
    delay = BatchDelay(CURVE, history=0.5)
    delay.update(4, 0.015)
    assert delay(4) == pytest.approx(0.014)


def test_an_average_below_one_before_it_counts_as_that_one():
    delay = BatchDelay([0.010, 0.030, 0.020, 0.025, 0.050])
    assert delay.seconds == [0.010, 0.030, 0.030, 0.030, 0.050]
    assert delay(4) == delay(6) == delay(8) == 0.030 and delay(12) == pytest.approx(0.040)
    for _ in range(40):
        delay.update(2, 0.012)
    assert delay.seconds == pytest.approx([0.010, 0.012, 0.020, 0.025, 0.050], abs=1e-5)  # it was kept, not lost


def test_a_last_average_below_one_before_it_makes_a_level_line():
    assert BatchDelay([0.010, 0.030, 0.020])(400) == 0.030


def test_a_falling_end_is_not_drawn_out_when_a_long_batch_is_measured():
    delay = BatchDelay([0.010, 0.030, 0.020])
    delay.update(40, 0.021)  # against 0.020, where the last average is, not against the falling line
    for _ in range(60):
        delay.update(2, 0.012)
    assert 0.020 < delay(4) <= 0.0202


def test_more_tokens_never_take_less_time_whatever_is_measured():
    draw = random.Random(0)
    delay = BatchDelay(CURVE)
    for _ in range(300):
        delay.update(draw.randrange(1, 60), draw.choice((0.0001, 0.01, 0.5)) * draw.random())
        read = [delay(tokens / 2) for tokens in range(1, 150)]
        assert all(one <= other for one, other in itertools.pairwise(read))
        assert read[0] > 0
    assert all(type(value) is float for value in (*delay.seconds, *read))


@pytest.mark.parametrize("tokens", [3, 5, 6, 7, 9, 12, 15])
@pytest.mark.parametrize("excess", [0.0005, -0.0005])
def test_between_two_buckets_both_move_towards_what_was_measured(tokens, excess):
    delay = BatchDelay(CURVE)
    before, measured = delay(tokens), delay(tokens) + excess
    delay.update(tokens, measured)
    moved = [new - old for new, old in zip(delay.seconds, CURVE, strict=True)]
    below = tokens.bit_length() - 1
    assert moved[below] * excess > 0 and moved[below + 1] * excess > 0
    assert sum(moved) == pytest.approx(0.2 * excess)
    assert [move for place, move in enumerate(moved) if place not in (below, below + 1)] == [0.0] * 3
    nearer = below if tokens / 2**below < 2**0.5 else below + 1
    assert abs(moved[nearer]) == max(map(abs, moved))
    assert abs(delay(tokens) - measured) < abs(before - measured)


@pytest.mark.parametrize("tokens", [1, 3, 8, 13, 16, 20, 40, 200, 4000])
@pytest.mark.parametrize("start", [CURVE, [0.02] * 5])
def test_the_same_measurement_again_and_again_becomes_the_delay(tokens, start):
    """Beyond the last bucket too, where a line swings the further out the more its end moves."""
    delay, errors = BatchDelay(start), []
    measured = 1.7 * delay(tokens)
    for _ in range(60):
        errors.append(abs(delay(tokens) - measured))
        delay.update(tokens, measured)
    assert all(new < old for old, new in itertools.pairwise(errors))
    assert errors[-1] < 0.02 * errors[0]


@pytest.mark.parametrize("tokens", [16, 24, 100])
def test_beyond_the_last_bucket_is_an_exact_moving_average_as_well(tokens):
    delay, average = BatchDelay(CURVE), MovingAverage(value=BatchDelay(CURVE)(tokens))
    for new in (0.3, 0.4, 0.5):
        delay.update(tokens, new)
        average.update(new)
        assert delay(tokens) == pytest.approx(average.value, rel=1e-12)
    assert delay.seconds[:4] == CURVE[:4]


def test_batches_of_no_tokens_count_as_one():
    delay = BatchDelay(CURVE)
    delay.update(0, 0.0095)
    assert delay.seconds == pytest.approx([0.0099, *CURVE[1:]])


def test_what_is_given_is_copied():
    given = list(CURVE)
    delay = BatchDelay(given)
    delay.update(1, 0.001)
    assert given == CURVE
    delay.seconds[0] = 5.0
    assert delay(1) < 0.01


@pytest.mark.parametrize("seconds", [[], [0.01], [0.01, 0.0], [-0.01, 0.02]])
def test_too_few_or_impossible_delays_are_refused(seconds):
    with pytest.raises(ValueError, match="give at least two"):
        BatchDelay(seconds)


def test_a_link_takes_its_latency_and_a_time_by_bytes():
    link = Link(up=1000.0, down=4000.0, latency=0.25)
    assert link.up_seconds(500) == 0.75 and link.down_seconds(500) == 0.375
    assert link.up_seconds(0) == link.down_seconds(0) == 0.25
    assert Link(up=1000.0, down=4000.0).up_seconds(0) == 0


@pytest.mark.parametrize(
    "options",
    [
        {"up": 0, "down": 1},
        {"up": 1, "down": 0},
        {"up": -1, "down": 1},
        {"up": 1, "down": -2},
        {"up": 1, "down": 1, "latency": -0.1},
        {"up": float("nan"), "down": 1},
    ],
)
def test_an_impossible_link_is_refused(options):
    with pytest.raises(ValueError, match="bytes a second are above 0"):
        Link(**options)


def test_a_link_does_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Link(1.0, 1.0).up = 2.0
