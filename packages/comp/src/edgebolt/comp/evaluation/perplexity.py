"""Perplexity of a text, which means nothing without its window."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchmetrics.text import Perplexity
from tqdm import tqdm

from edgebolt.comp.evaluation._running import device_of, evaluating

__all__ = ["PerplexityResult", "perplexity"]

POSITIONS_AT_ONCE = 128  # in float64 over a vocabulary of 49,152: 50 MB


@dataclass(frozen=True)
class PerplexityResult:
    """A perplexity and what it was measured with; the same text has 12.6 at window 128 and 5.5 at 2048.

    Attributes:
        value: the perplexity a token.
        window: tokens that the model sees at once.
        stride: tokens that the window moves on by.
        tokens: how many were scored.

    Example::

        >>> print(PerplexityResult(24.3, window=512, stride=256, tokens=4091))
        24.30 (window 512, stride 256, 4091 tokens)
    """

    value: float
    window: int
    stride: int
    tokens: int

    def __str__(self) -> str:
        return f"{self.value:.2f} (window {self.window}, stride {self.stride}, {self.tokens} tokens)"

    def __float__(self) -> float:
        return self.value


def perplexity(
    model: Any,
    ids: Tensor | Sequence[int],
    window: int = 512,
    stride: int | None = None,
    batch_size: int = 1,
    progress: bool = True,
) -> PerplexityResult:
    """``exp(−mean log p(token | the tokens before it in its window))``, by ``torchmetrics.text.Perplexity``.

    The window slides over the text by ``stride``. Each token is scored once, in the first window that it is in; the
    others of a window are what it is conditioned on. The first token of the text has nothing before it and is not
    scored; with ``stride=window``, the usual setting, that holds for the first token of every window.

    Args:
        model: a causal language model of transformers.
        ids: int64, the tokens of one text; or texts by tokens, over which the window does not reach.
        window: tokens that the model sees at once.
        stride: tokens that the window moves on by; None: ``window``. Smaller ones give each token more context and
            take ``window / stride`` times as long.
        batch_size: windows that run at once. Their logits take ``4 * batch_size * stride * vocabulary`` bytes.
        progress: show a bar.

    Raises:
        ValueError: for a window or stride that is out of range, and for a text of less than two tokens.

    Example::

        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        ...                      vocab_size=50)
        >>> ids = torch.arange(40)
        >>> result = perplexity(LlamaForCausalLM(config), ids, window=16, stride=8, progress=False)
        >>> print(str(result)[5:], 45 < result.value < 55)
         (window 16, stride 8, 39 tokens) True
    """
    texts = torch.as_tensor(ids)
    texts = texts[None] if texts.dim() == 1 else texts
    if texts.dim() != 2 or texts.is_floating_point() or texts.shape[1] < 2 or not len(texts):
        raise ValueError(f"ids have the shape {tuple(texts.shape)}: give the tokens of a text, two or more, as int64.")
    stride = window if stride is None else stride
    longest = getattr(model.config, "max_position_embeddings", None) or window
    if not 2 <= window <= longest:
        raise ValueError(
            f"window={window}: use from 2 to {longest} tokens, which is what the model has positions for."
        )
    if not 1 <= stride <= window:
        raise ValueError(f"stride={stride}: use from 1 to {window}, the window; beyond it tokens would be left out.")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: use 1 or more.")
    device = device_of(model)
    metric = Perplexity().to(device)
    metric.set_dtype(torch.float64)
    tokens = 0
    windows = [(row, *part) for row in range(len(texts)) for part in _windows(texts.shape[1], window, stride)]
    with evaluating(model), tqdm(total=len(windows), desc="perplexity", unit="window", disable=not progress) as bar:
        for batch in _alike(windows, batch_size):
            scored = batch[0][3]
            inputs = torch.stack([texts[row, begin:end] for row, begin, end, _ in batch]).long().to(device)
            logits: Tensor = model(input_ids=inputs, use_cache=False, logits_to_keep=scored + 1).logits[:, :-1]
            flat, targets = logits.flatten(0, 1), inputs[:, -scored:].flatten()
            for at in range(0, len(flat), POSITIONS_AT_ONCE):
                part = slice(at, at + POSITIONS_AT_ONCE)
                # The metric takes the logarithm of a probability, which in float32 is 0 for what a broken model gives
                # less than 1e-45.
                metric.update(flat[None, part].double(), targets[None, part])
            tokens += scored * len(batch)
            bar.update(len(batch))
    return PerplexityResult(float(metric.compute()), window, stride, tokens)


def _windows(length: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Begin, end, and how many tokens at the end are scored."""
    before = 0
    for begin in range(0, length, stride):
        end = min(begin + window, length)
        scored = min(end - before, end - begin - 1)
        if scored > 0:
            yield begin, end, scored
        before = end
        if end == length:
            return


def _alike(windows: list[tuple[int, int, int, int]], size: int) -> Iterator[list[tuple[int, int, int, int]]]:
    """Runs of windows of the same length that score equally many tokens."""
    batch: list[tuple[int, int, int, int]] = []
    for part in windows:
        same = batch and (part[2] - part[1], part[3]) == (batch[0][2] - batch[0][1], batch[0][3])
        if batch and (len(batch) == size or not same):
            yield batch
            batch = []
        batch.append(part)
    yield batch
