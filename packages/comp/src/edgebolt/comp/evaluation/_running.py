"""A model as it is for evaluation, and put back afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def evaluating(*models: Any) -> Iterator[None]:
    """Without gradients and dropout inside the block; training modes come back after it."""
    modes = [model.training for model in models]
    try:
        for model in models:
            model.eval()
        with torch.no_grad():  # not inference_mode: what a model caches could not be trained with later
            yield
    finally:
        for model, mode in zip(models, modes, strict=True):
            model.train(mode)


def device_of(model: Any) -> torch.device:
    """Where the model's inputs belong: on the device of its first parameter."""
    device: torch.device = next(model.parameters()).device
    return device
