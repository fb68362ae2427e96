"""What a device sends to the cloud, as plain data: every message says itself where its rows belong."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["Upload"]


@dataclass(frozen=True)
class Upload:
    """Hidden states of a text's next tokens.

    Args:
        start: positions that the cloud keeps of what it has; the rows come behind them.
        rows: shape ``[rows, width]``.
        reply: for how many of the last rows the device wants what the middle layers give: none while a prompt is not
            complete, one for its end, all when drafted tokens are to be verified.
        kept: positions of the last upload's tree that were followed, in order; they are the last of the ``start``
            kept ones. Empty for a chain, which is cut.
        parents: of all rows but the first, where they are a tree below it (see
            :class:`edgebolt.common.decoding.DraftTree`); None for a chain.
    """

    start: int
    rows: Tensor
    reply: int
    kept: tuple[int, ...] = ()
    parents: tuple[int, ...] | None = None
