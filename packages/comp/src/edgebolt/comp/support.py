"""Models that can be pruned, and what to do with the others."""

from __future__ import annotations

from typing import Any

from edgebolt.comp.pruned_models import KINDS

__all__ = ["check_supported"]


def check_supported(config: Any) -> str:
    """The family of a model.

    Args:
        config: of the model.

    Returns:
        ``model_type`` of the dense family.

    Raises:
        NotImplementedError: for a model that cannot be pruned; the message says why, and what can be done.
    """
    kind = str(config.model_type).removeprefix("comp_")
    plain = config.to_dict()
    if plain.get("quantization_config"):
        raise NotImplementedError(
            f"This {kind} model's weights are quantized: packed weights have no rows to take out. Prune the model "
            "before it is quantized, then load the result with BitsAndBytesConfig; or load it dequantized "
            "(model.dequantize()) and save that first."
        )
    if plain.get("is_encoder_decoder"):
        raise NotImplementedError(
            f"{kind} is an encoder-decoder, whose cross-attention this does not follow. Prune an encoder or a decoder "
            f"alone: {KINDS}."
        )
    experts = [name for name in ("num_experts", "num_local_experts", "n_routed_experts") if (plain.get(name) or 0) > 1]
    if experts:
        raise NotImplementedError(
            f"{kind} has {plain[experts[0]]} experts a layer ({experts[0]}), of which each token sees a few: neurons "
            f"are not the unit to remove there. Prune a dense model: {KINDS}."
        )
    if kind in ("phi3", "glm", "glm4"):
        raise NotImplementedError(
            f"{kind} has its projections fused (gate_up_proj, qkv_proj). Rewrite the checkpoint with separate "
            f"projections as Llama has them, or prune a model of {KINDS}."
        )
    if kind not in KINDS:
        raise NotImplementedError(
            f"{kind!r} cannot be pruned yet; these can: {KINDS}. To add a decoder with separate projections, give it "
            "a row in edgebolt.common.anatomy.FAMILIES and its name in edgebolt.comp.pruned_models.KINDS."
        )
    attention = str(getattr(config, "_attn_implementation", None))
    if "flash" in attention:
        raise NotImplementedError(
            f"The model runs {attention}, which refuses float32, in which layers are pruned: load it with "
            "attn_implementation='sdpa'."
        )
    if plain.get("add_cross_attention"):
        raise NotImplementedError(f"This {kind} model has cross-attention, which this does not follow.")
    return kind
