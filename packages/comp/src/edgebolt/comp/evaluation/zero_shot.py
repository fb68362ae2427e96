"""Zero-shot accuracy: the likelihood of each choice, by its length."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torchmetrics.classification import MulticlassAccuracy
from tqdm import tqdm

from edgebolt.comp.evaluation._running import device_of, evaluating
from edgebolt.comp.evaluation.questions import TASKS, Question, load_questions

__all__ = ["Normalise", "ZeroShotResult", "zero_shot"]

Normalise = Literal["characters", "tokens", "none"]


@dataclass(frozen=True)
class ZeroShotResult:
    """An accuracy and what it was measured on.

    Attributes:
        task: its name.
        accuracy: share of the questions whose right choice has the largest log-likelihood by its length.
        questions: how many were asked.
        choices: how many were scored, over all questions.
        chance: accuracy of a guess: the mean of one over the number of choices.
        normalise: what the log-likelihoods were divided by.

    Example::

        >>> print(ZeroShotResult("piqa", 0.68, questions=100, choices=200, chance=0.5, normalise="characters"))
        piqa: 68.0 % ± 4.7 (100 questions, 200 choices, chance 50.0 %, by characters)
    """

    task: str
    accuracy: float
    questions: int
    choices: int
    chance: float
    normalise: str

    @property
    def error(self) -> float:
        """Standard error of the accuracy over the draw of the questions."""
        return float((self.accuracy * (1 - self.accuracy) / max(1, self.questions - 1)) ** 0.5)

    def __str__(self) -> str:
        return (
            f"{self.task}: {100 * self.accuracy:.1f} % ± {100 * self.error:.1f} ({self.questions} questions, "
            f"{self.choices} choices, chance {100 * self.chance:.1f} %, by {self.normalise})"
        )

    def __float__(self) -> float:
        return self.accuracy


def zero_shot(
    model: Any,
    tokenizer: Any,
    task: str | Sequence[Question],
    source: str | os.PathLike[str] | None = None,
    limit: int | None = None,
    normalise: Normalise | None = None,
    tokens_at_once: int = 2048,
    max_length: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> ZeroShotResult:
    """Ask a language model questions, none of which it has been shown an answer to.

    The answer is the choice with the largest ``log p(choice | context) / length(choice)``, as in EleutherAI's harness
    (``acc_norm``, whose length is in characters).

    Args:
        model: a causal language model of transformers.
        tokenizer: its own.
        task: a key of :data:`~edgebolt.comp.evaluation.TASKS`, or your questions.
        source: where the questions of a named task are, for :func:`~edgebolt.comp.evaluation.load_questions`.
        limit: how many are drawn, of your own questions the first; None: all.
        normalise: the length of a choice: its ``"characters"``, its ``"tokens"``, or ``"none"``. None: characters, and
            tokens for ``boolq``, whose two answers are one token each.
        tokens_at_once: of a batch, padding counted.
        max_length: tokens of context and choice, of which the first are left out where there are more; None: as many
            as the model has positions for.
        seed: of the draw of ``limit`` questions.
        progress: show a bar.

    Raises:
        ValueError: for an argument that is out of range, without questions, and for one without a token of context.
        FileNotFoundError: if the questions are not there; the message says where they can be had.

    Example::

        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
        >>> def letters(text: str) -> dict[str, list[int]]:  # stands in for a tokenizer
        ...     return {"input_ids": [ord(letter) for letter in text]}
        >>> questions = [Question("One and one is", (" two.", " three."), 0)]
        >>> result = zero_shot(LlamaForCausalLM(config), letters, questions, progress=False)
        >>> result.questions, result.choices, result.normalise
        (1, 2, 'characters')
    """
    known = ("characters", "tokens", "none")
    if normalise not in (None, *known):
        raise ValueError(f"normalise={normalise!r}: use one of {known}.")
    if isinstance(task, str):
        name, questions = task, load_questions(task, source, limit, seed)
        by = normalise or cast(Normalise, TASKS[task].normalise)
    else:
        name, questions, by = "own questions", list(task)[:limit], normalise or "characters"
    if not questions:
        raise ValueError("There are no questions: give at least one.")
    longest = max_length or getattr(model.config, "max_position_embeddings", None) or 2**31
    if longest < 2 or tokens_at_once < 1:
        raise ValueError(f"max_length={max_length}, tokens_at_once={tokens_at_once}: use 2, or 1, or more.")
    asked = [(question, choice) for question in questions for choice in question.choices]
    parts = [_tokens(tokenizer, question.context, choice, longest) for question, choice in asked]
    likelihood = log_likelihoods(model, parts, tokens_at_once, progress, name)
    lengths = {
        "characters": [len(choice.strip()) for _, choice in asked],
        "tokens": [len(ids) - start for ids, start in parts],
        "none": [1] * len(asked),
    }[by]
    scores = [value / length for value, length in zip(likelihood, lengths, strict=True)]
    most = max(len(question.choices) for question in questions)
    accuracy = MulticlassAccuracy(num_classes=most, average="micro")
    at = 0
    for question in questions:
        own = torch.tensor(scores[at : at + len(question.choices)])
        accuracy.update(own.argmax()[None], torch.tensor([question.answer]))
        at += len(question.choices)
    chance = sum(1 / len(question.choices) for question in questions) / len(questions)
    return ZeroShotResult(name, float(accuracy.compute()), len(questions), len(asked), chance, by)


def _tokens(tokenizer: Any, context: str, choice: str, longest: int) -> tuple[tuple[int, ...], int]:
    """Tokens of context and choice, and where the choice begins.

    They are cut together, as they would be in a text; a token that reaches over the border counts to the choice.
    """
    before = list(tokenizer(context)["input_ids"])
    whole = list(tokenizer(context + choice)["input_ids"])
    start = next((at for at, pair in enumerate(zip(before, whole, strict=False)) if pair[0] != pair[1]), len(before))
    if len(whole) < 2:
        raise ValueError(f"{context + choice!r} is {len(whole)} tokens: a choice needs a token before it.")
    start = max(1, min(start, len(whole) - 1))
    cut = max(0, min(len(whole) - longest, start - 1))
    return tuple(whole[cut:]), start - cut


def log_likelihoods(
    model: Any, parts: Sequence[tuple[tuple[int, ...], int]], tokens_at_once: int, progress: bool, name: str
) -> list[float]:
    """``log p(ids[start:] | ids[:start])`` of each ``(ids, start)``, in nats.

    Sequences that differ in the last token alone, which is not read, run once: yes and no are one forward.
    """
    sharing: dict[tuple[int, ...], list[int]] = {}
    for index, (ids, _) in enumerate(parts):
        sharing.setdefault(ids[:-1], []).append(index)
    found = [0.0] * len(parts)
    device = device_of(model)
    with evaluating(model), tqdm(total=len(sharing), desc=name, unit="sequence", disable=not progress) as bar:
        for batch in _batches(sorted(sharing, key=len), tokens_at_once):
            # Padding is behind all that counts, where a causal model does not see it: no mask is needed.
            inputs = pad_sequence([torch.tensor(ids) for ids in batch], batch_first=True).to(device)
            first = min(parts[index][1] for ids in batch for index in sharing[ids]) - 1
            keep = torch.arange(first, inputs.shape[1], device=device)
            logits: Tensor = model(input_ids=inputs, use_cache=False, logits_to_keep=keep).logits
            for row, ids in zip(logits, batch, strict=True):
                for index in sharing[ids]:
                    whole, start = parts[index]
                    predicted = row[start - 1 - first : len(whole) - 1 - first].double().log_softmax(-1)
                    targets = torch.tensor(whole[start:], device=device)
                    found[index] = float(predicted.gather(1, targets[:, None]).sum())
            bar.update(len(batch))
    return found


def _batches(sequences: Sequence[tuple[int, ...]], tokens_at_once: int) -> Iterator[list[tuple[int, ...]]]:
    """Sequences in rising length, as many at once as fit."""
    batch: list[tuple[int, ...]] = []
    for ids in sequences:
        if batch and (len(batch) + 1) * len(ids) > tokens_at_once:
            yield batch
            batch = []
        batch.append(ids)
    yield batch
