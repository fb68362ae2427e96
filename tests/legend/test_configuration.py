import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from edgebolt.legend import LCD, choose_depths

LAYERS = 6


def seconds(forward, layer, fixed=0.0):
    """``t(k) = fixed + forward + k * layer`` of a cohort, ``[cohort, L]``."""
    forward, layer = np.asarray(forward, dtype=float), np.asarray(layer, dtype=float)
    return (np.zeros_like(forward) + fixed + forward)[:, None] + np.arange(1, LAYERS + 1) * layer[:, None]


def all_of(cohort):
    return np.full(cohort, LAYERS)


def waiting(times, depths):
    taken = times[np.arange(len(times)), depths - 1]
    return (taken.max() - taken).mean()


@pytest.mark.parametrize("anchor", ["deadline", "quantile", "fastest"])
def test_equal_devices_train_everything_and_nobody_waits(anchor):
    times = seconds([6.0] * 5, [1.0] * 5)
    depths = choose_depths(times, all_of(5), anchor)
    assert depths.tolist() == [LAYERS] * 5 and waiting(times, depths) == 0


@pytest.mark.parametrize("least", [1, 3])
def test_one_very_slow_device_sets_the_time_and_the_others_use_it(least):
    times = seconds([6, 6, 60, 3], [1, 1, 10, 0.5])
    depths = choose_depths(times, all_of(4), min_depth=least)
    assert depths.tolist() == [6, 6, least, 6]
    times = seconds([6, 6, 7, 3], [1, 1, 2, 0.5])
    depths = choose_depths(times, all_of(4), min_depth=least)
    round_time = times[2, least - 1]
    assert depths[2] == least
    for device in (0, 1, 3):
        deepest = np.flatnonzero(times[device] <= max(round_time, times[:, -1].min()))[-1] + 1
        assert depths[device] == deepest


@given(
    arrays(float, 8, elements=st.floats(0.1, 50)), arrays(float, 8, elements=st.floats(0.01, 10)),
    st.integers(1, LAYERS), arrays(np.int64, 8, elements=st.integers(1, LAYERS)),
)  # fmt: skip
def test_the_deadline_costs_no_time_and_leaves_no_layer_unused(forward, layer, least, most):
    times = seconds(forward, layer)
    depths = choose_depths(times, most, "deadline", min_depth=least)
    lowest = np.minimum(least, most)
    assert (depths >= lowest).all() and (depths <= most).all()
    taken = times[np.arange(8), depths - 1]
    unavoidable = max(times[np.arange(8), lowest - 1].max(), times[np.arange(8), most - 1].min())
    assert taken.max() <= unavoidable * (1 + 1e-8)
    for device in range(8):
        if depths[device] < most[device]:
            assert times[device, depths[device]] > unavoidable


def test_anchors_differ_as_they_say():
    times = seconds([2, 4, 6, 8], [1, 2, 3, 4])
    fastest = choose_depths(times, all_of(4), "fastest")
    assert fastest.tolist() == [6, 2, 1, 1]  # the reference is 8 s
    assert choose_depths(times, all_of(4), "quantile", quantile=0.0).tolist() == fastest.tolist()
    assert choose_depths(times, all_of(4), "quantile", quantile=1.0).tolist() == [6, 6, 6, 6]
    assert choose_depths(times, all_of(4), "deadline").tolist() == [6, 4, 2, 1]  # 12 s, the slowest at depth 1


def test_memory_comes_first():
    times = seconds([6, 6], [1, 1])
    assert choose_depths(times, np.array([2, 6]), min_depth=4).tolist() == [2, 4]
    assert choose_depths(times, np.array([2, 6]), "quantile", quantile=1.0).tolist() == [2, 6]


def test_the_waiting_bound_takes_layers_from_stragglers():
    times = seconds([2, 2, 2, 6], [1, 1, 1, 1])
    free = choose_depths(times, all_of(4), "quantile", quantile=1.0)
    bound = choose_depths(times, all_of(4), "quantile", quantile=1.0, max_waiting=1.0)
    assert waiting(times, free) > 1.0 >= waiting(times, bound)
    assert bound[:3].tolist() == [6, 6, 6] and 1 <= bound[3] < free[3]
    tight = choose_depths(times, all_of(4), "quantile", quantile=1.0, max_waiting=0.0, min_depth=2)
    assert tight[3] == 2  # no further


@pytest.mark.parametrize("depth", range(1, LAYERS + 1))
def test_compute_alone_saves_at_most_a_half(depth):
    """Backward of a layer costs its forward, so full depth takes ``2L / (L + k)`` times as long as depth ``k``."""
    times = seconds([float(LAYERS)], [1.0])
    assert times[0, -1] / times[0, depth - 1] == pytest.approx(2 * LAYERS / (LAYERS + depth))


@pytest.mark.parametrize(
    "wrong",
    [
        {"anchor": "slowest"},
        {"quantile": 1.5},
        {"min_depth": 0},
        {"depth": 1.5},
        {"max_waiting": -1.0},
        {"smoothing": 1.0},
        {"freeze_below": "drop"},
    ],
)
def test_refusals(wrong):
    with pytest.raises(ValueError, match=r"use|weight of the past"):
        LCD(**wrong)
