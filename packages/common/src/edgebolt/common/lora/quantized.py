"""Frozen base models in 4 or 8 bit, through transformers and bitsandbytes; adapters and head stay float."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, cast

import torch

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PreTrainedModel

__all__ = ["Bits", "prepare_quantized", "quantization"]

Bits = Literal[4, 8]


def quantization(bits: Bits, dtype: torch.dtype = torch.float32) -> BitsAndBytesConfig:
    """What ``from_pretrained(..., quantization_config=...)`` takes for a base in 8 bit, or 4 (NF4; Dettmers et al.).

    Heads stay as they are. Unlike Lightning's ``BitsandbytesPrecision``, which quantises every linear layer of the
    module, LoRA matrices and head included.

    Args:
        bits: 4 or 8.
        dtype: in which 4-bit weights are multiplied.

    Raises:
        ModuleNotFoundError: without bitsandbytes; the message names the extra.
        ValueError: for another number of bits.
    """
    if bits not in (4, 8):
        raise ValueError(f"bits={bits!r}: use 4, 8, or None for a base that is not quantised.")
    try:
        import bitsandbytes  # noqa: F401
        from transformers import BitsAndBytesConfig
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"A base in {bits} bit needs bitsandbytes: pip install 'edgebolt-common[llm,quantized]'"
        ) from error
    make: Any = BitsAndBytesConfig
    heads: Any = {"llm_int8_skip_modules": ["classifier", "lm_head", "score", r"(?:.*\.)?pooler"]}
    if bits == 8:
        return make(load_in_8bit=True, **heads)  # type: ignore[no-any-return]
    return make(  # type: ignore[no-any-return]
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, **heads
    )


def prepare_quantized(model: PreTrainedModel) -> PreTrainedModel:
    """Make a quantised base ready for LoRA: all frozen, what is not quantised (norms, embeddings) in float32.

    Gradient checkpointing stays off: it would lead the backward pass down to the embeddings at any LoRA depth.
    """
    from peft import prepare_model_for_kbit_training

    prepared = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)  # type: ignore[no-untyped-call]
    return cast("PreTrainedModel", prepared)
