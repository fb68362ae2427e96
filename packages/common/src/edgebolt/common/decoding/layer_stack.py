"""Consecutive layers of a decoder, run on the rows of several conversations at once.

The rows of all conversations lie one behind the other, so that projections and feed-forward parts see one matrix;
attention alone goes conversation by conversation, each with its own cache. Nothing is padded, and what a conversation
gets does not depend on the lengths of the others.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from edgebolt.common.anatomy import Anatomy
from edgebolt.common.decoding.caches import cache_length

if TYPE_CHECKING:
    from transformers import DynamicCache

__all__ = ["LayerStack", "Segment", "attend", "segment_attention"]

ATTENTION = "edgebolt_segments"


@dataclass(frozen=True)
class Segment:
    """Rows of one conversation.

    Args:
        cache: of the conversation, for the layers of one stack; the rows' keys and values are appended.
        rows: how many rows it has in this call.
        positions: their positions in the text, shape ``[rows]``; by default they go on behind the cache.
        mask: what each row sees of the cache and of these rows, boolean, shape ``[rows, cached + rows]``, such as
            :meth:`DraftTree.mask` gives; by default each row sees all before it and itself.
    """

    cache: DynamicCache
    rows: int
    positions: Tensor | None = None
    mask: Tensor | None = None


def segment_attention(config: Any) -> Any:
    """A copy of a model's configuration by which its layers run as a :class:`LayerStack` calls them.

    Raises:
        NotImplementedError: for models whose keys depend on the length of the text (dynamic rotary scaling).
    """
    from transformers import AttentionInterface

    scaling = str((getattr(config, "rope_parameters", None) or {}).get("rope_type", "default"))
    if scaling in ("dynamic", "longrope"):
        raise NotImplementedError(
            f"rope_type={scaling!r}: angles change with the length of the text, so that a cache cannot be cut back "
            "or shared. Load the model with rope_parameters of type 'default', 'linear', 'yarn' or 'llama3'."
        )
    AttentionInterface.register(ATTENTION, attend)
    config = copy.deepcopy(config)
    config._attn_implementation = ATTENTION
    return config


class _Packed:
    """What the layers take for a cache: hands each conversation its rows."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        self.segments, self.counts = segments, [segment.rows for segment in segments]

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        parts = zip(self.segments, torch.split(keys, self.counts, 2), torch.split(values, self.counts, 2), strict=True)
        for segment, key, value in parts:
            segment.cache.update(key, value, layer)
        return keys, values


def attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: None, segments: Sequence[Segment] = (),
    masks: Sequence[Tensor | None] = (), **options: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention of transformers, for one conversation after the other."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    found = []
    queries = torch.split(query, [each.rows for each in segments], 2)
    for segment, rows, seen in zip(segments, queries, masks, strict=True):
        held: Any = segment.cache.layers[module.layer_idx]
        # Without a mask, several rows are causal only where they are all there is: see `LayerStack._mask`.
        found.append(sdpa_attention_forward(module, rows, held.keys, held.values, seen, **options)[0])
    return torch.cat(found, 1), None


class LayerStack(nn.Module):
    """Decoder layers over packed rows.

    Args:
        layers: called as transformers' decoder layers are, with attention by :func:`segment_attention`.
        rotary: what turns positions into the angles that the layers are given; None where they are given none.

    Example::

        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
        >>> stack = LayerStack.of(LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=20)).eval(), 1, 3)
        >>> from edgebolt.common.decoding import new_cache
        >>> one, other = new_cache(), new_cache()
        >>> stack(torch.randn(5, 8), [Segment(one, 2), Segment(other, 3)]).shape
        torch.Size([5, 8])
        >>> one.get_seq_length(), other.get_seq_length()
        (2, 3)
    """

    def __init__(self, layers: Iterable[nn.Module], rotary: nn.Module | None = None) -> None:
        super().__init__()
        self.layers, self.rotary = nn.ModuleList(layers), rotary

    @classmethod
    def of(cls, model: nn.Module, first: int, last: int) -> LayerStack:
        """Layers ``first`` to ``last`` of a model, sharing its weights, with numbers of their own for the caches.

        Args:
            model: a decoder of a known family (Llama, Qwen2, Mistral, GPT-2).
            first: the first layer.
            last: the layer behind the last one, as in ``range``.

        Raises:
            ValueError: if the model has no such layers.
            NotImplementedError: for models whose keys depend on the length of the text (dynamic rotary scaling).
        """
        anatomy = Anatomy(model)
        if not 0 <= first < last <= len(anatomy.layers):
            raise ValueError(f"Layers {first} to {last}: take at least one of the model's {len(anatomy.layers)}.")
        config = segment_attention(anatomy.model.config)
        layers = []
        for number, layer in enumerate(anatomy.layers[first:last]):
            # Weights and buffers are the model's own; what is new is the number, by which caches are addressed.
            shared: dict[int, Any] = {id(each): each for each in (*layer.parameters(), *layer.buffers())}
            shared[id(anatomy.model.config)] = config
            mine = copy.deepcopy(layer, shared)
            numbered: list[Any] = [part for part in mine.modules() if hasattr(part, "layer_idx")]
            for part in numbered:
                part.layer_idx = number
            layers.append(mine)
        rotary = anatomy.family.rotary
        return cls(layers, None if rotary is None else anatomy.backbone.get_submodule(rotary))

    def forward(self, hidden: Tensor, segments: Sequence[Segment]) -> Tensor:
        """Run the layers and append to the caches.

        Args:
            hidden: what goes into the first layer, shape ``[rows, width]``: all rows of the first segment, of the
                second …
            segments: whose rows they are.

        Returns:
            What comes out of the last layer, shape ``[rows, width]``.

        Raises:
            ValueError: if there are more or fewer rows than the segments say, if positions or a mask have another
                shape than they need, or if two segments have one cache; no cache has changed then.
        """
        counts = [segment.rows for segment in segments]
        if sum(counts) != len(hidden) or min(counts, default=0) < 1:
            raise ValueError(f"{len(hidden)} rows for segments of {counts}: each row belongs to one segment.")
        if len({id(segment.cache) for segment in segments}) < len(segments):
            raise ValueError("Two segments have one cache: give a conversation's rows as one segment.")
        masks, positions = [], []
        for segment in segments:
            cached = cache_length(segment.cache)
            masks.append(self._mask(segment, cached, hidden))
            given = segment.positions
            if given is not None and given.shape != (segment.rows,):
                raise ValueError(f"positions of shape {list(given.shape)} for {segment.rows} rows: give each row one.")
            positions.append(torch.arange(cached, cached + segment.rows) if given is None else given)
        where = torch.cat(positions).to(hidden.device).unsqueeze(0)
        options: dict[str, Any] = {"segments": segments, "masks": masks, "past_key_values": _Packed(segments)}
        out = hidden.unsqueeze(0)
        if self.rotary is not None:
            options["position_embeddings"] = self.rotary(out, position_ids=where)
        for layer in self.layers:
            out = layer(out, attention_mask=None, position_ids=where, use_cache=True, **options)
        return out.squeeze(0)

    @staticmethod
    def _mask(segment: Segment, cached: int, hidden: Tensor) -> Tensor | None:
        """Additive, shape ``[1, 1, rows, cached + rows]``, in the dtype of the rows; None where none is needed."""
        seen, shape = segment.mask, (segment.rows, cached + segment.rows)
        if seen is None:
            if segment.rows == 1 or not cached:
                return None  # one row sees everything; rows that are all there is are causal by themselves
            seen = torch.ones(shape, dtype=torch.bool).tril(cached)
        elif tuple(seen.shape) != shape:
            raise ValueError(
                f"mask of shape {list(seen.shape)}: {cached} cached and {segment.rows} rows need {shape}."
            )
        mask = torch.zeros(shape, dtype=hidden.dtype).masked_fill(~seen, torch.finfo(hidden.dtype).min)
        return mask.to(hidden.device)[None, None]
