"""What the projection behind the removed units is made to give without them."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from edgebolt.comp.blocks import Block
from edgebolt.comp.least_squares import Sublayer, solve, stripes, submatrix

__all__ = ["Recovered", "Recovery", "recovered_weight"]

Recovery = Literal["none", "mask", "lstsq"]
LARGEST_SCALE = 10.0
LARGEST_RIDGE = 1e6


class Recovered(NamedTuple):
    """A projection without the removed units.

    Attributes:
        weight: outputs by kept inputs.
        variance: of the mask; 0 without one.
        before: the objective with the old columns.
        after: the objective with ``weight``.
    """

    weight: Tensor
    variance: float
    before: float
    after: float


def recovered_weight(
    sublayer: Sublayer,
    block: Block,
    kept: Tensor,
    recover: Recovery = "mask",
    ridge: float = 1e-2,
    variance_bound: float = float("inf"),
) -> Recovered:
    """The weight of the projection on the kept units.

    What would raise the objective on the calibration tokens, is not finite, or scales a unit more than tenfold, is not
    used: the old columns are.

    Args:
        sublayer: its sums.
        block: which of its inputs belong together.
        kept: int64, ascending, on the sublayer's device.
        recover: ``"none"``: its old columns. ``"mask"``: each unit scaled by the least-squares mask, which is the
            paper's mask tuning (digests; the solver's ridge is ours, and the technique is that of Kwon et al. 2022).
            ``"lstsq"``: all of the weight solved for, with a ridge towards the old one; ours.
        ridge: share of the mean diagonal of the normal equations.
        variance_bound: of the mask: the ridge grows tenfold, which draws it to one, until it varies no more than that.
    """
    columns = block.columns(kept.cpu()).to(kept.device)
    plain = sublayer.weight[:, columns]
    problem = sublayer.masks(block.unit)
    before = problem.error(kept, torch.ones(len(kept), device=kept.device))
    if recover == "none":
        return Recovered(plain, 0.0, before, before)
    variance = 0.0
    if recover == "mask":
        mask = problem.tuned(kept, ridge)
        while float(mask.var(correction=0)) > variance_bound and ridge < LARGEST_RIDGE:
            ridge *= 10
            mask = problem.tuned(kept, ridge)
        usable = bool(mask.isfinite().all()) and float(mask.abs().max()) <= LARGEST_SCALE
        variance = float(mask.var(correction=0))
        usable = usable and variance <= variance_bound
        weight, after = plain * mask.repeat_interleave(block.unit), problem.error(kept, mask)
    else:
        sublayer.forget_masks()
        del problem  # its memory goes to the factor
        pull = ridge * float(sublayer.gram.diagonal()[columns].mean())
        right = sublayer.cross[columns]
        for rows in stripes(len(columns)):
            right[rows] -= sublayer.gram[columns[rows]][:, columns] @ plain.T
        weight = plain + solve(lambda: submatrix(sublayer.gram, columns), right, pull).T
        usable, after = bool(weight.isfinite().all()), sublayer.error(columns, weight)
    if not usable or after > before:
        return Recovered(plain, 0.0, before, before)
    return Recovered(weight, variance, before, after)


def fold(consumer: torch.nn.Module, weight: Tensor) -> None:
    """Write the weight into the narrowed projection."""
    parameter = consumer.get_parameter("weight")
    with torch.no_grad():
        parameter.copy_(weight if isinstance(consumer, torch.nn.Linear) else weight.T)
