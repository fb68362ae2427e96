"""What one projection must reproduce after pruning, as a least-squares problem that fits in memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["MaskProblem", "Sublayer"]

# Up to this many inputs, batches, each multiplied in float32, are summed in float64 and solved with in it, which takes
# 128 MB a matrix there; above it all is float32.
DOUBLE_UP_TO = 4096


class Sublayer:
    """Sums over the calibration tokens from which a projection's mask, or its weight, is solved for.

    With ``X`` the inputs that the projection gets in the pruned model, ``W`` its weight and ``T`` what it gave in the
    dense model, these are ``XᵀX``, ``XᵀT`` and ``‖T‖²``: no matrix grows with the tokens.

    Args:
        weight: outputs by inputs.

    Attributes:
        gram: ``XᵀX``, inputs by inputs.
        cross: ``XᵀT``, inputs by outputs.
        energy: ``‖T‖²``.
        tokens: how many were added.
    """

    def __init__(self, weight: Tensor) -> None:
        outputs, inputs = weight.shape
        dtype = torch.float64 if inputs <= DOUBLE_UP_TO else torch.float32
        self.weight = weight.to(dtype)
        self.gram = torch.zeros(inputs, inputs, dtype=dtype, device=weight.device)
        self.cross = torch.zeros(inputs, outputs, dtype=dtype, device=weight.device)
        self.energy, self.tokens = 0.0, 0
        self._masks: dict[int, MaskProblem] = {}

    def add(self, inputs: Tensor, target: Tensor) -> None:
        """Count some tokens in.

        Args:
            inputs: float32, tokens by inputs.
            target: float32, tokens by outputs.
        """
        self._masks.clear()
        self.gram += inputs.T @ inputs
        self.cross += inputs.T @ target
        self.energy += float(target.double().square().sum())
        self.tokens += len(inputs)

    def masks(self, unit: int = 1) -> MaskProblem:
        """The problem of scaling the inputs, ``unit`` neighbours at a time by one number."""
        if unit in self._masks:
            return self._masks[unit]
        gram = self.gram * (self.weight.T @ self.weight)
        linear = (self.cross * self.weight.T).sum(1)
        if unit > 1:
            units = len(gram) // unit
            gram = gram.view(units, unit, units, unit).sum((1, 3))
            linear = linear.view(units, unit).sum(1)
        self._masks[unit] = MaskProblem(gram, linear, self.energy)
        return self._masks[unit]

    def error(self, kept: Tensor, weight: Tensor) -> float:
        """``‖T − X_S Wᵀ‖²`` for a weight on the inputs ``kept``."""
        small = weight.T.to(self.gram.dtype)
        quadratic = (small * (self.gram[kept][:, kept] @ small)).sum()
        return float(quadratic - 2 * (small * self.cross[kept]).sum() + self.energy)


@dataclass(frozen=True)
class MaskProblem:
    """``‖T − X diag(m) Wᵀ‖² = mᵀ G m − 2 cᵀ m + e``.

    Args:
        gram: ``G = (XᵀX) ∘ (WᵀW)``, the Gram matrix of what each unit adds to the output.
        linear: ``c``.
        constant: ``e``.

    Example::

        >>> weight, inputs = torch.randn(5, 8), torch.randn(100, 8)
        >>> sublayer = Sublayer(weight)
        >>> sublayer.add(inputs, inputs @ weight.T)
        >>> problem = sublayer.masks()
        >>> bool(problem.error(torch.arange(8), torch.ones(8)) < 1e-3 * sublayer.energy)  # nothing pruned
        True
    """

    gram: Tensor
    linear: Tensor
    constant: float

    def error(self, kept: Tensor, mask: Tensor) -> float:
        """The objective, with ``mask`` on the units ``kept`` and zero on all others."""
        mask = mask.to(self.gram.dtype)
        return float(mask @ self.gram[kept][:, kept] @ mask - 2 * self.linear[kept] @ mask + self.constant)

    def ridge(self, share: float) -> float:
        """``share`` of the mean of the diagonal of ``G``."""
        return share * float(self.gram.diagonal().mean())

    def tuned(self, kept: Tensor, ridge: float) -> Tensor:
        """The mask on ``kept`` that solves ``(G + λI)(m − 1) = c − G 1``, ``λ`` being that share of the diagonal."""
        gram = self.gram[kept][:, kept]
        right = self.linear[kept] - gram.sum(1)
        return 1 + solve(gram, right[:, None], self.ridge(ridge))[:, 0]


def solve(gram: Tensor, right: Tensor, ridge: float) -> Tensor:
    """``(gram + ridge I)⁻¹ right``; the ridge grows tenfold until the matrix is positive definite."""
    return torch.cholesky_solve(right, factor(gram, ridge))


def factor(gram: Tensor, ridge: float) -> Tensor:
    """Lower Cholesky factor of ``gram + ridge I``."""
    unit = float(gram.diagonal().mean())
    for _ in range(12):
        lower: Tensor
        regular = gram.clone()
        regular.diagonal().add_(ridge)
        lower, failed = torch.linalg.cholesky_ex(regular)
        if not failed:
            return lower
        ridge = max(10 * ridge, 1e-12 * unit, torch.finfo(gram.dtype).tiny)
    raise ArithmeticError(
        f"No ridge up to {ridge:.3g} makes this {len(gram)} x {len(gram)} matrix of calibration activations positive "
        "definite: they hold nan or infinity. Check the calibration texts, and load the model in float32 or bfloat16."
    )
