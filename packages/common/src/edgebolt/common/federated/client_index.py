"""Which samples are whose: two arrays, however many clients there are."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["ClientIndex"]

_SPLITS = ("train", "val", "test")


@dataclass(frozen=True, eq=False)
class ClientIndex:
    """Which samples belong to which client and split: two arrays, however many clients there are.

    Client ``c`` owns ``index[offsets[3c]:offsets[3c + 3]]``: its training, then validation, then test samples.

    Args:
        index: Sample numbers, int64, shape ``[samples]``, each at most once.
        offsets: Where each part begins in ``index``, int64, shape ``[3 * clients + 1]``.

    Raises:
        ValueError: If the offsets do not cover ``index`` in order, or a sample occurs twice.

    Example::

        >>> index = ClientIndex(index=np.array([5, 6, 0, 1, 2, 3]), offsets=np.array([0, 1, 1, 2, 5, 6, 6]))
        >>> len(index), index.indices(1).tolist(), index.indices(1, "val").tolist()
        (2, [0, 1, 2], [3])
        >>> index.sizes().tolist(), index.sizes("test").tolist(), index.sizes("all").tolist()
        ([1, 3], [1, 0], [2, 4])
    """

    index: NDArray[np.int64]
    offsets: NDArray[np.int64]

    def __post_init__(self) -> None:
        """Copy and check the arrays."""
        for name in ("index", "offsets"):
            array = np.array(getattr(self, name), dtype=np.int64)
            array.flags.writeable = False  # the views that are handed out share this memory
            object.__setattr__(self, name, array)
        offsets = self.offsets
        if self.index.ndim != 1 or offsets.ndim != 1 or len(offsets) % 3 != 1:
            raise ValueError(
                f"index must be [samples], offsets [3 * clients + 1], got {self.index.shape} and {offsets.shape}."
            )
        if offsets[0] != 0 or offsets[-1] != len(self.index) or (np.diff(offsets) < 0).any():
            raise ValueError(f"offsets must rise from 0 to the {len(self.index)} entries of index, got {offsets}.")
        if len(self.index) and (self.index.min() < 0 or np.bincount(self.index).max() > 1):
            raise ValueError("index must hold sample numbers from 0 on, each at most once.")

    def __len__(self) -> int:
        """Return the number of clients."""
        return len(self.offsets) // 3

    def indices(self, client: int, split: str = "train") -> NDArray[np.int64]:
        """Return the samples of one client in rising order: a read-only view, int64, shape ``[samples]``.

        Args:
            client: ``0 <= client < len(self)``.
            split: ``"train"``, ``"val"``, ``"test"``, or ``"all"`` (the three one after the other).

        Raises:
            IndexError: If there is no such client.
            ValueError: If there is no such split.
        """
        if not 0 <= client < len(self):
            raise IndexError(f"client must be in 0 ... {len(self) - 1}, got {client}.")
        first, last = _parts(split)
        return self.index[self.offsets[3 * client + first] : self.offsets[3 * client + last]]

    def sizes(self, split: str = "train") -> NDArray[np.int64]:
        """Return the number of samples of each client, int64, shape ``[clients]``."""
        first, last = _parts(split)
        return self.offsets[last::3][: len(self)] - self.offsets[first::3][: len(self)]

    def label_counts(self, labels: NDArray[np.int64], split: str = "train") -> NDArray[np.int64]:
        """Count the labels of each client.

        Args:
            labels: Class number of each sample of the dataset, shape ``[samples]``; see ``find_labels``.
            split: As in :meth:`indices`.

        Returns:
            int64, shape ``[clients, max(labels) + 1]``.

        Raises:
            ValueError: If ``labels`` are not class numbers, or too few.
        """
        labels = np.asarray(labels)
        if labels.ndim != 1 or labels.dtype.kind not in "iu" or (labels.size and labels.min() < 0):
            raise ValueError("labels must be class numbers from 0 on, one a sample: `find_labels(dataset)`.")
        if len(self.index) and len(labels) <= self.index.max():
            raise ValueError(f"There are {len(labels)} labels, but the clients hold sample {self.index.max()}.")
        first, last = _parts(split)
        part = np.repeat(np.arange(3 * len(self)), np.diff(self.offsets))
        counted = (part % 3 >= first) & (part % 3 < last)
        classes = int(labels.max()) + 1 if labels.size else 0
        cells = part[counted] // 3 * classes + labels[self.index[counted]]
        return np.bincount(cells, minlength=len(self) * classes).reshape(len(self), classes)


def _parts(split: str) -> tuple[int, int]:
    if split == "all":
        return 0, 3
    if split not in _SPLITS:
        raise ValueError(f'split must be "train", "val", "test" or "all", got {split!r}.')
    return _SPLITS.index(split), _SPLITS.index(split) + 1
