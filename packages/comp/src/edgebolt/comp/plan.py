"""How many units each layer loses, and which layers go: what is decided before the first weight is touched."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from edgebolt.comp.allocation import layers_to_drop, removal_rates, whole_units
from edgebolt.comp.blocks import attention_block, ffn_block, parameter_count, unit_parameters

if TYPE_CHECKING:
    from edgebolt.comp.comp import Comp

__all__ = ["Plan", "make_plan"]


@dataclass
class Plan:
    """What goes of each layer; lists have an entry for every layer of the dense model.

    Attributes:
        importance: of each layer.
        dropped: layers that go as a whole, ascending.
        neurons: how many go of each layer; 0 in a dropped one.
        groups: how many key-value heads go of each layer.
        most: how many neurons may go of each layer.
    """

    importance: list[float]
    dropped: list[int]
    neurons: list[int]
    groups: list[int]
    most: list[int]

    def to_plain(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def hand_on(self, index: int, unmet: int, round_to: int) -> int:
        """Let the layers behind ``index`` lose the neurons that it could not, in proportion to their own.

        Returns:
            How many could not be handed on.
        """
        later = [layer for layer in range(index + 1, len(self.neurons)) if self.neurons[layer] > 0]
        total = sum(self.neurons[layer] for layer in later)
        wanted = {layer: unmet * self.neurons[layer] / total for layer in later}
        for layer in later:
            room = (self.most[layer] - self.neurons[layer]) // round_to * round_to
            more = min(room, round(wanted[layer] / round_to) * round_to, unmet // round_to * round_to)
            self.neurons[layer] += more
            unmet -= more
        for layer in later:  # what rounding left
            room = (self.most[layer] - self.neurons[layer]) // round_to * round_to
            more = min(room, unmet // round_to * round_to)
            self.neurons[layer] += more
            unmet -= more
        return unmet


def make_plan(kind: str, config: Any, layers: list[nn.Module], importance: list[float], options: Comp) -> Plan:
    """Divide the ratio among layers.

    Args:
        kind: family.
        config: of the dense model.
        layers: its layers; only their shapes are read.
        importance: of each layer.
        options: the user's.

    Raises:
        ValueError: if so much cannot go.
    """
    count = len(layers)
    sizes = [parameter_count(layer) for layer in layers]
    dropped = layers_to_drop(importance, options.ratio, options.depth_fraction, options.protect)
    left = [index for index in range(count) if index not in dropped]
    remove = options.ratio * sum(sizes) - sum(sizes[index] for index in dropped)
    ffn = [ffn_block(kind, layers[index]) for index in left]
    neuron = [unit_parameters(kind, block, layers[index], config) for block, index in zip(ffn, left, strict=True)]
    prunable = [block.units * weight for block, weight in zip(ffn, neuron, strict=True)]
    groups = [0] * count
    score = [importance[index] for index in left]
    if options.prune_attention:
        attention = [attention_block(kind, layers[index], config) for index in left]
        group = [
            unit_parameters(kind, block, layers[index], config) for block, index in zip(attention, left, strict=True)
        ]
        heads = [block.units * weight for block, weight in zip(attention, group, strict=True)]
        both = [a + b for a, b in zip(prunable, heads, strict=True)]
        rates = removal_rates(score, both, max(0.0, remove), options.allocation, options.largest_rate)
        lost = whole_units(rates, [block.units for block in attention], group)
        for index, number in zip(left, lost, strict=True):
            groups[index] = number
        remove -= sum(number * weight for number, weight in zip(lost, group, strict=True))
    rates = removal_rates(score, prunable, max(0.0, remove), options.allocation, options.largest_rate)
    units = [block.units for block in ffn]
    if options.uniform:
        width = units[0] - max(0.0, remove) / sum(neuron)
        width = max(options.round_to, round(width / options.round_to) * options.round_to)
        lost = [max(0, units[0] - width) if options.ratio else 0] * len(left)
    else:
        lost = whole_units(rates, units, neuron, options.round_to)
    neurons, most = [0] * count, [0] * count
    for index, number, total in zip(left, lost, units, strict=True):
        neurons[index] = number
        most[index] = max(number, min(total - options.round_to, int(total * options.largest_rate)))
    return Plan([float(value) for value in importance], dropped, neurons, groups, most)
