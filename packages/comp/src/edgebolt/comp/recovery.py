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
        before: the objective with the old columns, as a share of it with none.
        after: the objective with ``weight``, as that share.
        shift: what is added to the projection's bias: the mean of what is missing; None without one.
    """

    weight: Tensor
    variance: float
    before: float
    after: float
    shift: Tensor | None = None


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
            ``"lstsq"``: all of the weight solved for, with a ridge towards the old one; ours. Of both, what is missing
            on average goes to the bias of a projection that has one.
        ridge: share of the mean diagonal of the normal equations.
        variance_bound: of the mask: the ridge grows tenfold, which draws it to one, until it varies no more than that.
    """
    columns = block.columns(kept.cpu()).to(kept.device)
    plain = sublayer.weight[:, columns]
    weight, variance, usable = plain, 0.0, True
    if recover == "lstsq":
        energy, before = sublayer.error(columns[:0], plain[:, :0]), sublayer.error(columns, plain)
        pull = ridge * float(sublayer.gram.diagonal()[columns].mean())
        rest = sublayer.weight.clone()
        rest[:, columns] = 0
        right = torch.cat([sublayer.gram[columns[rows]] @ rest.T for rows in stripes(len(columns))])
        weight = plain + solve(lambda: submatrix(sublayer.gram, columns), right, pull).T
        usable, after = bool(weight.isfinite().all()), sublayer.error(columns, weight)
    else:
        problem = sublayer.masks(block.unit)
        energy = problem.constant
        after = before = problem.error(kept, torch.ones(len(kept), device=kept.device))
        if recover == "mask":
            mask = problem.tuned(kept, ridge)
            while float(mask.var(correction=0)) > variance_bound and ridge < LARGEST_RIDGE:
                ridge *= 10
                mask = problem.tuned(kept, ridge)
            variance = float(mask.var(correction=0))
            usable = bool(mask.isfinite().all()) and float(mask.abs().max()) <= LARGEST_SCALE
            usable = usable and variance <= variance_bound
            weight, after = plain * mask.repeat_interleave(block.unit), problem.error(kept, mask)
    if not usable or after > before:
        weight, variance, after = plain, 0.0, before
    energy = max(energy, 1e-30)
    shift = None
    if sublayer.mean is not None and recover != "none":
        shift = sublayer.weight @ sublayer.mean - weight @ sublayer.mean[columns]
    return Recovered(weight, variance, before / energy, after / energy, shift)


def fold(consumer: torch.nn.Module, found: Recovered) -> None:
    """Write the weight, and what goes to the bias, into the narrowed projection."""
    parameter = consumer.get_parameter("weight")
    with torch.no_grad():
        parameter.copy_(found.weight if isinstance(consumer, torch.nn.Linear) else found.weight.T)
        if found.shift is not None:
            consumer.get_parameter("bias").add_(found.shift)
