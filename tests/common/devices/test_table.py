import csv
from dataclasses import asdict, fields, replace

import pytest

from edgebolt.common.devices import DeviceProfile, Fleet

PHONE = DeviceProfile("phone", 2e12, 6 * 2**30, 4.0, 1.5, up_bps=8e6, down_bps=16e6, failure_rate=0.1, online_rate=0.9)
SENSOR = DeviceProfile("sensor, small", 1.5e9, 2**20, 0.2, 0.1, up_bps=1e5, down_bps=2e5)
HEADER = "name,flops,memory_bytes,power_w,radio_w,up_bps,down_bps"


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_round_trip(tmp_path):
    path = tmp_path / "fleet.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(DeviceProfile)])
        writer.writeheader()
        writer.writerows([asdict(PHONE), asdict(SENSOR), asdict(PHONE)])
    fleet = Fleet.from_csv(path, seed=4)
    assert [fleet.profile(client, 0) for client in range(len(fleet))] == [PHONE, SENSOR, PHONE]
    assert fleet.seed == 4


def test_counts_blank_lines_spaces_and_a_byte_order_mark(tmp_path):
    text = f"\ufeff{HEADER}, count\nphone,2e12,6442450944,4,1.5,8e6,16e6,3\n\nsensor,1e9,1e6,0.2,0.1,100000,2e5,2\n"
    fleet = Fleet.from_csv(write(tmp_path / "fleet.csv", text))
    assert [fleet.profile(client, 0).name for client in range(len(fleet))] == ["phone"] * 3 + ["sensor"] * 2
    assert fleet.profile(0, 0) == replace(PHONE, failure_rate=0.0, online_rate=1.0)
    assert fleet.at(0).memory_bytes.tolist() == [6442450944] * 3 + [1_000_000] * 2


GOOD = "phone,2e12,6442450944,4,1.5,8e6,16e6"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"fleet.csv, line 1: missing columns \['name', 'flops'"),
        (HEADER.replace(",up_bps", ""), r"line 1: missing columns \['up_bps'\]"),
        (HEADER + ",speed\n", r"line 1: unknown columns \['speed'\]; known are .*'count'"),
        (HEADER + ",flops\n", r"line 1: doubled columns \['flops'\]"),
        (HEADER + "\n", r"no devices"),
        (f"{HEADER}\n{GOOD}\nphone,fast,1,4,1.5,8e6,16e6\n", r"line 3, column 'flops': 'fast' is not a number"),
        (f"{HEADER}\n\n{GOOD},7\n", r"line 3: 7 columns are named, got 8 cells"),
        (
            f"{HEADER}\nphone,2e12,1.5,4,1.5,8e6,16e6\n",
            r"line 2, column 'memory_bytes': .*whole number of bytes, got 1.5",
        ),
        (f"{HEADER}\nphone,2e12,1,4,1.5,0,16e6\n", r"line 2, column 'up_bps': up_bps must be above 0, got 0"),
        (f"{HEADER}\nphone,2e12,1,4,,1,16e6\n", r"line 2, column 'radio_w': '' is not a number"),
        (f"{HEADER}\nphone,nan,1,4,1,1,16e6\n", r"line 2, column 'flops': flops must be a finite number, got nan"),
        (f"{HEADER}\n,2e12,1,4,1,1,16e6\n", r"line 2, column 'name': name must be a non-empty str"),
        (f"{HEADER},failure_rate\n{GOOD},2\n", r"line 2, column 'failure_rate': .*between 0 and 1, got 2"),
        (f"{HEADER},count\n{GOOD},0\n", r"line 2, column 'count': count must be a whole number .* got 0"),
        (f"{HEADER},count\n{GOOD},1.5\n", r"line 2, column 'count': .*got 1.5"),
    ],
)
def test_errors_name_line_and_column(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        Fleet.from_csv(write(tmp_path / "fleet.csv", text))


def test_a_missing_file_says_so(tmp_path):
    with pytest.raises(FileNotFoundError):
        Fleet.from_csv(tmp_path / "none.csv")
