"""Texts for classification as a data module."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from edgebolt.common.random import stream
from edgebolt.common.text.sources import load_tokenizer
from edgebolt.common.text.texts import Texts, load_texts

__all__ = ["TextClassificationData", "TokenizedTexts"]

_CHARACTERS = 10  # of a token, at most: a tokenizer reads a text to its end before it truncates


class TokenizedTexts(Dataset[dict[str, Tensor]]):
    """Tokens of equal length, and a class each; an item is a dict that a transformers model takes.

    A tokenizer reads a text to its end before it truncates, so a text is first cut to ten characters a token, which
    is more than tokens have: one that is mostly spaces may then fill fewer than ``max_tokens``.

    Args:
        texts: ``n`` strings.
        labels: int64 ``[n]``, class numbers.
        tokenizer: of transformers, with a token to pad with (see :func:`~edgebolt.common.text.load_tokenizer`).
        max_tokens: length of every text; longer ones are cut, shorter ones padded.

    Attributes:
        input_ids, attention_mask: int64 ``[n, max_tokens]``.
        labels: int64 ``[n]``; the name by which partitions find them.
    """

    def __init__(self, texts: Sequence[str], labels: NDArray[np.int64], tokenizer: Any, max_tokens: int) -> None:
        cut = [text[: _CHARACTERS * max_tokens] for text in texts]
        tokens = tokenizer(cut, truncation=True, max_length=max_tokens, padding="max_length", return_tensors="pt")
        self.input_ids: Tensor = tokens["input_ids"]
        self.attention_mask: Tensor = tokens["attention_mask"]
        self.labels = torch.from_numpy(labels.copy())

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {
            "input_ids": self.input_ids[index],
            "attention_mask": self.attention_mask[index],
            "labels": self.labels[index],
        }


class TextClassificationData(pl.LightningDataModule):
    """Tokenized texts of a data set: training, validation held out of the training split, and test.

    The first call reads everything; the texts stay in memory as tokens.

    Args:
        source: a name or file for :func:`~edgebolt.common.text.load_texts`.
        model: whose tokenizer is used, see :func:`~edgebolt.common.text.find_model`.
        max_tokens: length of every text; longer ones are cut, shorter ones padded.
        batch_size: of training.
        eval_batch_size: of validation and test.
        train_samples: at most so many; None: all.
        val_samples: so many texts of the training split are held out.
        test_samples: at most so many of the test split; None: all.
        seed: of what is held out and of the order in which the numbers above count.
        test_source: where the test texts are; None: the test split of ``source``, which a file does not have.
        text_column: of a file or hub data set, see :func:`~edgebolt.common.text.load_texts`.
        label_column: likewise.

    Raises:
        ValueError: for sizes below 1, if a split has fewer texts than are asked for, or if test texts are asked for
            that a file does not have or that are of unknown classes.
        FileNotFoundError, OSError: if data or tokenizer are not there; the message says what to install.

    Example::

        >>> data = TextClassificationData("20newsgroups", model="minilm", max_tokens=64, batch_size=8)
        >>> data.batch_size
        8
    """

    def __init__(
        self,
        source: str = "20newsgroups",
        model: str = "minilm",
        max_tokens: int = 64,
        batch_size: int = 8,
        eval_batch_size: int = 64,
        train_samples: int | None = None,
        val_samples: int = 256,
        test_samples: int | None = None,
        seed: int = 0,
        test_source: str | None = None,
        text_column: str | None = None,
        label_column: str | None = None,
    ) -> None:
        super().__init__()
        sizes = {
            "max_tokens": max_tokens,
            "batch_size": batch_size,
            "eval_batch_size": eval_batch_size,
            "train_samples": train_samples,
            "val_samples": val_samples,
            "test_samples": test_samples,
        }
        for name, size in sizes.items():
            if size is not None and (type(size) is not int or size < 1):
                raise ValueError(f"{name}={size!r}: use a whole number of 1 or more.")
        self.source, self.model, self.max_tokens, self.seed = source, model, max_tokens, seed
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.train_samples, self.val_samples, self.test_samples = train_samples, val_samples, test_samples
        self.test_source, self.columns = test_source, (text_column, label_column)
        self._classes: list[str] = []
        self._splits: dict[str, TokenizedTexts] = {}

    def setup(self, stage: str | None = None) -> None:
        """Read and tokenize training and validation, once; the test split is read when it is asked for."""
        if self._splits:
            return
        texts = load_texts(self.source, "train", *self.columns)
        order = stream(self.seed, "held out", len(texts)).permutation(len(texts))
        last = None if self.train_samples is None else self.val_samples + self.train_samples
        val = self._taken("val", texts, order[: self.val_samples], self.val_samples)
        train = self._taken("train", texts, order[self.val_samples : last], self.train_samples or 1)
        self._classes, self._splits = texts.classes, {"train": train, "val": val}

    def _taken(self, split: str, texts: Texts, rows: NDArray[np.int64], wanted: int) -> TokenizedTexts:
        if len(rows) < wanted:
            raise ValueError(
                f"{split}_samples={wanted}: {self.source} has {len(texts)} texts there and {len(rows)} of them are "
                "left: ask for fewer."
            )
        tokenizer = load_tokenizer(self.model)
        return TokenizedTexts([texts.texts[row] for row in rows], texts.labels[rows], tokenizer, self.max_tokens)

    @property
    def classes(self) -> list[str]:
        """Names of the classes; reads the data."""
        self.setup()
        return self._classes

    @property
    def num_classes(self) -> int:
        """Number of classes; reads the data."""
        return len(self.classes)

    def split(self, name: str) -> TokenizedTexts:
        """The texts of ``"train"``, ``"val"`` or ``"test"``; reads the data."""
        self.setup()
        if name == "test" and "test" not in self._splits:
            if self.test_source is None and Path(self.source).is_file():
                raise ValueError(f"source={self.source!r} is a file, which has no test split: give test_source=...")
            texts = load_texts(self.test_source or self.source, "test", *self.columns).numbered_as(self.classes)
            order = stream(self.seed, "test", len(texts)).permutation(len(texts))
            self._splits["test"] = self._taken("test", texts, order[: self.test_samples], self.test_samples or 1)
        return self._splits[name]

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Shuffled batches."""
        return DataLoader(self.split("train"), self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """What was held out of the training split."""
        return DataLoader(self.split("val"), self.eval_batch_size)

    def test_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """The test split, or its first ``test_samples`` in a seeded order."""
        return DataLoader(self.split("test"), self.eval_batch_size)
