"""Batch sizes that let all participants of a round end together."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from edgebolt.caesar.ratios import dense_bytes
from edgebolt.common.federated import Server, Visit

__all__ = ["LevelledBatches", "level_batches"]


def level_batches(
    sending: NDArray[np.float64],
    sample_seconds: NDArray[np.float64],
    steps: NDArray[np.int64],
    most: NDArray[np.int64],
    least: int = 4,
) -> NDArray[np.int64]:
    """The largest batches with which nobody ends after the fastest device at its largest batch.

    ``M_i(b) = comm_i + τ_i b μ_i``; ``T* = min_i M_i(b_max)``; ``b_i = clip(floor((T* - comm_i) / (τ_i μ_i)), b_min,
    b_max)``. That the fastest device has the largest batch and the others less, so that times are equal, is Caesar's
    (arXiv 2412.19989), from a summary; the formula is our completion.

    Args:
        sending: ``comm_i``, seconds down and up, ``[cohort]``.
        sample_seconds: ``μ_i``, seconds that a step takes a sample, ``[cohort]``.
        steps: ``τ_i``, ``[cohort]``.
        most: ``b_max`` of each device, ``[cohort]``.
        least: ``b_min``.

    Returns:
        int64 ``[cohort]``. A device that was never measured (NaN) has its largest batch and sets no pace.

    Example: equal links, a device of half the speed::

        >>> level_batches(np.ones(2), np.array([0.1, 0.2]), np.array([10, 10]), np.array([32, 32])).tolist()
        [32, 16]
    """
    full = sending + steps * most * sample_seconds
    known = ~np.isnan(full)
    if not known.any():
        return most
    fits = (full[known].min() - sending[known]) / np.maximum(steps[known] * sample_seconds[known], 1e-300)
    batches = most.copy()
    # A quotient that is a whole number but for rounding counts as that number: the fastest keeps its largest batch.
    batches[known] = np.clip(np.floor(fits * (1 + 1e-9)), np.minimum(least, most[known]), most[known]).astype(np.int64)
    return batches


class LevelledBatches:
    """Gives each visit a batch size, so that the participants of a round end about together.

    A part for ``Algorithm(configure=[...])``, after those that choose ratios. Steps stay what the user asked for: with
    ``local_steps`` a slow device does as many steps on less data. Speeds and links are the last measured; messages are
    expected to be as long as ratios say, positions and signs included.

    Args:
        most: ``b_max``; None: the batch size of each device's own loader.
        least: ``b_min``; 4 is inferred.

    Raises:
        ValueError: for arguments that are out of range.
    """

    def __init__(self, most: int | None = None, least: int = 4) -> None:
        for name, value in {"most": most, "least": least}.items():
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"{name}={value!r}: use a whole number of samples, 1 or more.")
        if most is not None and least > most:
            raise ValueError(f"least={least} is more than most={most}.")
        self.most, self.least = most, least

    def _largest(self, server: Server, client: int) -> int:
        """The batch size of the device's own loader, as it has reported; 0: unknown."""
        told = server.reports.get("batch_size")
        return 0 if told is None else int(told[client].nan_to_num(nan=0))

    def __call__(self, server: Server, visits: list[Visit]) -> list[Visit]:
        """The visits with their batch sizes."""
        largest = np.array([self.most or self._largest(server, visit.client) for visit in visits])
        if not largest.all():  # somebody has never said what its loader's batch size is
            return visits
        clients = [visit.client for visit in visits]
        samples = server.reports["samples"][clients].numpy()
        batches = level_batches(
            sending_seconds(server, visits),
            server.reports["sample_seconds"][clients].numpy(),
            np.array([visit.steps for visit in visits]),
            np.minimum(largest, samples),
            self.least,
        )
        # A batch of all its samples is a batch of any larger size; the largest is the same in every round.
        smaller = [_no_single(int(b), int(n), self.least) for b, n in zip(batches, samples, strict=True)]
        whole = batches >= np.minimum(largest, samples)
        sizes = np.where(whole, largest, smaller)
        return [replace(visit, batch_size=int(size)) for visit, size in zip(visits, sizes, strict=True)]


def sending_seconds(server: Server, visits: list[Visit]) -> NDArray[np.float64]:
    """Seconds for the model and back over the links last measured, at the ratios of the visits; NaN: unknown.

    A float32 model degraded by ``θ`` takes ``1 - θ`` of its bytes, a bitmap 1/32 and, downwards, signs θ/32.
    """
    dense = dense_bytes(server.models["global"])
    clients = [visit.client for visit in visits]
    down = np.array([visit.settings.get("down_ratio", 0.0) for visit in visits])
    up = np.array([visit.settings.get("up_ratio", 0.0) for visit in visits])
    down_bytes = dense * np.minimum(1.0, (1 - down) + (1 + down) / 32)
    up_bytes = dense * np.minimum(1.0, (1 - up) + 1 / 32)
    down_bps, up_bps = (server.reports[name][clients].numpy() for name in ("down_bps", "up_bps"))
    seconds: NDArray[np.float64] = 8 * (down_bytes / down_bps + up_bytes / up_bps)
    return seconds


def _no_single(batch: int, samples: int, least: int) -> int:
    """A batch size, at most the given one, that leaves no last batch of a single sample, which BatchNorm refuses."""
    return next((size for size in range(batch, max(least, 2) - 1, -1) if samples % size != 1), batch)
