"""MPNet's attention with some of its heads."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.models.mpnet.modeling_mpnet import MPNetSelfAttention

__all__ = ["PrunedMPNetSelfAttention", "kept_heads", "set_kept_heads"]


class PrunedMPNetSelfAttention(MPNetSelfAttention):
    """Takes of the relative position bias, which all layers share, the heads that this layer has."""

    kept_heads: tuple[int, ...]

    def forward(
        self, hidden_states: Tensor, attention_mask: Any = None, position_bias: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        """As in transformers."""
        if position_bias is not None:
            position_bias = position_bias[:, list(self.kept_heads)]
        return super().forward(hidden_states, attention_mask, position_bias, *args, **kwargs)  # type: ignore[no-untyped-call]


def set_kept_heads(layer: nn.Module, heads: list[int]) -> None:
    """Say which heads of the dense model an MPNet layer has."""
    attention: Any = layer.get_submodule("attention.attn")
    attention.__class__ = PrunedMPNetSelfAttention
    attention.kept_heads = tuple(heads)


def kept_heads(layer: nn.Module) -> list[int]:
    """Which heads of the dense model an MPNet layer has."""
    attention: Any = layer.get_submodule("attention.attn")
    return list(getattr(attention, "kept_heads", range(attention.num_attention_heads)))
