"""What the server has in place of a client's data: their number, and samples of the server's own for their shape."""

from __future__ import annotations

from typing import Any

from torch.utils.data import DataLoader, Dataset

from edgebolt.flower.records import Facts

__all__ = ["stand_in"]


class _Samples(Dataset[Any]):
    """As many samples as the client has; which they are is of no matter, for nobody trains on them."""

    def __init__(self, length: int, dataset: Any) -> None:
        self.length, self.dataset = length, dataset

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < self.length:
            raise IndexError(index)
        return self.dataset[index % len(self.dataset)]


def stand_in(facts: Facts, loader: DataLoader[Any]) -> DataLoader[Any]:
    """A loader of as many batches as the client's.

    Args:
        facts: what the client has said.
        loader: of the server, whose samples have the shape of the clients' own.
    """
    return DataLoader(
        _Samples(facts.samples, loader.dataset),
        batch_size=facts.batch_size,
        drop_last=facts.drop_last,
        collate_fn=loader.collate_fn,
    )
