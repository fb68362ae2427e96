"""Several runs side by side as a table for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean

from edgebolt.common.federated.results import Rounds, common_target, measured, read_rounds, time_to

__all__ = ["compare_table"]


def compare_table(
    runs: Mapping[str, Rounds], metric: str = "val_acc", label: str = "accuracy", mode: str = "max"
) -> dict[str, dict[str, str]]:
    """What each run came to, and what it needed to the best value that all of them reach.

    Args:
        runs: Name of the run -> rows, a ``rounds.csv`` or its folder; the first is what others are compared with.
        metric: Name of the column.
        label: What to call it.
        mode: ``"max"`` or ``"min"`` (a loss).

    Returns:
        Run -> {row -> cell}, for :func:`print_table`; rows may be added.

    Raises:
        ValueError: If there is no run, or one has fewer than three measurements of the metric.

    Example::

        >>> def run(seconds):
        ...     return [{"round": r, "round/sim_time": seconds * (r + 1), "bytes_up_total": 9 * r, "val_acc": 0.1 * r,
        ...              "bytes_down_total": 9 * r, "round/energy": 5.0, "round/waiting_time": 1.0,
        ...              "round/visits": 4, "round/failed": 0} for r in range(5)]
        >>> compare_table({"slow": run(6.0), "fast": run(3.0)})["fast"]["    speed-up"]
        '2.00'
    """
    target = common_target(runs, metric, mode)
    first: tuple[int, float, int] | None = None
    table = {}
    for name, rounds in runs.items():
        rows = read_rounds(rounds)
        reached = time_to(rows, metric, target, mode)
        assert reached is not None  # by the target's definition
        first = reached if first is None else first
        total = {key: sum(row[f"round/{key}"] for row in rows) for key in ("energy", "visits", "failed")}
        last = rows[-1]
        table[name] = {
            f"{label}, mean of the last 3 rounds": f"{fmean(row[metric] for row in measured(rows, metric)[-3:]):.3f}",
            f"rounds to {target:.3f}, the best that all reach": f"{reached[0] + 1}",
            "    after simulated seconds": f"{reached[1]:.1f}",
            "    speed-up": f"{first[1] / reached[1]:.2f}",
            "    after MB, up and down": f"{reached[2] / 1e6:.1f}",
            "simulated seconds in all": f"{last['round/sim_time']:.1f}",
            "MB up / down in all": f"{last['bytes_up_total'] / 1e6:.1f} / {last['bytes_down_total'] / 1e6:.1f}",
            "seconds a visit waits for its round": f"{fmean(row['round/waiting_time'] for row in rows):.2f}",
            "energy of all devices, J": f"{total['energy']:.0f}",
            "visits that died / all": f"{total['failed']:.0f} / {total['visits']:.0f}",
        }
    return table
