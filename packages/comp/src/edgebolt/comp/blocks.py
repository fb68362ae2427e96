"""The units that can leave a transformer layer: neurons of its feed-forward part, heads of its attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from edgebolt.common.anatomy import FAMILIES
from edgebolt.comp.mpnet import kept_heads, set_kept_heads

__all__ = [
    "Block",
    "attention_block",
    "ffn_block",
    "keep_heads",
    "keep_neurons",
    "prunable_blocks",
    "stub_type",
]


@dataclass(frozen=True)
class Block:
    """Coupled weights of one layer: what one unit takes along when it goes.

    Args:
        name: ``"ffn"`` or ``"attention"``.
        consumer: path, inside the layer, of the projection whose inputs the units are.
        unit: consecutive inputs of the consumer that make a unit: 1 for a neuron, head size times the query heads of
            a key-value head for attention.
        units: how many there are.
    """

    name: str
    consumer: str
    unit: int
    units: int

    def columns(self, kept: Tensor) -> Tensor:
        """Inputs of the consumer that belong to the units ``kept`` (int64, ascending)."""
        return (kept[:, None] * self.unit + torch.arange(self.unit)).flatten()


def features(module: nn.Module) -> tuple[int, int]:
    """Inputs and outputs of a linear layer; of GPT-2's ``Conv1D`` too, whose weight is the other way round."""
    weight: Any = module.weight
    rows, columns = weight.shape
    return (columns, rows) if isinstance(module, nn.Linear) else (rows, columns)


def matrix(module: nn.Module) -> Tensor:
    """The weight as ``nn.Linear`` has it: outputs by inputs; a view."""
    weight: Any = module.weight
    found: Tensor = weight.data
    return found if isinstance(module, nn.Linear) else found.T


def narrow(module: nn.Module, inputs: Tensor | None = None, outputs: Tensor | None = None) -> None:
    """Leave only these inputs or outputs, in place: parameters stay the objects that an optimizer knows."""
    weight: Any = module.weight
    with torch.no_grad():
        new = matrix(module)
        if inputs is not None:
            new = new.index_select(1, inputs.to(new.device))
        if outputs is not None:
            new = new.index_select(0, outputs.to(new.device))
            if module.bias is not None:
                bias: Any = module.bias
                bias.grad, bias.data = None, bias.data.index_select(0, outputs.to(new.device))
        weight.grad = None
        weight.data = (new if isinstance(module, nn.Linear) else new.T).contiguous()
    state_size(module)


def resize(module: nn.Module, inputs: int | None = None, outputs: int | None = None) -> None:
    """New, empty weights of another size on the same device, to be loaded into."""
    old_inputs, old_outputs = features(module)
    size = (outputs or old_outputs, inputs or old_inputs)
    weight: Any = module.weight
    size = size if isinstance(module, nn.Linear) else size[::-1]
    module.weight = nn.Parameter(torch.empty(size, dtype=weight.dtype, device=weight.device), weight.requires_grad)
    if outputs and module.bias is not None:
        bias: Any = module.bias
        empty = torch.empty(outputs, dtype=bias.dtype, device=bias.device)
        module.bias = nn.Parameter(empty, bias.requires_grad)
    state_size(module)


def state_size(module: nn.Module) -> None:
    """Let the attributes say what the weight's shape is: PEFT, quantizers and exporters read them."""
    inputs, outputs = features(module)
    if isinstance(module, nn.Linear):
        module.in_features, module.out_features = inputs, outputs
    else:
        module.nx, module.nf = inputs, outputs  # type: ignore[assignment]


def heads(config: Any) -> tuple[int, int, int]:
    """Query heads, key-value heads and head size of the dense model."""
    query = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // query
    return query, getattr(config, "num_key_value_heads", None) or query, size


def ffn_block(kind: str, layer: nn.Module) -> Block:
    """The feed-forward part of a layer as it is now.

    Args:
        kind: ``model_type`` of the family.
        layer: one transformer layer.
    """
    consumer = FAMILIES[kind].mlp[-1]
    return Block("ffn", consumer, 1, features(layer.get_submodule(consumer))[0])


def attention_block(kind: str, layer: nn.Module, config: Any) -> Block:
    """The attention of a layer as it is now: a unit is a key-value head with all query heads that read it."""
    query, groups, size = heads(config)
    consumer = FAMILIES[kind].output
    unit = query // groups * size
    return Block("attention", consumer, unit, features(layer.get_submodule(consumer))[0] // unit)


def prunable_blocks(kind: str, layer: nn.Module, config: Any, attention: bool) -> list[Block]:
    """What of a layer is pruned: its attention where that is asked for, and its feed-forward part."""
    ffn = ffn_block(kind, layer)
    return [attention_block(kind, layer, config), ffn] if attention else [ffn]


def keep_neurons(kind: str, layer: nn.Module, kept: Tensor) -> None:
    """Take all other neurons out of the feed-forward part, with their rows, columns and biases.

    Args:
        kind: ``model_type`` of the family.
        layer: the layer, changed in place.
        kept: int64, ascending.
    """
    *producers, consumer = FAMILIES[kind].mlp
    for path in producers:
        narrow(layer.get_submodule(path), outputs=kept)
    narrow(layer.get_submodule(consumer), inputs=kept)
    state_ffn(kind, layer)


def keep_heads(kind: str, layer: nn.Module, kept: Tensor, config: Any) -> None:
    """Take all other key-value heads out of the attention, with the query heads that read them.

    Args:
        kind: ``model_type`` of the family.
        layer: the layer, changed in place.
        kept: int64, ascending: key-value heads, counted as the layer has them now.
        config: of the model.
    """
    query, groups, size = heads(config)
    per_group = query // groups
    family = FAMILIES[kind]

    def rows(width: int) -> Tensor:
        return (kept[:, None] * width + torch.arange(width)).flatten()

    if family.query == family.key:  # one fused projection: queries, keys, values
        fused = layer.get_submodule(family.query)
        part = features(fused)[1] // 3
        narrow(fused, outputs=torch.cat([rows(size) + part * index for index in range(3)]))
    else:
        narrow(layer.get_submodule(family.query), outputs=rows(per_group * size))
        for path in (family.key, family.value):
            narrow(layer.get_submodule(path), outputs=rows(size))
    narrow(layer.get_submodule(family.output), inputs=rows(per_group * size))
    if kind == "mpnet":
        before = kept_heads(layer)
        set_kept_heads(layer, [before[group] for group in kept.tolist()])
    state_attention(kind, layer, config)


def resize_layer(kind: str, layer: nn.Module, config: Any, neurons: int, groups: int) -> None:
    """Give a freshly built layer the sizes of a pruned one, with empty weights where they differ."""
    family = FAMILIES[kind]
    *producers, consumer = family.mlp
    if features(layer.get_submodule(consumer))[0] != neurons:
        for path in producers:
            resize(layer.get_submodule(path), outputs=neurons)
        resize(layer.get_submodule(consumer), inputs=neurons)
        state_ffn(kind, layer)
    query, full, size = heads(config)
    if groups != full:
        width = groups * (query // full) * size
        if family.query == family.key:
            resize(layer.get_submodule(family.query), outputs=3 * width)
        else:
            resize(layer.get_submodule(family.query), outputs=width)
            for path in (family.key, family.value):
                resize(layer.get_submodule(path), outputs=groups * size)
        resize(layer.get_submodule(family.output), inputs=width)
        state_attention(kind, layer, config)


def state_ffn(kind: str, layer: nn.Module) -> None:
    consumer = FAMILIES[kind].mlp[-1]
    owner: Any = layer.get_submodule(consumer.rpartition(".")[0])
    if hasattr(owner, "intermediate_size"):
        owner.intermediate_size = features(layer.get_submodule(consumer))[0]


def state_attention(kind: str, layer: nn.Module, config: Any) -> None:
    """Set what the attention's forward reads beside its weights; none of it is in a state dict."""
    *_, size = heads(config)
    family = FAMILIES[kind]
    owner: Any = layer.get_submodule(family.query.rpartition(".")[0])
    width = features(layer.get_submodule(family.output))[0]
    for name, value in {
        "num_heads": width // size,
        "num_attention_heads": width // size,
        "split_size": width,
        "all_head_size": width,
    }.items():
        if hasattr(owner, name):
            setattr(owner, name, value)


def parameter_count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def unit_parameters(kind: str, block: Block, layer: nn.Module, config: Any) -> int:
    """Weights and biases that leave the layer with one unit."""
    family = FAMILIES[kind]
    consumer = layer.get_submodule(block.consumer)
    gone = block.unit * features(consumer)[1]
    if block.name == "ffn":
        producers: Sequence[tuple[str, int]] = [(path, 1) for path in family.mlp[:-1]]
    else:
        *_, size = heads(config)
        if family.query == family.key:
            producers = [(family.query, 3 * size)]
        else:
            producers = [(family.query, block.unit), (family.key, size), (family.value, size)]
    for path, rows in producers:
        module = layer.get_submodule(path)
        gone += rows * (features(module)[0] + (module.bias is not None))
    return gone


def stub_type(kind: str) -> type[tuple[Tensor]] | None:
    """What a layer of this family returns around its hidden states: MPNet a tuple, all others nothing."""
    return tuple if kind == "mpnet" else None
