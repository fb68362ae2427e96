import numpy as np
import pytest

from edgebolt.caesar import LevelledBatches, level_batches
from edgebolt.caesar.batch_sizes import _no_single


def test_nobody_ends_after_the_fastest_where_that_is_possible():
    rng = np.random.default_rng(0)
    for _ in range(50):
        sending, speed = rng.uniform(0, 2, 8), rng.uniform(0.01, 0.1, 8)
        steps, most = np.full(8, 10), np.full(8, 32)
        batches = level_batches(sending, speed, steps, most)
        times = sending + steps * batches * speed
        end = (sending + steps * most * speed).min()
        fastest = (sending + steps * most * speed).argmin()
        assert batches[fastest] == 32
        assert ((times <= end * (1 + 1e-9)) | (batches == 4)).all()
        larger = sending + steps * (batches + 1) * speed
        assert ((larger > end) | (batches == 32)).all()  # and none could be larger


def test_the_unmeasured_have_their_largest_batch_and_set_no_pace():
    nan = float("nan")
    assert level_batches(
        np.array([nan, 1.0]), np.array([nan, 0.1]), np.array([5, 5]), np.array([32, 32])
    ).tolist() == [
        32,
        32,
    ]
    assert level_batches(np.array([nan]), np.array([nan]), np.array([5]), np.array([32])).tolist() == [32]


def test_a_link_that_takes_longer_than_the_fastest_device_gets_the_least():
    batches = level_batches(np.array([0.0, 100.0]), np.array([0.1, 0.1]), np.array([5, 5]), np.array([32, 32]))
    assert batches.tolist() == [32, 4]


def test_a_small_device_keeps_all_its_samples():
    assert level_batches(np.array([100.0, 0.0]), np.ones(2), np.ones(2, int), np.array([3, 32])).tolist() == [3, 32]


def test_no_last_batch_of_one():
    assert _no_single(4, 13, 2) == 4  # all of 4, 3, 2 leave one
    assert _no_single(5, 11, 4) == 4  # 11 = 5 + 5 + 1 = 4 + 4 + 3
    assert _no_single(4, 12, 4) == 4
    assert _no_single(4, 5, 4) == 4  # nothing better above the least


@pytest.mark.parametrize(("arguments", "says"), [({"most": 0}, "most=0"), ({"least": 1.5}, "least=1.5")])
def test_arguments(arguments, says):
    with pytest.raises(ValueError, match=says):
        LevelledBatches(**arguments)
    with pytest.raises(ValueError, match="least=8 is more than most=4"):
        LevelledBatches(most=4, least=8)
