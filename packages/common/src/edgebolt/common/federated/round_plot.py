"""A picture of a round: who downloaded, trained, uploaded and waited, on simulated time."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import TYPE_CHECKING

from edgebolt.common.federated.visit import Outcome

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_round"]

_PARTS = (("download", "#4477aa"), ("compute", "#ccbb44"), ("upload", "#228833"), ("waiting", "#dddddd"))


def plot_round(
    outcomes: Sequence[Outcome], ax: Axes | None = None, path: str | PathLike[str] | None = None
) -> tuple[Figure, Axes]:
    """Draw one bar per visit over simulated seconds: download, compute, upload, waiting for the stage to close.

    A visit that delivered nothing ends in a cross.

    Args:
        outcomes: of one round: ``strategy.outcomes``, or what ``Algorithm.finish`` is given.
        ax: where to draw; ``None``: a new figure.
        path: where to save the picture, if anywhere.

    Returns:
        The figure and its axes.

    Raises:
        ModuleNotFoundError: without matplotlib.
        ValueError: if there is no outcome.
    """
    if not outcomes:
        raise ValueError("outcomes is empty: there is no round to draw.")
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("plot_round needs matplotlib: pip install 'edgebolt-common[plot]'") from error
    rows = sorted(outcomes, key=lambda outcome: (outcome.visit.lane, outcome.finished), reverse=True)
    if ax is None:
        ax = Figure(figsize=(8, 1.5 + 0.28 * len(rows)), layout="constrained").subplots()
    for row, outcome in enumerate(rows):
        seconds = (outcome.down_seconds, outcome.compute_seconds, outcome.up_seconds, outcome.waited)
        start = outcome.finished - sum(seconds[:3])  # later than `started` for who ended an earlier visit first
        for (name, color), length in zip(_PARTS, seconds, strict=True):
            ax.barh(row, length, left=start, color=color, label=name if row == 0 else None)
            start += length
        if not outcome.delivered:
            ax.plot(outcome.finished, row, "x", color="#aa3377")
    ax.set_yticks(range(len(rows)), [f"client {outcome.visit.client}" for outcome in rows])
    ax.set_xlabel("simulated time, s")
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, 1.0), ncols=4, frameon=False)
    ax.set_ylim(-0.6, len(rows) + 0.6)
    figure = ax.figure
    assert isinstance(figure, Figure)
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure, ax
