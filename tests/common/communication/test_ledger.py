import csv
import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgebolt.common.communication import TrafficLedger

entry = st.fixed_dictionaries(
    {
        "round": st.integers(0, 5),
        "client": st.integers(0, 2**63 - 1),
        "direction": st.sampled_from(["up", "down"]),
        "nbytes": st.integers(0, 2**63 - 1),
        "time": st.floats(0, allow_infinity=False, allow_nan=False),
        "kind": st.text(max_size=3),
        "delivered": st.booleans(),
    }
)


def filled(entries):
    ledger = TrafficLedger()
    for fields in entries:
        ledger.add(**fields)
    return ledger


def two_entries():
    ledger = TrafficLedger()
    ledger.add(round=1, client=7, direction="down", nbytes=1000, time=0.5)
    ledger.add(round=0, client=8, direction="up", nbytes=30, time=0.1 + 0.2, kind="enrol, first", delivered=False)
    return ledger


def through_torch(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def test_empty():
    ledger = TrafficLedger()
    assert (len(ledger), ledger.total_bytes, ledger.by_round(), ledger.kinds) == (0, 0, {}, ())
    assert all(len(column) == 0 for column in ledger.entries().values())


@given(st.lists(entry, max_size=20))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_totals_are_exact(entries):
    ledger = filled(entries)
    up = [e["nbytes"] for e in entries if e["direction"] == "up"]
    down = [e["nbytes"] for e in entries if e["direction"] == "down"]
    assert (ledger.up_bytes, ledger.down_bytes, ledger.total_bytes) == (sum(up), sum(down), sum(up) + sum(down))
    assert len(ledger) == len(entries)
    rounds = ledger.by_round()
    assert list(rounds) == sorted({e["round"] for e in entries})
    for number, (up_bytes, down_bytes) in rounds.items():
        mine = [e for e in entries if e["round"] == number]
        assert up_bytes == sum(e["nbytes"] for e in mine if e["direction"] == "up")
        assert down_bytes == sum(e["nbytes"] for e in mine if e["direction"] == "down")


@given(st.lists(entry, max_size=10), st.lists(entry, max_size=3))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_state_round_trips_under_weights_only(entries, more):
    ledger, other = filled(entries), filled(more)
    other.load_state_dict(through_torch(ledger.state_dict()))
    assert other == ledger
    assert (other.up_bytes, other.down_bytes) == (ledger.up_bytes, ledger.down_bytes)
    for fields in more:  # and it goes on alike
        ledger.add(**fields)
        other.add(**fields)
    assert other == ledger
    assert other.total_bytes == ledger.total_bytes


def test_entries():
    ledger = two_entries()
    entries = ledger.entries()
    assert {name: column.tolist() for name, column in entries.items()} == {
        "round": [1, 0], "client": [7, 8], "up": [False, True], "nbytes": [1000, 30], "time": [0.5, 0.1 + 0.2],
        "kind": [0, 1], "delivered": [True, False],
    }  # fmt: skip
    assert {name: column.dtype for name, column in entries.items()} == {
        "round": np.int64, "client": np.int64, "up": np.bool_, "nbytes": np.int64, "time": np.float64,
        "kind": np.int16, "delivered": np.bool_,
    }  # fmt: skip
    assert ledger.kinds == ("model", "enrol, first")


def test_entries_and_states_are_copies():
    ledger = two_entries()
    entries, state = ledger.entries(), ledger.state_dict()
    entries["nbytes"][:] = 0
    state["nbytes"].zero_()
    ledger.add(round=2, client=0, direction="up", nbytes=1, time=0)
    assert ledger.entries()["nbytes"].tolist() == [1000, 30, 1]
    assert len(state["nbytes"]) == 2


def test_csv(tmp_path):
    path = tmp_path / "traffic.csv"
    path.write_text("old")
    two_entries().to_csv(path)
    with path.open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [
        ["round", "client", "direction", "nbytes", "time", "kind", "delivered"],
        ["1", "7", "down", "1000", "0.5", "model", "True"],
        ["0", "8", "up", "30", "0.30000000000000004", "enrol, first", "False"],
    ]
    assert list(tmp_path.iterdir()) == [path]


def test_csv_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "traffic.csv"
    path.write_text("old")
    ledger = two_entries()
    monkeypatch.setattr(TrafficLedger, "kinds", ())  # the first row cannot be written
    with pytest.raises(IndexError):
        ledger.to_csv(str(path))
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("nbytes", -1, ValueError), ("nbytes", 2**63, ValueError), ("nbytes", 1.5, TypeError),
        ("round", -1, ValueError), ("client", -1, ValueError), ("client", None, TypeError),
        ("time", -0.1, ValueError), ("time", float("nan"), ValueError), ("time", float("inf"), ValueError),
        ("direction", "UP", ValueError), ("direction", True, ValueError), ("kind", 3, TypeError),
    ],
)  # fmt: skip
def test_bad_arguments_enter_nothing(field, value, error):
    ledger = two_entries()
    with pytest.raises(error, match=None if error is TypeError else str(value)):
        ledger.add(**{"round": 0, "client": 0, "direction": "up", "nbytes": 1, "time": 0.0, field: value})
    assert ledger == two_entries()
    assert ledger.total_bytes == 1030


def test_kinds_are_limited():
    ledger = TrafficLedger()
    for number in range(2**15):
        ledger.add(round=0, client=0, direction="up", nbytes=1, time=0, kind=str(number))
    with pytest.raises(ValueError, match="fewer"):
        ledger.add(round=0, client=0, direction="up", nbytes=1, time=0, kind="one more")
    assert ledger.entries()["kind"][-1] == 2**15 - 1
    assert len(ledger) == 2**15


def test_numpy_integers_are_welcome():
    ledger = TrafficLedger()
    ledger.add(round=np.int64(1), client=np.int32(2), direction="up", nbytes=np.int64(3), time=np.float32(0.5))
    assert ledger.by_round() == {1: (3, 0)}
    assert type(ledger.total_bytes) is int


def test_equality_sees_every_column():
    base = {"round": 0, "client": 0, "direction": "up", "nbytes": 1, "time": 0.0, "kind": "a", "delivered": True}
    changes = {"round": 1, "client": 1, "direction": "down", "nbytes": 2, "time": 1.0, "kind": "b", "delivered": False}
    assert filled([base]) == filled([base])
    for field, value in changes.items():
        assert filled([base]) != filled([{**base, field: value}])
    assert filled([base]) != filled([base, base])
    assert filled([]) != 0


@pytest.mark.parametrize(
    "change",
    [
        {"nbytes": torch.tensor([1, -1])},
        {"nbytes": torch.tensor([1])},
        {"nbytes": torch.tensor([1.0, 2.0])},
        {"nbytes": torch.tensor([[1, 2]])},
        {"nbytes": [1, 2]},
        {"time": torch.tensor([0.0, float("nan")], dtype=torch.float64)},
        {"time": torch.tensor([0.0, float("inf")], dtype=torch.float64)},
        {"kind": torch.tensor([0, 2], dtype=torch.int16)},
        {"kinds": ["model"]},
        {"kinds": ["model", "model"]},
        {"kinds": ["model", 3]},
        {"kinds": "ab"},
        {"extra": 1},
    ],
)
def test_bad_states_change_nothing(change):
    ledger = two_entries()
    with pytest.raises(ValueError, match=next(iter(change)) if "nbytes" not in change else "columns? "):
        ledger.load_state_dict({**ledger.state_dict(), **change})
    assert ledger == two_entries()
    state = ledger.state_dict()
    del state["time"]
    with pytest.raises(ValueError, match="keys"):
        ledger.load_state_dict(state)
