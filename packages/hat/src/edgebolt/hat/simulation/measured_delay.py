"""``g`` of real layers on the machine at hand, to be set beside what is simulated."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from edgebolt.common.decoding import LayerStack, Segment, new_cache

__all__ = ["measured_delay"]


@torch.no_grad()
def measured_delay(
    sizes: Mapping[str, Any],
    layers: int,
    tokens: Sequence[int] = (1, 4, 16, 64, 256, 1024),
    repeats: int = 5,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> dict[int, float]:
    """Seconds of a batch in Llama layers with random weights.

    Args:
        sizes: of a ``LlamaConfig``.
        layers: how many; all in one stage.
        tokens: of a batch, as one prompt each.
        repeats: of which the fastest counts.
        device: that runs them.
        dtype: of weights and rows.

    Returns:
        Tokens -> seconds.

    Example::

        >>> sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "vocab_size": 8}
        >>> list(measured_delay(sizes, layers=1, tokens=(1, 8), repeats=1))
        [1, 8]
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # weights that are made in float32 first would need twice the memory
    try:
        with torch.device(device):
            model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=layers))
    finally:
        torch.set_default_dtype(before)
    stack = LayerStack.of(model, 0, layers)
    found = {}
    for count in tokens:
        rows = torch.randn(count, model.config.hidden_size, device=device, dtype=dtype)
        taken = []
        for _ in range(repeats + 1):  # the first one warms up
            started = _now(device)
            stack(rows, [Segment(new_cache(), count)])
            taken.append(_now(device) - started)
        found[count] = min(taken[1:])
    return found


def _now(device: str) -> float:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()
