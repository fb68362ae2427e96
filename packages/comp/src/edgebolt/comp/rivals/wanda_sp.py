"""Wanda, made structured: weights times activations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from edgebolt.comp.blocks import Block, matrix
from edgebolt.comp.calls import capture_batches
from edgebolt.comp.in_memory import LayersInMemory
from edgebolt.comp.rivals.inputs import InputSums, advance, measure
from edgebolt.comp.rivals.rival import Batches, Rival, Selection, slim, whole
from edgebolt.comp.rivals.units import blocks_of, lowest, uniform_counts

__all__ = ["WandaSp"]


@dataclass(frozen=True, kw_only=True)
class WandaSp(Rival):
    """``S = Σ_{j in the unit} Σ_i |W_ij| ‖x_j‖₂``: the units of the smallest sum go, the same share of every layer.

    Wanda (Sun et al. 2024, arXiv 2306.11695) scores each weight by its magnitude times the norm of its input over the
    calibration tokens. Its structured form is the baseline of FLAP (An et al. 2024, arXiv 2312.11983). ``W`` is what
    reads the unit (``down_proj``, ``o_proj``), ``x`` its input. As in Wanda, layers are pruned one after the other,
    and each sees what the pruned ones before it give; nothing is tuned.

    Reduced: the rows that make the unit (``gate_proj``, ``up_proj``, ``q_proj``, …) are not in the sum.

    Args:
        attention: remove key-value heads, with the query heads that read them, as well as neurons.

    Example::

        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(hidden_size=16, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2,
        ...                      vocab_size=50)
        >>> model = LlamaForCausalLM(config)
        >>> report = WandaSp(attention=False).prune(model, [{"input_ids": torch.randint(50, (2, 8))}], ratio=0.3)
        >>> type(model).__name__, round(report.ratio, 2)
        ('CompLlamaForCausalLM', 0.30)
    """

    attention: bool = True

    def choose(self, model: Any, layers: LayersInMemory, batches: Batches, ratio: float) -> Selection:
        """As in :class:`Rival`."""
        calibration = capture_batches(model, batches)
        counts = uniform_counts(layers, ratio, self.attention, range(len(layers)))
        kept, hidden = whole(layers), calibration.hidden
        for index, left in kept.items():
            layer = layers.dense(index)
            blocks = blocks_of(layers, index, self.attention)
            sums, _ = measure(layer, blocks, calibration, hidden, index)
            for block in blocks:
                stay = lowest(wanda_scores(layer, block, sums[block.name]), counts[index][block.name])
                if block.name == "ffn":
                    left.neurons = stay
                else:
                    left.groups = stay
            hidden = advance(slim(layers.kind, layer, left, layers.config), calibration, hidden, index)
        return Selection(kept)


def wanda_scores(layer: nn.Module, block: Block, sums: InputSums) -> Tensor:
    """Score of each unit; float64."""
    weight = matrix(layer.get_submodule(block.consumer)).double()
    return (weight.abs().sum(0) * sums.squares.sqrt()).view(block.units, block.unit).sum(1)
