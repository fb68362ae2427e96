"""How many tokens of a prompt go in one message."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["chunk_size"]


def chunk_size(
    left: int,
    row_seconds: float,
    delay: Callable[[float], float],
    batch: float,
    stages: int = 1,
    smallest: int = 8,
    largest: int = 512,
) -> int:
    """The chunk whose upload takes as long as the cloud needs until it can take the next one.

    ``X · A / β = (g(μ) + g(X)) / P``: a chunk that has come in waits for the batch in the first of
    ``P`` stages, then passes that stage itself, and meanwhile the next one is on the link. Smaller chunks would queue,
    larger ones leave the cloud idle. A digest of HAT says this in words; the formula, and both bounds, are ours.

    Args:
        left: tokens of the prompt that are not sent yet.
        row_seconds: ``A / β``, seconds that a token's row is on the uplink.
        delay: ``g``, seconds that a batch of so many tokens takes in the cloud; never falling.
        batch: ``μ``, tokens of a batch as it is now, without the chunk.
        stages: ``P``, of the cloud's pipeline.
        smallest: bound; the last chunk of a prompt can be smaller.
        largest: bound.

    Returns:
        The smallest of ``smallest`` … ``largest`` tokens whose upload takes at least as long as the cloud (where ``g``
        rises faster than the upload in between, one that does); ``largest`` where the link is faster than the cloud at
        every size; at most ``left``.

    Raises:
        ValueError: for numbers out of range.

    Example::

        >>> chunk_size(2000, 8192 / 7.5e6, lambda tokens: 4 * (0.004 + 0.00003 * tokens), batch=90, stages=4)
        11
    """
    if left < 1 or not row_seconds > 0 or batch < 0 or stages < 1 or not 1 <= smallest <= largest:
        raise ValueError(
            f"left={left}, row_seconds={row_seconds}, batch={batch}, stages={stages}, smallest={smallest}, "
            f"largest={largest}: all are above 0 (batch may be 0), and smallest is at most largest."
        )

    def uploads_longer(tokens: int) -> bool:
        return tokens * row_seconds >= (delay(batch) + delay(tokens)) / stages

    low, high = smallest, largest
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if uploads_longer(middle) else (middle + 1, high)
    return min(low, left)
