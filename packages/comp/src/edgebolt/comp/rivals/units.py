"""The weights that leave a layer together, and how many units of each layer go."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from edgebolt.common.anatomy import FAMILIES
from edgebolt.comp.blocks import Block, parameter_count, prunable_blocks, unit_parameters
from edgebolt.comp.in_memory import LayersInMemory
from edgebolt.comp.rivals.rival import whole
from edgebolt.comp.sweep import Slimmed

__all__ = ["blocks_of", "coupled", "lowest", "uniform_counts"]


def blocks_of(layers: LayersInMemory, index: int, attention: bool) -> list[Block]:
    """The feed-forward part of a layer, and its attention where that is pruned too."""
    return prunable_blocks(layers.kind, layers.layers[index], layers.config, attention)


def coupled(
    kind: str, layer: nn.Module, block: Block, config: Any, value: Callable[[nn.Parameter], Tensor]
) -> Iterator[Tensor]:
    """All that goes with each unit: rows and biases of what makes it, columns of what reads it.

    Args:
        kind: family.
        layer: the layer.
        block: its feed-forward part or attention.
        config: of the model.
        value: what is looked at of a parameter, in its shape: the weights, their gradients.

    Yields:
        Of one parameter after the other: units by what belongs to each.
    """
    family = FAMILIES[kind]
    consumer = layer.get_submodule(block.consumer)
    yield _as_linear(consumer, value).T.reshape(block.units, -1)
    if block.name == "ffn":
        producers = [(path, 1) for path in family.mlp[:-1]]
    elif family.query == family.key:
        producers = [(family.query, 3)]  # queries, keys and values of all heads, one after the other
    else:
        producers = [(family.query, 1), (family.key, 1), (family.value, 1)]
    for path, parts in producers:
        module = layer.get_submodule(path)
        for part in _as_linear(module, value).chunk(parts):
            yield part.reshape(block.units, -1)
        if module.bias is not None:
            for part in value(module.bias).chunk(parts):  # type: ignore[arg-type]
                yield part.reshape(block.units, -1)


def _as_linear(module: nn.Module, value: Callable[[nn.Parameter], Tensor]) -> Tensor:
    """Outputs by inputs."""
    found = value(module.weight)  # type: ignore[arg-type]
    return found if isinstance(module, nn.Linear) else found.T


def uniform_counts(
    layers: LayersInMemory, ratio: float, attention: bool, chosen: Sequence[int]
) -> dict[int, dict[str, int]]:
    """How many units go where every chosen layer loses the same share of its neurons and key-value heads.

    Where the share is no whole number of heads, some layers lose one more than others, spread evenly over the depth;
    neurons then bring the sum to what was asked for, to half a neuron. (The originals round down in every layer, and
    so miss the ratio; with three key-value heads they would remove none at all below a third.)

    Args:
        layers: of the model.
        ratio: share of the parameters of all layers.
        attention: whether heads go as well.
        chosen: layers that lose something.

    Returns:
        By layer: units that go, by name of the block.

    Raises:
        ValueError: if so much cannot go; the message says by how much it is too much.
    """
    remove = ratio * sum(map(parameter_count, layers.layers))
    blocks = {index: {block.name: block for block in blocks_of(layers, index, attention)} for index in chosen}
    sizes = {
        index: {
            name: unit_parameters(layers.kind, block, layers.layers[index], layers.config)
            for name, block in own.items()
        }
        for index, own in blocks.items()
    }
    counts: dict[int, dict[str, int]] = {index: {} for index in chosen}
    names = ("attention", "ffn") if attention else ("ffn",)
    for at, name in enumerate(names):
        rest = sum(sizes[index][other] * blocks[index][other].units for index in chosen for other in names[at:])
        share = min(1.0, remove / rest)
        wanted, taken = 0.0, 0
        for index in chosen:
            units = blocks[index][name].units
            wanted += share * units
            gone = min(units - 1, int(wanted - taken + 0.5))
            counts[index][name] = gone
            taken += gone
        remove -= sum(counts[index][name] * sizes[index][name] for index in chosen)
    if remove > max(own["ffn"] for own in sizes.values()):
        raise ValueError(
            f"ratio={ratio}: {remove:,.0f} parameters more should go than the layers {list(chosen)} can lose, each of "
            "which keeps a neuron and a key-value head: lower it, or "
            + ("let more layers lose something." if attention else "set attention=True.")
        )
    return counts


def lowest(scores: Tensor, remove: int) -> list[int]:
    """The units that stay when those of the lowest scores go; ascending, ties by index."""
    return sorted(torch.argsort(scores, stable=True)[remove:].tolist())


def select(
    layers: LayersInMemory, counts: dict[int, dict[str, int]], scores: dict[int, dict[str, Tensor]]
) -> dict[int, Slimmed]:
    """What stays where each layer loses that many units of the lowest scores."""
    kept = whole(layers)
    for index, own in counts.items():
        left = kept[index]
        left.neurons = lowest(scores[index]["ffn"], own["ffn"])
        if "attention" in own:
            left.groups = lowest(scores[index]["attention"], own["attention"])
    return kept
