"""Λ: the light adapter that stands in for the cloud's layers when the device drafts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from edgebolt.common.anatomy import Anatomy
from edgebolt.common.decoding import LayerStack, Segment
from edgebolt.common.decoding.layer_stack import attend
from edgebolt.common.files import replaced

if TYPE_CHECKING:
    from transformers import DynamicCache

__all__ = ["HatAdapter"]


class _Attention(nn.Module):
    """``h + attention(norm(h))``, called as a decoder layer is."""

    layer_idx, is_causal = 0, True

    def __init__(self, width: int, heads: int, key_value_heads: int, head_width: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.query = nn.Linear(width, heads * head_width, bias=False)
        self.key = nn.Linear(width, key_value_heads * head_width, bias=False)
        self.value = nn.Linear(width, key_value_heads * head_width, bias=False)
        self.output = nn.Linear(heads * head_width, width, bias=False)
        nn.init.zeros_(self.output.weight)  # Λ starts as the identity
        self.head_width, self.num_key_value_groups = head_width, heads // key_value_heads

    def forward(
        self,
        hidden: Tensor,
        past_key_values: Any,
        segments: Any,
        masks: Any,
        position_embeddings: Any = None,
        **_: Any,
    ) -> Tensor:
        normed = self.norm(hidden)
        query, key, value = (
            part(normed).unflatten(-1, (-1, self.head_width)).transpose(1, 2)
            for part in (self.query, self.key, self.value)
        )
        if position_embeddings is not None:
            from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

            query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        key, value = past_key_values.update(key, value, self.layer_idx)
        scaling = self.head_width**-0.5
        found, _nothing = attend(self, query, key, value, None, segments, masks, scaling=scaling)
        return hidden + cast(Tensor, self.output(found.flatten(-2)))


class HatAdapter(nn.Module):
    """Λ: one block of self-attention, without a feed-forward part, between a model's two ends.

    HAT's is like an attention module, a digest says; that it is no more is worked out from its weights:
    ``4 · width²``, where the model has as many key and value heads as query heads, are the 67 M (Vicuna-7B) and 105 M
    (13B) that the paper counts. That it is pre-norm, has a residual connection and the model's own rotary angles is
    ours, and so is the beginning as the identity.

    Args:
        model: a decoder of a known family; only its configuration and its rotary angles are used.
        key_value_heads: heads of keys and values; by default those of the model.

    Raises:
        ValueError: if the heads cannot be shared out.

    Example::

        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from edgebolt.common.decoding import new_cache
        >>> sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
        >>> adapter = HatAdapter(LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=20)))
        >>> rows = torch.randn(3, 8)
        >>> torch.equal(adapter(rows, new_cache()), rows)  # not trained yet
        True
    """

    def __init__(self, model: nn.Module, key_value_heads: int | None = None) -> None:
        super().__init__()
        anatomy = Anatomy(model)
        config: Any = anatomy.model.config
        heads = int(config.num_attention_heads)
        own = int(getattr(config, "num_key_value_heads", None) or heads)
        groups = own if key_value_heads is None else key_value_heads
        if groups < 1 or heads % groups:
            raise ValueError(f"key_value_heads={groups}: the model's {heads} heads cannot be shared out among them.")
        width = int(config.hidden_size)
        head_width = int(getattr(config, "head_dim", None) or width // heads)
        self.sizes = {"width": width, "heads": heads, "key_value_heads": groups, "head_width": head_width}
        rotary = anatomy.family.rotary
        angles = None if rotary is None else anatomy.backbone.get_submodule(rotary)
        self.layers = LayerStack([_Attention(**self.sizes)], angles)
        weight = next(anatomy.model.parameters())
        self.to(device=weight.device, dtype=weight.dtype)

    def forward(
        self, rows: Tensor, cache: DynamicCache, positions: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Hidden states behind the device's first layers to what would come out of the cloud.

        Shape ``[rows, width]`` to the same; one text, whose cache grows. ``positions`` and ``mask`` are those of
        :class:`edgebolt.common.decoding.Segment`.
        """
        return cast(Tensor, self.layers(rows, [Segment(cache, len(rows), positions, mask)]))

    def save(self, file: str | Path) -> None:
        """Write the adapter alone, as safetensors with its sizes."""
        tensors = {name: value.contiguous() for name, value in self.state_dict().items()}
        with replaced(file) as partial:
            save_file(tensors, partial, {"hat_adapter": json.dumps(self.sizes)})

    @classmethod
    def load(cls, file: str | Path, model: nn.Module) -> HatAdapter:
        """Read an adapter for a model.

        Raises:
            ValueError: if the file is no adapter, or one of another model's sizes.
        """
        try:
            with safe_open(str(file), "pt") as opened:
                sizes = json.loads((opened.metadata() or {}).get("hat_adapter", "null"))
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{file} is no safetensors file: {error}") from error
        if not isinstance(sizes, dict):
            raise ValueError(f"{file} is no adapter that HatAdapter.save has written.")
        adapter = cls(model, sizes.get("key_value_heads"))
        if adapter.sizes != sizes:
            raise ValueError(
                f"{file} is an adapter of {sizes}, and the model needs {adapter.sizes}: train one for it."
            )
        adapter.load_state_dict(tensors)
        return adapter
