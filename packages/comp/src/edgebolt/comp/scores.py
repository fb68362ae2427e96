"""How important a unit is, given all others that are left: the registry of scores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from edgebolt.comp.least_squares import MaskProblem

__all__ = ["SCORES", "Remaining", "collinearity", "condition", "relative"]


@dataclass(frozen=True)
class Remaining:
    """What a score may look at: the least-squares problem on the units that are left.

    Args:
        problem: the whole problem.
        kept: units that are left, ascending.
        inverse: ``P = (G_SS + ridge)⁻¹``.
        mask: ``P c_S``, the mask that solves the problem on them.
    """

    problem: MaskProblem
    kept: Tensor
    inverse: Tensor
    mask: Tensor


def condition(left: Remaining) -> Tensor:
    """``m_j² / P_jj``: by how much the objective rises when unit ``j`` goes and the others are tuned again.

    It is ``(m_j ‖a_j‖ / κ_j)²``, with ``a_j`` what the unit adds to the output and ``κ_j`` its condition number
    (:func:`collinearity`). The digests of the paper say that its score is built on matrix condition and comes out of
    the pruning objective; its formula was not available. This one is ours.
    """
    return left.mask.square() / left.inverse.diagonal()


def collinearity(left: Remaining) -> Tensor:
    """``1 / P_jj = G_jj / κ_j²``, with ``κ_j = √(G_jj P_jj)``, Stewart's condition number of a column. Ours.

    Low for a unit that the others nearly make up.
    """
    return left.inverse.diagonal().reciprocal()


def relative(left: Remaining) -> Tensor:
    """``√G_jj / ‖T‖``, the relative condition of the output with respect to unit ``j``. Ours.

    The closest to a digest's words, "sensitivity of the output to that neuron". Ranks as norms of activations times
    norms of weights do.
    """
    norms: Tensor = left.problem.gram.diagonal()[left.kept].clamp_min(0).sqrt()
    return norms / float(max(left.problem.constant, 1e-30) ** 0.5)


SCORES: dict[str, Callable[[Remaining], Tensor]] = {
    "condition": condition,
    "collinearity": collinearity,
    "relative": relative,
}
"""Name -> score: units with the lowest go first. Add your own under a new name."""
