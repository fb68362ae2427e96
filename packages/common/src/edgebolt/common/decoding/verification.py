"""Which drafted tokens the target would have chosen itself."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from torch import Tensor

from edgebolt.common.decoding.token_choice import TokenChoice
from edgebolt.common.decoding.trees import DraftTree

__all__ = ["Verified", "committed", "verify"]


@dataclass(frozen=True)
class Verified:
    """What a round gives.

    Args:
        nodes: of the tree that were followed, root's child first.
        tokens: their tokens, and one more that the target chose where no node had it.
    """

    nodes: tuple[int, ...]
    tokens: tuple[int, ...]

    @property
    def accepted(self) -> int:
        """Drafted tokens that are taken over."""
        return len(self.nodes)


def verify(tree: DraftTree, logits: Tensor, choice: TokenChoice, request: int, text: Sequence[int]) -> Verified:
    """Follow the target's choices down a tree: sample and match.

    Args:
        tree: the draft, fixed before any choice of this round was made.
        logits: of the target at the root and at every node, shape ``[1 + nodes, vocabulary]``.
        choice: of the target.
        request: number of the conversation.
        text: all tokens up to the root, the root included.

    Raises:
        ValueError: if the rows are not one for the root and one a node.

    Example::

        >>> import torch
        >>> logits = torch.eye(4)[[2, 3, 0]]  # after the root comes 2, after that 3; 0 after the other branch
        >>> verify(DraftTree((2, 1), (-1, -1)), logits, TokenChoice(), 0, [0])
        Verified(nodes=(0,), tokens=(2, 3))
    """
    if len(logits) != len(tree) + 1:
        raise ValueError(f"{len(logits)} rows of logits for a tree of {len(tree)}: one for the root, one a node.")
    node, path = -1, list(text)
    nodes: list[int] = []
    while True:
        token = choice(logits[node + 1], request, len(path), path)
        path.append(token)
        following = tree.child(node, token)
        if following is None:
            return Verified(tuple(nodes), tuple(path[len(text) :]))
        nodes.append(following)
        node = following


def committed(tokens: Sequence[int], left: int, stops: Collection[int] = ()) -> tuple[list[int], bool]:
    """What of a round's tokens belongs to the text, and whether it ends there.

    Args:
        tokens: in order.
        left: tokens that the text may still get.
        stops: tokens that end a text; they belong to it.

    Example::

        >>> committed([4, 2, 7], left=5, stops={2})
        ([4, 2], True)
        >>> committed([4, 2, 7], left=3)
        ([4, 2, 7], True)
    """
    kept = list(tokens[:left])
    end = next((index + 1 for index, token in enumerate(kept) if token in stops), None)
    return kept[:end], end is not None or len(kept) == left
