"""The picture of a pruned model: what is left of each layer, and how much the layer does."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from edgebolt.comp.report import Report

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw"]


def draw(report: Report, path: str | os.PathLike[str]) -> Figure:
    """Draw the share of each dense layer that is left, its importance, and its effect where that was measured.

    Args:
        report: of a pruning.
        path: where to save; the ending says the format. Its folder is made if missing.

    Raises:
        ModuleNotFoundError: without matplotlib; the message names the extra.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("The figure needs matplotlib: pip install 'edgebolt-comp[plot]'") from error
    count = len(report.importance)
    left = {entry["layer"]: entry for entry in report.layers}
    neurons, groups = report.units
    parts = [("neurons", "feed-forward neurons", neurons, "tab:blue")]
    if report.options["prune_attention"]:
        parts.append(("groups", "key-value heads", groups, "tab:green"))
    figure = Figure(figsize=(max(6.0, 0.25 * count), 4.5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    for number, (key, label, total, color) in enumerate(parts):
        shares = [len(left[index][key]) / total if index in left else 0.0 for index in range(count)]
        width = 0.8 / len(parts)
        places = [index + (number - (len(parts) - 1) / 2) * width for index in range(count)]
        above.bar(places, shares, width, color=color, label=f"{label}, of {total}")
    for number, index in enumerate(report.dropped):
        above.axvspan(index - 0.5, index + 0.5, color="tab:red", alpha=0.2, label=None if number else "layer dropped")
    above.set_ylabel("share left")
    above.set_ylim(0, 1.05)
    above.legend(loc="lower left", fontsize="small")
    above.set_title(report.summary().removeprefix("COMP: ").partition(";")[0], fontsize="medium")
    width = 0.4 if report.effect else 0.8
    places = [index - width / 2 if report.effect else index for index in range(count)]
    below.bar(places, report.importance, width, color="tab:gray", label="importance: its output from its input")
    if report.effect:
        label = "effect: the network's output from the dense one's,\nwithout a quarter of its neurons"
        below.bar([index + width / 2 for index in range(count)], report.effect, width, color="tab:orange", label=label)
        below.legend(fontsize="small")
    below.set_yscale("log")
    below.set_ylabel("1 − cos; divergence")
    below.set_xlabel("layer of the dense model")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return figure
