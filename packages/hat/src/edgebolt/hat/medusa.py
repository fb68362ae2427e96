"""U-Medusa: heads on the hidden state that comes back guess tokens ahead; their tree is verified in the cloud."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import count
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgebolt.common.decoding import DraftTree, TokenChoice, keep, verify
from edgebolt.hat.conversation import Conversation, Drafting
from edgebolt.hat.split_model import SplitModel
from edgebolt.hat.upload import Upload

__all__ = ["MEDUSA_TREE", "MedusaConversation", "MedusaHeads"]

MEDUSA_TREE = (-1, 0, 1, 2, -1, 0, 1, 4, -1, 0)
"""Parents of ten nodes: the likeliest paths, four deep; few, since every node is a row on the link (ours)."""


class MedusaHeads(nn.Module):
    """Heads that guess the second, third … token behind a hidden state (Medusa; Cai et al. 2024).

    Each is ``h + SiLU(linear(h))`` and a head of its own: ``heads · (width² + width + width · vocabulary)`` weights;
    four of them, as is worked out from that, are the 591 M (Vicuna-7B) and 760 M (13B) that HAT's baseline is said to
    have. Trained, the base frozen, by the cross-entropy of head ``i`` on the token ``i + 2`` places on, weighted
    ``0.8^i``.

    Args:
        parts: of the model; the heads begin as copies of its own head.
        heads: how many.

    Example::

        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from edgebolt.hat import split
        >>> sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
        >>> heads = MedusaHeads(split(LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=20)), 1))
        >>> heads(torch.randn(5, 8)).shape, sum(weight.numel() for weight in heads.parameters())
        (torch.Size([4, 5, 20]), 928)
    """

    def __init__(self, parts: SplitModel, heads: int = 4) -> None:
        super().__init__()
        if heads < 1:
            raise ValueError(f"heads={heads}: use at least one.")
        own: Any = parts.output.head
        weight = own.weight
        self.norm = [parts.output.norm]  # in a list: the model's, not trained
        self.blocks = nn.ModuleList(nn.Linear(parts.width, parts.width) for _ in range(heads))
        self.heads = nn.ModuleList(nn.Linear(parts.width, len(weight), bias=False) for _ in range(heads))
        self.to(device=weight.device, dtype=weight.dtype)
        with torch.no_grad():
            for block, head in zip(self.blocks, self.heads, strict=True):
                cast(nn.Linear, block).weight.zero_()
                cast(nn.Linear, block).bias.zero_()
                cast(nn.Linear, head).weight.copy_(weight)

    def forward(self, deep: Tensor) -> Tensor:
        """Hidden states of the cloud, ``[rows, width]``, to logits, ``[heads, rows, vocabulary]``."""
        rows = self.norm[0](deep)
        found = [head(rows + F.silu(block(rows))) for block, head in zip(self.blocks, self.heads, strict=True)]
        return torch.stack(found)

    def loss(self, deep: Tensor, tokens: Tensor) -> Tensor:
        """Weighted cross-entropy of one text: ``deep`` ``[tokens, width]``, ``tokens`` ``[tokens]``."""
        total = deep.new_zeros(())
        for place, logits in enumerate(self(deep)):
            ahead = place + 2
            if len(tokens) > ahead:
                total = total + 0.8**place * F.cross_entropy(logits[:-ahead].float(), tokens[ahead:])
        return total


class MedusaConversation(Conversation):
    """A text whose drafts are a tree of what the heads guess; all its rows are uploaded and verified at once.

    Typical acceptance, which Medusa can do, is not lossless: here the tree is followed by the model's own choices.

    Args:
        parts: of the model; the middle is not used.
        heads: trained for it.
        prompt: token ids, at least one.
        new_tokens: tokens to generate at most.
        choice: the target's.
        tree: parents; a node takes, of its depth's head, the token whose rank is its place among its siblings.
        request: number of the text among those with the same seed.
        stops: tokens that end the text; by default the model's.
    """

    def __init__(
        self,
        parts: SplitModel,
        heads: MedusaHeads,
        prompt: Sequence[int],
        new_tokens: int = 128,
        choice: TokenChoice | None = None,
        tree: Sequence[int] = MEDUSA_TREE,
        request: int = 0,
        stops: Collection[int] | None = None,
    ) -> None:
        super().__init__(parts, None, prompt, new_tokens, choice, Drafting(branches=0), request, stops)
        self.heads = heads
        template = DraftTree((0,) * len(tree), tuple(tree))
        if template.depths and max(template.depths) > len(heads.heads):
            raise ValueError(f"A tree of depth {max(template.depths)}, and {len(heads.heads)} heads: cut it.")
        siblings: dict[int, count[int]] = {}
        self._ranks = tuple(next(siblings.setdefault(parent, count())) for parent in tree)
        self._template = template
        self._guess = DraftTree((), ())
        self._kept: tuple[int, ...] = ()
        self._seen: Tensor | None = None

    @torch.no_grad()
    def begin(self, deep: Tensor) -> list[int]:
        """The first token, and what the heads guess behind it."""
        self._seen = deep[-1].to(next(self.heads.parameters()))
        return super().begin(deep)

    @torch.no_grad()
    def draft(self) -> None:
        """The heads' tree, put through the device's layers: one step for all of it."""
        if self._next is None:
            raise RuntimeError("The draft has ended: send it with upload().")
        assert self._seen is not None
        depths = self._template.depths
        nodes = [node for node, depth in enumerate(depths) if depth < self.left]  # a prefix of each path
        place = {node: index for index, node in enumerate(nodes)} | {-1: -1}
        guessed = self.heads(self._seen[None])[:, 0]
        best = guessed.topk(max(self._ranks, default=0) + 1, -1).indices
        tokens = tuple(int(best[depths[node] - 1, self._ranks[node]]) for node in nodes)
        self._guess = DraftTree(tokens, tuple(place[self._template.parents[node]] for node in nodes))
        root = self.held
        rows = self.parts.input(
            torch.tensor([self._next, *tokens]), self._shallow, self._guess.positions(root), self._guess.mask(root)
        )
        self._rows, self._next = list(rows), None

    def upload(self) -> Upload:
        """Rows of the pending token and of the tree."""
        chain = super().upload()
        return Upload(chain.start, chain.rows, chain.reply, self._kept, self._guess.parents)

    def look_ahead(self) -> bool:
        """Nothing: the heads need what the cloud sends."""
        return False

    @torch.no_grad()
    def receive(self, deep: Tensor) -> list[int]:
        """Follow the model's choices down the tree."""
        if len(deep) != len(self._rows):
            raise ValueError(f"{len(deep)} rows came back for {len(self._rows)}.")
        deep = deep.to(next(self.heads.parameters()))
        verified = verify(self._guess, self._said(deep), self.choice, self.request, self.text)
        self.rounds += 1
        self.drafted += len(self._guess)
        self.accepted += verified.accepted
        rows = [0, *(node + 1 for node in verified.nodes)]
        root = self.held
        self._kept = tuple(root + row for row in rows)
        keep(self._shallow, torch.tensor([*range(root), *self._kept]))
        self._sent.extend(self._rows[row] for row in rows)
        self._seen = deep[rows[-1]]
        return self._commit(list(verified.tokens))
