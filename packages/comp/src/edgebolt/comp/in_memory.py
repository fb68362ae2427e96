"""Pruning a model that is loaded."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from edgebolt.common.anatomy import FAMILIES, Anatomy
from edgebolt.comp.blocks import keep_heads, keep_neurons
from edgebolt.comp.calls import family_of
from edgebolt.comp.mpnet import kept_heads
from edgebolt.comp.pruned_models import as_pruned, renumber, stock_config
from edgebolt.comp.readout import Readout
from edgebolt.comp.sweep import Slimmed

__all__ = ["LayersInMemory", "cut"]


def cut(model: Any, left: Mapping[int, Slimmed], uniform: bool = False) -> None:
    """Take everything else out of a model, in place.

    Parameters stay the objects that they were, so that an optimizer goes on with them; the model's class becomes the
    one that is saved and loaded with unequal layers.

    Args:
        model: a transformers model.
        left: index of a layer -> what is left of it; layers that are not named go.
        uniform: all layers are equally wide: the model's class stays one of transformers'.
    """
    config, kind = model.config, family_of(model.config)
    layers = Anatomy(model).layers
    names = (getattr(config, "pruned", None) or {}).get("layers") or list(range(len(layers)))
    positions = sorted(left)
    for index in positions:
        layer, slimmed = layers[index], left[index]
        keep_neurons(kind, layer, torch.tensor(slimmed.neurons))
        keep_heads(kind, layer, torch.tensor(slimmed.groups), config)
    pruned: dict[str, Any] = {
        "layers": [names[index] for index in positions],
        "neurons": [len(left[index].neurons) for index in positions],
        "groups": [len(left[index].groups) for index in positions],
    }
    if kind == "mpnet":
        pruned["heads"] = [kept_heads(layers[index]) for index in positions]
    for index in reversed(range(len(layers))):
        if index not in left:
            del layers[index]
    renumber(layers)
    if uniform:
        stock_config(config, positions, pruned["neurons"][0])
    else:
        as_pruned(model, positions, pruned)


class LayersInMemory:
    """The layers of a model, which is changed at the end alone: after an error it is as it was.

    Args:
        model: a transformers model.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.config = model, model.config
        self.kind = family_of(model.config)
        self.layers = Anatomy(model).layers
        self.left: dict[int, Slimmed] = {}
        self.weights: dict[int, dict[str, Tensor]] = {}

    def __len__(self) -> int:
        return len(self.layers)

    def dense(self, index: int) -> nn.Module:
        """A copy, in float32."""
        layer: Any = copy.deepcopy(self.layers[index]).float()
        layer.chunk_size_feed_forward = 0  # BERT and RoBERTa would else call the projection once for each chunk
        dense: nn.Module = layer.eval()
        return dense

    def readout(self, tokens: Tensor) -> Readout | None:
        """Copied from the model."""
        anatomy, head = Anatomy(self.model), getattr(self.model, "lm_head", None)
        if anatomy.family.norm is None or not isinstance(head, nn.Linear):
            return None
        return Readout(
            anatomy.backbone.get_submodule(anatomy.family.norm), head.weight.data[tokens.to(head.weight.device)]
        )

    def store(self, index: int, layer: nn.Module, slimmed: Slimmed) -> None:
        """Keep what is left, and the weights that were solved for."""
        layer = layer.to(next(self.layers[index].parameters()).dtype)
        family = FAMILIES[self.kind]
        self.left[index] = slimmed
        self.weights[index] = {
            f"{path}.{name}": parameter.detach().clone()
            for path in (family.mlp[-1], family.output)
            for name, parameter in layer.get_submodule(path).named_parameters()
        }

    def stored(self, index: int) -> None:
        """Nothing is left of a run that was interrupted."""

    def apply(self, uniform: bool) -> None:
        """Change the model."""
        layers = {index: self.layers[index] for index in self.left}
        cut(self.model, self.left, uniform)
        for index, layer in layers.items():
            for path, weight in self.weights[index].items():
                layer.get_parameter(path).data.copy_(weight)
