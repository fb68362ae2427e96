"""Which rows the cloud runs next: continuous batching, token by token."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, TypeVar

__all__ = ["Waiting", "next_batch"]


class Waiting(Protocol):
    """An upload that waits: ``rows`` left of it, and whether it is to be verified, which is not cut."""

    @property
    def rows(self) -> int: ...  # noqa: D102

    @property
    def verifies(self) -> bool: ...  # noqa: D102


Job = TypeVar("Job", bound=Waiting)


def next_batch(waiting: Iterable[Job], budget: int | None) -> list[tuple[Job, int]]:
    """What goes in the next batch, and how many rows of each.

    With a budget, rows to be verified come first, then prompts as they arrived, the last one cut where the budget ends
    (Sarathi-Serve's rule: no prompt holds up decoding; HAT names continuous batching, the order is ours).
    Without one, everything that waits goes whole.

    Args:
        waiting: in order of arrival, one of each conversation.
        budget: tokens of a batch.

    Example::

        >>> from types import SimpleNamespace as Upload
        >>> prompt, draft = Upload(rows=900, verifies=False), Upload(rows=5, verifies=True)
        >>> [rows for _, rows in next_batch([prompt, draft], budget=512)]
        [5, 507]
    """
    jobs = list(waiting)
    if budget is None:
        return [(job, job.rows) for job in jobs]
    batch: list[tuple[Job, int]] = []
    for job in sorted(jobs, key=lambda each: not each.verifies):
        fits = budget if not job.verifies else (job.rows if job.rows <= budget or not batch else 0)
        if rows := min(job.rows, fits):
            batch.append((job, rows))
            budget = max(budget - rows, 0)
    return batch
