"""The picture of federated runs: a metric over simulated time and over traffic."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from edgebolt.common.federated.results import Rounds, measured, moving_average

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["compare"]

# From how many simulated seconds on a unit is used, its seconds, its name.
_UNITS = ((7200.0, 3600.0, "h"), (120.0, 60.0, "min"), (0.0, 1.0, "s"))


def compare(
    runs: Mapping[str, Rounds],
    path: str | os.PathLike[str],
    metric: str = "val_acc",
    title: str | None = None,
    label: str | None = None,
    lines: Mapping[str, float] | None = None,
) -> Figure:
    """Draw a metric of several runs over simulated time and over traffic, side by side.

    Thick: mean of the last three measurements; thin: the measurements. Traffic is up and down, 1 MB = 10^6 bytes.

    Args:
        runs: Name of the run -> rows, ``rounds.csv`` or its folder.
        path: Where to save; the ending says the format. Its folder is made if missing.
        metric: Name of the column.
        title: Title of the figure.
        label: What the metric is called in the figure; by default its name.
        lines: Name -> value of horizontal lines, such as a target or a trivial predictor.

    Returns:
        The figure; its axes are time and traffic.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
        ValueError: If there is no run, or one has no such metric.

    Example::

        >>> import tempfile
        >>> names = ("round/sim_time", "bytes_up_total", "bytes_down_total", "val_acc")
        >>> rows = [dict.fromkeys(names, float(round)) for round in range(9)]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     figure = compare({"FedAvg": rows}, f"{folder}/runs.png", lines={"guessing": 0.1})
        >>> [axes.get_xlabel() for axes in figure.axes]
        ['simulated time (s)', 'traffic, up and down (MB)']
    """
    try:
        from matplotlib import figure as matplotlib_figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Plotting needs matplotlib: pip install 'edgebolt-common[plot]'", name=error.name
        ) from error
    if not runs:
        raise ValueError("There is no run to draw: pass {name: folder of the run}.")
    tables = {name: measured(rounds, metric) for name, rounds in runs.items()}
    longest = max(rows[-1]["round/sim_time"] for rows in tables.values())
    seconds, unit = next((seconds, unit) for least, seconds, unit in _UNITS if longest >= least)
    figure = matplotlib_figure.Figure(figsize=(10.0, 4.8), layout="constrained", dpi=150)
    time, traffic = figure.subplots(1, 2, sharey=True)
    _panel(time, tables, metric, lambda row: row["round/sim_time"] / seconds, lines or {})
    _panel(traffic, tables, metric, lambda row: (row["bytes_up_total"] + row["bytes_down_total"]) / 1e6, lines or {})
    name = label or metric.replace("_", " ")
    time.set(title=f"{name} over simulated time", xlabel=f"simulated time ({unit})", ylabel=name)
    traffic.set(title=f"{name} over traffic", xlabel="traffic, up and down (MB)")
    if len(tables) + len(lines or {}) > 1:
        figure.legend(*time.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    if title:
        figure.suptitle(title)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return figure


def _panel(
    ax: Axes,
    tables: Mapping[str, list[dict[str, float]]],
    metric: str,
    x_of: Callable[[dict[str, float]], float],
    lines: Mapping[str, float],
) -> None:
    from matplotlib import colormaps

    colours, styles = colormaps["tab10"], ("-", "--", "-.")  # dashes show a curve that lies below another
    for number, (name, rows) in enumerate(tables.items()):
        x, y = [x_of(row) for row in rows], [row[metric] for row in rows]
        smooth = moving_average(y)
        ax.plot(x, y, color=colours(number % 10), linewidth=0.8, alpha=0.35)
        if smooth:
            style = styles[number % 3]
            ax.plot(x[-len(smooth) :], smooth, style, color=colours(number % 10), linewidth=2.0, label=name)
        else:
            ax.plot(x, y, "o", color=colours(number % 10), label=name)  # too short a run to average
    for number, (name, value) in enumerate(lines.items()):
        ax.axhline(value, color="0.4", linewidth=1.0, linestyle=((0, (1, 2)), (0, (5, 3)))[number % 2], label=name)
    ax.grid(True, alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_xlim(left=0)
    ax.margins(x=0.02)
