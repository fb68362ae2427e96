"""The one place that knows model families: where a transformer keeps its layers, projections and heads."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

from torch import nn

__all__ = ["FAMILIES", "Anatomy", "Family"]


@dataclass(frozen=True)
class Family:
    """Where the parts of one family of transformers are, as dotted paths: a row of :data:`FAMILIES`.

    Args:
        layers: the list of layers, inside the backbone (``model.base_model`` in transformers' terms).
        embedding: token embeddings, inside the backbone.
        query, key, value, output: the attention's projections, inside a layer. A fused projection is named for each
            of those that it holds.
        mlp: the projections of the feed-forward part, inside a layer, in the order of use; the last one leads back
            to the hidden width.
        norm: the norm after the last layer, inside the backbone; None where there is none.
        heads: names that a task head may have in the whole model.
        pooler: what lies between the backbone's layers and a classification head, inside the backbone; None where
            the family has none.
        positions: the table of learned positions that is added to the embeddings, inside the backbone; None where
            positions come in otherwise.
        rotary: what turns positions into the angles that decoder layers are given, inside the backbone; None where
            they are given none.
    """

    layers: str
    embedding: str
    query: str
    key: str
    value: str
    output: str
    mlp: tuple[str, ...]
    norm: str | None = None
    heads: tuple[str, ...] = ("classifier", "score", "lm_head")
    pooler: str | None = None
    positions: str | None = None
    rotary: str | None = None


_ROBERTA = Family(
    layers="encoder.layer",
    embedding="embeddings.word_embeddings",
    query="attention.self.query",
    key="attention.self.key",
    value="attention.self.value",
    output="attention.output.dense",
    mlp=("intermediate.dense", "output.dense"),
    heads=("classifier", "lm_head", "cls"),
)
_BERT = replace(_ROBERTA, pooler="pooler")
_LLAMA = Family(
    layers="layers",
    embedding="embed_tokens",
    query="self_attn.q_proj",
    key="self_attn.k_proj",
    value="self_attn.v_proj",
    output="self_attn.o_proj",
    mlp=("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    norm="norm",
    rotary="rotary_emb",
)

FAMILIES: dict[str, Family] = {
    "bert": _BERT,
    "gpt2": Family(
        layers="h",
        embedding="wte",
        query="attn.c_attn",
        key="attn.c_attn",
        value="attn.c_attn",
        output="attn.c_proj",
        mlp=("mlp.c_fc", "mlp.c_proj"),
        norm="ln_f",
        positions="wpe",
    ),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mpnet": Family(
        layers="encoder.layer",
        embedding="embeddings.word_embeddings",
        query="attention.attn.q",
        key="attention.attn.k",
        value="attention.attn.v",
        output="attention.attn.o",
        mlp=("intermediate.dense", "output.dense"),
        heads=("classifier", "lm_head"),
    ),
    "qwen2": _LLAMA,
    "roberta": _ROBERTA,
}
"""``config.model_type`` of transformers -> :class:`Family`. Add a row for a family that is missing."""


class Anatomy:
    """The parts of one model.

    Args:
        model: a transformers model, bare or with a head, or a PEFT model around one.

    Attributes:
        model: the transformers model itself.
        family: its row.
        prefix: path of the backbone in ``model`` with a final dot; empty if ``model`` is the backbone.

    Raises:
        TypeError: if ``model`` is no transformers model.
        KeyError: if its family has no row; the message shows how to add one.

    Example::

        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> config = BertConfig(hidden_size=8, num_hidden_layers=3, num_attention_heads=2, intermediate_size=16)
        >>> anatomy = Anatomy(BertForSequenceClassification(config))
        >>> len(anatomy.layers), anatomy.head_name, anatomy.path(2, "query")
        (3, 'classifier', 'bert.encoder.layer.2.attention.self.query')
    """

    def __init__(self, model: nn.Module) -> None:
        if hasattr(model, "get_base_model"):  # PEFT's wrapper
            wrapper: Any = model
            model = wrapper.get_base_model()
        config = getattr(model, "config", None)
        if not hasattr(config, "model_type"):
            raise TypeError(
                f"{type(model).__name__} is no transformers model: pass a PreTrainedModel or a PeftModel, such as "
                "the attribute of your LightningModule that holds it."
            )
        kind = config.model_type  # type: ignore[union-attr]
        if kind not in FAMILIES:
            raise KeyError(
                f"{type(model).__name__} is of family {kind!r}, and edgebolt.common.anatomy knows {sorted(FAMILIES)}. "
                f"Add a row before you build it: FAMILIES[{kind!r}] = Family(layers='layers', "
                "embedding='embed_tokens', query='self_attn.q_proj', key=..., value=..., output=..., mlp=(...)), with "
                "the names that print(model) shows."
            )
        self.model, self.family = model, FAMILIES[kind]
        name = str(getattr(model, "base_model_prefix", ""))
        self.prefix = f"{name}." if name and hasattr(model, name) else ""

    @property
    def backbone(self) -> nn.Module:
        """The model without its head."""
        return self.model.get_submodule(self.prefix.removesuffix("."))

    @property
    def layers(self) -> nn.ModuleList:
        """The transformer layers, input first."""
        return cast(nn.ModuleList, self.backbone.get_submodule(self.family.layers))

    @property
    def embedding(self) -> nn.Module:
        """The token embeddings."""
        return self.backbone.get_submodule(self.family.embedding)

    @property
    def norm(self) -> nn.Module | None:
        """The norm after the last layer."""
        return None if self.family.norm is None else self.backbone.get_submodule(self.family.norm)

    @property
    def head_name(self) -> str | None:
        """Name of the task head; None for a bare backbone."""
        return next((name for name in self.family.heads if hasattr(self.model, name)), None)

    @property
    def head(self) -> nn.Module | None:
        """The task head."""
        return None if self.head_name is None else self.model.get_submodule(self.head_name)

    @property
    def classification_head(self) -> list[str]:
        """Paths of all that lies above the layers and belongs to a classification task: pooler and head.

        BERT's pooler and classifier compute what RoBERTa's ``classifier`` does: dense, tanh, dense. Empty for a
        language model and for a bare backbone.
        """
        if self.head_name not in ("classifier", "score"):
            return []
        pooler = self.family.pooler
        pooled = pooler is not None and getattr(self.backbone, pooler, None) is not None
        return [f"{self.prefix}{pooler}"] * pooled + [str(self.head_name)]

    def path(self, layer: int, part: str) -> str:
        """Dotted path of a projection of a layer in :attr:`model`.

        Args:
            layer: index from the input, 0 first.
            part: ``"query"``, ``"key"``, ``"value"`` or ``"output"``.
        """
        return f"{self.prefix}{self.family.layers}.{layer}.{self.inside(part)[0]}"

    def inside(self, part: str) -> tuple[str, ...]:
        """Paths of a part inside a layer: of one projection, or of all those of the ``"mlp"``.

        Raises:
            ValueError: for a part that no layer has.
        """
        if part not in ("query", "key", "value", "output", "mlp"):
            raise ValueError(f"part={part!r}: a layer has 'query', 'key', 'value', 'output' and 'mlp'.")
        found: Any = getattr(self.family, part)
        return (found,) if isinstance(found, str) else tuple(found)
