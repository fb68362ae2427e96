"""What a language model makes of the hidden states behind its last layer."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from edgebolt.comp.importance import BlockInfluence

__all__ = ["Readout", "effect_at_the_end"]


class Readout:
    """Chances of the next token, among those that occur in the calibration texts: the rest of the head stays unread.

    Args:
        norm: behind the last layer.
        rows: of the head's weight, those of these tokens.
    """

    def __init__(self, norm: nn.Module, rows: Tensor) -> None:
        self.norm, self.rows = copy.deepcopy(norm).float().eval(), rows.float()

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logarithms of the chances, float64: tokens by rows, from tokens by width."""
        with torch.no_grad():
            chances: Tensor = (self.norm(hidden) @ self.rows.T).double().log_softmax(-1)
        return chances


def effect_at_the_end(readout: Readout | None, dense: Tensor, other: Tensor, real: Tensor) -> float:
    """How far a pruned model is from the dense one.

    Args:
        readout: of a causal language model; None for any other.
        dense: hidden states behind the last layer, sequences by tokens by width.
        other: those of the pruned model.
        real: which tokens count, sequences by tokens.

    Returns:
        With a readout the Kullback-Leibler divergence of its chances, in nats, without one ``1 − cos`` of the hidden
        states; the mean over tokens.
    """
    if readout is None:
        influence = BlockInfluence()
        influence.add(dense[real], other[real])
        return influence.value
    total = 0.0
    for true, got, counts in zip(dense, other, real, strict=True):  # a sequence at a time: it is a wide matrix
        expected, found = readout(true[counts]), readout(got[counts])
        total += float((expected.exp() * (expected - found)).sum())
    return total / max(1, int(real.sum()))
