import math

import pytest

from edgebolt.common.devices import Clock


def test_it_goes_forward_and_adds_up():
    clock = Clock()
    assert (clock.now, clock.energy_joules) == (0.0, 0.0)
    clock.advance_to(3)
    clock.advance_to(3.0)
    clock.spend(2.5)
    clock.spend(0)
    clock.spend(1.0)
    assert (clock.now, clock.energy_joules) == (3.0, 3.5)
    assert repr(clock) == "3 s"
    clock.advance_to(812.43)
    assert repr(clock) == "812.4 s"


def test_it_never_goes_back():
    clock = Clock()
    clock.advance_to(10.5)
    with pytest.raises(ValueError, match=r"stands at 10.5 s and never goes back, got 10.4"):
        clock.advance_to(10.4)
    with pytest.raises(ValueError, match="nan"):
        clock.advance_to(math.nan)
    with pytest.raises(ValueError, match=r"got -1\.0"):
        clock.spend(-1)
    assert clock.state_dict() == {"now": 10.5, "energy_joules": 0.0}


def test_state_round_trip():
    clock, other = Clock(), Clock()
    clock.advance_to(1 / 3)
    clock.spend(0.1)
    other.advance_to(100)
    other.load_state_dict(clock.state_dict())
    assert other.state_dict() == clock.state_dict()
    assert all(type(value) is float for value in clock.state_dict().values())
    with pytest.raises(ValueError, match="energy_joules"):
        other.load_state_dict({"now": 1.0})
