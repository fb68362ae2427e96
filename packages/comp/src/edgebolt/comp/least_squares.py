"""What one projection must go on giving after pruning, as a least-squares problem that fits in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from edgebolt.common.files import replaced

__all__ = ["MaskProblem", "Sublayer"]

# Up to this many inputs, batches, each multiplied in float32, are summed in float64 and solved with in it, which takes
# 128 MB a matrix there; above it all is float32. That chooses nearly the same neurons with the same ridge, also beside
# outliers (tests/comp/test_memory_bound.py): a Gram matrix times that of the weights, entry by entry, is conditioned
# far better than alone.
DOUBLE_UP_TO = 4096

# Square matrices are worked on so many rows at a time: what is computed on the way stays small beside them.
ROWS = 256


class Sublayer:
    """Sums over the calibration tokens from which a projection's mask, or its weight, is solved for.

    With ``X`` what the projection gets in the dense model and ``W`` its weight, it is to go on giving ``X Wᵀ``. All
    that is needed is ``XᵀX``, which does not grow with the tokens.

    Inputs of the dense model, not of one whose earlier layers are pruned already: those are the right ones plus an
    error, and least squares on inputs with an error draws every scale towards zero. (SmolLM2-135M with FLAP's widths,
    WikiText-2's validation split: perplexity 35.0 with the dense model's inputs, 39.6 with the pruned one's.)

    Args:
        weight: outputs by inputs.
        centred: sums of inputs less their mean, for a projection with a bias: that makes up for the mean.

    Attributes:
        gram: ``XᵀX``, inputs by inputs.
        tokens: how many were added.
        mean: of each input, if centred.
    """

    def __init__(self, weight: Tensor, centred: bool = False) -> None:
        inputs = weight.shape[1]
        self.weight = weight.to(torch.float64 if inputs <= DOUBLE_UP_TO else torch.float32)
        self.gram = self.weight.new_zeros(inputs, inputs)
        self.mean = self.weight.new_zeros(inputs) if centred else None
        self.tokens = 0

    def add(self, inputs: Tensor) -> None:
        """Count some tokens in.

        Args:
            inputs: float32, tokens by inputs.
        """
        if self.mean is not None:
            # Both sums move to the mean of all tokens so far, lest large numbers cancel in the end.
            count = self.tokens + len(inputs)
            own = inputs.to(self.gram.dtype).mean(0) if len(inputs) else self.mean
            shift, self.mean = own - self.mean, self.mean + (own - self.mean) * (len(inputs) / max(1, count))
            self.gram.addr_(shift, shift, alpha=self.tokens * len(inputs) / max(1, count))
            inputs = inputs - own.to(inputs.dtype)
        for rows in stripes(len(self.gram)):
            self.gram[rows, rows.start :] += inputs[:, rows].T @ inputs[:, rows.start :]
            self.gram[rows.stop :, rows] = self.gram[rows, rows.stop :].T
        self.tokens += len(inputs)

    def save(self, path: Path) -> None:
        """Write the sums to a file, in float32, so that they are there when the rates are known."""
        tensors = {"gram": self.gram.float().cpu()}
        if self.mean is not None:
            tensors["mean"] = self.mean.float().cpu()
        with replaced(path, durable=True) as partial:
            save_file(tensors, partial)

    @classmethod
    def load(cls, path: Path, weight: Tensor) -> Sublayer:
        """Read them again.

        Args:
            path: of the file.
            weight: of the projection.
        """
        with safe_open(path, framework="pt") as file:
            found = cls(weight)
            found.gram = file.get_tensor("gram").to(found.weight)
            if "mean" in file.keys():  # noqa: SIM118
                found.mean = file.get_tensor("mean").to(found.weight)
        return found

    def masks(self, unit: int = 1, consume: bool = False) -> MaskProblem:
        """The problem of scaling the inputs, ``unit`` neighbours at a time by one number.

        Args:
            unit: how many.
            consume: the problem takes the memory of ``gram``, which is empty afterwards.
        """
        gram = self.gram if consume else self.gram.clone()
        if consume:
            self.gram = gram.new_empty(0)
        for rows in stripes(len(gram)):
            gram[rows, rows.start :] *= self.weight[:, rows].T @ self.weight[:, rows.start :]
            gram[rows.stop :, rows] = gram[rows, rows.stop :].T
        if unit > 1:
            units = len(gram) // unit
            gram = gram.view(units, unit, units, unit).sum((1, 3))
        return MaskProblem(gram)

    def error(self, kept: Tensor, weight: Tensor) -> float:
        """``‖X Wᵀ − X_S Vᵀ‖²`` for a weight ``V`` on the inputs ``kept``."""
        missing = self.weight.clone()
        missing[:, kept] -= weight.to(missing.dtype)
        return sum(float(((missing[rows] @ self.gram) * missing[rows]).sum()) for rows in stripes(len(missing)))


@dataclass(frozen=True)
class MaskProblem:
    """``‖X Wᵀ − X diag(m) Wᵀ‖² = (1 − m)ᵀ G (1 − m)``.

    Args:
        gram: ``G = (XᵀX) ∘ (WᵀW)``, the Gram matrix of what each unit adds to the output.

    Example::

        >>> weight, inputs = torch.randn(5, 8), torch.randn(100, 8)
        >>> sublayer = Sublayer(weight)
        >>> sublayer.add(inputs)
        >>> problem = sublayer.masks()
        >>> problem.error(torch.arange(8), torch.ones(8))  # nothing pruned
        0.0
    """

    gram: Tensor

    @cached_property
    def linear(self) -> Tensor:
        """``G 1``, the right side whose solution is a mask of ones as long as nothing is gone."""
        return self.gram.sum(1)

    @cached_property
    def constant(self) -> float:
        """``1ᵀ G 1``, the objective without any unit."""
        return float(self.linear.sum())

    def error(self, kept: Tensor, mask: Tensor) -> float:
        """The objective, with ``mask`` on the units ``kept`` and zero on all others."""
        missing = torch.ones_like(self.linear)
        missing[kept] -= mask.to(missing.dtype)
        return float(missing @ (self.gram @ missing))

    def ridge(self, share: float) -> float:
        """``share`` of the mean of the diagonal of ``G``."""
        return share * float(self.gram.diagonal().mean())

    def tuned(self, kept: Tensor, ridge: float) -> Tensor:
        """The mask on ``kept`` that solves ``(G_SS + λI)(m − 1) = G_SR 1``, ``λ`` being that share of the diagonal."""
        gone = torch.ones_like(self.linear)
        gone[kept] = 0
        right = (self.gram @ gone)[kept]
        return 1 + solve(lambda: submatrix(self.gram, kept), right[:, None], self.ridge(ridge))[:, 0]


def stripes(count: int) -> Iterator[slice]:
    """Slices of :data:`ROWS` rows that cover a matrix, in ascending order."""
    for start in range(0, count, ROWS):
        yield slice(start, min(start + ROWS, count))


def submatrix(matrix: Tensor, kept: Tensor) -> Tensor:
    """``matrix[kept][:, kept]``, without the copy of all rows that this would make."""
    small = matrix.new_empty(len(kept), len(kept))
    for rows in stripes(len(kept)):
        small[rows] = matrix[kept[rows]][:, kept]
    return small


def solve(gram: Tensor | Callable[[], Tensor], right: Tensor, ridge: float) -> Tensor:
    """``(gram + ridge I)⁻¹ right``; the ridge grows tenfold until the matrix is positive definite."""
    lower = factor(gram, ridge)
    half = torch.linalg.solve_triangular(lower, right, upper=False)  # cholesky_solve would copy the factor
    found: Tensor = torch.linalg.solve_triangular(lower.mT, half, upper=True)
    return found


def inverted(gram: Tensor, ridge: float) -> Tensor:
    """``(gram + ridge I)⁻¹``, with the same care, in the memory of its factor."""
    lower = factor(gram, ridge)
    return torch.cholesky_inverse(lower, out=lower).mT


def factor(gram: Tensor | Callable[[], Tensor], ridge: float) -> Tensor:
    """Lower Cholesky factor of ``gram + ridge I``.

    Args:
        gram: the matrix, which is copied; or a function that makes it, for one that is not needed otherwise: the
            factor takes its memory.
        ridge: what is tried first.
    """
    for _ in range(12):
        regular = gram.clone() if isinstance(gram, Tensor) else gram()
        unit = float(regular.diagonal().mean())
        regular.diagonal().add_(ridge)
        lower, failed = regular.mT, torch.empty((), dtype=torch.int32, device=regular.device)
        torch.linalg.cholesky_ex(lower, out=(lower, failed))  # in place, as columns are what LAPACK has in a row
        if not failed:
            return lower
        ridge = max(10 * ridge, 1e-12 * unit, torch.finfo(regular.dtype).tiny)
    raise ArithmeticError(
        f"No ridge up to {ridge:.3g} makes this {len(lower)} x {len(lower)} matrix of calibration activations "
        "positive definite: they hold nan or infinity. Check the calibration texts, and load the model in float32 or "
        "bfloat16."
    )
