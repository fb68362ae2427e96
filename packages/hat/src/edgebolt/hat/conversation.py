"""The device's half of one text: prompt in chunks, drafts, look-ahead, verification.

It knows no link and no clock. Whoever drives it (the client, the simulator, the in-process link) carries its uploads
to the cloud and the answers back, and decides how long it looks ahead meanwhile.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from edgebolt.common.decoding import DraftTree, TokenChoice, committed, crop, keep, new_cache, verify
from edgebolt.hat.adapter import HatAdapter
from edgebolt.hat.split_model import SplitModel
from edgebolt.hat.upload import Upload

__all__ = ["Conversation", "Drafting"]


@dataclass(frozen=True)
class Drafting:
    """How a device drafts.

    Args:
        threshold: η; a draft ends where the device's likeliest next token has less than this chance (paper: 0.6). The
            token below it is not sent (ours: not stated).
        longest: tokens of a draft at most (ours).
        branches: k; continuations that are drafted ahead while the cloud verifies (paper: top-k; 3 is ours); 0: none.

    Raises:
        ValueError: for a negative number.
    """

    threshold: float = 0.6
    longest: int = 8
    branches: int = 3

    def __post_init__(self) -> None:
        if self.threshold < 0 or self.longest < 0 or self.branches < 0:
            raise ValueError(f"{self}: threshold, longest and branches are 0 or more.")


@dataclass
class _Ahead:
    """Branches below the end of a draft; node i is row i."""

    tokens: list[int]
    parents: list[int]
    rows: list[Tensor]
    logits: list[Tensor]
    leaves: list[int]  # the last node of each branch; before the first step, none


class Conversation:
    """One text on a device.

    At the start of a round, of ``n`` tokens the last one, pending, is in no cache: device and cloud hold ``n - 1``
    positions. Drafting puts the pending and every drafted token through the device's layers, and these rows are what
    is uploaded. What comes back for them goes through the head, on the device, which follows the target's choices
    down the draft.

    Args:
        parts: of the model; the middle is not used.
        adapter: Λ; None drafts nothing, which is the U-shaped baseline.
        prompt: token ids, at least one.
        new_tokens: tokens to generate at most.
        choice: the target's; the draft uses it too, so that sampling has the same noise.
        drafting: when drafts end and how many branches are looked ahead.
        request: number of the text among those with the same seed.
        stops: tokens that end the text; by default the model's.

    Attributes:
        text: prompt and committed tokens.
        done: whether the text is complete.
        drafted, accepted, rounds: tokens drafted and taken over so far, and rounds of verification.
        hits: rounds that began with what had been drafted ahead.

    Raises:
        ValueError: for an empty prompt, or if prompt and new tokens are more than the model has positions.
    """

    def __init__(
        self,
        parts: SplitModel,
        adapter: HatAdapter | None,
        prompt: Sequence[int],
        new_tokens: int = 128,
        choice: TokenChoice | None = None,
        drafting: Drafting | None = None,
        request: int = 0,
        stops: Collection[int] | None = None,
    ) -> None:
        if not len(prompt):
            raise ValueError("An empty prompt: give at least one token, such as the model's beginning-of-text token.")
        if new_tokens < 1 or len(prompt) + new_tokens > parts.longest:
            raise ValueError(
                f"A prompt of {len(prompt)} tokens and new_tokens={new_tokens}: generate at least one, and at most "
                f"{parts.longest} tokens in all, which is what the model has positions for."
            )
        self.parts, self.adapter = parts, adapter
        self.text, self.prompt_length, self.new_tokens = [int(token) for token in prompt], len(prompt), new_tokens
        self.choice = TokenChoice() if choice is None else choice
        self.drafting = Drafting() if drafting is None else drafting
        self.request, self.stops = request, frozenset(parts.stops if stops is None else stops)
        self.done, self.drafted, self.accepted, self.rounds, self.hits = False, 0, 0, 0, 0
        self._shallow, self._light = new_cache(), new_cache()
        self._sent: list[Tensor] = []  # rows of all positions that the cloud should hold
        self._unread: list[Tensor] = []  # rows that Λ has not seen yet
        self._draft: list[int] = []
        self._rows: list[Tensor] = []
        self._logits: Tensor | None = None  # the draft's, behind its last token
        self._next: int | None = None  # to be put through the device's layers
        self._ahead: _Ahead | None = None

    @property
    def left(self) -> int:
        """Tokens that may still be generated."""
        return self.new_tokens - (len(self.text) - self.prompt_length)

    @property
    def held(self) -> int:
        """Positions of the text that device and cloud hold between rounds."""
        return len(self._sent)

    # The prompt

    @torch.no_grad()
    def chunk(self, tokens: int) -> Upload:
        """The next tokens of the prompt; the upload asks for an answer once it is complete.

        Raises:
            RuntimeError: if all of it has been taken.
        """
        start = self.held
        if start >= self.prompt_length:
            raise RuntimeError("The prompt has been taken whole.")
        part = torch.tensor(self.text[start : min(start + tokens, self.prompt_length)])
        rows = self.parts.input(part, self._shallow)
        self._sent.extend(rows)
        self._unread.append(rows)
        return Upload(start, rows, int(self.held == self.prompt_length))

    @torch.no_grad()
    def read_prompt(self) -> None:
        """Put the prompt's rows through Λ, which needs them to draft: while the last chunk is on its way."""
        if self._unread and self.adapter is not None:
            self.adapter(torch.cat(self._unread), self._light)
        self._unread = []

    @torch.no_grad()
    def begin(self, deep: Tensor) -> list[int]:
        """The first token, from what the cloud gave for the prompt's last one, shape ``[1, width]``."""
        logits = self._said(deep)
        return self._commit([self.choice(logits[0], self.request, len(self.text), self.text)])

    # A round

    @property
    def drafts(self) -> bool:
        """Whether the draft goes on: call :meth:`draft`."""
        return self._next is not None

    @torch.no_grad()
    def draft(self) -> None:
        """One step: the pending or last drafted token goes through the device's layers and Λ."""
        if self._next is None:
            raise RuntimeError("The draft has ended: send it with upload().")
        self.read_prompt()
        row = self.parts.input(torch.tensor([self._next]), self._shallow)
        self._rows.append(row[0])
        if self.adapter is not None:
            self._logits = self.parts.output(self.adapter(row, self._light))[0]
        self._extend()

    def _extend(self) -> None:
        """Draft one more token, or end."""
        self._next = None
        longest = min(self.drafting.longest, self.left - 1)
        if self._logits is None or len(self._draft) >= longest or (self._draft and self._draft[-1] in self.stops):
            return
        if self._confident(self._logits):
            text = [*self.text, *self._draft]
            self._next = self.choice(self._logits, self.request, len(text), text)
            self._draft.append(self._next)

    def _confident(self, logits: Tensor) -> bool:
        return bool(logits.float().softmax(-1).max() >= self.drafting.threshold)

    def upload(self) -> Upload:
        """Rows of the pending and all drafted tokens."""
        if self._next is not None or self.done:
            raise RuntimeError("The draft goes on." if self._next is not None else "The text is complete.")
        return Upload(self.held, torch.stack(self._rows), len(self._rows))

    @torch.no_grad()
    def look_ahead(self) -> bool:
        """One step further on the branches below the draft's end; False where there is nothing to look ahead to."""
        if self._logits is None or not self.drafting.branches or self._next is not None:
            return False
        depth = 0 if self._ahead is None else len(self._ahead.tokens) // len(self._ahead.leaves)
        if depth >= min(self.left - len(self._draft) - 1, self.drafting.longest + 1):
            return False  # deeper lies what is no part of the text, whose places a model may not have, or of a draft
        text = [*self.text, *self._draft]
        if self._ahead is None:
            found = self.choice.best(self._logits, self.request, len(text), text, self.drafting.branches)
            self._ahead, tokens, parents = _Ahead([], [], [], [], []), found, [-1] * len(found)
        else:
            ahead, tokens, parents = self._ahead, [], list(self._ahead.leaves)
            for leaf in ahead.leaves:
                path = [*text, *(ahead.tokens[node] for node in self._tree().path(leaf))]
                tokens.append(self.choice(ahead.logits[leaf], self.request, len(path), path))
        ahead = self._ahead
        ahead.leaves = list(range(len(ahead.tokens), len(ahead.tokens) + len(tokens)))
        ahead.tokens += tokens
        ahead.parents += parents
        tree, root = self._tree(), len(text) - 1
        mask, positions = tree.mask(root)[-len(tokens) :], tree.positions(root)[-len(tokens) :]
        rows = self.parts.input(torch.tensor(tokens), self._shallow, positions, mask)
        assert self.adapter is not None  # without it there are no logits to look ahead from
        ahead.logits.extend(self.parts.output(self.adapter(rows, self._light, positions, mask)))
        ahead.rows.extend(rows)
        return True

    def _tree(self) -> DraftTree:
        assert self._ahead is not None
        return DraftTree(tuple(self._ahead.tokens), tuple(self._ahead.parents))

    @torch.no_grad()
    def receive(self, deep: Tensor) -> list[int]:
        """Verify the draft with what the cloud gave for the uploaded rows.

        Args:
            deep: shape ``[1 + drafted, width]``.

        Returns:
            The tokens that the text has grown by: those accepted, and the target's own.

        Raises:
            ValueError: for another number of rows; nothing has changed then.
        """
        if len(deep) != len(self._rows):
            raise ValueError(f"{len(deep)} rows came back for {len(self._rows)}.")
        chain = DraftTree.chain(self._draft)
        verified = verify(chain, self._said(deep), self.choice, self.request, self.text)
        self.rounds += 1
        self.drafted += len(self._draft)
        self.accepted += verified.accepted
        self._sent.extend(self._rows[: verified.accepted + 1])
        whole = verified.accepted == len(self._draft)
        new = self._commit(list(verified.tokens), adopt=whole)
        return new

    def _said(self, deep: Tensor) -> Tensor:
        """The target's logits, of rows as they came over the link."""
        weight = next(self.parts.output.parameters())
        return cast(Tensor, self.parts.output(deep.to(weight)))

    def _commit(self, tokens: list[int], adopt: bool = False) -> list[int]:
        new, self.done = committed(tokens, self.left, self.stops)
        end = len(self.text) + len(self._draft)  # positions before those that were looked ahead to
        self.text += new
        ahead, self._ahead = self._ahead, None
        self._draft, self._rows, self._logits, self._next = [], [], None, None
        if self.done:
            return new
        if adopt and ahead is not None and self.text[-1] in ahead.tokens[: ahead.parents.count(-1)]:
            self._adopt(ahead, ahead.tokens.index(self.text[-1]), end)
        else:
            for cache in (self._shallow, self._light):
                if cache.get_seq_length() > self.held:
                    crop(cache, self.held)
            self._next = self.text[-1]
        return new

    def _adopt(self, ahead: _Ahead, root: int, end: int) -> None:
        """Begin the round with the branch below node ``root``, as far as a draft would have gone."""
        self.hits += 1
        kept = [root]
        while True:
            self._logits = ahead.logits[kept[-1]]
            self._rows = [ahead.rows[node] for node in kept]
            self._extend()
            if self._next is None:
                break
            following = next((node for node, parent in enumerate(ahead.parents) if parent == kept[-1]), None)
            if following is None:
                break
            assert ahead.tokens[following] == self._next  # both are the choice at the same place
            kept.append(following)
        places = torch.tensor([*range(end), *(end + node for node in kept)])
        keep(self._shallow, places)
        keep(self._light, places)

    # The link

    def resent(self, held: int, before: int, rows: int) -> list[Upload]:
        """What a cloud that holds ``held`` positions needs up to position ``before``, in uploads of ``rows`` rows."""
        return [
            Upload(at, torch.stack(self._sent[at : min(at + rows, before)]), 0) for at in range(held, before, rows)
        ]
