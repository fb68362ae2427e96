import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from edgebolt.common.decoding import BatchDelay
from edgebolt.hat import chunk_size


def line(constant, slope):
    return lambda tokens: constant + slope * tokens


RATES = some.floats(1e-5, 1e-2)
WHERE = {
    "row": RATES,
    "constant": some.floats(1e-4, 1.0),
    "slope": some.floats(0, 1e-3),
    "batch": some.floats(0, 2000),
    "stages": some.integers(1, 8),
}


def solved(row, constant, slope, batch, stages, left=10**9, smallest=1, largest=10**6):
    return chunk_size(left, row, line(constant, slope), batch, stages, smallest, largest)


def off(tokens, row, constant, slope, batch, stages):
    """By what the upload takes longer than the cloud (B2)."""
    delay = line(constant, slope)
    return tokens * row - (delay(batch) + delay(tokens)) / stages


@given(**WHERE)
@settings(max_examples=200, deadline=None)
def test_upload_and_cloud_differ_by_one_tokens_step_at_most(row, constant, slope, batch, stages):
    tokens = solved(row, constant, slope, batch, stages)
    if tokens == 10**6:  # the link is as fast as the cloud, whatever the size
        assert off(tokens - 1, row, constant, slope, batch, stages) < 0
        return
    found = off(tokens, row, constant, slope, batch, stages)
    assert found >= 0
    if tokens > 1:
        assert found <= (row - slope / stages) * (1 + 1e-6)
        assert off(tokens - 1, row, constant, slope, batch, stages) < 0


def test_the_pages_example():
    # 8,192 bytes a row at 7.5 MB/s: 11 rows take 12.0 ms, 10 rows 10.9 ms; the cloud (4 + 2.7) + (4 + 0.3) = 11.0 ms
    delay = line(4 * 0.004, 4 * 0.00003)
    assert chunk_size(2000, 8192 / 7.5e6, delay, batch=90, stages=4) == 11
    assert chunk_size(2000, 8192 / 7.5e6, delay, batch=90, stages=1) == 45


@given(**WHERE, more=some.floats(1, 10))
@settings(max_examples=100, deadline=None)
def test_a_faster_link_more_load_and_fewer_stages_make_larger_chunks(row, constant, slope, batch, stages, more):
    tokens = solved(row, constant, slope, batch, stages)
    assert solved(row / more, constant, slope, batch, stages) >= tokens
    assert solved(row, constant, slope, batch * more, stages) >= tokens
    assert solved(row, constant, slope, batch, stages + 1) <= tokens


def test_the_differences_are_real():
    sizes = [solved(row, 0.01, 1e-5, 50, 2) for row in (1e-3, 1e-4, 3e-5)]
    assert sizes == sorted(set(sizes))
    assert solved(1e-4, 0.01, 1e-5, 500, 2) > sizes[1] > solved(1e-4, 0.01, 1e-5, 50, 4)


@given(**WHERE, left=some.integers(1, 700), bounds=some.tuples(some.integers(1, 600), some.integers(0, 600)))
@settings(max_examples=100, deadline=None)
def test_bounds(row, constant, slope, batch, stages, left, bounds):
    smallest, largest = bounds[0], sum(bounds)
    tokens = solved(row, constant, slope, batch, stages, left, smallest, largest)
    assert min(smallest, left) <= tokens <= min(largest, left)
    free = solved(row, constant, slope, batch, stages)
    assert tokens == min(max(smallest, min(free, largest)), left)


def test_a_small_prompt_goes_whole():
    assert [chunk_size(left, 1e-3, line(0.1, 0), 0) for left in (1, 5, 99)] == [1, 5, 99]
    assert chunk_size(300, 1e-3, line(0.1, 0), 0) == 200


def test_a_measured_delay_is_taken():
    delay = BatchDelay([0.01, 0.01, 0.01, 0.01, 0.012, 0.015, 0.02, 0.03, 0.05, 0.09])
    tokens = chunk_size(500, 5e-4, delay, batch=20)
    assert tokens * 5e-4 >= delay(20) + delay(tokens) > (tokens - 1) * 5e-4


@pytest.mark.parametrize(
    "wrong",
    [
        {"left": 0},
        {"row_seconds": 0.0},
        {"row_seconds": float("nan")},
        {"batch": -1},
        {"stages": 0},
        {"smallest": 0},
        {"smallest": 9, "largest": 8},
    ],
)
def test_numbers_out_of_range_are_refused(wrong):
    given = {"left": 10, "row_seconds": 1e-3, "delay": line(0.1, 0), "batch": 0, "stages": 1}
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}={next(iter(wrong.values()))}"):
        chunk_size(**{**given, **wrong})
