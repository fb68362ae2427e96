"""The picture of federated runs: a metric over simulated time and over traffic."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from edgebolt.common.federated.results import Rounds, measured, moving_average

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["compare"]

# From how many simulated seconds on a unit is used, its seconds, its name.
_UNITS = ((7200.0, 3600.0, "h"), (120.0, 60.0, "min"), (0.0, 1.0, "s"))


def compare(
    runs: Mapping[str, Rounds],
    path: str | os.PathLike[str],
    metric: str = "val_acc",
    title: str | None = None,
    lines: Mapping[str, float] | None = None,
) -> None:
    """Draw a metric of several runs over simulated time and over traffic, side by side.

    Thick: mean of the last three measurements; thin: the measurements. Traffic is up and down, 1 MB = 10^6 bytes.

    Args:
        runs: Name of the run -> rows, ``rounds.csv`` or its folder.
        path: Where to save; the ending says the format. Its folder is made if missing.
        metric: Name of the column.
        title: Title of the figure.
        lines: Name -> value of horizontal lines, such as a target or a trivial predictor.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
        ValueError: If there is no run, or one has no such metric.

    Example::

        >>> import tempfile
        >>> names = ("round/sim_time", "bytes_up_total", "bytes_down_total", "val_acc")
        >>> rows = [dict.fromkeys(names, float(round)) for round in range(9)]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     compare({"FedAvg": rows}, f"{folder}/runs.png", lines={"guessing": 0.1})
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Plotting needs matplotlib: pip install 'edgebolt-common[plot]'", name=error.name
        ) from error
    if not runs:
        raise ValueError("There is no run to draw: pass {name: folder of the run}.")
    tables = {name: measured(rounds, metric) for name, rounds in runs.items()}
    longest = max(rows[-1]["round/sim_time"] for rows in tables.values())
    seconds, unit = next((seconds, unit) for least, seconds, unit in _UNITS if longest >= least)
    figure = Figure(figsize=(10.0, 4.5), layout="constrained", dpi=150)
    time, traffic = figure.subplots(1, 2, sharey=True)
    name = metric.replace("_", " ")
    _panel(time, tables, metric, lambda row: row["round/sim_time"] / seconds, lines or {})
    _panel(traffic, tables, metric, lambda row: (row["bytes_up_total"] + row["bytes_down_total"]) / 1e6, lines or {})
    time.set(title=f"{name} over simulated time", xlabel=f"simulated time ({unit})", ylabel=name)
    traffic.set(title=f"{name} over traffic", xlabel="traffic, up and down (MB)")
    if len(tables) + len(lines or {}) > 1:
        time.legend(loc="lower right", frameon=False)
    if title:
        figure.suptitle(title)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _panel(
    ax: Axes,
    tables: Mapping[str, list[dict[str, float]]],
    metric: str,
    x_of: Callable[[dict[str, float]], float],
    lines: Mapping[str, float],
) -> None:
    from matplotlib import colormaps

    colours = colormaps["tab10"]
    for number, (name, rows) in enumerate(tables.items()):
        x, y = [x_of(row) for row in rows], [row[metric] for row in rows]
        smooth = moving_average(y)
        ax.plot(x, y, color=colours(number % 10), linewidth=0.8, alpha=0.35)
        if smooth:
            ax.plot(x[-len(smooth) :], smooth, color=colours(number % 10), linewidth=2.0, label=name)
        else:
            ax.plot(x, y, "o", color=colours(number % 10), label=name)  # too short a run to average
    for style, (name, value) in zip([":", "--", "-."] * len(lines), lines.items(), strict=False):
        ax.axhline(value, color="0.35", linewidth=1.0, linestyle=style, label=name)
    ax.grid(True, alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_xlim(left=0)
    ax.margins(x=0.02)
