"""The target's choice of a token: greedy, or sampled with noise that belongs to a place in a text."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from edgebolt.common.random import stream

__all__ = ["Processor", "TokenChoice"]

Processor = Callable[[Tensor, Tensor], Tensor]
"""As transformers' ``LogitsProcessor``: tokens so far ``[1, length]`` and scores ``[1, vocabulary]`` to scores."""


class TokenChoice:
    """Chooses the next token from the target's logits.

    Sampling adds Gumbel noise to the scores and takes the largest sum, which draws from their softmax (the Gumbel-max
    trick). The noise depends on (``seed``, request, position) alone: whatever was drafted, at a place in a text the
    same logits give the same token, so that speculative decoding gives the very text that decoding token by token
    gives. A chosen token is followed in a tree if it is there, and else ends the round, which keeps the target's
    distribution exactly, for any tree that was fixed before.

    Args:
        temperature: 0 takes the largest score.
        top_k: only the so many largest scores can be drawn; None: all.
        top_p: only the most likely tokens, of this mass together, can be drawn; None: all.
        seed: of all noise.
        processors: transformers' logits processors, in order, before temperature, top-k and top-p; each sees the text
            up to the node of the tree that it scores.

    Raises:
        ValueError: for a negative temperature; for ``top_k`` below 1; for ``top_p`` outside (0, 1]; for ``top_k`` or
            ``top_p`` with a temperature of 0, where they change nothing.

    Example::

        >>> choice = TokenChoice()
        >>> choice(torch.tensor([0.0, 3.0, 1.0]), request=0, position=4, text=[2, 2, 1, 0])
        1
        >>> sampled = TokenChoice(temperature=1.0, seed=1)
        >>> scores = torch.zeros(1000)
        >>> first = sampled(scores, request=0, position=1, text=[5])
        >>> sampled(scores, 0, 1, [5]) == first, sampled(scores, 0, 2, [5]) == first
        (True, False)
    """

    def __init__(
        self,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        processors: Sequence[Processor] = (),
    ) -> None:
        from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

        if temperature < 0:
            raise ValueError(f"temperature={temperature}: use 0 for the most likely token, or more.")
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k={top_k}: keep at least one token, or pass None for all.")
        if top_p is not None and not 0 < top_p <= 1:
            raise ValueError(f"top_p={top_p}: use a share in (0, 1], or None for all.")
        if not temperature and (top_k or top_p):
            raise ValueError(f"top_k={top_k}, top_p={top_p} change nothing at temperature=0: give a temperature.")
        self.temperature, self.seed = temperature, seed
        self.processors: list[Processor] = list(processors)
        if temperature not in (0, 1):
            self.processors.append(TemperatureLogitsWarper(float(temperature)))
        if top_k is not None:
            self.processors.append(TopKLogitsWarper(top_k))
        if top_p is not None:
            self.processors.append(TopPLogitsWarper(top_p))

    def __call__(self, logits: Tensor, request: int, position: int, text: Sequence[int]) -> int:
        """Choose one token.

        Args:
            logits: of the target, shape ``[vocabulary]``.
            request: number of the conversation.
            position: of the token to choose, in the text.
            text: all tokens before it; read by processors alone.
        """
        return int(self._scores(logits, request, position, text).argmax())

    def best(self, logits: Tensor, request: int, position: int, text: Sequence[int], count: int) -> list[int]:
        """The ``count`` tokens that would be chosen first, best first: what a draft offers.

        A draft's logits are scored with the noise of the place that they are for, as the target's will be, so that
        where both are alike they choose alike.
        """
        scores = self._scores(logits, request, position, text)
        first = int(scores.argmax())  # of equal ones `topk` takes any
        others = (int(token) for token in scores.topk(min(count, len(scores))).indices)
        return [first, *(token for token in others if token != first)][:count]

    def _scores(self, logits: Tensor, request: int, position: int, text: Sequence[int]) -> Tensor:
        scores = logits
        if self.processors:
            before = torch.tensor([list(text)], device=logits.device)
            scores = logits[None].clone()  # some processors write into what they get
            for processor in self.processors:
                scores = processor(before, scores)
            scores = scores[0]
        if self.temperature:
            scores = scores.double() + self.noise(request, position, len(scores)).to(scores.device)
        return scores

    def noise(self, request: int, position: int, vocabulary: int) -> Tensor:
        """Gumbel noise of one place, float64, shape ``[vocabulary]``."""
        return torch.from_numpy(stream(self.seed, "gumbel", request, position).gumbel(size=vocabulary))
