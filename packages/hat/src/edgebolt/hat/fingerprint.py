"""A short name for the weights that device and cloud must share."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from edgebolt.hat.split_model import SplitModel

__all__ = ["fingerprint"]


def fingerprint(parts: SplitModel) -> str:
    """Hash of what a device holds of a model: the cloud, which has read the same checkpoint, finds the same.

    Of every tensor name, shape and some 4,096 values, evenly spread, in bfloat16: another checkpoint, another cut or
    another fine-tuning of these parts is told apart; float64, float32 and bfloat16 of the same checkpoint are not,
    but float16, which rounds otherwise, is one of its own.

    Example::

        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from edgebolt.hat import split
        >>> sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=20))
        >>> name = fingerprint(split(model, 1))
        >>> fingerprint(split(model, 1)) == name, fingerprint(split(model, 2)) == name
        (True, False)
    """
    found = hashlib.blake2b(digest_size=16)
    for part in (parts.input, parts.output):
        _add(found, part)
    return found.hexdigest()


def _add(found: hashlib.blake2b, part: nn.Module) -> None:
    for name, value in part.state_dict().items():
        found.update(f"{name}{list(value.shape)}".encode())
        found.update(_sample(value).numpy().tobytes())


def _sample(value: Tensor) -> Tensor:
    flat = value.detach().flatten()
    step = max(len(flat) // 4096, 1)
    return flat[::step].to("cpu", torch.bfloat16).float()
