"""How much memory a block of code took."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from edgebolt.comp.heap import trim

__all__ = ["MeasuredMemory", "measured_memory"]


@dataclass
class MeasuredMemory:
    """Bytes; all None where they cannot be read, which is everywhere but on Linux.

    Attributes:
        before: anonymous and shared memory of the process as the block began.
        peak: the most above ``before`` while it ran; None until it has ended.
    """

    before: int | None = None
    peak: int | None = None

    def __str__(self) -> str:
        return "not measured" if self.peak is None else f"{self.peak / 2**20:.1f} MiB"


@contextmanager
def measured_memory(interval: float = 0.002) -> Iterator[MeasuredMemory]:
    """Peak memory of the process while a block runs, above what it had before.

    Counted is what no file backs: anonymous memory (``RssAnon``: tensors, Python's objects) and shared memory
    (``RssShmem``: tensors shared among processes, files under a ``tmpfs``). Pages of files that are mapped, such as
    safetensors, are not: the kernel drops them when it needs the room. A thread reads ``/proc`` every ``interval``
    seconds, so a peak that is shorter than that may be missed, and the kernel's figures lag by some 100 KiB. Memory
    that was freed before the block is given back to the system first, so that the block cannot hide in it. Children
    and GPUs are not counted (``torch.cuda.max_memory_allocated`` is there for these).

    Elsewhere than on Linux the block runs and nothing is measured: ``peak`` stays None.

    Args:
        interval: seconds between two readings.

    Yields:
        What is filled in as the block ends, also if it raises.

    Example::

        >>> import torch
        >>> with measured_memory() as memory:
        ...     held = torch.ones(16 * 2**20)
        >>> memory.peak is None or 60 * 2**20 < memory.peak < 80 * 2**20
        True
    """
    result = MeasuredMemory()
    try:
        status = os.open(f"/proc/{os.getpid()}/status", os.O_RDONLY)
        result.before = _bytes(status)
    except (OSError, ValueError):  # no /proc, or one that does not tell
        yield result
        return
    gc.collect()
    trim()
    before = most = result.before = _bytes(status)
    done = threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(interval):
            most = max(most, _bytes(status))

    thread = threading.Thread(target=watch, name="measured_memory", daemon=True)
    thread.start()
    try:
        yield result
    finally:
        most = max(most, _bytes(status))
        done.set()
        thread.join()
        os.close(status)
        result.peak = most - before


def _bytes(status: int) -> int:
    """``RssAnon + RssShmem`` of an open ``/proc/PID/status``."""
    text = os.pread(status, 8192, 0)
    found = [line.split()[1] for line in text.splitlines() if line.startswith((b"RssAnon:", b"RssShmem:"))]
    if len(found) != 2:
        raise ValueError("the kernel does not tell RssAnon and RssShmem")
    return 1024 * sum(map(int, found))
