"""ShortGPT: whole layers that change little go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from edgebolt.comp.blocks import parameter_count
from edgebolt.comp.calls import capture_batches, run_layer
from edgebolt.comp.importance import BlockInfluence
from edgebolt.comp.in_memory import LayersInMemory
from edgebolt.comp.rivals.rival import Batches, Rival, Selection, whole

__all__ = ["ShortGpt"]


@dataclass(frozen=True, kw_only=True)
class ShortGpt(Rival):
    """``BI_l = 1 − E_t[cos(x_l,t, x_l+1,t)]``: the layers of the lowest Block Influence go, all at once.

    Men et al. 2024 (arXiv 2403.03853). It prunes depth alone, so the ratio is met to half a layer; no layer is
    protected.

    Reduced: nothing.

    Example::

        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(hidden_size=16, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2,
        ...                      vocab_size=50)
        >>> model = LlamaForCausalLM(config)
        >>> report = ShortGpt().prune(model, [{"input_ids": torch.randint(50, (2, 8))}], ratio=0.25)
        >>> len(report.dropped), len(model.model.layers)
        (1, 3)
    """

    def choose(self, model: Any, layers: LayersInMemory, batches: Batches, ratio: float) -> Selection:
        """As in :class:`Rival`."""
        influence = block_influence(model, layers, batches)
        sizes = [parameter_count(layer) for layer in layers.layers]
        rest, kept = ratio * sum(sizes), whole(layers)
        for index in sorted(range(len(layers)), key=lambda index: influence[index]):
            if rest < sizes[index] / 2 or len(kept) == 1:
                break
            del kept[index]
            rest -= sizes[index]
        return Selection(kept)


def block_influence(model: Any, layers: LayersInMemory, batches: Batches) -> list[float]:
    """Block Influence of each layer of the dense model, over all tokens that are no padding."""
    calibration = capture_batches(model, batches)
    hidden, found = calibration.hidden, []
    for index in range(len(layers)):
        layer, influence, leaving = layers.dense(index), BlockInfluence(), []
        for batch, entering in enumerate(hidden):
            out = run_layer(layer, entering, calibration.calls[batch][index])
            real = calibration.real[batch]
            influence.add(entering[real], out[real])
            leaving.append(out)
        hidden = leaving
        found.append(influence.value)
    return found
