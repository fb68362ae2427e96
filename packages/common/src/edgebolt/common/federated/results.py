"""What a federated run came to: its rounds as a table, and when it reached a target."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

__all__ = ["Rounds", "common_target", "measured", "moving_average", "read_rounds", "time_to"]

Rounds = Sequence[Mapping[str, float]] | str | os.PathLike[str]  # rows of a run, its rounds.csv, or that file's folder

_WINDOW = 3  # measurements in a moving average


def read_rounds(rounds: Rounds) -> list[dict[str, float]]:
    """Rows of a run: whole numbers as int, others as float; an empty cell is left out of its row.

    Args:
        rounds: A ``rounds.csv`` (see :class:`FederatedSummary`), the folder that holds it, or rows, which are copied.

    Raises:
        FileNotFoundError: If there is no such file.

    Example::

        >>> read_rounds([{"round": 0, "val_acc": 0.5}])
        [{'round': 0, 'val_acc': 0.5}]
    """
    if not isinstance(rounds, str | os.PathLike):
        return [dict(row) for row in rounds]
    path = Path(rounds)
    with (path / "rounds.csv" if path.is_dir() else path).open(newline="", encoding="utf-8") as file:
        return [{name: _number(cell) for name, cell in row.items() if cell} for row in csv.DictReader(file)]


def _number(cell: str) -> float:
    return int(cell) if cell.removeprefix("-").isdigit() else float(cell)


def measured(rounds: Rounds, metric: str) -> list[dict[str, float]]:
    """The rows that have a metric; rounds without validation have none.

    Raises:
        ValueError: If no row has it; the message lists the columns.
    """
    rows = read_rounds(rounds)
    found = [row for row in rows if metric in row]
    if not found:
        columns = list(dict.fromkeys(name for row in rows for name in row))
        raise ValueError(f"metric={metric!r} is in no round: log it with self.log, or take one of {columns}.")
    return found


def moving_average(values: Sequence[float]) -> list[float]:
    """The mean of each three consecutive values, ``len(values) - 2`` numbers (none for fewer than three values)."""
    return [fmean(values[end - _WINDOW : end]) for end in range(_WINDOW, len(values) + 1)]


def time_to(rounds: Rounds, metric: str, target: float, mode: str = "max") -> tuple[int, float, int] | None:
    """When a run reached a target: the first round at which the mean of the last three measurements is good enough.

    Args:
        rounds: Rows, a ``rounds.csv``, or its folder.
        metric: Name of the column; rounds without it are passed over.
        target: Value to reach.
        mode: ``"max"``: at least ``target``; ``"min"``: at most (a loss).

    Returns:
        The round, and simulated seconds and bytes (up and down) from the run's beginning to the end of that round.
        None if the target was not reached, which includes a run of fewer than three measurements.

    Raises:
        ValueError: If no row has the metric, or for another ``mode``.

    Example::

        >>> rows = [{"round": r, "round/sim_time": 10.0 * r, "bytes_up_total": 5 * r, "bytes_down_total": 8 * r,
        ...          "val_acc": acc} for r, acc in enumerate([0.1, 0.9, 0.5, 0.8, 0.8])]
        >>> time_to(rows, "val_acc", 0.7)
        (3, 30.0, 39)
        >>> time_to(rows, "val_acc", 0.95) is None
        True
    """
    sign, rows = _sign(mode), measured(rounds, metric)
    averages = moving_average([row[metric] for row in rows])
    for row, average in zip(rows[_WINDOW - 1 :], averages, strict=True):
        if sign * average >= sign * target:
            return int(row["round"]), row["round/sim_time"], int(row["bytes_up_total"] + row["bytes_down_total"])
    return None


def common_target(runs: Mapping[str, Rounds], metric: str = "val_acc", mode: str = "max") -> float:
    """The best mean of three consecutive measurements that every run reaches: a target for :func:`time_to`.

    Args:
        runs: Name of the run -> rows, ``rounds.csv`` or its folder.
        metric: Name of the column.
        mode: ``"max"`` or ``"min"`` (a loss).

    Raises:
        ValueError: If there is no run, or one has fewer than three measurements, or for another ``mode``.

    Example::

        >>> runs = {"a": [{"val_acc": v} for v in (0.3, 0.4, 0.5)], "b": [{"val_acc": v} for v in (0.25, 0.25, 0.25)]}
        >>> common_target(runs)
        0.25
    """
    sign = _sign(mode)
    averages = {
        name: moving_average([row[metric] for row in measured(rounds, metric)]) for name, rounds in runs.items()
    }
    short = [name for name, values in averages.items() if not values]
    if short or not averages:
        raise ValueError(f"runs={list(runs)}: each needs {_WINDOW} measurements of {metric!r}; too few in {short}.")
    return sign * min(max(sign * value for value in values) for values in averages.values())


def _sign(mode: str) -> int:
    if mode not in ("max", "min"):
        raise ValueError(f"mode={mode!r}: use 'max' or 'min'.")
    return 1 if mode == "max" else -1
