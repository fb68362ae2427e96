"""A device's memory as bytes: tensors and built-ins, as in a checkpoint."""

from __future__ import annotations

import io
from typing import Any

import torch

__all__ = ["dump_memory", "load_memory"]


def dump_memory(memory: dict[str, Any]) -> bytes:
    """Spell a memory, whose tensors are brought to the CPU when it is read."""
    buffer = io.BytesIO()
    torch.save(memory, buffer)
    return buffer.getvalue()


def load_memory(blob: bytes | memoryview) -> dict[str, Any]:
    """Read a memory; nothing but tensors and built-ins is accepted, so that no code can come with it."""
    memory: dict[str, Any] = torch.load(io.BytesIO(blob), map_location="cpu", weights_only=True)
    return memory
