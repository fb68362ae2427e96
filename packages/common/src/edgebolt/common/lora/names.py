"""Which layer a LoRA tensor belongs to, read from its name: all that a server knows of a model."""

from __future__ import annotations

import re
from collections.abc import Iterable

__all__ = ["adapter_layers", "layers_held", "pairs"]

_ADAPTER = re.compile(r"(^|\.)lora_[A-Za-z_]+(\.|$)")
_A = re.compile(r"(^|\.)lora_A(\.|$)")


def adapter_layers(names: Iterable[str]) -> dict[str, int]:
    """The transformer layer of each LoRA tensor, 0 at the input.

    The layer is the first number in a name that is not the same in all of them (the first number at all, if there is
    one layer only), counted from 0 over the layers that carry LoRA.

    Args:
        names: names of tensors, LoRA or not, as PEFT writes them.

    Returns:
        Name -> layer, for the LoRA of layers alone: LoRA on embeddings or on a head has no number and is left out.

    Example::

        >>> adapter_layers(["layer.4.query.lora_A.default.weight", "layer.5.query.lora_A.default.weight", "head.bias"])
        {'layer.4.query.lora_A.default.weight': 0, 'layer.5.query.lora_A.default.weight': 1}
    """
    numbers = {name: found for name in names if _ADAPTER.search(name) and (found := _numbers(name))}
    width = min(map(len, numbers.values()), default=0)
    place = next((i for i in range(width) if len({n[i] for n in numbers.values()}) > 1), 0)
    order = {number: layer for layer, number in enumerate(sorted({n[place] for n in numbers.values()}))}
    return {name: order[found[place]] for name, found in numbers.items()}


def _numbers(name: str) -> list[int]:
    return [int(part) for part in name.split(".") if part.isdigit()]


def layers_held(names: Iterable[str]) -> int:
    """The number of layers that carry LoRA.

    Example::

        >>> layers_held(["layer.0.query.lora_A.weight", "layer.1.query.lora_A.weight", "head.bias"])
        2
    """
    return max(adapter_layers(names).values(), default=-1) + 1


def pairs(names: Iterable[str]) -> list[tuple[str, str]]:
    """The names of ``A`` and ``B`` of each LoRA pair whose both halves are there.

    Example::

        >>> pairs(["query.lora_A.default.weight", "query.lora_B.default.weight", "head.bias"])
        [('query.lora_A.default.weight', 'query.lora_B.default.weight')]
    """
    every = list(names)
    known = set(every)
    both = [(name, _A.sub(r"\1lora_B\2", name)) for name in every if _A.search(name)]
    return [(a, b) for a, b in both if b in known]
