"""Sums over what the projections behind the units get."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from edgebolt.comp.blocks import Block
from edgebolt.comp.calls import Calibration, run_layer, watching

__all__ = ["InputSums", "advance", "measure"]


@dataclass
class InputSums:
    """Of the inputs of one projection, over all tokens.

    Example::

        >>> sums = InputSums()
        >>> sums.add(torch.tensor([[1.0, 0.0], [3.0, 0.0]]))
        >>> sums.mean.tolist(), sums.variance.tolist()
        ([2.0, 0.0], [2.0, 0.0])
    """

    tokens: int = 0
    total: Tensor = field(default_factory=lambda: torch.zeros(()))
    squares: Tensor = field(default_factory=lambda: torch.zeros(()))

    def add(self, inputs: Tensor) -> None:
        """Count tokens in: tokens by inputs."""
        inputs = inputs.double()
        self.total = self.total.to(inputs) + inputs.sum(0)
        self.squares = self.squares.to(inputs) + inputs.square().sum(0)
        self.tokens += len(inputs)

    @property
    def mean(self) -> Tensor:
        """Of each input; float64."""
        return self.total / self.tokens

    @property
    def variance(self) -> Tensor:
        """Of each input, with ``tokens − 1`` below; float64."""
        return (self.squares - self.tokens * self.mean.square()).clamp_min(0) / max(1, self.tokens - 1)


def measure(
    layer: nn.Module, blocks: Sequence[Block], calibration: Calibration, hidden: Sequence[Tensor], index: int
) -> tuple[dict[str, InputSums], list[Tensor]]:
    """Run a layer on all batches.

    Args:
        layer: float32.
        blocks: whose consumers are watched.
        calibration: the calls, and which tokens are real; padding does not count.
        hidden: what enters the layer, a batch each.
        index: of the layer.

    Returns:
        Sums by name of the block, and what leaves the layer.
    """
    sums = {block.name: InputSums() for block in blocks}
    leaving = []
    for batch, entering in enumerate(hidden):
        with ExitStack() as stack:
            seen = {block.name: stack.enter_context(watching(layer, block.consumer)) for block in blocks}
            leaving.append(run_layer(layer, entering, calibration.calls[batch][index]))
        for name, (inputs,) in seen.items():
            sums[name].add(inputs[calibration.real[batch]])
    return sums, leaving


def advance(layer: nn.Module, calibration: Calibration, hidden: Sequence[Tensor], index: int) -> list[Tensor]:
    """What leaves a layer, a batch each."""
    return [run_layer(layer, batch, calibration.calls[number][index]) for number, batch in enumerate(hidden)]
