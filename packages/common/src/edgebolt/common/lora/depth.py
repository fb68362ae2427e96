"""LoRA depth: how many layers, counted from the output, are trained."""

from __future__ import annotations

from torch import nn

from edgebolt.common.lora.names import adapter_layers, layers_held

__all__ = ["set_depth"]


def set_depth(module: nn.Module, depth: int) -> None:
    """Train the LoRA of the top ``depth`` layers alone: ``Λ(k) = {L-k, ..., L-1}``.

    Works through ``requires_grad``: backward and the activations that it stores end at the lowest trained layer, as
    nothing below requires gradients. What is not LoRA (the head) is left as it is. Gradient checkpointing with
    ``enable_input_require_grads`` would lead the backward pass down to the embeddings again.

    Args:
        module: a module with LoRA layers of PEFT anywhere inside.
        depth: ``k``, 1 to the number of layers with LoRA.

    Raises:
        ValueError: if nothing inside carries LoRA, or for a depth out of range.

    Example::

        >>> import torch
        >>> layers = torch.nn.ModuleList([torch.nn.ModuleDict({"lora_A": torch.nn.Linear(2, 1)}) for _ in range(3)])
        >>> set_depth(layers, 1)
        >>> [p.requires_grad for p in layers.parameters()]
        [False, False, False, False, True, True]
    """
    parameters = dict(module.named_parameters())
    layers = layers_held(parameters)
    if not layers:
        raise ValueError(
            f"{type(module).__name__} has no LoRA layers: add them with edgebolt.common.lora.add_lora(model) or "
            "peft.get_peft_model(model, LoraConfig(...)) in the module's __init__."
        )
    if type(depth) is not int or not 1 <= depth <= layers:
        raise ValueError(
            f"depth={depth!r}: {layers} layers carry LoRA; train 1 to {layers} of them, counted from the output."
        )
    for name, layer in adapter_layers(parameters).items():
        parameters[name].requires_grad_(layer >= layers - depth)
