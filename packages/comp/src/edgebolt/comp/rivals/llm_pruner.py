"""LLM-Pruner: what the loss would change least without goes, by gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from edgebolt.comp.blocks import Block
from edgebolt.comp.in_memory import LayersInMemory
from edgebolt.comp.rivals.rival import Batches, Rival, Selection
from edgebolt.comp.rivals.units import blocks_of, coupled, select, uniform_counts

__all__ = ["LlmPruner"]


@dataclass(frozen=True, kw_only=True)
class LlmPruner(Rival):
    """First-order Taylor scores of coupled structures, from gradients of the language model's loss.

    Ma et al. 2023 (arXiv 2305.11627), without the LoRA training that follows there ("untuned"). Units are neurons and
    heads with all that depends on them. ``element``: ``S = Σ |w ∂L/∂w|`` over the unit's weights (the paper's
    Element¹, its best untuned one); ``vector``: ``S = |Σ w ∂L/∂w|``, to first order what the loss changes by when the
    unit goes. ``L`` is the mean loss of a token over all batches. Layers 4 to L − 3 (counted from 0) are pruned,
    block by block, each of them by the same share; so they lose more than the ratio, which is of all layers. Weights
    and gradients of the whole model are in memory.

    Reduced: the second-order term (Element²); with grouped queries the unit is a key-value head with all query heads
    that read it.

    Args:
        attention: remove key-value heads, with the query heads that read them, as well as neurons.
        score: ``"element"`` or ``"vector"``.
        first: layers at the input that stay whole.
        last: layers at the output that stay whole.

    Raises:
        ValueError: for an argument that is out of range.

    Example::

        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(hidden_size=16, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2,
        ...                      vocab_size=50)
        >>> model, batches = LlamaForCausalLM(config), [{"input_ids": torch.randint(50, (2, 8))}]
        >>> report = LlmPruner(first=1, last=1).prune(model, batches, ratio=0.2)
        >>> [len(layer["neurons"]) == 64 for layer in report.layers], round(report.ratio, 2)
        ([True, False, False, True], 0.20)
    """

    attention: bool = True
    score: Literal["element", "vector"] = "element"
    first: int = 4
    last: int = 2

    def __post_init__(self) -> None:
        if self.score not in ("element", "vector"):
            raise ValueError(f"score={self.score!r}: use 'element' or 'vector'.")
        if self.first < 0 or self.last < 0:
            raise ValueError(f"first={self.first}, last={self.last}: use 0 or more.")

    def choose(self, model: Any, layers: LayersInMemory, batches: Batches, ratio: float) -> Selection:
        """As in :class:`Rival`."""
        chosen = range(self.first, len(layers) - self.last)
        if not chosen:
            raise ValueError(
                f"first={self.first} and last={self.last} leave none of the {len(layers)} layers to be pruned: give "
                "smaller ones."
            )
        counts = uniform_counts(layers, ratio, self.attention, chosen)
        with loss_gradients(model, batches):
            scores = {
                index: {
                    block.name: taylor_scores(layers.kind, layers.layers[index], block, layers.config, self.score)
                    for block in blocks_of(layers, index, self.attention)
                }
                for index in chosen
            }
        return Selection(select(layers, counts, scores))


def taylor_scores(kind: str, layer: nn.Module, block: Block, config: Any, score: str) -> Tensor:
    """Score of each unit of a layer whose parameters have gradients; float32."""
    products = list(coupled(kind, layer, block, config, _product))
    if score == "element":
        return torch.stack([part.abs().sum(1) for part in products]).sum(0)
    return torch.stack([part.sum(1) for part in products]).sum(0).abs()


def _product(parameter: nn.Parameter) -> Tensor:
    if parameter.grad is None:
        return torch.zeros_like(parameter.data, dtype=torch.float32)
    return parameter.data.float() * parameter.grad.float()


@contextmanager
def loss_gradients(model: Any, batches: Batches) -> Iterator[float]:
    """Inside the block all parameters have the gradient of the mean loss of a token; afterwards what they had before.

    Yields:
        The loss.

    Raises:
        ValueError: for a model that gives no loss for its own input.
    """
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    device = before[0][0].device
    labels = [_labels(batch) for batch in batches]
    targets = [int((own[:, 1:] != -100).sum()) for own in labels]
    total = 0.0
    try:
        for parameter, _, _ in before:
            parameter.grad = None
            parameter.requires_grad_(True)
        for batch, own, count in zip(batches, labels, targets, strict=True):
            inputs = {name: tensor.to(device) for name, tensor in batch.items()}
            with torch.enable_grad():
                loss = getattr(model(**{**inputs, "labels": own.to(device), "use_cache": False}), "loss", None)
                if loss is None:
                    raise ValueError(
                        f"{type(model).__name__} gives no loss for labels: LLM-Pruner needs a causal language model."
                    )
                (loss * (count / sum(targets))).backward()
            total += float(loss.detach()) * count / sum(targets)
        yield total
    finally:
        for parameter, required, grad in before:
            parameter.requires_grad_(required)
            parameter.grad = grad


def _labels(batch: Any) -> Tensor:
    """The tokens themselves, which the model shifts; padding does not count."""
    if "labels" in batch:
        return batch["labels"]  # type: ignore[no-any-return]
    ids: Tensor = batch["input_ids"]
    mask = batch.get("attention_mask")
    return ids if mask is None else ids.masked_fill(mask == 0, -100)
