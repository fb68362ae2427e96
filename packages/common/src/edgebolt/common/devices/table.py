"""A table of devices in a CSV file, with errors that name the place."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from edgebolt.common.devices.profile import DeviceProfile, check_field

__all__ = ["read_profiles"]

_FIELDS = {field.name: field.default is MISSING for field in fields(DeviceProfile)}  # name -> required
_WHOLE = ("memory_bytes", "count")


def read_profiles(path: str | os.PathLike[str]) -> tuple[list[DeviceProfile], list[int]]:
    r"""Read device profiles, one a line, and the number of equal devices that each line stands for.

    Args:
        path: A CSV file in UTF-8. The first line names the columns: the fields of :class:`DeviceProfile`
            (``failure_rate`` and ``online_rate`` may be left out) and, if wanted, ``count``. Blank lines are skipped.

    Returns:
        The profiles and the counts, in the order of the lines.

    Raises:
        ValueError: If a column is missing, unknown or doubled, a cell is not allowed, or there are no devices.

    Example::

        >>> import tempfile, pathlib
        >>> from edgebolt.common.devices.table import read_profiles
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "fleet.csv"
        >>> _ = path.write_text("name,flops,memory_bytes,power_w,radio_w,up_bps,down_bps,count\n"
        ...                     "phone,1e12,6e9,4,1.5,8e6,16e6,3\n")
        >>> profiles, counts = read_profiles(path)
        >>> profiles[0].name, profiles[0].memory_bytes, counts
        ('phone', 6000000000, [3])
    """
    profiles: list[DeviceProfile] = []
    counts: list[int] = []
    with Path(path).open(newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file)
        columns = [column.strip() for column in next(reader, [])]
        _check_columns(columns, f"{path}, line 1")
        for cells in reader:
            if not cells:
                continue
            place = f"{path}, line {reader.line_num}"
            if len(cells) != len(columns):
                raise ValueError(f"{place}: {len(columns)} columns are named, got {len(cells)} cells")
            row = _row(dict(zip(columns, cells, strict=True)), place)
            counts.append(row.pop("count", 1))
            profiles.append(DeviceProfile(**row))
    if not profiles:
        raise ValueError(f"{path}: no devices; a fleet needs a line of column names and at least one more")
    return profiles, counts


def _check_columns(columns: list[str], place: str) -> None:
    if missing := [name for name, required in _FIELDS.items() if required and name not in columns]:
        raise ValueError(f"{place}: missing columns {missing}")
    if unknown := [name for name in columns if name not in _FIELDS and name != "count"]:
        raise ValueError(f"{place}: unknown columns {unknown}; known are {[*_FIELDS, 'count']}")
    if doubled := sorted({name for name in columns if columns.count(name) > 1}):
        raise ValueError(f"{place}: doubled columns {doubled}")


def _row(cells: Mapping[str, str], place: str) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for name, cell in cells.items():
        try:
            row[name] = _value(name, cell.strip())
        except ValueError as error:
            raise ValueError(f"{place}, column {name!r}: {error}") from error
    return row


def _value(name: str, cell: str) -> str | int | float:
    if name == "name":
        check_field(name, cell)
        return cell
    try:
        value: int | float = int(cell)
    except ValueError:
        try:
            value = float(cell)
        except ValueError:
            raise ValueError(f"{cell!r} is not a number") from None
    if name in _WHOLE and isinstance(value, float) and value.is_integer():
        value = int(value)  # 6e9 bytes
    if name != "count":
        check_field(name, value)
    elif not isinstance(value, int) or value < 1:
        raise ValueError(f"count must be a whole number of devices, at least 1, got {cell}")
    return value
