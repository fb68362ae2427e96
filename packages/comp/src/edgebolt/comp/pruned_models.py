"""Model classes with layers of unequal sizes, which transformers loads by their own ``model_type``.

``comp_llama`` is Llama whose config says, in ``pruned``, what is left of each layer: the model is built as ever, and
its layers are then resized, before the weights are read. Importing :mod:`edgebolt.comp` registers the classes with
``AutoConfig`` and the ``AutoModel`` classes.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto import modeling_auto

from edgebolt.common.anatomy import FAMILIES, Anatomy
from edgebolt.comp.blocks import resize_layer
from edgebolt.comp.mpnet import set_kept_heads

__all__ = [
    "KINDS",
    "as_pruned",
    "is_pruned",
    "layer_lists",
    "pruned_class",
    "pruned_config",
    "renumber",
    "stock_config",
]

KINDS = ("llama", "qwen2", "mistral", "gpt2", "bert", "roberta", "mpnet")
AUTO_CLASSES = {
    "AutoModel": "MODEL_MAPPING_NAMES",
    "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "AutoModelForMaskedLM": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "AutoModelForMultipleChoice": "MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES",
    "AutoModelForQuestionAnswering": "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
    "AutoModelForSequenceClassification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "AutoModelForTokenClassification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
}
_CLASSES: dict[type, type] = {}  # stock model class -> ours


class _Resized:
    """Comes before a stock model class: resizes the layers that it has built."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        resize_model(self)  # type: ignore[arg-type]

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, but that no weight below a head is ever filled with random numbers.

        Raises:
            ValueError: for ``ignore_mismatched_sizes=True``, and for a checkpoint that lacks a tensor; heads and
                poolers, which a new task begins with, may be missing.
        """
        if kwargs.get("ignore_mismatched_sizes"):
            raise ValueError(
                "ignore_mismatched_sizes=True would replace weights that do not fit by random ones. A pruned model "
                "has its sizes in its config: leave the argument out. For a new head, load the model without it and "
                "put the head on."
            )
        told = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(*args, **kwargs, output_loading_info=True)  # type: ignore[misc]
        inside = Anatomy(model).prefix
        missing = sorted(
            name for name in info["missing_keys"] if name.startswith(inside) and "pooler" not in name.split(".")
        )
        if missing:
            raise ValueError(
                f"The checkpoint lacks {len(missing)} tensors, such as {missing[:3]}: it is damaged, or something "
                "else has written it. Prune the dense model again."
            )
        return (model, info) if told else model


def resize_model(model: nn.Module) -> None:
    """Give a freshly built model the layers that its config tells of."""
    config: Any = model.config
    pruned = getattr(config, "pruned", None)
    if pruned is None:
        return
    kind = config.model_type.removeprefix("comp_")
    layers = Anatomy(model).layers
    if not len(layers) == len(pruned["layers"]) == len(pruned["neurons"]) == len(pruned["groups"]):
        raise ValueError(
            f"The config has num_hidden_layers={config.num_hidden_layers} and tells of {len(pruned['layers'])} "
            "pruned layers: take the config that was saved with the model."
        )
    for index, layer in enumerate(layers):
        before = list(layer.parameters())
        resize_layer(kind, layer, config, pruned["neurons"][index], pruned["groups"][index])
        if kind == "mpnet":
            set_kept_heads(layer, pruned["heads"][index])
        if getattr(config, "scale_attn_by_inverse_layer_idx", False):  # GPT-2: the scale is of the original depth
            attention: Any = layer.attn
            attention.scaling = (attention.head_dim**-0.5 if config.scale_attn_weights else 1.0) / (
                pruned["layers"][index] + 1
            )
        for module in layer.modules():
            # Not on the meta device, where a checkpoint is loaded into: these are to be trained from scratch.
            own = [parameter for parameter in module.parameters(recurse=False) if not parameter.is_meta]
            if any(all(parameter is not old for old in before) for parameter in own):
                with torch.no_grad():
                    model._init_weights(module)  # type: ignore[operator]


def renumber(layers: nn.ModuleList) -> None:
    """Let every layer know its place, by which key-value caches are found."""
    for index, layer in enumerate(layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index  # type: ignore[assignment]


def layer_lists(config: Any, kept: list[int]) -> dict[str, list[Any]]:
    """The entries of a config that list something for each layer, cut to the layers that are kept."""
    count = config.num_hidden_layers
    return {
        key: [value[index] for index in kept]
        for key, value in config.to_dict().items()
        if isinstance(value, list) and len(value) == count and "layer" in key
    }


def is_pruned(config: Any) -> bool:
    """Whether a config is of one of the classes here."""
    return str(config.model_type).startswith("comp_")


def pruned_class(stock: type) -> type:
    """Our class for a stock one; ours for ours.

    Raises:
        TypeError: for a class that transformers' auto classes do not know.
    """
    if issubclass(stock, _Resized):
        return stock
    if stock not in _CLASSES:
        raise TypeError(
            f"{stock.__name__} is none of the classes that transformers' auto classes build for {KINDS}: pass the "
            "model that such a class holds, or a PeftModel after merge_and_unload()."
        )
    return _CLASSES[stock]


def as_pruned(model: Any, positions: list[int], pruned: dict[str, Any]) -> None:
    """Make a model whose layers were changed in place one of our classes, so that it is saved as what it is.

    Args:
        model: changed in place.
        positions: which of the layers that it had are left.
        pruned: what its config is to tell of them.
    """
    target = pruned_class(type(model))
    pruned_config(model.config, target, positions, pruned)
    model.__class__ = target


def pruned_config(config: Any, target: type, positions: list[int], pruned: dict[str, Any]) -> None:
    """Let a config tell of a pruned model. It stays the same object, which the layers hold too."""
    _cut_lists(config, positions)
    config.__class__ = target.config_class  # type: ignore[attr-defined]
    config.pruned = pruned
    config.architectures = [target.__name__]


def stock_config(config: Any, positions: list[int], width: int) -> None:
    """Let a config tell of fewer layers, all of one width, in transformers' own terms."""
    _cut_lists(config, positions)
    setattr(config, "n_inner" if config.model_type == "gpt2" else "intermediate_size", width)


def _cut_lists(config: Any, positions: list[int]) -> None:
    for key, value in layer_lists(config, positions).items():
        setattr(config, key, value)
    config.num_hidden_layers = len(positions)


def _register() -> None:
    here = sys.modules[__name__]
    for kind in KINDS:
        package = import_module(f"transformers.models.{kind}.modeling_{kind}")
        stock_config = transformers.models.auto.CONFIG_MAPPING[kind]
        name = f"Comp{stock_config.__name__}"
        config = type(name, (stock_config,), {"model_type": f"comp_{kind}", "__module__": __name__})
        setattr(here, name, config)
        transformers.AutoConfig.register(f"comp_{kind}", config, exist_ok=True)
        FAMILIES[f"comp_{kind}"] = FAMILIES[kind]
        for auto, names in AUTO_CLASSES.items():
            found = getattr(modeling_auto, names).get(kind)
            if found is None:
                continue
            stock = getattr(package, found)
            if stock not in _CLASSES:
                body = {"config_class": config, "__module__": __name__, "__doc__": stock.__doc__}
                _CLASSES[stock] = type(f"Comp{found}", (_Resized, stock), body)
                setattr(here, f"Comp{found}", _CLASSES[stock])
            getattr(transformers, auto).register(config, _CLASSES[stock], exist_ok=True)


_register()
