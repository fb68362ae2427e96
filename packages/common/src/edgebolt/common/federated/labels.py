"""Finding the label of every sample of a dataset without asking its author."""

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from numpy.typing import NDArray
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, TensorDataset

__all__ = ["LabelSource", "count_samples", "find_column", "find_labels"]

LabelSource = str | Callable[[Dataset[Any]], Sequence[Any]] | None

_NAMES = ("targets", "target", "labels", "label", "y")
_MISSING = object()


def count_samples(dataset: Dataset[Any]) -> int:
    """Return the number of samples of a map-style dataset.

    Args:
        dataset: Anything with ``__len__`` and ``__getitem__``: a ``Dataset``, a list of graphs, a table.

    Raises:
        TypeError: If samples can not be addressed by number (``IterableDataset``, no ``__len__``), or if a
            ``DataLoader`` was passed.

    Example::

        >>> count_samples([(0.1, 0), (0.2, 1)])
        2
    """
    if isinstance(dataset, DataLoader):
        raise TypeError("A partition splits a dataset, not a DataLoader: pass `loader.dataset`.")
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
        raise TypeError(
            f"{type(dataset).__name__} is not a map-style dataset, so its samples can not be dealt out to clients by "
            "number: load it into one first, for example `list(dataset)`."
        )
    try:
        return len(dataset)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError) as error:
        raise TypeError(
            f"{type(dataset).__name__} has no length: give it a `__len__` that returns its number of samples."
        ) from error


def find_labels(dataset: Dataset[Any], labels: LabelSource = None) -> NDArray[np.int64]:
    """Return one class number for each sample.

    Non-negative integers stay what they are, so that class 3 of the dataset is class 3 here. All other values
    (strings, negative numbers ...) are numbered from 0 in sorted order, booleans are 0 and 1.

    Args:
        dataset: A map-style dataset.
        labels: Where the labels are. A name: the attribute, column or sample field of that name. A callable: it gets
            the dataset and returns the labels. ``None``: see below.

    Without ``labels`` the first that exists is taken of

    1. the attributes ``targets``, ``target``, ``labels``, ``label``, ``y`` (torchvision, PyTorch Geometric),
    2. the columns of these names (``dataset.column_names``, Hugging Face datasets),
    3. the second tensor of a ``TensorDataset``,
    4. the labels of the datasets inside a ``Subset`` or ``ConcatDataset``, found in the same way,
    5. the samples, read one by one: ``sample["label"]`` etc., ``sample[1]`` of a tuple or list, ``sample.y``. This
       reads the whole dataset once at each call, transforms included, and is slow for files on disk. The global
       random generators are left as they were.

    Returns:
        int64, shape ``[samples]``.

    Raises:
        TypeError: If no labels are found (the message lists what was tried), or if the dataset has no length.
        ValueError: If the labels are not one for each sample, are floats, or can not be sorted.

    Example::

        >>> import torch
        >>> from torch.utils.data import Subset, TensorDataset
        >>> dataset = TensorDataset(torch.zeros(4, 2), torch.tensor([2, 0, 1, 2]))
        >>> find_labels(Subset(dataset, [0, 1, 3])).tolist()
        [2, 0, 2]
        >>> find_labels(dataset, labels=lambda dataset: ["cat", "ant", "bee", "cat"]).tolist()
        [2, 0, 1, 2]
    """
    return _to_classes(find_column(dataset, labels))


def find_column(dataset: Dataset[Any], source: LabelSource | Sequence[Any] = None) -> NDArray[Any]:
    """Return one value for each sample, as it is stored.

    Args:
        dataset: A map-style dataset.
        source: The values themselves, or a name, a callable or ``None`` as in :func:`find_labels`.

    Returns:
        Shape ``[samples]``, of whatever type the values have.

    Raises:
        TypeError: If nothing is found, or if the dataset has no length.
        ValueError: If there is not exactly one value for each sample.

    Example::

        >>> find_column([{"user": "eve"}, {"user": "bob"}], "user").tolist()
        ['eve', 'bob']
    """
    samples = count_samples(dataset)
    if callable(source):
        return _to_column(source(dataset), samples, "the callable")
    if source is not None and not isinstance(source, str):
        return _to_column(source, samples, "the given sequence")
    names = _NAMES if source is None else (source,)
    column = _stored_column(dataset, names, positional=source is None)
    if column is None:
        column = _to_column(_read_samples(dataset, samples, names, positional=source is None), samples, "the samples")
    return column


def _stored_column(dataset: Dataset[Any], names: Sequence[str], positional: bool) -> NDArray[Any] | None:
    """Look for a whole column, without reading a sample."""
    samples = count_samples(dataset)
    for name in names:
        value = getattr(dataset, name, None)
        if hasattr(value, "__len__") and not callable(value) and not isinstance(value, str | bytes | Mapping):
            return _to_column(value, samples, f"{type(dataset).__name__}.{name}")
    columns = getattr(dataset, "column_names", None)
    for name in names:
        if isinstance(columns, list | tuple) and name in columns:
            return _to_column(dataset[name], samples, f'{type(dataset).__name__}["{name}"]')
    if positional and isinstance(dataset, TensorDataset) and len(dataset.tensors) > 1:
        return _to_column(dataset.tensors[1], samples, "TensorDataset.tensors[1]")
    if isinstance(dataset, Subset):
        inner = _stored_column(dataset.dataset, names, positional)
        return None if inner is None else inner[np.asarray(dataset.indices, dtype=np.int64)]
    if isinstance(dataset, ConcatDataset):
        parts = [_stored_column(part, names, positional) for part in dataset.datasets]
        found = [part for part in parts if part is not None]
        return np.concatenate(found) if len(found) == len(parts) else None
    return None


def _read_samples(dataset: Dataset[Any], samples: int, names: Sequence[str], positional: bool) -> list[Any]:
    """Take the value out of every sample; without an explicit name only whole numbers pass for labels."""
    values = []
    with isolate_rng(include_cuda=False):  # random transforms must not shift the run's own generators
        for number in range(samples):
            value = _field(dataset[number], names, positional)
            if isinstance(value, torch.Tensor | np.ndarray) and prod(value.shape) == 1:
                value = value.item()
            if value is _MISSING or (positional and not isinstance(value, int | np.integer | np.bool_)):
                raise TypeError(_not_found(dataset, number, value, names, positional))
            values.append(value)
    return values


def _field(sample: object, names: Sequence[str], positional: bool) -> object:
    if isinstance(sample, Mapping):
        return next((sample[name] for name in names if name in sample), _MISSING)
    for name in names:
        value = getattr(sample, name, None)  # PyG answers None for a field it knows but does not have
        if value is not None and not callable(value):
            return value
    if positional and isinstance(sample, tuple | list) and len(sample) > 1:
        return sample[1]
    return _MISSING


def _not_found(dataset: Dataset[Any], number: int, value: object, names: Sequence[str], positional: bool) -> str:
    fields = ", ".join(names)
    if value is _MISSING:
        seen = f"sample {number} has none of them"
    else:
        shape = f" of shape {tuple(value.shape)}" if hasattr(value, "shape") else ""
        seen = f"sample {number} has a {type(value).__name__}{shape} there, not one whole number"
    return (
        f"No labels found in {type(dataset).__name__}. Tried the attributes and columns {fields}"
        f"{', the second tensor of a TensorDataset' if positional else ''}, the same inside Subset and ConcatDataset, "
        f"and in the samples the fields {fields}{' and position 1' if positional else ''}: {seen}. "
        "Say where they are: `labels=lambda dataset: [...]`, a function that returns one value for each sample "
        "(or `key=...` of ByKey)."
    )


def _to_column(values: object, samples: int, where: str) -> NDArray[Any]:
    try:
        column = values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
    except ValueError as error:  # ragged
        raise ValueError(f"{where} holds values of different shapes; one value for each sample is needed.") from error
    if column.ndim == 0 or len(column) != samples:
        length = "a single value" if column.ndim == 0 else f"{len(column)} values"
        raise ValueError(
            f"{where} has {length}, the dataset has {samples} samples. Pass the right ones: `lambda dataset: [...]`."
        )
    if column.size != samples:
        raise ValueError(
            f"{where} has shape {column.shape}; one value for each sample is needed. One-hot rows become class "
            "numbers by `lambda dataset: dataset.targets.argmax(1)`."
        )
    return column.reshape(samples)


def _to_classes(column: NDArray[Any]) -> NDArray[np.int64]:
    numbers = column.dtype.kind in "iu"
    if column.dtype.kind == "b" or (numbers and (column.size == 0 or column.min() >= 0)):
        return column.astype(np.int64)
    if column.size == 0:
        return np.zeros(0, dtype=np.int64)
    if column.dtype.kind in "fc" or (column.dtype == object and any(isinstance(value, float) for value in column)):
        raise ValueError(
            f"The labels are floats ({column[0]!r} ...), as in regression, and give no classes. If they are class "
            "numbers, convert them: `labels=lambda dataset: dataset.targets.long()`; if not, cut them into classes."
        )
    try:
        return np.unique(column, return_inverse=True)[1].astype(np.int64)
    except TypeError as error:
        raise ValueError(f"The labels can not be sorted, for they are of different types: {error}.") from error
