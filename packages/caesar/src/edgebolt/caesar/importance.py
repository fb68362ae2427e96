"""How much of its update a device sends: more, the more its data matter."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from edgebolt.caesar.ratios import check_range, ranks, with_ratios
from edgebolt.common.federated import Outcome, Server, Visit

__all__ = ["Divergence", "Reference", "UploadRatios", "importance", "label_divergence", "ranked_ratios"]

Divergence = Literal["exp", "inverse", "linear"]
Reference = Literal["pooled", "uniform"]
_KEY = "caesar/labels"


def label_divergence(histograms: NDArray[np.float64], reference: Reference = "pooled") -> NDArray[np.float64]:
    """``D_i = KL(Φ_i ‖ Φ_0) = Σ_c Φ_i(c) ln(Φ_i(c) / Φ_0(c))``, with ``0 ln 0 = 0``.

    Args:
        histograms: samples of each class, ``[n, classes]``; a device without any has divergence 0.
        reference: ``Φ_0``: ``"pooled"``, the labels of all devices; ``"uniform"``, for a server that must not learn
            them. Which of them is the paper's is unknown.

    Example: a device like the whole, and one that has a single class of two::

        >>> label_divergence(np.array([[5.0, 5.0], [8.0, 0.0], [0.0, 8.0]])).round(3).tolist()
        [0.0, 0.693, 0.693]
    """
    shares = histograms / np.maximum(histograms.sum(1, keepdims=True), 1)
    if reference == "uniform":
        base = np.full(histograms.shape[1], 1 / histograms.shape[1])
    else:
        base = histograms.sum(0) / max(1, histograms.sum())
    terms = np.zeros_like(shares)
    seen = shares > 0
    terms[seen] = shares[seen] * np.log(shares[seen] / np.broadcast_to(base, shares.shape)[seen])
    result: NDArray[np.float64] = terms.sum(1)
    return result


def importance(
    samples: NDArray[np.float64],
    divergence: NDArray[np.float64] | None,
    balance: float = 0.5,
    form: Divergence = "exp",
) -> NDArray[np.float64]:
    """``C_i = λ n_i / max_j n_j + (1 - λ) g(D_i)``.

    Source: Caesar, equation 3: volume term and the value 0.5 from a re-implementation, the divergence from a summary.
    That ``λ`` weighs the two terms is remembered; the form of ``g``, and that it falls, are completions. They decide
    ranks alone, where volume and skew disagree.

    Args:
        samples: ``n_i``, ``[n]``.
        divergence: ``D_i``, ``[n]``; None if ``balance`` is 1.
        balance: ``λ``, 0 to 1.
        form: ``g``: ``"exp"``: ``exp(-D)``; ``"inverse"``: ``1 / (1 + D)``; ``"linear"``: ``1 - D / max_j D_j``.

    Returns:
        float64 ``[n]``.
    """
    volume: NDArray[np.float64] = balance * samples / samples.max()
    if divergence is None:
        return volume
    if form == "exp":
        alike = np.exp(-divergence)
    elif form == "inverse":
        alike = 1 / (1 + divergence)
    else:
        alike = 1 - divergence / max(float(divergence.max()), np.finfo(float).tiny)
    total: NDArray[np.float64] = volume + (1 - balance) * alike
    return total


def ranked_ratios(importance: NDArray[np.float64], least: float = 0.1, most: float = 0.6) -> NDArray[np.float64]:
    """``θ_u,i = θ_u^min + (θ_u^max - θ_u^min) / N · rank(C_i)``, rank 1 being the most important of all ``N`` devices.

    Source: Caesar, equation 10, from a re-implementation. Ties go to the lower index (a completion).

    Example::

        >>> ranked_ratios(np.array([5.0, 4.0, 3.0, 2.0, 1.0])).round(2).tolist()
        [0.2, 0.3, 0.4, 0.5, 0.6]
    """
    ratios: NDArray[np.float64] = least + (most - least) / len(importance) * (ranks(importance).astype(np.float64) + 1)
    return ratios


class UploadRatios:
    """Gives each visit ``settings["up_ratio"]`` by the rank of its device's data, the same in every round.

    A part for ``Algorithm(configure=[...], up=TopK(setting="up_ratio"))``. Label histograms come in the enrolment's
    reports (:class:`~edgebolt.caesar.Introduction`); they are private data, and are sent once.

    Args:
        least, most: ``θ_u^min`` and ``θ_u^max``; 0.1 and 0.6 are the paper's.
        balance: ``λ``; 1: volume alone, no histograms are asked for.
        divergence: ``g``, see :func:`importance`; inferred.
        reference: ``Φ_0``, see :func:`label_divergence`; inferred.

    Raises:
        ValueError: for arguments that are out of range; in the first round, if no device has reported its labels.
    """

    def __init__(
        self,
        least: float = 0.1,
        most: float = 0.6,
        balance: float = 0.5,
        divergence: Divergence = "exp",
        reference: Reference = "pooled",
    ) -> None:
        check_range(least, most)
        if not 0 <= balance <= 1:
            raise ValueError(f"balance={balance!r}: use the weight of the volume, 0 to 1.")
        if divergence not in ("exp", "inverse", "linear"):
            raise ValueError(f"divergence={divergence!r}: use 'exp', 'inverse' or 'linear'.")
        if reference not in ("pooled", "uniform"):
            raise ValueError(f"reference={reference!r}: use 'pooled' or 'uniform'.")
        self.least, self.most, self.balance = least, most, balance
        self.divergence: Divergence = divergence
        self.reference: Reference = reference

    def observe(self, server: Server, outcomes: list[Outcome]) -> None:
        """Keep the histograms that the enrolment brought."""
        reports = {o.visit.client: o.report.get("labels") for o in outcomes if o.delivered}
        told = {client: labels for client, labels in reports.items() if isinstance(labels, dict)}
        # A column for each label that occurs: a device may call its classes what it likes.
        classes = sorted({label for labels in told.values() for label in labels})
        column = {label: number for number, label in enumerate(classes)}
        if column:
            table = torch.zeros((server.population, len(column)), dtype=torch.float64)
            for client, labels in told.items():
                for label, count in labels.items():
                    table[client, column[label]] = count if type(count) is int and count > 0 else 0
            server.memory[_KEY] = table

    def importance(self, server: Server) -> NDArray[np.float64]:
        """``C_i`` of all devices, ``[population]``.

        Raises:
            ValueError: if labels count and none were reported.
        """
        samples = server.reports["samples"].double().numpy()
        if self.balance == 1:
            return importance(samples, None, 1.0)
        if _KEY not in server.memory:
            raise ValueError("No device has reported its labels: add the callback Introduction(), or use balance=1.")
        divergence = label_divergence(server.memory[_KEY].numpy(), self.reference)
        return importance(samples, divergence, self.balance, self.divergence)

    def __call__(self, server: Server, visits: list[Visit]) -> list[Visit]:
        """The visits with their ratios."""
        if self.least == self.most:
            ratios = np.full(server.population, self.most)
        else:
            ratios = ranked_ratios(self.importance(server), self.least, self.most)
        return with_ratios(visits, "up_ratio", ratios[[visit.client for visit in visits]])
