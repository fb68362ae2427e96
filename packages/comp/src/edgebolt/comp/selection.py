"""Which units go: in rounds, the least important first, as long as the mask stays calm."""

from __future__ import annotations

import torch
from torch import Tensor

from edgebolt.comp.least_squares import MaskProblem, inverted, stripes
from edgebolt.comp.scores import SCORES, Remaining

__all__ = ["select"]

SCORING_RIDGE = 1e-6


def select(
    problem: MaskProblem,
    remove: int,
    score: str = "condition",
    step: float = 0.05,
    variance_bound: float = 0.1,
    ridge: float = 1e-2,
) -> Tensor:
    """Remove units in rounds, with the least-squares mask of those left updated after each.

    From digests of the paper: units go in rounds, the number of a round is adjusted, and the variance of the mask is
    kept inside a bound so that the calibration texts are not over-fitted. The numbers, and what happens at the bound,
    are ours: the round is undone and halved, and a layer in which a single unit is too many is left at that.

    Args:
        problem: the layer's.
        remove: how many units to remove, fewer than there are.
        score: a name in :data:`~edgebolt.comp.SCORES`.
        step: share of the units that a round removes, at least one.
        variance_bound: of the mask, over the units that are left.
        ridge: share of the mean diagonal with which the mask is solved for where it is checked against the bound.

    Returns:
        int64, ascending: the units that are left. More than asked for where the bound was met.
    """
    gram, linear = problem.gram, problem.linear
    units = len(gram)
    kept = torch.arange(units, device=gram.device)
    inverse = inverted(gram, problem.ridge(SCORING_RIDGE))
    mask = inverse @ linear
    size = max(1, round(step * units))
    while remove > 0:
        size = min(size, remove)
        importance = SCORES[score](Remaining(problem, kept, inverse, mask))
        order = torch.sort(importance, stable=True).indices  # ties: the lower index goes
        gone, left = order[:size].sort().values, order[size:].sort().values
        # Without the units R: m_K - P_KR P_RR⁻¹ m_R and P_KK - P_KR P_RR⁻¹ P_RK solve the problem on the rest.
        rows = inverse[gone]
        across = rows[:, left]
        coupling = torch.linalg.solve(rows[:, gone], across)
        smaller_mask = mask[left] - coupling.T @ mask[gone]
        if calm(problem, kept[left], smaller_mask, variance_bound, ridge):
            kept, inverse, mask = kept[left], shrunk(inverse, left, across, coupling), smaller_mask
            remove -= len(gone)
        elif size > 1:
            size //= 2
        else:
            break
    return kept


def shrunk(inverse: Tensor, left: Tensor, across: Tensor, coupling: Tensor) -> Tensor:
    """``P_KK − P_KR P_RR⁻¹ P_RK``, symmetric, in the upper left corner of the memory of ``P``.

    Going down, a stripe is written from the diagonal on and mirrored below it. What is still to be read lies further
    down and further right, as no unit moves to a later place.
    """
    for rows in stripes(len(left)):
        rest, width = slice(rows.start, len(left)), rows.stop - rows.start
        part = inverse[left[rows]][:, left[rest]].addmm_(across[:, rows].T, coupling[:, rest], alpha=-1)
        part[:, :width] = (part[:, :width] + part[:, :width].T) / 2
        inverse[rows, rest] = part
        inverse[rest, rows] = part.T
    return inverse[: len(left), : len(left)]


def calm(problem: MaskProblem, kept: Tensor, mask: Tensor, bound: float, ridge: float) -> bool:
    """Whether the mask that would be used varies within the bound; solved for only where the free one does not."""
    if not bool(mask.isfinite().all()):
        return False
    return float(mask.var(correction=0)) <= bound or float(problem.tuned(kept, ridge).var(correction=0)) <= bound
