"""A decoder cut in three: the first layers and the head for the device, the layers between them for the cloud."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from edgebolt.common.anatomy import Anatomy
from edgebolt.common.decoding import Embedding, Head, LayerStack, Segment, cache_length, longest_text

if TYPE_CHECKING:
    from transformers import DynamicCache

__all__ = ["InputModel", "SplitModel", "split"]


class InputModel(nn.Module):
    """Embeddings and the first layers.

    Args:
        embedding: of tokens and positions.
        layers: the first ones.
    """

    def __init__(self, embedding: Embedding, layers: LayerStack) -> None:
        super().__init__()
        self.embedding, self.layers = embedding, layers

    def forward(
        self, tokens: Tensor, cache: DynamicCache, positions: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Hidden states of tokens of one text, shape ``[tokens]`` to ``[tokens, width]``; appends to the cache.

        ``positions`` and ``mask`` are those of :class:`edgebolt.common.decoding.Segment`.
        """
        count, cached = len(tokens), cache_length(cache)
        tokens = tokens.to(next(self.parameters()).device)
        if positions is None:
            positions = torch.arange(cached, cached + count)
        rows = self.embedding(tokens, positions.to(tokens.device))
        return cast(Tensor, self.layers(rows, [Segment(cache, count, positions, mask)]))


@dataclass(frozen=True)
class SplitModel:
    """The three parts of a decoder; they share its weights.

    Args:
        input: embeddings and the first layers, on the device.
        middle: all other layers, in the cloud.
        output: final norm and head, on the device.
        width: of the hidden states between them.
        longest: tokens that a text may have.
        stops: tokens that end a text, as the model's generation configuration has them.
    """

    input: InputModel
    middle: LayerStack
    output: Head
    width: int
    longest: int
    stops: frozenset[int] = frozenset()


def split(model: nn.Module, device_layers: int = 2) -> SplitModel:
    """Cut a decoder in three (HAT, through a digest: embedding and first layers, middle layers, head).

    Run one after the other, in any chunks, the parts give what the model gives in the same chunks, bit for bit.

    Args:
        model: a decoder with a language-model head: Llama, Qwen2, Mistral or GPT-2. It is put in evaluation mode, and
            shares its weights with the parts.
        device_layers: layers of the device; the paper has 2 of 32 (Vicuna-7B) and 3 of 40 (13B).

    Raises:
        ValueError: if no layer were left for the device or for the cloud, or if the model has no such head.
        NotImplementedError: for an encoder, and for dynamic rotary scaling.

    Example::

        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from edgebolt.common.decoding import new_cache
        >>> sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=20))
        >>> parts, tokens = split(model, device_layers=1), torch.tensor([3, 1, 4])
        >>> rows = parts.input(tokens, new_cache())
        >>> logits = parts.output(parts.middle(rows, [Segment(new_cache(), 3)]))
        >>> torch.equal(logits, model(tokens[None]).logits[0])
        True
    """
    anatomy = Anatomy(model)
    config: Any = anatomy.model.config
    count, kind = len(anatomy.layers), config.model_type
    if anatomy.family.norm is None:
        raise NotImplementedError(f"{kind} is an encoder, which does not generate: split a decoder.")
    if not 1 <= device_layers < count:
        raise ValueError(f"device_layers={device_layers}: the model has {count}; leave the cloud and the device one.")
    model.eval()
    generation = getattr(anatomy.model, "generation_config", None)
    stops = getattr(generation, "eos_token_id", None)
    return SplitModel(
        InputModel(Embedding(model), LayerStack.of(model, 0, device_layers)),
        LayerStack.of(model, device_layers, count),
        Head(model),
        int(config.hidden_size),
        longest_text(model),
        frozenset([stops] if isinstance(stops, int) else stops or []),
    )
