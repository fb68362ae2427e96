"""Rows of text files: .csv, .tsv and .jsonl, plain or compressed."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["pick_columns", "read_rows"]

_TEXT, _LABEL = ("text", "sentence", "content", "review"), ("label", "target", "class", "category")
_LONGEST = 2**31 - 1  # characters of a field: csv's own limit of 131,072 is less than some documents have


def read_rows(path: Path) -> list[Mapping[str, Any]]:
    r"""All rows of a file, each by column name.

    Args:
        path: ends in ``.csv`` (fields in quotes may hold line breaks), ``.tsv`` (no quoting) or ``.jsonl`` (an object
            a line), or in one of these and ``.gz``; UTF-8.

    Raises:
        ValueError: for another kind of file, or a line that is no JSON object.

    Example::

        >>> import pathlib, tempfile
        >>> file = pathlib.Path(tempfile.mkdtemp(), "reviews.tsv")
        >>> _ = file.write_text('text\tlabel\nsay "hi"\tyes\n')
        >>> read_rows(file)
        [{'text': 'say "hi"', 'label': 'yes'}]
    """
    kind = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    if kind not in (".csv", ".tsv", ".jsonl"):
        raise ValueError(f"{path}: use a .csv, .tsv or .jsonl file, plain or .gz, not {kind!r}.")
    how: dict[str, Any] = {"encoding": "utf-8-sig", "newline": "" if kind == ".csv" else None}
    with gzip.open(path, "rt", **how) if path.suffix == ".gz" else path.open(**how) as lines:
        if kind == ".jsonl":
            return [_object(line, path, number) for number, line in enumerate(lines, 1) if line.strip()]
        before = csv.field_size_limit(_LONGEST)
        try:
            quotes: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if kind == ".tsv" else {}
            return list(csv.DictReader(lines, **quotes))
        finally:
            csv.field_size_limit(before)


def _object(line: str, path: Path, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {number} is no JSON: {line.strip()!r:.80} ({error}).") from error
    if not isinstance(row, dict):
        raise ValueError(f"{path}, line {number} is {line.strip()!r:.80}: write an object a line, {{...}}.")
    return row


def pick_columns(there: Sequence[str], name: str, text: str | None, label: str | None) -> tuple[str, str]:
    """The names of the columns that hold text and class.

    Args:
        there: names of all columns.
        name: of the data set, for the error.
        text: its name; None: the first of ``text``, ``sentence``, ``content``, ``review``.
        label: its name; None: the first of ``label``, ``target``, ``class``, ``category``.

    Raises:
        ValueError: if one of them is not there.

    Example::

        >>> pick_columns(["id", "sentence", "target"], "reviews.csv", None, None)
        ('sentence', 'target')
    """
    found = [
        next((column for column in ([own] if own else usual) if column in there), None)
        for own, usual in ((text, _TEXT), (label, _LABEL))
    ]
    if found[0] is None or found[1] is None:
        raise ValueError(
            f"{name} has the columns {list(there)}, text_column={text!r}, label_column={label!r}: say with these "
            "which hold text and class."
        )
    return found[0], found[1]
