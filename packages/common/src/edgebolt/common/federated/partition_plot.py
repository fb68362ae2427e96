"""The picture of a partition: how many samples of each label each client has."""

from os import PathLike
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_label_counts"]

_MOST_BARS = 40
_MOST_COLOURS = 20
_MOST_COLUMNS = 400


def plot_label_counts(
    counts: NDArray[np.int64], ax: "Axes | None" = None, path: str | PathLike[str] | None = None
) -> "tuple[Figure, Axes]":
    """Draw the label-by-client matrix.

    Up to 40 clients and 20 labels become one stacked bar a client, more become a heat map. Of more than 400
    clients the heat map shows every n-th, for columns narrower than a pixel would blend into one average.

    Args:
        counts: Samples of each client and label, shape ``[clients, labels]``; see ``ClientIndex.label_counts``.
        ax: Axes to draw on; ``None`` makes a new figure (without a window, without touching ``pyplot``).
        path: Where to save the figure; the ending says the format.

    Returns:
        The figure and its axes.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.

    Example::

        >>> figure, ax = plot_label_counts(np.array([[3, 1], [0, 4]]))
        >>> ax.get_xlabel(), ax.get_ylabel()
        ('client', 'samples')
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Plotting needs matplotlib: pip install 'edgebolt-common[plot]'", name=error.name
        ) from error
    clients, labels = counts.shape
    if ax is None:
        ax = Figure(figsize=(min(12.0, 4.5 + 0.2 * clients), 4.0), layout="constrained").add_subplot()
    figure = ax.get_figure(root=True)
    if figure is None:
        raise ValueError("ax belongs to no figure: make it by `figure.add_subplot()`.")
    if clients <= _MOST_BARS and labels <= _MOST_COLOURS:
        _draw_bars(counts, ax)
    else:
        _draw_heat_map(counts, ax, figure)
    if path is not None:
        figure.savefig(path)
    return figure, ax


def _draw_bars(counts: NDArray[np.int64], ax: "Axes") -> None:
    from matplotlib import colormaps
    from matplotlib.ticker import MaxNLocator

    clients, labels = counts.shape
    colours = colormaps["tab10" if labels <= 10 else "tab20"]
    bottom = np.cumsum(counts, axis=1) - counts
    for label in range(labels):
        ax.bar(np.arange(clients), counts[:, label], 0.8, bottom[:, label], color=colours(label), label=str(label))
    ax.set_xlabel("client")
    ax.set_ylabel("samples")
    ax.set_xlim(-0.6, clients - 0.4)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    if labels:
        ax.legend(
            title="label", loc="upper left", bbox_to_anchor=(1.0, 1.0), ncols=1 + (labels > 10), reverse=labels <= 10
        )


def _draw_heat_map(counts: NDArray[np.int64], ax: "Axes", figure: "Figure") -> None:
    from matplotlib.ticker import MaxNLocator

    step = -(-len(counts) // _MOST_COLUMNS)
    shown = counts[::step].T
    extent = (-step / 2, (shown.shape[1] - 0.5) * step, -0.5, shown.shape[0] - 0.5)
    image = ax.imshow(shown, aspect="auto", origin="lower", cmap="viridis", extent=extent, interpolation="nearest")
    figure.colorbar(image, ax=ax, label="samples")
    ax.set_xlabel("client" if step == 1 else f"client (one in {step} shown)")
    ax.set_ylabel("label")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.yaxis.set_major_locator(MaxNLocator(integer=True))
