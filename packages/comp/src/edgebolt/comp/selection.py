"""Which units go: in rounds, the least important first, as long as the mask stays calm."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from edgebolt.comp.least_squares import MaskProblem, inverted, stripes
from edgebolt.comp.scores import SCORES, Remaining

__all__ = ["RemovalOrder", "removal_order"]

SCORING_RIDGE = 1e-6


@dataclass
class RemovalOrder:
    """In which order the units of a block go, and what that costs.

    Attributes:
        units: all of them, the first to go first.
        gone: how many are gone after each round, ascending.
        rises: by how much the least-squares objective has risen by then, as a share of it with no unit left.
        probed: how many were gone when the effect was measured.
        effect: how far the network's output is then from the dense one's, all else of the model being whole and the
            units that are left tuned (:mod:`~edgebolt.comp.readout`); 0 where it was not measured.
    """

    units: list[int]
    gone: list[int]
    rises: list[float]
    probed: int = 0
    effect: float = 0.0

    def kept(self, remove: int) -> Tensor:
        """int64, ascending: what is left without the first ``remove``."""
        return torch.tensor(self.units[remove:]).sort().values

    def costs(self) -> list[float]:
        """The effect after each round: within a layer it grows as the objective does.

        In SmolLM2, from an eighth to a half of a layer's neurons the objective grew 4.7- to 7.7-fold and the effect
        4.3- to 9.1-fold; in 27 of 30 layers the one is within a quarter of the other.
        """
        rise = self.rises[self.gone.index(self.probed)] if self.probed else 0.0
        return [self.effect * value / rise if rise > 0 else 0.0 for value in self.rises]

    def to_plain(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def removal_order(
    problem: MaskProblem,
    most: int,
    score: str = "condition",
    step: float = 0.05,
    variance_bound: float = 0.1,
    ridge: float = 1e-2,
) -> RemovalOrder:
    """Remove units in rounds, with the least-squares mask of those left updated after each.

    From digests of the paper: units go in rounds, the number of a round is adjusted, and the variance of the mask is
    kept inside a bound so that the calibration texts are not over-fitted. The numbers, and what happens at the bound,
    are ours: the round is undone and halved, so that fewer go between two scores; where even one unit is too many,
    rounds are whole again, and the mask that is used in the end is damped until it is within the bound.

    Args:
        problem: the layer's.
        most: how many units to remove, fewer than there are.
        score: a name in :data:`~edgebolt.comp.SCORES`.
        step: share of the units that a round removes, at least one.
        variance_bound: of the mask, over the units that are left.
        ridge: share of the mean diagonal with which the mask is solved for where it is checked against the bound.

    Returns:
        The order; what is left after ``most`` follows by its last score.
    """
    gram, linear = problem.gram, problem.linear
    kept = torch.arange(len(gram), device=gram.device)
    inverse = inverted(gram, problem.ridge(SCORING_RIDGE))
    mask = inverse @ linear
    whole = size = max(1, round(step * len(gram)))
    guarded = True
    found = RemovalOrder([], [], [])
    rise, energy = 0.0, max(problem.constant, 1e-30)
    while True:
        importance = SCORES[score](Remaining(problem, kept, inverse, mask))
        order = torch.sort(importance, stable=True).indices  # ties: the lower index goes
        size = min(size, most - len(found.units))
        if size == 0:
            found.units += kept[order].tolist()
            return found
        gone, left = order[:size].sort().values, order[size:].sort().values
        # Without the units R: m_K - P_KR P_RR⁻¹ m_R and P_KK - P_KR P_RR⁻¹ P_RK solve the problem on the rest, and
        # the objective rises by m_Rᵀ P_RR⁻¹ m_R.
        rows = inverse[gone]
        across = rows[:, left]
        solved = torch.linalg.solve(rows[:, gone], torch.cat([across, mask[gone, None]], 1))
        coupling = solved[:, :-1]
        smaller = mask[left] - coupling.T @ mask[gone]
        if guarded and not calm(problem, kept[left], smaller, variance_bound, ridge):
            size, guarded = (size // 2, True) if size > 1 else (whole, False)
            continue
        rise += max(0.0, float(mask[gone] @ solved[:, -1]))
        found.units += kept[order[:size]].tolist()
        found.gone.append(len(found.units))
        found.rises.append(rise / energy)
        kept, inverse, mask = kept[left], shrunk(inverse, left, across, coupling), smaller
        size = min(whole, 2 * size)


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
