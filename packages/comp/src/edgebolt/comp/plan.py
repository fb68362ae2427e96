"""How many units each layer loses, and which layers go: what is decided before the first weight is touched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from edgebolt.comp.allocation import layers_to_drop, rates_by_cost, removal_rates, whole_units
from edgebolt.comp.blocks import Block, attention_block, ffn_block, parameter_count, unit_parameters
from edgebolt.comp.selection import RemovalOrder

if TYPE_CHECKING:
    from edgebolt.comp.comp import Comp

__all__ = ["Plan", "Survey", "make_plan"]


@dataclass
class Survey:
    """What a run of the dense model tells.

    Attributes:
        importance: of each layer.
        orders: of each layer, in which order the units of its blocks go, by name of the block.
    """

    importance: list[float]
    orders: list[dict[str, RemovalOrder]]

    def effect(self) -> list[float]:
        """Of the neurons of each layer; empty where it was not measured."""
        if not all("ffn" in own and own["ffn"].probed for own in self.orders):
            return []
        return [own["ffn"].effect for own in self.orders]

    def to_plain(self) -> dict[str, Any]:
        """For JSON."""
        orders = [{name: order.to_plain() for name, order in own.items()} for own in self.orders]
        return {"importance": self.importance, "orders": orders}

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> Survey:
        """The inverse of :meth:`to_plain`."""
        orders = [{name: RemovalOrder(**order) for name, order in own.items()} for own in plain["orders"]]
        return cls(plain["importance"], orders)


@dataclass
class Plan:
    """What goes of each layer; lists have an entry for every layer of the dense model.

    Attributes:
        dropped: layers that go as a whole, ascending.
        neurons: how many go of each layer; 0 in a dropped one.
        groups: how many key-value heads go of each layer.
    """

    dropped: list[int]
    neurons: list[int]
    groups: list[int]


def make_plan(kind: str, config: Any, layers: list[nn.Module], survey: Survey, options: Comp) -> Plan:
    """Divide the ratio among layers.

    Args:
        kind: family.
        config: of the dense model.
        layers: its layers; only their shapes are read.
        survey: of the dense model.
        options: the user's.

    Raises:
        ValueError: if so much cannot go, or ``round_to`` is too coarse for it.
    """
    count = len(layers)
    sizes = [parameter_count(layer) for layer in layers]
    dropped = layers_to_drop(survey.importance, options.ratio, options.depth_fraction, options.protect)
    left = [index for index in range(count) if index not in dropped]
    remove = max(0.0, options.ratio * sum(sizes) - sum(sizes[index] for index in dropped))
    ffn = [ffn_block(kind, layers[index]) for index in left]
    attention = [attention_block(kind, layers[index], config) for index in left]
    neuron, group = (
        [unit_parameters(kind, block, layers[index], config) for block, index in zip(blocks, left, strict=True)]
        for blocks in (ffn, attention)
    )
    plan = Plan(dropped, [0] * count, [0] * count)
    if options.prune_attention:
        rates = _rates(survey, left, [(attention, group), (ffn, neuron)], remove, options)[: len(left)]
        lost = whole_units(rates, [block.units for block in attention], group)
        for index, number in zip(left, lost, strict=True):
            plan.groups[index] = number
        remove = max(0.0, remove - sum(number * weight for number, weight in zip(lost, group, strict=True)))
    rates = _rates(survey, left, [(ffn, neuron)], remove, options)
    units = [block.units for block in ffn]
    if options.uniform:
        width = units[0] - remove / sum(neuron)
        width = max(options.round_to, round(width / options.round_to) * options.round_to)
        lost = [max(0, units[0] - width) if options.ratio else 0] * len(left)
    else:
        lost = whole_units(rates, units, neuron, options.round_to)
    for index, number in zip(left, lost, strict=True):
        plan.neurons[index] = number
    missed = abs(sum(number * weight for number, weight in zip(lost, neuron, strict=True)) - remove)
    rounding = options.round_to * (sum(neuron) if options.uniform else max(neuron))
    nothing = remove >= min(neuron) and not (dropped or any(plan.groups) or any(lost))
    if nothing or missed > rounding:
        raise ValueError(
            f"round_to={options.round_to}: with layers of {sorted(set(units))} neurons, each left with a multiple of "
            f"that, {missed:,.0f} parameters of {remove:,.0f} could not go: lower it."
        )
    return plan


def _rates(
    survey: Survey, left: list[int], parts: list[tuple[list[Block], list[int]]], remove: float, options: Comp
) -> list[float]:
    """Share of its units that each block loses: all of the first part, then all of the second."""
    sizes = [[block.units * price for block, price in zip(blocks, prices, strict=True)] for blocks, prices in parts]
    if options.allocation == "effect" and not options.uniform and options.ratio:
        orders = [
            survey.orders[index][block.name] for blocks, _ in parts for index, block in zip(left, blocks, strict=True)
        ]
        flat = [size for own in sizes for size in own]
        units = [block.units for blocks, _ in parts for block in blocks]
        curves = [
            [(gone / total, cost) for gone, cost in zip(order.gone, order.costs(), strict=True)]
            for order, total in zip(orders, units, strict=True)
        ]
        return rates_by_cost(curves, flat, remove)
    together = [sum(own) for own in zip(*sizes, strict=True)]
    rule: Literal["inverse_importance", "uniform"] = (
        "inverse_importance" if options.allocation == "inverse_importance" else "uniform"
    )
    importance = [survey.importance[index] for index in left]
    return removal_rates(importance, together, remove, rule, options.largest_rate) * len(parts)
