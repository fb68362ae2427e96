"""The rank of each layer's LoRA, read and changed at a constant scale."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from edgebolt.common.lora.names import adapter_layers

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer

__all__ = ["ranks_of", "set_ranks"]


def ranks_of(module: nn.Module) -> list[int]:
    """The rank of each layer that carries LoRA, input first; the largest where a layer's projections differ.

    Args:
        module: a module with LoRA layers of PEFT anywhere inside; none gives an empty list.

    Example::

        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> from edgebolt.common.lora import add_lora
        >>> config = BertConfig(hidden_size=8, num_hidden_layers=3, num_attention_heads=2, intermediate_size=16)
        >>> ranks_of(add_lora(BertForSequenceClassification(config), ranks=[1, 2, 4]))
        [1, 2, 4]
    """
    ranks: dict[int, int] = {}
    for layer, _, adapter, lora in _lora_layers(module):
        ranks[layer] = max(ranks.get(layer, 0), lora.r[adapter])
    return [ranks[layer] for layer in sorted(ranks)]


def set_ranks(module: nn.Module, ranks: Sequence[int]) -> None:
    """Give each layer's LoRA a rank of its own, at the scale ``alpha / r`` that it has.

    A constant scale is what makes ranks comparable: with a constant ``alpha`` the layers of high rank would count
    less. The function that an adapter computes is kept where that is possible: a rank grows by rows of ``A`` drawn as
    PEFT draws them and columns of ``B`` that are zero; it shrinks by leaving out rows if ``B`` is zero (nothing was
    trained yet), else to the best approximation of ``B A`` (its truncated singular value decomposition).

    Parameters are replaced: call it before the optimizer is made.

    Args:
        module: a module with LoRA layers of PEFT anywhere inside.
        ranks: one number of 1 or more for each layer that carries LoRA, input first.

    Raises:
        ValueError: if the number of ranks is not that of the layers, or a rank is below 1 or above the layer's width.
    """
    layers = list(_lora_layers(module))
    held = 1 + max((layer for layer, *_ in layers), default=-1)
    if len(ranks) != held:
        raise ValueError(f"ranks={list(ranks)!r} are {len(ranks)}, and {held} layers carry LoRA: give one for each.")
    for layer, _, _, lora in layers:
        widest = min(int(lora.in_features or 0), int(lora.out_features or 0))
        if not 1 <= ranks[layer] <= widest:
            raise ValueError(f"ranks[{layer}]={ranks[layer]!r}: use 1 to {widest}, the width of the projection.")
    configs: list[Any] = [part.peft_config for part in module.modules() if hasattr(part, "get_base_model")]
    for layer, path, adapter, lora in layers:
        if lora.r[adapter] == ranks[layer]:
            continue
        _resize(lora, adapter, ranks[layer])
        for config in configs:  # what is exported names the ranks
            config[adapter].rank_pattern[path] = ranks[layer]
            config[adapter].alpha_pattern[path] = lora.lora_alpha[adapter]


def _lora_layers(module: nn.Module) -> Iterator[tuple[int, str, str, LoraLayer]]:
    """``(layer, path inside the transformers model, adapter, LoRA layer of PEFT)``, in the module's order."""
    found = [(name, part) for name, part in module.named_modules() if hasattr(part, "lora_A") and hasattr(part, "r")]
    layers = adapter_layers([f"{name}.lora_A" for name, _ in found])
    for name, part in found:
        lora: Any = part
        if f"{name}.lora_A" not in layers:  # on embeddings or a head
            continue
        for adapter in lora.active_adapters:
            yield layers[f"{name}.lora_A"], name.rpartition("base_model.model.")[2], adapter, lora


def _resize(lora: LoraLayer, adapter: str, rank: int) -> None:
    old_a, old_b = lora.lora_A[adapter], lora.lora_B[adapter]
    a, b = _resized(old_a.weight.detach(), old_b.weight.detach(), rank)  # type: ignore[operator]
    halves: list[tuple[Any, torch.Tensor]] = [(old_a, a), (old_b, b)]
    for linear, weight in halves:
        linear.weight = nn.Parameter(weight, requires_grad=bool(linear.weight.requires_grad))
        linear.out_features, linear.in_features = weight.shape
    alpha = lora.scaling[adapter] * (math.sqrt(rank) if lora.use_rslora[adapter] else rank)
    lora.r[adapter] = rank
    lora.lora_alpha[adapter] = int(alpha) if float(alpha).is_integer() else alpha


def _resized(a: torch.Tensor, b: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``A`` of shape ``[rank, in]`` and ``B`` of shape ``[out, rank]``."""
    had = len(a)
    if rank <= had and b.count_nonzero():
        # Of the two thin factors, never of the dense product: B = Q_b R_b, A = (Q_a R_a)^T.
        (q_b, r_b), (q_a, r_a) = torch.linalg.qr(b.float()), torch.linalg.qr(a.float().T)
        left, sizes, right = torch.linalg.svd(r_b @ r_a.T)
        root = sizes[:rank].sqrt()
        return (root[:, None] * (q_a @ right[:rank].T).T).to(a), (q_b @ left[:, :rank] * root).to(b)
    if rank <= had:
        return a[:rank].clone(), b[:, :rank].clone()
    # As PEFT draws them; the bound depends on the input's width alone. The rows that are there seed the new ones:
    # equal modules stay equal, and nothing else that is drawn changes.
    seed = int.from_bytes(blake2b(a.float().cpu().numpy().tobytes(), digest_size=7).digest(), "little")
    rows = torch.empty(rank - had, a.shape[1])
    nn.init.kaiming_uniform_(rows, a=math.sqrt(5), generator=torch.Generator().manual_seed(seed))
    return torch.cat([a, rows.to(a)]), torch.cat([b, b.new_zeros(len(b), rank - had)], 1)
