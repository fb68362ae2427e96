"""Dealing the samples of one dataset out to clients, each with a training, validation and test part."""

import reprlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from math import ceil
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from edgebolt.common.federated.client_index import ClientIndex
from edgebolt.common.federated.labels import LabelSource, count_samples, find_column, find_labels
from edgebolt.common.random import stream

if TYPE_CHECKING:
    from os import PathLike

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["IID", "ByKey", "Dirichlet", "Partition", "Shards", "Sizes"]


class Partition(ABC):
    """How a dataset is dealt out to clients. Subclasses say to whom each sample goes: :meth:`assign`.

    A client with ``m`` samples gives ``floor(test * m)`` of them to its test part and ``floor(val * m)`` to its
    validation part, drawn at random; the others are for training. So a client with few samples may have none to
    validate with. The draw depends on the seed and on which samples the client has, not on the other clients, and the
    test part does not depend on ``val``. Where rounding would leave fewer than ``min_samples`` for training although
    a smaller client has them (``m = 4`` at ``val = test = 0.3`` leaves 2, ``m = 3`` leaves 3), validation gives way.

    A client that would have fewer than ``min_samples`` for training receives samples, one at a time, from whoever is
    the largest client at that moment (at equal size the one with the lowest number); which ones is drawn at random.

    Args:
        clients: Number of clients.
        seed: Seed of all draws; the same seed and dataset give the same partition.
        min_samples: Least number of training samples of a client.
        val: Share of each client's samples for its validation part, in ``[0, 1)``.
        test: Share of each client's samples for its test part, in ``[0, 1)``.
        labels: Where the labels are: a name, or a callable from the dataset to one label a sample; ``None``: they are
            searched as ``find_labels`` says.

    Raises:
        ValueError: If an argument is out of its range.
        TypeError: If ``labels`` is neither a name nor a callable.
    """

    def __init__(
        self,
        clients: int,
        *,
        seed: int = 0,
        min_samples: int = 1,
        val: float = 0.0,
        test: float = 0.0,
        labels: LabelSource = None,
    ) -> None:
        if clients < 1:
            raise ValueError(f"clients must be at least 1, got {clients}.")
        if min_samples < 0:
            raise ValueError(f"min_samples must be 0 (clients may be empty) or more, got {min_samples}.")
        if not (0 <= val < 1 and 0 <= test < 1 and val + test < 1):
            raise ValueError(f"val and test must be shares that leave some for training, got val={val}, test={test}.")
        if labels is not None and not isinstance(labels, str) and not callable(labels):
            raise TypeError(
                f"labels must be a name or a callable, got {type(labels).__name__}: `labels=lambda dataset: [...]`."
            )
        self.clients: int | None = clients
        self.seed = seed
        self.min_samples = min_samples
        self.val = val
        self.test = test
        self.labels = labels

    @abstractmethod
    def assign(self, dataset: Dataset[Any]) -> NDArray[np.int64]:
        """Return the client of each sample, int64, shape ``[samples]``; -1 leaves a sample out."""

    def __len__(self) -> int:
        """Return the number of clients."""
        if self.clients is None:
            raise RuntimeError(f"The number of clients of {type(self).__name__} is known after split(dataset).")
        return self.clients

    def __repr__(self) -> str:
        """Show the arguments, long ones shortened."""
        return f"{type(self).__name__}({', '.join(f'{k}={reprlib.repr(v)}' for k, v in vars(self).items())})"

    def split(self, dataset: Dataset[Any]) -> ClientIndex:
        """Deal the samples of ``dataset`` out.

        Args:
            dataset: A map-style dataset: anything with ``__len__`` and ``__getitem__``.

        Raises:
            TypeError: If the dataset has no length or can not be indexed, or if its labels are needed and not found.
            ValueError: If there are too few samples for ``min_samples``, or the labels can not be used.
        """
        samples = count_samples(dataset)
        owner = np.asarray(self.assign(dataset), dtype=np.int64)
        clients = len(self)
        if owner.shape != (samples,) or (samples and not -1 <= owner.min() <= owner.max() < clients):
            raise ValueError(
                f"{type(self).__name__}.assign must return clients, -1 to {clients - 1}, for {samples} samples."
            )
        owner = self._fill_up(owner, clients)
        part = 3 * owner + self._parts_of_clients(owner, clients)
        part[owner < 0] = -1
        order = np.argsort(part, kind="stable")  # samples stay in rising order inside a part
        sizes = np.bincount(part[part >= 0], minlength=3 * clients)
        return ClientIndex(order[samples - int(sizes.sum()) :], np.concatenate([[0], np.cumsum(sizes)]))

    def plot(
        self, dataset: Dataset[Any], ax: "Axes | None" = None, path: "str | PathLike[str] | None" = None
    ) -> "tuple[Figure, Axes]":
        """Draw how many samples of each label each client has, all splits together.

        Args:
            dataset: The dataset to split; it must have labels.
            ax: Axes to draw on; ``None`` makes a new figure (without a window, without touching ``pyplot``).
            path: Where to save the figure; the ending says the format.

        Returns:
            The figure and its axes.

        Raises:
            ModuleNotFoundError: If matplotlib is not installed: ``pip install 'edgebolt-common[plot]'``.
        """
        from edgebolt.common.federated.partition_plot import plot_label_counts

        counts = self.split(dataset).label_counts(find_labels(dataset, self.labels), "all")
        return plot_label_counts(counts, ax=ax, path=path)

    def _held_out(self, sizes: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the sizes of the validation and test parts of clients of these sizes."""
        # 0.29 * 100 is 28.999999999999996 in floats
        return np.floor(self.val * sizes + 1e-9).astype(np.int64), np.floor(self.test * sizes + 1e-9).astype(np.int64)

    def _least_size(self) -> int:
        """Return the smallest size of a client that keeps ``min_samples`` for training."""
        bound = ceil(self.min_samples / (1 - self.val - self.test)) + 1
        sizes = np.arange(bound + 1)
        val, test = self._held_out(sizes)
        return int(np.argmax(sizes - val - test >= self.min_samples))

    def _fill_up(self, owner: NDArray[np.int64], clients: int) -> NDArray[np.int64]:
        """Move samples from the largest clients to those below the minimum."""
        sizes = np.bincount(owner[owner >= 0], minlength=clients)
        least, total = self._least_size(), int(sizes.sum())
        if total < clients * least:
            held = f" ({least} in all, with val={self.val} and test={self.test})" if least > self.min_samples else ""
            raise ValueError(
                f"{clients} clients with min_samples={self.min_samples}{held} need {clients * least} samples, but "
                f"there are {total}, {total // clients} a client: take a smaller min_samples"
                + (f", or at most {total // least} clients." if total >= least else ".")
            )
        missing = np.maximum(least - sizes, 0)
        if not missing.any():
            return owner
        surplus = sizes - _levelled(sizes, int(missing.sum()))
        rng = stream(self.seed, "partition/move")
        giver = np.flatnonzero((owner >= 0) & (surplus[owner] > 0))
        rank = _rank_in_group(owner[giver], rng.random(len(owner))[giver], clients)
        moved = giver[rank < surplus[owner[giver]]]
        owner = owner.copy()
        owner[rng.permutation(moved)] = np.repeat(np.arange(clients), missing)
        return owner

    def _parts_of_clients(self, owner: NDArray[np.int64], clients: int) -> NDArray[np.int64]:
        """Return 0, 1 or 2 for each sample: training, validation or test."""
        parts = np.zeros(len(owner), dtype=np.int64)
        if self.val == 0 and self.test == 0:
            return parts
        used = np.flatnonzero(owner >= 0)
        sizes = np.bincount(owner[used], minlength=clients)
        val, test = self._held_out(sizes)
        val = np.minimum(val, sizes - test - self.min_samples)  # two floors: what is left is not monotone in the size
        # One number a sample, drawn whatever the partition is: each client's order depends on its own samples alone.
        rank = _rank_in_group(owner[used], stream(self.seed, "partition/holdout").random(len(owner))[used], clients)
        parts[used[rank < test[owner[used]]]] = 2
        parts[used[rank >= (sizes - val)[owner[used]]]] = 1
        return parts


def _rank_in_group(group: NDArray[np.int64], keys: NDArray[np.float64], groups: int) -> NDArray[np.int64]:
    """Return the place of each element among those of its group, ordered by key."""
    order = np.lexsort((keys, group))
    sizes = np.bincount(group, minlength=groups)
    rank = np.empty(len(group), dtype=np.int64)
    rank[order] = np.arange(len(group)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return rank


def _levelled(sizes: NDArray[np.int64], take: int) -> NDArray[np.int64]:
    """Return the sizes after one has been taken ``take`` times from the largest (first of equals)."""
    low, high = 0, int(sizes.max())
    while low < high:  # the lowest level that does not take too many
        level = (low + high) // 2
        low, high = (low, level) if np.maximum(sizes - level, 0).sum() <= take else (level + 1, high)
    levelled = np.minimum(sizes, low)
    left = take - int((sizes - levelled).sum())
    levelled[np.flatnonzero(levelled == low)[:left]] -= 1
    return levelled


class IID(Partition):
    """Every client gets the same number of samples (one more or less), drawn at random.

    The arguments and errors are those of :class:`Partition`; only :meth:`plot` needs labels.

    Example::

        >>> index = IID(4, seed=0, val=0.25).split([(x, x % 2) for x in range(18)])
        >>> index.sizes().tolist(), index.sizes("val").tolist()
        ([4, 4, 3, 3], [1, 1, 1, 1])
    """

    def assign(self, dataset: Dataset[Any]) -> NDArray[np.int64]:
        """Return the client of each sample, int64, shape ``[samples]``."""
        samples = count_samples(dataset)
        owner = np.empty(samples, dtype=np.int64)
        owner[stream(self.seed, "partition/iid").permutation(samples)] = np.arange(samples) % len(self)
        return owner


class Dirichlet(Partition):
    r"""Label skew: each class is dealt out to the clients in shares drawn from a Dirichlet distribution.

    For each class :math:`k` shares :math:`p_k \sim \mathrm{Dir}_N(\alpha)` over the :math:`N` clients are drawn, and
    client :math:`c` gets :math:`p_{k,c}` of the samples of that class. So both the label mix and the number of samples
    differ between clients. This is the variant of Yurochkin et al., "Bayesian Nonparametric Federated Learning of
    Neural Networks" (ICML 2019). Hsu et al., "Measuring the Effects of Non-Identical Data Distribution for Federated
    Visual Classification" (2019) draw a label mix for each client instead and give all clients the same number of
    samples; at one ``alpha`` the two are not the same. Rounding (assumed): the samples of a class lie in random order
    on a line that the cumulative shares cut; a sample belongs to the client in whose piece its middle lies.

    Args:
        clients: Number of clients, :math:`N`.
        alpha: Concentration :math:`\alpha > 0`. Small: a client sees few classes; large: the same mix everywhere.
        seed: Seed of all draws.
        min_samples: Least number of training samples of a client; reached by moving samples (see :class:`Partition`).
        val: Share of each client's samples for validation.
        test: Share of each client's samples for testing.
        labels: Where the labels are; ``None``: searched as ``find_labels`` says.

    Raises:
        ValueError: If an argument is out of its range.

    Example::

        >>> dataset = [(x, x % 10) for x in range(1000)]
        >>> index = Dirichlet(5, alpha=0.1, seed=0, min_samples=20, test=0.2).split(dataset)
        >>> int(index.sizes("all").sum()), bool(index.sizes().min() >= 20)
        (1000, True)
    """

    def __init__(
        self,
        clients: int,
        alpha: float = 0.5,
        *,
        seed: int = 0,
        min_samples: int = 1,
        val: float = 0.0,
        test: float = 0.0,
        labels: LabelSource = None,
    ) -> None:
        super().__init__(clients, seed=seed, min_samples=min_samples, val=val, test=test, labels=labels)
        if not 0 < alpha < float("inf"):
            raise ValueError(f"alpha must be positive and finite, got {alpha}; for equal shares use IID.")
        self.alpha = alpha

    def assign(self, dataset: Dataset[Any]) -> NDArray[np.int64]:
        """Return the client of each sample, int64, shape ``[samples]``."""
        labels = find_labels(dataset, self.labels)
        owner = np.empty(len(labels), dtype=np.int64)
        by_label = np.argsort(labels, kind="stable")
        for members in np.split(by_label, np.flatnonzero(np.diff(labels[by_label])) + 1):
            if not len(members):
                continue
            rng = stream(self.seed, "partition/dirichlet", int(labels[members[0]]))
            ends = np.cumsum(rng.dirichlet(np.full(len(self), float(self.alpha)))) * len(members)
            piece = np.searchsorted(ends, np.arange(len(members)) + 0.5)
            owner[rng.permutation(members)] = np.minimum(piece, len(self) - 1)  # the last end may be 1 - 1e-16
        return owner


class Shards(Partition):
    """Label skew by shards: the samples are sorted by label, cut in equal shards, and each client gets some at random.

    McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data" (AISTATS 2017): with
    two shards most clients see two labels. Inside a label the order is random (assumed).

    Args:
        clients: Number of clients.
        shards_per_client: Number of shards of a client.
        seed: Seed of all draws.
        min_samples: Least number of training samples of a client.
        val: Share of each client's samples for validation; see :class:`Partition`.
        test: Share of each client's samples for testing.
        labels: Where the labels are; ``None``: searched as ``find_labels`` says.

    Raises:
        ValueError: If an argument is out of its range, or, in ``split``, if there are more shards than samples.

    Example::

        >>> dataset = [(x, x % 10) for x in range(1000)]
        >>> counts = Shards(5, shards_per_client=2, seed=0).split(dataset).label_counts(np.arange(1000) % 10)
        >>> (counts > 0).sum(axis=1).tolist()
        [2, 2, 2, 2, 2]
    """

    def __init__(
        self,
        clients: int,
        shards_per_client: int = 2,
        *,
        seed: int = 0,
        min_samples: int = 1,
        val: float = 0.0,
        test: float = 0.0,
        labels: LabelSource = None,
    ) -> None:
        super().__init__(clients, seed=seed, min_samples=min_samples, val=val, test=test, labels=labels)
        if shards_per_client < 1:
            raise ValueError(f"shards_per_client must be at least 1, got {shards_per_client}.")
        self.shards_per_client = shards_per_client

    def assign(self, dataset: Dataset[Any]) -> NDArray[np.int64]:
        """Return the client of each sample, int64, shape ``[samples]``."""
        labels = find_labels(dataset, self.labels)
        shards = len(self) * self.shards_per_client
        if shards > len(labels):
            raise ValueError(
                f"{len(self)} clients with {self.shards_per_client} shards each make {shards} shards of "
                f"{len(labels)} samples: take fewer clients or fewer shards_per_client."
            )
        rng = stream(self.seed, "partition/shards")
        shuffled = rng.permutation(len(labels))
        sorted_by_label = shuffled[np.argsort(labels[shuffled], kind="stable")]
        shard = np.arange(len(labels)) * shards // len(labels)
        owner = np.empty(len(labels), dtype=np.int64)
        owner[sorted_by_label] = (rng.permutation(shards) % len(self))[shard]
        return owner


class ByKey(Partition):
    """Natural clients: one for each distinct value of a key, such as the user who wrote the samples.

    Clients are numbered in the sorted order of ``str(value)``, so "10" comes before "2". Samples are never moved
    between users: a key with too few samples for ``min_samples`` is left out with its samples (as in LEAF, Caldas et
    al., 2018). The number of clients is known after :meth:`split`.

    Args:
        key: Where the keys are: the name of an attribute, column or sample field, a callable from the dataset to one
            key a sample, or the keys themselves.
        max_clients: Largest number of clients; of more keys this many are drawn at random. ``None``: all.
        seed: Seed of all draws.
        min_samples: Least number of training samples of a client.
        val: Share of each client's samples for validation; see :class:`Partition`.
        test: Share of each client's samples for testing.
        labels: Where the labels are; only :meth:`plot` needs them.

    Raises:
        ValueError: If an argument is out of its range, or, in ``split``, if no key has enough samples.
        TypeError: In ``split``, if the key is not found.

    Example::

        >>> dataset = [{"user": "eve", "label": 0}, {"user": "bob", "label": 1}, {"user": "eve", "label": 1}]
        >>> partition = ByKey(key="user")
        >>> partition.split(dataset).sizes().tolist(), len(partition)
        ([1, 2], 2)
    """

    def __init__(
        self,
        key: str | Sequence[Any] | Callable[[Dataset[Any]], Sequence[Any]],
        *,
        max_clients: int | None = None,
        seed: int = 0,
        min_samples: int = 1,
        val: float = 0.0,
        test: float = 0.0,
        labels: LabelSource = None,
    ) -> None:
        if max_clients is not None and max_clients < 1:
            raise ValueError(f"max_clients must be at least 1, or None for all, got {max_clients}.")
        super().__init__(1, seed=seed, min_samples=min_samples, val=val, test=test, labels=labels)
        self.clients = None
        self.key = key
        self.max_clients = max_clients

    def assign(self, dataset: Dataset[Any]) -> NDArray[np.int64]:
        """Return the client of each sample, int64, shape ``[samples]``; -1 for those left out."""
        values, inverse, sizes = np.unique(
            find_column(dataset, self.key).astype(str), return_inverse=True, return_counts=True
        )
        kept = np.flatnonzero(sizes >= self._least_size())
        if not len(kept):
            raise ValueError(
                f"None of the {len(values)} keys has the {self._least_size()} samples that min_samples="
                f"{self.min_samples} asks for (the largest has {sizes.max(initial=0)}): take a smaller min_samples."
            )
        if self.max_clients is not None and len(kept) > self.max_clients:
            kept = np.sort(stream(self.seed, "partition/keys").choice(kept, self.max_clients, replace=False))
        self.clients = len(kept)
        client = np.full(len(values), -1, dtype=np.int64)
        client[kept] = np.arange(len(kept))
        return client[inverse]


class Sizes(Partition):
    """Given numbers of samples; which samples is drawn at random, so labels are mixed alike and only quantity differs.

    Shares that follow Zipf's law, the client of rank r proportional to 1/r:
    ``Sizes([1 / r / sum(1 / s for s in range(1, 101)) for r in range(1, 101)])``.

    Args:
        sizes: For each client its number of samples, validation and test parts included (integers; samples beyond
            their sum are left out), or its share of the dataset (floats that sum to 1; rounded by largest remainder).
        seed: Seed of all draws.
        min_samples: Least number of training samples of a client. Shares are rounded up to it by moving samples (see
            :class:`Partition`); numbers below it are an error.
        val: Share of each client's samples for validation.
        test: Share of each client's samples for testing.
        labels: Where the labels are; only :meth:`plot` needs them.

    Raises:
        ValueError: If an argument is out of its range, or, in ``split``, if there are fewer samples than asked for.

    Example::

        >>> dataset = [(x, x % 2) for x in range(100)]
        >>> Sizes(sizes=[10, 20, 30], seed=0).split(dataset).sizes().tolist()
        [10, 20, 30]
        >>> Sizes(sizes=[0.5, 0.3, 0.2], seed=0).split(dataset).sizes().tolist()
        [50, 30, 20]
    """

    def __init__(
        self,
        sizes: Sequence[int] | Sequence[float],
        *,
        seed: int = 0,
        min_samples: int = 1,
        val: float = 0.0,
        test: float = 0.0,
        labels: LabelSource = None,
    ) -> None:
        super().__init__(len(sizes), seed=seed, min_samples=min_samples, val=val, test=test, labels=labels)
        given = np.asarray(sizes)
        if given.ndim != 1 or given.dtype.kind not in "iuf" or not (given >= 0).all():
            raise ValueError(f"sizes must be a flat list of numbers >= 0, got {reprlib.repr(sizes)}.")
        if given.dtype.kind == "f" and not abs(given.sum() - 1) < 1e-6:
            raise ValueError(
                f"Shares must sum to 1, these sum to {given.sum():g}: divide them by their sum, or give whole numbers."
            )
        if given.dtype.kind != "f" and given.min() < self._least_size():
            raise ValueError(
                f"A client with {given.min()} samples can not keep min_samples={min_samples} for training (val={val}, "
                f"test={test}: that takes {self._least_size()}): give it more, or pass a smaller min_samples."
            )
        self.sizes = given.astype(np.float64 if given.dtype.kind == "f" else np.int64).tolist()

    def assign(self, dataset: Dataset[Any]) -> NDArray[np.int64]:
        """Return the client of each sample, int64, shape ``[samples]``; -1 for those left out."""
        samples = count_samples(dataset)
        sizes = np.asarray(self.sizes)
        if sizes.dtype.kind == "f":
            exact = sizes / sizes.sum() * samples
            sizes = np.floor(exact + 1e-9).astype(np.int64)
            sizes[np.argsort(sizes - exact, kind="stable")[: samples - sizes.sum()]] += 1
        if sizes.sum() > samples:
            raise ValueError(f"The sizes sum to {sizes.sum()}, but the dataset has {samples} samples: ask for fewer.")
        owner = np.full(samples, -1, dtype=np.int64)
        order = stream(self.seed, "partition/sizes").permutation(samples)[: sizes.sum()]
        owner[order] = np.repeat(np.arange(len(self)), sizes)
        return owner
