"""How much a layer changes what runs through it."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

__all__ = ["BlockInfluence"]


class BlockInfluence:
    """``I = 1 − mean over tokens of cos(x_in, x_out)``, the redundancy of a layer taken from one.

    That the score is one minus the cosine between a layer's input and output is what digests of the paper say; the
    mean over tokens, as in ShortGPT's Block Influence, is our reading of a garbled formula.

    Example::

        >>> import torch
        >>> influence = BlockInfluence()
        >>> influence.add(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[2.0, 0.0], [0.0, 3.0]]))
        >>> influence.value
        0.5
    """

    def __init__(self) -> None:
        self.cosines, self.tokens = 0.0, 0

    def add(self, entering: Tensor, leaving: Tensor) -> None:
        """Count tokens in: both float32, tokens by width."""
        self.cosines += float(F.cosine_similarity(entering, leaving, dim=-1).double().sum())
        self.tokens += len(entering)

    @property
    def value(self) -> float:
        """The importance, from 0 to 2."""
        return 1 - self.cosines / max(1, self.tokens)
