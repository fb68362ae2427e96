import json
import math
import os
from dataclasses import asdict, fields, replace
from itertools import pairwise

import pytest

from edgebolt.common.devices import DeviceProfile
from edgebolt.common.devices.constants import BOARDS, GIB, RING_BANDS_BPS

PHONE = DeviceProfile("phone", 2e12, 6 * GIB, 4.0, 1.5, up_bps=8e6, down_bps=16e6, failure_rate=0.1, online_rate=0.9)


def test_closed_form_seconds_and_joules():
    assert PHONE.compute_seconds(5e12) == 2.5
    assert PHONE.download_seconds(3_000_000) == 1.5  # 24 Mbit at 16 Mb/s
    assert PHONE.upload_seconds(3_000_000) == 3.0
    assert PHONE.upload_seconds(0) == 0.0
    assert PHONE.energy_joules(2.5, 4.5) == 4.0 * 2.5 + 1.5 * 4.5


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("name", ""),
        ("name", 3),
        ("flops", 0.0),
        ("flops", math.inf),
        ("flops", "fast"),
        ("memory_bytes", 6e9),
        ("memory_bytes", 0),
        ("power_w", -1.0),
        ("power_w", True),
        ("radio_w", math.nan),
        ("up_bps", 0),
        ("down_bps", -5),
        ("failure_rate", 1.1),
        ("online_rate", -0.1),
    ],
)
def test_values_that_are_refused_are_named(name, value):
    with pytest.raises(ValueError, match=f"^{name} must .*got {value!r}$"):
        replace(PHONE, **{name: value})


def test_json_round_trip(tmp_path):
    path = tmp_path / "deep" / "phone.json"
    PHONE.to_json(path)
    assert json.loads(path.read_text()) == asdict(PHONE)
    assert DeviceProfile.from_json(path) == PHONE
    PHONE.to_json(path, measured={"steps_per_second": 3.0})  # over the old one
    assert json.loads(path.read_text())["measured"] == {"steps_per_second": 3.0}
    assert DeviceProfile.from_json(str(path)) == PHONE
    assert os.listdir(path.parent) == ["phone.json"]


def test_rates_may_be_left_out(tmp_path):
    content = asdict(PHONE)
    del content["failure_rate"], content["online_rate"]
    (tmp_path / "p.json").write_text(json.dumps(content))
    assert DeviceProfile.from_json(tmp_path / "p.json") == replace(PHONE, failure_rate=0.0, online_rate=1.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"speed": 1}, r"p.json: unknown keys \['speed'\]"),
        ({"flops": None}, r"p.json: flops must be a finite number, got None"),
        ({"up_bps": "8e6"}, r"p.json: up_bps must be a finite number, got '8e6'"),
        ({"failure_rate": 2}, r"p.json: failure_rate must be between 0 and 1, got 2"),
    ],
)
def test_bad_json_values(tmp_path, change, message):
    (tmp_path / "p.json").write_text(json.dumps(asdict(PHONE) | change))
    with pytest.raises(ValueError, match=message):
        DeviceProfile.from_json(tmp_path / "p.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a JSON file"),
        ("[1]", "is a JSON object, got list"),
        ('{"name": "x"}', r"missing keys \['flops', 'memory_bytes'"),
    ],
)
def test_bad_json_files(tmp_path, text, message):
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        DeviceProfile.from_json(tmp_path / "p.json")


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "p.json"
    PHONE.to_json(path)

    def broken(source, target):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(OSError, match="disk full"):
        replace(PHONE, name="other").to_json(path)
    assert DeviceProfile.from_json(path) == PHONE
    assert os.listdir(tmp_path) == ["p.json"]


def test_the_constants_are_the_stated_testbed():
    assert {board.name: (board.share, len(board.flops)) for board in BOARDS} == {
        "jetson-tx2": (30, 4),
        "jetson-xavier-nx": (40, 8),
        "jetson-agx-xavier": (10, 8),
    }
    for board in BOARDS:
        assert len(board.flops) == len(board.power_w)
        assert sorted(board.flops, reverse=True) == list(board.flops)
        assert sorted(board.power_w, reverse=True) == list(board.power_w)
        assert 1e11 < board.flops[-1] < board.flops[0] < 5e12  # effective training rates, no INT8 TOPS
    assert RING_BANDS_BPS[0][1] == 30e6
    assert RING_BANDS_BPS[-1][0] == 1e6
    assert all(near[0] == far[1] for near, far in pairwise(RING_BANDS_BPS))


def test_the_profile_has_the_agreed_fields():
    assert [field.name for field in fields(DeviceProfile)] == [
        "name",
        "flops",
        "memory_bytes",
        "power_w",
        "radio_w",
        "up_bps",
        "down_bps",
        "failure_rate",
        "online_rate",
    ]
