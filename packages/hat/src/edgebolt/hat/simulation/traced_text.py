"""Texts whose drafts are drawn instead of computed: for models that are too large to be run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from edgebolt.common.random import stream
from edgebolt.hat.cloud_model import cut_back
from edgebolt.hat.upload import Upload

if TYPE_CHECKING:
    from transformers import DynamicCache

__all__ = ["CountingModel", "DrawnRounds", "Round", "TracedText"]


@dataclass(frozen=True)
class Round:
    """What one round of verification came to.

    Args:
        drafted: tokens of the draft.
        accepted: of those, tokens that were taken over.
        hit: whether the model's own token was among the branches that were looked ahead to.
    """

    drafted: int
    accepted: int
    hit: bool = False


@dataclass(frozen=True)
class DrawnRounds:
    """Rounds with a given mean accept length.

    A draft goes on with a fixed chance after each token, up to ``longest``; each of its tokens is right with the
    chance ``right``, up to the first that is not. The chance of going on is solved for from the mean. That drafts end
    where they do, and how often their tokens are right, is ours: only the mean is the paper's.

    Args:
        accept_length: tokens a round on average, the model's own included.
        right: chance that a drafted token is accepted.
        longest: tokens of a draft.
        hit: chance that a branch has the model's own token, where the whole draft was accepted.

    Raises:
        ValueError: for a mean that no chance gives.

    Example::

        >>> rounds = DrawnRounds(2.06).of(seed=0, request=1)
        >>> found = [next(rounds) for _ in range(4000)]
        >>> round(sum(each.accepted + 1 for each in found) / 4000, 1)
        2.1
    """

    accept_length: float
    right: float = 0.9
    longest: int = 8
    hit: float = 0.6

    def __post_init__(self) -> None:
        if not 0 < self.right <= 1 or not 0 <= self.hit <= 1 or not 1 <= self.accept_length < 1 + self._accepted(1.0):
            raise ValueError(
                f"{self}: chances are in [0, 1], and the mean is at least 1 and below "
                f"{1 + self._accepted(1.0):.2f}, which drafts of {self.longest} tokens come to."
            )

    def _accepted(self, on: float) -> float:
        """Mean of accepted tokens: the first ``i`` are drafted and right."""
        return sum((on * self.right) ** place for place in range(1, self.longest + 1))

    @property
    def on(self) -> float:
        """Chance that a draft goes on."""
        low, high = 0.0, 1.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if self._accepted(middle) < self.accept_length - 1 else (low, middle)
        return high

    def of(self, seed: int, request: int) -> Iterator[Round]:
        """Rounds of one text, without end."""
        draws, on = stream(seed, "rounds", request), self.on
        while True:
            drafted = int(np.argmax(np.append(draws.random(self.longest) >= on, True)))
            wrong = np.append(draws.random(drafted) >= self.right, True)
            accepted = int(np.argmax(wrong))
            yield Round(drafted, accepted, accepted == drafted and draws.random() < self.hit)


class TracedText:
    """A text of which only lengths are known, with the methods of :class:`edgebolt.hat.Conversation`.

    Args:
        prompt_length: tokens.
        new_tokens: to generate.
        rounds: what each round comes to.
        branches: whether the device looks ahead.
        tree: parents of the rows that are uploaded in place of a chain (Medusa); None for a chain. Of a tree, the
            first ``accepted`` nodes of its first branch are taken over.
    """

    def __init__(
        self,
        prompt_length: int,
        new_tokens: int,
        rounds: Iterator[Round],
        branches: bool = True,
        tree: Sequence[int] | None = None,
    ) -> None:
        self.prompt_length, self.new_tokens, self.rounds = prompt_length, new_tokens, rounds
        self.branches, self.tree = branches, None if tree is None else tuple(tree)
        self.done, self.verified, self.accepted = False, 0, 0
        self._held, self._new, self._steps, self._ahead = 0, 0, 0, 0
        self._round = Round(0, 0)
        self._kept: tuple[int, ...] = ()

    @property
    def held(self) -> int:
        """Positions that device and cloud hold."""
        return self._held

    @property
    def drafts(self) -> bool:
        """Whether there are steps of the draft left."""
        return self._steps > 0

    def chunk(self, tokens: int) -> Upload:
        """The next tokens of the prompt."""
        start = self._held
        self._held = min(start + tokens, self.prompt_length)
        return Upload(start, torch.empty(self._held - start, 1), int(self._held == self.prompt_length))

    def read_prompt(self) -> None:
        """Nothing to read."""

    def begin(self, deep: Tensor) -> list[int]:
        """The first token."""
        return self._commit(1, 0)

    def draft(self) -> None:
        """One step."""
        self._steps -= 1

    def upload(self) -> Upload:
        """Rows of the pending and the drafted tokens."""
        rows = torch.empty(1 + (self._round.drafted if self.tree is None else len(self.tree)), 1)
        return Upload(self._held, rows, len(rows), self._kept, self.tree)

    def look_ahead(self) -> bool:
        """One step; beyond the longest draft there is none."""
        if not self.branches or self._ahead >= 8:
            return False
        self._ahead += 1
        return True

    def receive(self, deep: Tensor) -> list[int]:
        """Take over what was accepted."""
        self.verified += 1
        accepted = min(self._round.accepted, self.new_tokens - self._new - 1)
        self.accepted += accepted
        if self.tree is not None:
            self._kept = tuple(self._held + node for node in range(accepted + 1))
        self._held += accepted + 1
        return self._commit(accepted + 1, self._ahead if self._round.hit else 0)

    def _commit(self, tokens: int, ready: int) -> list[int]:
        self._new += tokens
        self.done = self._new >= self.new_tokens
        self._round = next(self.rounds)
        drafted = min(self._round.drafted, max(self.new_tokens - self._new - 1, 0))
        self._round = Round(drafted, min(self._round.accepted, drafted), self._round.hit)
        steps = 1 + drafted if self.tree is None else 0
        self._steps, self._ahead = max(steps - ready, 0), 0
        return [0] * tokens


class CountingModel:
    """In place of the cloud's layers: caches grow and are cut, and nothing is computed."""

    def run(self, work: Sequence[tuple[DynamicCache, Upload]]) -> list[Tensor]:
        """As :meth:`edgebolt.hat.CloudModel.run`, with rows of width 1."""
        for cache, upload in work:
            cut_back(cache, upload)
            row = torch.empty(1, 1, len(upload.rows), 1)
            cache.update(row, row, 0)
        return [upload.rows[len(upload.rows) - upload.reply :] for _, upload in work]
