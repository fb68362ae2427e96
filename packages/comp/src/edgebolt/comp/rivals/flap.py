"""FLAP: what fluctuates little goes, and its mean becomes a bias."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from edgebolt.comp.blocks import Block, features, matrix, parameter_count, unit_parameters
from edgebolt.comp.calls import capture_batches
from edgebolt.comp.in_memory import LayersInMemory
from edgebolt.comp.rivals.inputs import InputSums, measure
from edgebolt.comp.rivals.rival import Batches, Rival, Selection, whole
from edgebolt.comp.rivals.units import blocks_of
from edgebolt.comp.sweep import Slimmed

__all__ = ["Flap"]


@dataclass(frozen=True, kw_only=True)
class Flap(Rival):
    """``S_j = Var(x_j) ‖W_:j‖²``, standardised in each layer, cut at one height for all; the mean becomes a bias.

    An et al. 2024 (arXiv 2312.11983): the metric WIFV, ``Var`` with ``N − 1`` below; per projection
    ``(S − mean S) / std S``, so that the layers' scores can be compared; the lowest of all layers and of both kinds of
    units go, until the parameters that are asked for are gone; what the removed inputs gave on average,
    ``W_removed · mean(x_removed)``, is added to the bias of ``down_proj`` and ``o_proj``. All is measured in one run
    of the dense model.

    Reduced: a head's score is the mean of its inputs' standardised ones; with grouped queries the unit is a key-value
    head with all query heads that read it. Every layer keeps a neuron and a key-value head. Biases count as
    parameters, so a little more goes in their place.

    A projection of Llama, Qwen2 or Mistral has no bias: it gets one, **in memory only**. Such a model runs, generates
    and can be measured, but ``save_pretrained`` refuses it, since its config has no place for these biases and they
    would be lost at the next load.

    Args:
        attention: remove key-value heads, with the query heads that read them, as well as neurons.
        bias: put the removed mean into the bias.

    Example::

        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(hidden_size=16, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2,
        ...                      vocab_size=50)
        >>> model = LlamaForCausalLM(config)
        >>> report = Flap().prune(model, [{"input_ids": torch.randint(50, (2, 8))}], ratio=0.3)
        >>> type(model).__name__, round(report.ratio, 2)
        ('CompLlamaForCausalLM', 0.30)
    """

    attention: bool = True
    bias: bool = True

    def choose(self, model: Any, layers: LayersInMemory, batches: Batches, ratio: float) -> Selection:
        """As in :class:`Rival`."""
        calibration = capture_batches(model, batches)
        hidden, scores, means = calibration.hidden, {}, {}
        for index in range(len(layers)):
            layer, blocks = layers.dense(index), blocks_of(layers, index, self.attention)
            sums, hidden = measure(layer, blocks, calibration, hidden, index)
            for block in blocks:
                scores[index, block.name] = fluctuation(layer, block, sums[block.name])
                means[index, block.name] = sums[block.name].mean
        kept = self._cut(layers, scores, ratio)
        return Selection(kept, _biases(layers, kept, means) if self.bias else {})

    def _cut(self, layers: LayersInMemory, scores: dict[tuple[int, str], Tensor], ratio: float) -> dict[int, Slimmed]:
        """The lowest of all layers go, as long as that brings the parameters nearer to what is asked for."""
        rest, kept = ratio * sum(map(parameter_count, layers.layers)), whole(layers)
        gain, price = {}, {}
        for index, name in scores:
            block = {block.name: block for block in blocks_of(layers, index, True)}[name]
            consumer: Any = layers.layers[index].get_submodule(block.consumer)
            gain[index, name] = unit_parameters(layers.kind, block, layers.layers[index], layers.config)
            price[index, name] = features(consumer)[1] if self.bias and consumer.bias is None else 0
        order = sorted((value, *key, unit) for key, own in scores.items() for unit, value in enumerate(own.tolist()))
        for _, index, name, unit in order:
            left = kept[index].neurons if name == "ffn" else kept[index].groups
            saved = gain[index, name] - price[index, name]
            # Neurons come to within half of one; a head that would be too much may be followed by them.
            if len(left) > 1 and rest >= (saved / 2 if name == "ffn" else saved):
                left.remove(unit)
                rest -= saved
                price[index, name] = 0  # a layer pays once for its bias
        if rest >= min(gain.values()):
            raise ValueError(
                f"ratio={ratio}: {rest:,.0f} parameters more should go than there are. Lower it"
                + ("." if self.attention else ", or set attention=True.")
            )
        return kept


def fluctuation(layer: nn.Module, block: Block, sums: InputSums) -> Tensor:
    """Standardised WIFV of each unit; float64."""
    weight = matrix(layer.get_submodule(block.consumer)).double()
    wifv = sums.variance * weight.square().sum(0)
    standard = (wifv - wifv.mean()) / wifv.std(correction=0).clamp_min(1e-30)
    return standard.view(block.units, block.unit).mean(1)


def _biases(
    layers: LayersInMemory, kept: dict[int, Slimmed], means: dict[tuple[int, str], Tensor]
) -> dict[int, dict[str, Tensor]]:
    """What the removed inputs of each projection gave on average, where some were removed."""
    biases: dict[int, dict[str, Tensor]] = {index: {} for index in kept}
    for (index, name), mean in means.items():
        block = {block.name: block for block in blocks_of(layers, index, True)}[name]
        stay = kept[index].neurons if name == "ffn" else kept[index].groups
        gone = torch.ones(block.units * block.unit, dtype=torch.bool)
        gone[block.columns(torch.tensor(stay))] = False
        if gone.any():
            weight = matrix(layers.layers[index].get_submodule(block.consumer)).double()
            biases[index][block.consumer] = weight[:, gone.to(weight.device)] @ mean[gone.to(mean.device)]
    return biases
