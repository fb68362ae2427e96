"""Drafted tokens as a tree below the last committed token; a chain is a tree without branches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

__all__ = ["DraftTree"]


@dataclass(frozen=True)
class DraftTree:
    """Tokens that may follow, each below another one or below the root, the last committed token.

    Args:
        tokens: a token for every node.
        parents: for every node the index of the node that it follows, which comes before it; -1 for the root.

    Raises:
        ValueError: if the two differ in length, or a node comes before the one that it follows.

    Example::

        >>> tree = DraftTree((5, 7, 6), (-1, 0, -1))  # 5 then 7, or 6
        >>> tree.depths
        (1, 2, 1)
        >>> tree.path(1)
        (0, 1)
        >>> tree.mask(prefix=2)[1:, 2:].int().tolist()  # rows: nodes; columns: root and nodes
        [[1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 1]]
    """

    tokens: tuple[int, ...]
    parents: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.tokens) != len(self.parents):
            raise ValueError(f"{len(self.tokens)} tokens and {len(self.parents)} parents: give each token one.")
        for node, parent in enumerate(self.parents):
            if not -1 <= parent < node:
                raise ValueError(f"Node {node} follows node {parent}: a node follows an earlier one, or -1, the root.")

    @classmethod
    def chain(cls, tokens: Sequence[int]) -> DraftTree:
        """One token after the other.

        Example::

            >>> DraftTree.chain([5, 7]).parents
            (-1, 0)
        """
        return cls(tuple(tokens), tuple(range(-1, len(tokens) - 1)))

    def __len__(self) -> int:
        return len(self.tokens)

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """Distance of every node from the root, from 1 on: by how much its position lies behind the root's."""
        found: list[int] = []
        for parent in self.parents:
            found.append(1 if parent < 0 else found[parent] + 1)
        return tuple(found)

    def path(self, node: int) -> tuple[int, ...]:
        """Nodes from the root's child down to ``node``; empty for the root, -1."""
        found: list[int] = []
        while node >= 0:
            found.append(node)
            node = self.parents[node]
        return tuple(reversed(found))

    def child(self, node: int, token: int) -> int | None:
        """The node with ``token`` below ``node`` (-1: the root), the first if there are several, or None."""
        below = (index for index, parent in enumerate(self.parents) if parent == node and self.tokens[index] == token)
        return next(below, None)

    def mask(self, prefix: int) -> Tensor:
        """What root and nodes see: all that came before, themselves and what they follow.

        Args:
            prefix: positions in the cache before the root.

        Returns:
            Boolean, shape ``[1 + nodes, prefix + 1 + nodes]``; the root is row 0 and column ``prefix``.
        """
        seen = torch.zeros(len(self) + 1, prefix + len(self) + 1, dtype=torch.bool)
        seen[:, : prefix + 1] = True
        for node, parent in enumerate(self.parents):
            seen[node + 1] |= seen[parent + 1]
            seen[node + 1, prefix + node + 1] = True
        return seen

    def positions(self, root: int) -> Tensor:
        """Positions of root and nodes in the text, shape ``[1 + nodes]``; branches share theirs."""
        return torch.tensor([root, *(root + depth for depth in self.depths)])
