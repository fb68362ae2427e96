"""LoRA on a transformers model through PEFT, and its way back to plain PEFT."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from edgebolt.common.anatomy import Anatomy

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

__all__ = ["add_lora", "export_adapter"]


def add_lora(
    model: PreTrainedModel,
    ranks: int | Sequence[int] = 8,
    targets: Sequence[str] = ("query", "value"),
    scale: float = 2.0,
    dropout: float = 0.05,
) -> PeftModel:
    """Freeze a transformers model and add LoRA, ``W + s B A``, to projections of each of its layers (Hu et al. 2021).

    The scale ``s = alpha / r`` is the same in every layer, whatever the ranks. A classification head (``classifier``
    or ``score``, and BERT's pooler below it) stays outside the adapter, plain modules that are trained in full; a
    language model's head is frozen.

    Args:
        model: of a family that :mod:`edgebolt.common.anatomy` knows.
        ranks: one for all layers, or one for each, input first.
        targets: of ``"query"``, ``"key"``, ``"value"``, ``"output"``, ``"mlp"``.
        scale: ``s``.
        dropout: on the input of the adapter, 0 to 1.

    Returns:
        PEFT's model around ``model``, whose LoRA and classification head require gradients and nothing else does.

    Raises:
        ModuleNotFoundError: without PEFT; the message names the extra.
        ValueError: for ranks, targets, scale or dropout that are out of range.

    Example::

        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> config = BertConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)
        >>> model = add_lora(BertForSequenceClassification(config), ranks=[1, 2])
        >>> sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and "lora_" in n)
        96
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("LoRA needs PEFT: pip install 'edgebolt-common[llm]'") from error
    anatomy = Anatomy(model)
    count = len(anatomy.layers)
    each = [ranks] * count if isinstance(ranks, int) else list(ranks)
    if len(each) != count or not all(type(rank) is int and rank >= 1 for rank in each):
        raise ValueError(f"ranks={ranks!r}: use a whole number of 1 or more, or {count} of them, one for each layer.")
    if not targets or not scale > 0 or not 0 <= dropout < 1:
        raise ValueError(
            f"targets={targets!r}, scale={scale!r}, dropout={dropout!r}: name at least one projection, "
            "a scale above 0 and a dropout of 0 to 1."
        )
    inside = list(dict.fromkeys(path for part in targets for path in anatomy.inside(part)))
    rank_of = {
        f"{anatomy.prefix}{anatomy.family.layers}.{layer}.{path}": rank
        for layer, rank in enumerate(each)
        for path in inside
    }
    uniform = len(set(each)) == 1
    config = LoraConfig(
        r=each[-1],
        lora_alpha=_alpha(scale, each[-1]),
        rank_pattern={} if uniform else rank_of,
        alpha_pattern={} if uniform else {path: _alpha(scale, rank) for path, rank in rank_of.items()},
        target_modules=list(rank_of),
        lora_dropout=dropout,
        fan_in_fan_out=type(model.get_submodule(next(iter(rank_of)))).__name__ == "Conv1D",  # GPT-2
    )
    adapted: PeftModel = get_peft_model(model, config)
    for path in anatomy.classification_head:
        model.get_submodule(path).requires_grad_(True)
    return adapted


def _alpha(scale: float, rank: int) -> Any:  # PEFT says int and takes any number
    alpha = scale * rank
    return int(alpha) if float(alpha).is_integer() else alpha


def export_adapter(module: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write a folder that plain PEFT loads: ``PeftModel.from_pretrained(base, path)`` gives the same logits.

    Adapters of any ranks and the trained head: ``adapter_config.json`` and ``adapter_model.safetensors``. Files of
    an earlier export are replaced one by one, each at once.

    Args:
        module: a PEFT model, or a module that holds one (a ``LightningModule``).
        folder: where the files go; made if missing.

    Raises:
        ValueError: if there is no PEFT model inside, or more than one.

    Example::

        >>> import copy, tempfile, torch
        >>> from peft import PeftModel
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> config = BertConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)
        >>> base = BertForSequenceClassification(config).eval()
        >>> tokens, model = torch.arange(6).view(2, 3), add_lora(copy.deepcopy(base), ranks=[1, 2])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     export_adapter(model, folder)
        ...     loaded = PeftModel.from_pretrained(base, folder)
        >>> bool(torch.equal(loaded(tokens).logits, model(tokens).logits))
        True
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    model = peft_model(module)
    adapter = model.active_adapter
    tensors: dict[str, Tensor] = dict(get_peft_model_state_dict(model, adapter_name=adapter))
    config: Any = deepcopy(model.peft_config[adapter])
    config.inference_mode = True
    head = Anatomy(model).classification_head
    if not head:
        config.task_type = config.task_type or "CAUSAL_LM"
    elif not config.modules_to_save:
        config.task_type, config.modules_to_save = config.task_type or "SEQ_CLS", head
        for path in head:
            state: Mapping[str, Tensor] = model.get_base_model().get_submodule(path).state_dict()
            tensors |= {f"base_model.model.{path}.{name}": tensor for name, tensor in state.items()}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder, prefix=".") as temporary:
        config.save_pretrained(temporary)
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
            Path(temporary, "adapter_model.safetensors"),
            metadata={"format": "pt"},
        )
        for file in Path(temporary).iterdir():
            os.replace(file, folder / file.name)


def peft_model(module: nn.Module) -> PeftModel:
    """The one PEFT model inside a module.

    Raises:
        ValueError: if there is none, or more than one.
    """
    found: list[Any] = [
        part for part in module.modules() if hasattr(part, "peft_config") and hasattr(part, "save_pretrained")
    ]
    found = [part for part in found if hasattr(part, "get_base_model")]
    if len(found) != 1:
        raise ValueError(
            f"{type(module).__name__} holds {len(found)} PEFT models, and one is wanted: make it with "
            "edgebolt.common.lora.add_lora(model) or peft.get_peft_model."
        )
    return found[0]  # type: ignore[no-any-return]
