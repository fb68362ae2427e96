"""How fast a model reads and writes."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from edgebolt.comp.evaluation._running import device_of, evaluating

__all__ = ["SpeedResult", "decoding_speed", "decoding_speeds"]


@dataclass(frozen=True)
class SpeedResult:
    """Tokens a second, of each repeat; the properties are medians.

    Attributes:
        prefills: tokens a second while the prompt was read.
        decodes: tokens a second while one token after the other was written.
        prompt: tokens of the prompt.
        new: tokens written.
        batch_size: sequences at once; all their tokens count.

    Example::

        >>> result = SpeedResult((900.0, 1000.0, 950.0), (24.0, 25.0, 30.0), prompt=128, new=32, batch_size=1)
        >>> print(result, result.prefill)
        prefill 950 tok/s, decode 25.0 tok/s (prompt 128, new 32, batch 1, median of 3) 950.0
    """

    prefills: tuple[float, ...]
    decodes: tuple[float, ...]
    prompt: int
    new: int
    batch_size: int

    @property
    def prefill(self) -> float:
        """Median of :attr:`prefills`."""
        return median(self.prefills)

    @property
    def decode(self) -> float:
        """Median of :attr:`decodes`."""
        return median(self.decodes)

    def __str__(self) -> str:
        return (
            f"prefill {self.prefill:.0f} tok/s, decode {self.decode:.1f} tok/s (prompt {self.prompt}, new {self.new}, "
            f"batch {self.batch_size}, median of {len(self.prefills)})"
        )


def decoding_speed(
    model: Any, prompt: int = 128, new: int = 32, batch_size: int = 1, repeats: int = 5, seed: int = 0
) -> SpeedResult:
    """Speed of one model; of several that are to be compared, :func:`decoding_speeds`.

    Args:
        model: a causal language model of transformers.
        prompt: tokens of the prompt, which are random.
        new: tokens written, each the likeliest, with a key-value cache.
        batch_size: sequences at once.
        repeats: how often, after one more that warms up.
        seed: of the prompt.

    Raises:
        ValueError: for a number below 1, and for more tokens than the model has positions for.

    Example::

        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        ...                      vocab_size=50)
        >>> speed = decoding_speed(LlamaForCausalLM(config), prompt=8, new=2, repeats=2)
        >>> speed.prefill > 0, speed.decode > 0, len(speed.decodes)
        (True, True, 2)
    """
    return decoding_speeds({"": model}, prompt, new, batch_size, repeats, seed, progress=False)[""]


def decoding_speeds(
    models: Mapping[str, Any],
    prompt: int = 128,
    new: int = 32,
    batch_size: int = 1,
    repeats: int = 5,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, SpeedResult]:
    """Speed of several models, which take turns, so that what else the machine does slows all of them.

    Args:
        models: name -> model.
        prompt: as in :func:`decoding_speed`.
        new: likewise.
        batch_size: likewise.
        repeats: likewise.
        seed: likewise.
        progress: show a bar.

    Raises:
        ValueError: as there.
    """
    numbers = {"prompt": prompt, "new": new, "batch_size": batch_size, "repeats": repeats}
    for name, value in numbers.items():
        if value < 1:
            raise ValueError(f"{name}={value}: use 1 or more.")
    inputs = {}
    for name, model in models.items():
        longest = getattr(model.config, "max_position_embeddings", None) or prompt + new
        if prompt + new > longest:
            raise ValueError(f"prompt={prompt} and new={new}: the model has positions for {longest} tokens in all.")
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randint(model.config.vocab_size, (batch_size, prompt), generator=generator)
        inputs[name] = drawn.to(device_of(model))
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    rounds = tqdm(range(repeats + 1), desc="speed", unit="repeat", disable=not progress)
    with evaluating(*models.values()):
        for _ in rounds:
            for name, model in models.items():
                seconds[name].append(_seconds(model, inputs[name], new))
    read, written = batch_size * prompt, batch_size * new
    return {
        name: SpeedResult(
            tuple(read / prefill for prefill, _ in pairs[1:]),  # the first one warmed up
            tuple(written / decode for _, decode in pairs[1:]),
            prompt,
            new,
            batch_size,
        )
        for name, pairs in seconds.items()
    }


def _seconds(model: Any, ids: Tensor, new: int) -> tuple[float, float]:
    """Of reading the prompt, and of writing ``new`` tokens."""
    start = _now(ids)
    out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    token = out.logits[:, -1:].argmax(-1)
    read = _now(ids)
    for _ in range(new):
        out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
        token = out.logits[:, -1:].argmax(-1)
    return read - start, _now(ids) - read


def _now(tensor: Tensor) -> float:
    """Seconds, once everything that was asked of the tensor's device is done."""
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
    return time.perf_counter()
