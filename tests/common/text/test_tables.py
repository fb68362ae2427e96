import gzip
import json

import pytest

from edgebolt.common.text.tables import pick_columns, read_rows

ROWS = [{"text": 'a "b", c', "label": "x"}, {"text": "d", "label": "y"}]
CONTENT = {
    ".csv": '\ufefftext,label\r\n"a ""b"", c",x\r\nd,y\r\n',
    ".tsv": 'text\tlabel\na "b", c\tx\nd\ty\n',
    ".jsonl": "".join(json.dumps(row) + "\n\n" for row in ROWS),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", CONTENT)
def test_kinds(tmp_path, kind, packed):
    data = CONTENT[kind].encode()
    path = tmp_path / f"v1.0{kind}{'.gz' if packed else ''}"
    path.write_bytes(gzip.compress(data) if packed else data)
    assert read_rows(path) == ROWS


def test_long_fields_and_line_breaks(tmp_path):
    path = tmp_path / "long.csv"
    path.write_text('text,label\n"' + "long\n" * 40_000 + '",x\n', newline="")
    (row,) = read_rows(path)
    assert len(row["text"]) == 200_000


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.parquet", "", r"use a \.csv, \.tsv or \.jsonl file, plain or \.gz, not '\.parquet'"),
        ("a.jsonl", '{"a": 1}\nno\n', r"a\.jsonl, line 2 is no JSON: 'no'"),
        ("a.jsonl", "[1]\n", r"line 1 is '\[1\]': write an object a line"),
    ],
)
def test_refuses(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_rows(tmp_path / name)


def test_columns():
    assert pick_columns(["label", "text", "sentence"], "d", None, None) == ("text", "label")
    assert pick_columns(["a", "b"], "d", "b", "a") == ("b", "a")
    with pytest.raises(ValueError, match=r"d has the columns \['a', 'b'\], text_column='c', label_column=None"):
        pick_columns(["a", "b"], "d", "c", None)
