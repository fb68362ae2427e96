"""Magnitude pruning: what is small goes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from edgebolt.comp.blocks import Block
from edgebolt.comp.in_memory import LayersInMemory
from edgebolt.comp.rivals.rival import Batches, Rival, Selection
from edgebolt.comp.rivals.units import blocks_of, coupled, select, uniform_counts

__all__ = ["Magnitude"]


@dataclass(frozen=True, kw_only=True)
class Magnitude(Rival):
    """``S = ‖all weights of the unit‖₂``: the units of the smallest norm go, the same share of every layer.

    The structured form of Han et al. 2015 (arXiv 1506.02626), with the coupled weights of LLM-Pruner (Ma et al. 2023,
    arXiv 2305.11627), which has it as its baseline "L2". It looks at no data.

    Reduced: the norm is over all coupled weights and biases at once.

    Args:
        attention: remove key-value heads, with the query heads that read them, as well as neurons.

    Example::

        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(hidden_size=16, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2,
        ...                      vocab_size=50)
        >>> model = LlamaForCausalLM(config)
        >>> report = Magnitude().prune(model, [{"input_ids": torch.randint(50, (2, 8))}], ratio=0.3)
        >>> type(model).__name__, round(report.ratio, 2)
        ('CompLlamaForCausalLM', 0.30)
    """

    attention: bool = True

    def choose(self, model: Any, layers: LayersInMemory, batches: Batches, ratio: float) -> Selection:
        """As in :class:`Rival`."""
        chosen = range(len(layers))
        counts = uniform_counts(layers, ratio, self.attention, chosen)
        scores = {
            index: {
                block.name: magnitude_scores(layers.kind, layers.layers[index], block, layers.config)
                for block in blocks_of(layers, index, self.attention)
            }
            for index in chosen
        }
        return Selection(select(layers, counts, scores))


def magnitude_scores(kind: str, layer: nn.Module, block: Block, config: Any) -> Tensor:
    """Norm of each unit's weights; float32."""
    parts = coupled(kind, layer, block, config, lambda parameter: parameter.data.float())
    return torch.stack([part.square().sum(1) for part in parts]).sum(0).sqrt()
