"""What all rivals share: they prune a loaded model to the size that is asked for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from edgebolt.comp.blocks import attention_block, ffn_block, keep_heads, keep_neurons, parameter_count
from edgebolt.comp.calibration_texts import fingerprint
from edgebolt.comp.in_memory import LayersInMemory, cut
from edgebolt.comp.report import Report, versions
from edgebolt.comp.support import check_supported
from edgebolt.comp.sweep import Seconds, Slimmed

__all__ = ["Batches", "Rival", "Selection"]

Batches = Sequence[Mapping[str, Tensor]]


@dataclass(frozen=True)
class Selection:
    """What stays of a model.

    Attributes:
        layers: by index; a layer that is not in it goes.
        biases: by index and by path of a projection inside the layer: what its bias gains.
    """

    layers: dict[int, Slimmed]
    biases: dict[int, dict[str, Tensor]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Rival(ABC):
    """A structured pruning method; an own one says in :meth:`choose` what stays."""

    def prune(self, model: Any, batches: Batches, ratio: float) -> Report:
        """Prune a loaded model in place, as :meth:`edgebolt.comp.Comp.prune` does: with the same classes afterwards.

        Args:
            model: a transformers model.
            batches: arguments of its forward, such as ``{"input_ids": int64, sequences by tokens}``.
            ratio: share of the parameters of all transformer layers that goes. It is met to half of the smallest unit
                that the method removes.

        Returns:
            What was removed; ``layers`` says which neurons and key-value heads each layer has left.

        Raises:
            NotImplementedError: for a family that cannot be pruned; the message says what can be done.
            ValueError: for a ratio that cannot be met, and without batches.
        """
        check_supported(model.config)
        if not 0 <= ratio < 1:
            raise ValueError(f"ratio={ratio}: use a number from 0 to below 1.")
        if not batches:
            raise ValueError("batches is empty: give at least one batch of token ids.")
        layers, seconds = LayersInMemory(model), Seconds()
        before, total, depth = parameter_count(model), sum(map(parameter_count, layers.layers)), len(layers)
        training = model.training
        model.eval()
        try:
            with seconds.spent("selection"):
                chosen = self.choose(model, layers, batches, ratio) if ratio else Selection(whole(layers))
        finally:
            model.train(training)
        with seconds.spent("write"):
            if ratio:
                _remove(layers, chosen)
        after = parameter_count(model)
        return Report(
            options={"rival": type(self).__name__, "ratio": ratio, **asdict(self)},
            parameters=(before, after),
            ratio=(before - after) / total,
            importance=[],
            effect=[],
            dropped=[index for index in range(depth) if index not in chosen.layers],
            layers=[{"layer": index, **left.to_plain()} for index, left in sorted(chosen.layers.items())],
            calibration=fingerprint([dict(batch) for batch in batches]),
            seconds=dict(seconds.by_stage),
            versions=versions(),
        )

    @abstractmethod
    def choose(self, model: Any, layers: LayersInMemory, batches: Batches, ratio: float) -> Selection:
        """What stays. The model must be as it was afterwards.

        Args:
            model: in evaluation mode.
            layers: its layers; ``layers.dense(index)`` is a float32 copy of one that may be changed.
            batches: as given.
            ratio: above 0.
        """


def _remove(layers: LayersInMemory, chosen: Selection) -> None:
    model, modules = layers.model, dict(enumerate(layers.layers))
    cut(model, chosen.layers, uniform=False)
    for index, biases in chosen.biases.items():
        for path, bias in biases.items():
            module: Any = modules[index].get_submodule(path)
            if module.bias is None:
                module.bias = nn.Parameter(bias.to(module.weight), module.weight.requires_grad)
                model.save_pretrained = _refuse
            else:
                module.bias.data += bias.to(module.bias)


def _refuse(*_: Any, **__: Any) -> None:
    """Stands in for a model's ``save_pretrained``."""
    raise NotImplementedError(
        "This model has biases that its config cannot tell of: they would be lost at the next load. Measure it in "
        "memory, or prune with Flap(bias=False)."
    )


def slim(kind: str, layer: nn.Module, left: Slimmed, config: Any) -> nn.Module:
    """Take out of a layer, in place, what is not left."""
    keep_neurons(kind, layer, torch.tensor(left.neurons))
    keep_heads(kind, layer, torch.tensor(left.groups), config)
    return layer


def whole(layers: LayersInMemory) -> dict[int, Slimmed]:
    """Everything stays."""
    return {
        index: Slimmed(
            list(range(ffn_block(layers.kind, layer).units)),
            list(range(attention_block(layers.kind, layer, layers.config).units)),
        )
        for index, layer in enumerate(layers.layers)
    }
