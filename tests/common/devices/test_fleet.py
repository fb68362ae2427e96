import copy
import pickle
from collections import Counter
from dataclasses import fields, replace

import numpy as np
import pytest

from edgebolt.common.devices import DeviceProfile, Fleet, FleetState
from edgebolt.common.devices.constants import BOARDS, RING_BANDS_BPS

PHONE = DeviceProfile("phone", 2e12, 6 * 2**30, 4.0, 1.5, up_bps=8e6, down_bps=16e6, failure_rate=0.1, online_rate=0.9)
SENSOR = DeviceProfile("sensor", 1e9, 2**20, 0.2, 0.1, up_bps=1e5, down_bps=2e5)


def boards(fleet, round=0):
    return Counter(fleet.profile(client, round).name.split("/")[0] for client in range(len(fleet)))


def rings(fleet, round=0):
    speed = fleet.at(round).up_bps
    return [int(((low <= speed) & (speed <= high)).sum()) for low, high in RING_BANDS_BPS]


def arrays(state):
    return {field.name: getattr(state, field.name) for field in fields(state)}


def same(left, right):
    return all(np.array_equal(array, arrays(right)[name]) for name, array in arrays(left).items())


@pytest.mark.parametrize(
    ("n", "expected"),
    [
        (80, (30, 40, 10)),
        (8, (3, 4, 1)),
        (1, (0, 1, 0)),
        (10, (4, 5, 1)),  # quotas 3.75, 5, 1.25
        (13, (5, 6, 2)),  # quotas 4.875, 6.5, 1.625
        (1000, (375, 500, 125)),
    ],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_exact_proportions_by_largest_remainder(n, expected, seed):
    counts = boards(Fleet.jetson(n, seed=seed))
    assert tuple(counts[board.name] for board in BOARDS) == expected


def test_rings_are_equal_and_hold_for_ever():
    fleet = Fleet.jetson(80, seed=3)
    assert rings(fleet) == [20, 20, 20, 20]
    for low, high in RING_BANDS_BPS:
        members = [(low <= fleet.at(round).up_bps) & (fleet.at(round).up_bps <= high) for round in (0, 1, 57)]
        assert np.array_equal(members[0], members[1])
        assert np.array_equal(members[0], members[2])
    assert rings(Fleet.jetson(10)) == [3, 3, 2, 2]


def test_boards_and_rings_are_dealt_independently_and_by_the_seed():
    fleet, other = Fleet.jetson(800, seed=0), Fleet.jetson(800, seed=1)
    kinds = np.array([fleet.profile(client, 0).name.split("/")[0] for client in range(800)])
    near = fleet.at(0).up_bps >= RING_BANDS_BPS[0][0]
    assert 30 < (near & (kinds == "jetson-tx2")).sum() < 120  # 75 expected of 300
    assert not np.array_equal(fleet.at(0).memory_bytes, other.at(0).memory_bytes)


def test_modes_are_redrawn_every_twenty_rounds_and_links_every_round():
    fleet = Fleet.jetson(80)
    assert np.array_equal(fleet.at(0).flops, fleet.at(19).flops)
    assert np.array_equal(fleet.at(20).flops, fleet.at(39).flops)
    assert not np.array_equal(fleet.at(19).flops, fleet.at(20).flops)
    assert not np.array_equal(fleet.at(0).up_bps, fleet.at(1).up_bps)
    assert boards(fleet, 0) == boards(fleet, 40)
    often = Fleet.jetson(80, redraw_every=2)
    assert np.array_equal(often.at(0).flops, often.at(1).flops)
    assert not np.array_equal(often.at(1).flops, often.at(2).flops)


def test_every_mode_comes_equally_often_with_its_own_power():
    fleet = Fleet.jetson(8000, seed=5)
    state, names = fleet.at(0), [fleet.profile(client, 0).name for client in range(8000)]
    for board in BOARDS:
        mine = np.array([name.startswith(board.name) for name in names])
        counts = [
            int((mine & (state.flops == flops) & (state.power_w == power)).sum())
            for flops, power in zip(board.flops, board.power_w, strict=True)
        ]
        expected = 8000 * board.share / 80 / len(board.flops)
        assert sum(counts) == 100 * board.share
        assert all(abs(count - expected) < 4.5 * expected**0.5 for count in counts)


def test_independent_of_the_order_of_calls():
    forward, backward = Fleet.jetson(50, 7, 0.4, 0.6), Fleet.jetson(50, 7, 0.4, 0.6)
    rounds = [0, 1, 25, 60, 3]
    first = {round: (forward.at(round), forward.cut(4, 9, round), forward.profile(8, round)) for round in rounds}
    np.random.default_rng(0)
    for round in reversed(rounds):
        np.random.random(3)
        cut, profile = backward.cut(4, 9, round), backward.profile(8, round)
        assert (cut, profile) == first[round][1:]
        assert same(backward.at(round), first[round][0])


def test_the_last_rounds_are_kept_and_cannot_be_changed():
    fleet = Fleet.jetson(10)
    state = fleet.at(3)
    assert fleet.at(3) is state
    for round in range(10, 30):
        fleet.at(round)
    assert fleet.at(3) is not state
    assert same(fleet.at(3), state)
    for name, array in arrays(state).items():
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1
        assert len(array) == 10, name


def test_a_hundred_thousand_devices_are_a_few_arrays():
    fleet = Fleet.jetson(100_000, failure_rate=0.1, online_rate=0.5)
    state = fleet.at(11)
    assert isinstance(state, FleetState)
    kinds = {"memory_bytes": np.int64, "online": np.bool_}
    for name, array in arrays(state).items():
        assert (type(array), array.shape, array.dtype) == (np.ndarray, (100_000,), kinds.get(name, np.float64)), name
    assert abs(state.online.mean() - 0.5) < 0.01
    assert not np.array_equal(state.online, fleet.at(12).online)
    held = [value for value in vars(fleet).values() if isinstance(value, (list, tuple, dict)) and len(value) > 100]
    assert held == []
    names = {board.name for board in BOARDS}
    assert fleet.profile(99_999, 11).name.split("/")[0] in names


def test_profile_is_a_row_of_the_state():
    fleet = Fleet.jetson(30, seed=2, failure_rate=0.2, online_rate=0.7)
    for client in (0, 13, 29):
        profile, state = fleet.profile(client, 45), fleet.at(45)
        for name in ("flops", "memory_bytes", "power_w", "radio_w", "up_bps", "down_bps", "failure_rate"):
            assert getattr(profile, name) == getattr(state, name)[client]
        assert profile.online_rate == 0.7
        board = next(board for board in BOARDS if board.name == profile.name.split("/")[0])
        assert board.flops[int(profile.name[-1])] == profile.flops


def test_uniform_fleets():
    fleet = Fleet.uniform(5, PHONE, seed=1)
    assert [fleet.profile(client, 9) for client in range(5)] == [PHONE] * 5
    default = Fleet.uniform(3).profile(0, 0)
    assert (default.name, default.flops) == (BOARDS[1].name, BOARDS[1].flops[0])
    assert default.up_bps == default.down_bps == 15.5e6
    assert (len(fleet), repr(fleet)) == (5, "Fleet(5 devices of 1 kinds, seed=1)")


def test_fleets_of_given_profiles():
    fleet = Fleet.from_profiles([PHONE, SENSOR, PHONE])
    assert [fleet.profile(client, 3) for client in range(3)] == [PHONE, SENSOR, PHONE]
    assert fleet.at(3).flops.tolist() == [2e12, 1e9, 2e12]


def test_failures_are_frequent_as_stated_and_uniform_in_place():
    fleet = Fleet.uniform(100, replace(PHONE, failure_rate=0.3))
    cuts = [fleet.cut(client, 4, round) for round in range(60) for client in range(100)]
    died = [cut for cut in cuts if cut is not None]
    assert abs(len(died) / len(cuts) - 0.3) < 0.02
    counts = Counter("download" if c.down < 1 else "upload" if c.up is not None else c.steps for c in died)
    expected = {"download": 0.1, "upload": 0.1, 0: 0.2, 1: 0.2, 2: 0.2, 3: 0.2}
    assert counts.keys() == expected.keys()
    assert all(abs(count / len(died) - expected[where]) < 0.04 for where, count in counts.items())
    assert all(c.steps == 4 for c in died if c.up is not None) and all(c.steps == 0 for c in died if c.down < 1)
    assert 0.4 < np.mean([c.down for c in died if c.down < 1]) < 0.6
    assert 0.4 < np.mean([c.up for c in died if c.up is not None]) < 0.6


def test_failures_belong_to_seed_round_client_and_stage_alone():
    fleet = Fleet.uniform(1000, replace(PHONE, failure_rate=0.5), seed=0)

    def pattern(fleet, **where):
        return [fleet.cut(client, 10, **{"round": 3, **where}) for client in range(200)]

    base = pattern(fleet)
    assert base == pattern(fleet)
    assert base == pattern(fleet, stage=0)
    # another population, another link, another speed: the same failures
    assert base == pattern(Fleet.jetson(200, seed=0, failure_rate=0.5))
    others = [
        pattern(fleet, round=4),
        pattern(fleet, stage=1),
        pattern(Fleet.uniform(1000, replace(PHONE, failure_rate=0.5), seed=1)),
    ]
    assert all(base != other for other in others)
    # fewer steps: the same visits die at the same fraction; a higher rate: they still die
    short = [fleet.cut(client, 1, 3) for client in range(200)]
    assert [cut is None for cut in short] == [cut is None for cut in base]
    higher = pattern(Fleet.uniform(1000, replace(PHONE, failure_rate=0.9)))
    assert all(cut == now for cut, now in zip(base, higher, strict=True) if cut is not None)


def test_cuts_at_the_ends():
    never, always = Fleet.jetson(20), Fleet.jetson(20, failure_rate=1.0)
    assert all(never.cut(client, 10, 0) is None for client in range(20))
    assert all(always.cut(client, 0, 0).steps == 0 for client in range(20))
    with pytest.raises(IndexError, match="clients 0 to 19, got 20"):
        never.cut(20, 10, 0)
    with pytest.raises(IndexError, match="got -1"):
        never.profile(-1, 0)
    with pytest.raises(ValueError, match="steps must not be negative, got -1"):
        never.cut(0, -1, 0)
    for ask in (lambda: never.at(-1), lambda: never.cut(0, 1, -1)):
        with pytest.raises(ValueError, match="rounds are counted from 0, got -1"):
            ask()


def test_copies_draw_the_same():
    fleet = Fleet.jetson(40, seed=9, failure_rate=0.5)
    fleet.at(2)
    for twin in (copy.deepcopy(fleet), pickle.loads(pickle.dumps(fleet))):
        assert same(twin.at(2), fleet.at(2))
        assert same(twin.at(77), fleet.at(77))


def test_arguments_are_checked():
    for make in (lambda: Fleet.jetson(0), lambda: Fleet.uniform(0), lambda: Fleet.from_profiles([])):
        with pytest.raises(ValueError, match="at least one device"):
            make()
    with pytest.raises(ValueError, match="redraw_every must be at least 1 round, got 0"):
        Fleet.jetson(3, redraw_every=0)
    with pytest.raises(ValueError, match=r"failure_rate must be between 0 and 1, got 1\.5"):
        Fleet.jetson(3, failure_rate=1.5)
    with pytest.raises(ValueError, match="indices from 0 to 0"):
        Fleet([[PHONE]], np.array([0, 1]))
    with pytest.raises(ValueError, match="2 devices, got 1"):
        Fleet([[PHONE]], np.array([0, 0]), ring=np.array([0]))


def test_speed_scales_computing_alone():
    fast, slow = Fleet.jetson(40, seed=3).at(5), Fleet.jetson(40, seed=3, speed=0.25).at(5)
    assert (slow.flops == fast.flops * 0.25).all()
    for same in ("memory_bytes", "power_w", "radio_w", "up_bps", "down_bps", "online"):
        assert (getattr(slow, same) == getattr(fast, same)).all()
    for wrong in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="speed="):
            Fleet.jetson(4, speed=wrong)
