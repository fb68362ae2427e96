"""The two ends of a decoder: token embeddings, and the norm and head that turn hidden states into logits."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from edgebolt.common.anatomy import Anatomy

__all__ = ["Embedding", "Head", "longest_text"]


class Embedding(nn.Module):
    """Tokens and positions to the hidden states that the first layer gets; shares the model's tables.

    Args:
        model: a decoder of a known family.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        anatomy = Anatomy(model)
        self.tokens = anatomy.embedding
        learned = anatomy.family.positions
        self.positions = None if learned is None else anatomy.backbone.get_submodule(learned)

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Shapes ``[rows]`` and ``[rows]`` to ``[rows, width]``."""
        found = self.tokens(tokens)
        return cast(Tensor, found if self.positions is None else found + self.positions(positions))


class Head(nn.Module):
    """Hidden states behind the last layer to logits; shares the model's norm and head.

    Args:
        model: a decoder with a language-model head.

    Raises:
        ValueError: for a model without such a head.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        anatomy = Anatomy(model)
        if anatomy.head_name != "lm_head" or anatomy.head is None:
            raise ValueError(
                f"{type(anatomy.model).__name__} has no language-model head: load it with AutoModelForCausalLM."
            )
        self.norm = nn.Identity() if anatomy.norm is None else anatomy.norm
        self.head = anatomy.head

    def forward(self, hidden: Tensor) -> Tensor:
        """Shape ``[rows, width]`` to ``[rows, vocabulary]``."""
        return cast(Tensor, self.head(self.norm(hidden)))


def longest_text(model: nn.Module) -> int:
    """Tokens that a text may have: the positions that the model has, or its sliding window if that is shorter.

    Caches keep all positions here, so that beyond a window a model would see more than it does elsewhere.

    Example::

        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=64)
        >>> longest_text(LlamaForCausalLM(config))
        64
    """
    config: Any = Anatomy(model).model.config
    kinds = getattr(config, "layer_types", None)
    slides = kinds is None or "sliding_attention" in kinds
    window = getattr(config, "sliding_window", None) if slides else None
    return int(min(config.max_position_embeddings, window or config.max_position_embeddings))
