"""LEGEND's configuration algorithm (LCD): how deep each device of a cohort trains."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from edgebolt.common.communication import Tensors
from edgebolt.common.federated import Outcome, Server, Visit
from edgebolt.common.lora import adapter_layers
from edgebolt.legend.capacity import CapacityEstimate

__all__ = ["LCD", "Anchor", "choose_depths"]

Anchor = Literal["deadline", "quantile", "fastest"]
_SAME = 1 + 1e-9  # times that differ by rounding are equal


def choose_depths(
    times: NDArray[np.float64],
    most: NDArray[np.int64],
    anchor: Anchor = "deadline",
    quantile: float = 0.25,
    min_depth: int = 1,
    max_waiting: float | None = None,
) -> NDArray[np.int64]:
    """The depth of each device: as deep as a common reference time allows.

    That a greedy algorithm named LCD chooses depths for unequal devices is the paper's; its steps are our completion:
    a reference time, then for each device the largest depth ``k`` with ``t_i(k) <= t_ref``, then, while the mean
    waiting time ``W = mean_i(t^h - t_i)`` is above its bound, one layer less for the straggler.

    Args:
        times: ``t_i(k)`` in seconds, float64 ``[cohort, L]``, growing with the depth; column 0 is depth 1.
        most: the largest depth that fits each device's memory, 1 to L, int64 ``[cohort]``.
        anchor: the reference time. ``"deadline"``: the later of the fastest device at its largest depth and the
            slowest at ``min_depth``: depth is given back wherever it costs no time. ``"quantile"``: that quantile of
            the devices' times at their largest depths. ``"fastest"``: the fastest device's at its largest depth.
        quantile: for ``anchor="quantile"``, 0 to 1.
        min_depth: no device trains fewer layers.
        max_waiting: ``ε_w``, seconds; None: no bound.

    Returns:
        int64 ``[cohort]``.

    Example: a device that is three times as slow trains as few layers as it may, the others all::

        >>> import numpy as np
        >>> seconds = np.array([[3, 4, 5, 6], [9, 12, 15, 18], [3, 4, 5, 6]], dtype=float)
        >>> choose_depths(seconds, most=np.array([4, 4, 4])).tolist()
        [4, 1, 4]
    """
    cohort, row = np.arange(len(times)), np.minimum(most, times.shape[1]) - 1
    least = np.minimum(min_depth - 1, row)
    full = times[cohort, row]
    if anchor == "deadline":
        reference = max(full.min(), times[cohort, least].max())
    elif anchor == "quantile":
        reference = float(np.quantile(full, quantile))
    else:
        reference = full.min()
    fits = times <= reference * _SAME
    depth: NDArray[np.int64] = np.clip(fits.sum(axis=1) - 1, least, row)
    while max_waiting is not None:
        taken = times[cohort, depth]
        stragglers = np.flatnonzero((taken * _SAME >= taken.max()) & (depth > least))
        if (taken.max() - taken).mean() <= max_waiting or not len(stragglers):
            break
        depth[stragglers[0]] -= 1
    chosen: NDArray[np.int64] = depth + 1
    return chosen


class LCD:
    """Gives each visit a LoRA depth, ``settings["depth"]``, from what its device was measured at.

    A part for ``Algorithm(configure=[...])``. It looks at the round's cohort alone, for a barrier holds within it. As
    long as nobody was measured everybody trains all layers. A device on which not even one layer fits (its report's
    ``max_depth`` is 0) is left out of the round.

    Args:
        anchor, quantile, min_depth, max_waiting: see :func:`choose_depths`.
        depth: a depth for all devices instead: the ablation without adaptation.
        smoothing: of the :class:`~edgebolt.legend.CapacityEstimate`.
        freeze_below: ``"omit"``: a device is not sent the LoRA below its depth; ``"load"``: it is, frozen.

    Raises:
        ValueError: for arguments that are out of range.

    Example::

        >>> LCD(anchor="quantile", quantile=0.25).anchor
        'quantile'
    """

    def __init__(
        self,
        anchor: Anchor = "deadline",
        quantile: float = 0.25,
        min_depth: int = 1,
        max_waiting: float | None = None,
        depth: int | None = None,
        smoothing: float = 0.8,
        freeze_below: Literal["omit", "load"] = "omit",
    ) -> None:
        if anchor not in ("deadline", "quantile", "fastest"):
            raise ValueError(f"anchor={anchor!r}: use 'deadline', 'quantile' or 'fastest'.")
        if not 0 <= quantile <= 1:
            raise ValueError(f"quantile={quantile!r}: use 0 to 1.")
        for name, value in {"min_depth": min_depth, "depth": depth}.items():
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"{name}={value!r}: use a whole number of layers, 1 or more.")
        if max_waiting is not None and not max_waiting >= 0:
            raise ValueError(f"max_waiting={max_waiting!r}: use seconds, 0 or more, or None.")
        if freeze_below not in ("omit", "load"):
            raise ValueError(f"freeze_below={freeze_below!r}: use 'omit' or 'load'.")
        self.anchor, self.quantile, self.min_depth, self.max_waiting = anchor, quantile, min_depth, max_waiting
        self.depth, self.freeze_below = depth, freeze_below
        self.capacity = CapacityEstimate(smoothing)

    def observe(self, server: Server, outcomes: list[Outcome]) -> None:
        """Update the estimates."""
        self.capacity.observe(server, outcomes)

    def __call__(self, server: Server, visits: list[Visit]) -> list[Visit]:
        """The visits with their depths.

        Raises:
            ValueError: if ``min_depth`` or ``depth`` is more than the layers with LoRA.
        """
        bytes_up, rest = layer_bytes(server.models["global"])
        layers = len(bytes_up)
        for name, value in {"min_depth": self.min_depth, "depth": self.depth}.items():
            if value is not None and value > layers:
                raise ValueError(f"{name}={value} and {layers} layers carry LoRA: use 1 to {layers}.")
        most = server.reports.get("max_depth")
        limit = np.full(server.population, layers) if most is None else most.nan_to_num(nan=layers).long().numpy()
        visits = [visit for visit in visits if limit[visit.client] >= 1]
        if not visits:
            return []
        clients = np.array([visit.client for visit in visits])
        limits = np.minimum(limit[clients], layers)
        if self.depth is not None:
            depths = np.minimum(self.depth, limits)
        else:
            up = rest + np.cumsum(bytes_up[::-1])
            down = up if self.freeze_below == "omit" else np.full(layers, up[-1])
            steps = np.array([visit.steps for visit in visits])
            times = self.capacity.times(server, clients, steps, down, up)
            depths = limits
            if not np.isnan(times).any():
                depths = choose_depths(times, limits, self.anchor, self.quantile, self.min_depth, self.max_waiting)
        return [
            replace(visit, settings={**visit.settings, "depth": int(depth)})
            for visit, depth in zip(visits, depths, strict=True)
        ]


def layer_bytes(model: Tensors) -> tuple[NDArray[np.float64], float]:
    """Bytes of each layer's LoRA, input first, ``[L]``, and of all that is not LoRA (the head).

    Raises:
        ValueError: if nothing in the model is LoRA.
    """
    layers = adapter_layers(model)
    if not layers:
        raise ValueError(
            "No tensor of the model is LoRA: add it in the module's __init__, edgebolt.common.lora.add_lora(model)."
        )
    held = np.zeros(max(layers.values()) + 1)
    for name, layer in layers.items():
        held[layer] += model[name].nbytes
    return held, float(sum(tensor.nbytes for name, tensor in model.items() if name not in layers))
