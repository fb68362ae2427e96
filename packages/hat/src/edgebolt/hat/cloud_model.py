"""The cloud's half: middle layers, and a cache for each conversation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from edgebolt.common.decoding import DraftTree, LayerStack, Segment, cache_length, crop, keep
from edgebolt.hat.upload import Upload

if TYPE_CHECKING:
    from transformers import DynamicCache

__all__ = ["CloudModel", "cut_back"]


def cut_back(cache: DynamicCache, upload: Upload) -> None:
    """Leave of a cache what an upload builds on."""
    if upload.kept:
        before = torch.arange(upload.start - len(upload.kept))
        keep(cache, torch.cat([before, torch.tensor(upload.kept)]))
    else:
        crop(cache, upload.start)


class CloudModel:
    """Runs the uploads of several conversations through the middle layers at once.

    Args:
        middle: of :func:`edgebolt.hat.split`.
    """

    def __init__(self, middle: LayerStack) -> None:
        self.middle = middle
        weight = next(middle.parameters())
        self.device, self.dtype = weight.device, weight.dtype

    @torch.no_grad()
    def run(self, work: Sequence[tuple[DynamicCache, Upload]]) -> list[Tensor]:
        """Cut each cache back to where its upload begins, and append the upload's rows.

        Args:
            work: caches, each once, and what is to be appended.

        Returns:
            For each upload what the middle layers give for its last ``reply`` rows, shape ``[reply, width]``.

        Raises:
            ValueError: if a cache holds less than its upload builds on; no cache has changed then.
        """
        for cache, upload in work:
            if upload.start > cache_length(cache):
                raise ValueError(f"Rows from position {upload.start} on, and {cache_length(cache)} are held.")
        segments = []
        for cache, upload in work:
            cut_back(cache, upload)
            positions = mask = None
            if upload.parents is not None:
                tree = DraftTree((0,) * len(upload.parents), upload.parents)
                positions, mask = tree.positions(upload.start), tree.mask(upload.start)
            segments.append(Segment(cache, len(upload.rows), positions, mask))
        rows = torch.cat([upload.rows for _, upload in work]).to(self.device, self.dtype)
        deep = self.middle(rows, segments).split([len(upload.rows) for _, upload in work])
        return [part[len(part) - upload.reply :].clone() for part, (_, upload) in zip(deep, work, strict=True)]
