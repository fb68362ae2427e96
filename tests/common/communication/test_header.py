import math
from collections import OrderedDict
from enum import IntEnum

import numpy as np
import pytest
import torch

from edgebolt.common.communication.header import MAX_HEADER_BYTES, canonical_header, dump_header, parse_header


class Stage(IntEnum):
    FIRST = 1


def test_values_of_every_kind_round_trip():
    header = {
        "none": None, "true": True, "zero": 0, "low": -(2**63), "high": 2**64 - 1, "minus zero": -0.0, "tiny": 5e-324,
        "nan": math.nan, "inf": math.inf, "-inf": -math.inf, "é\n\"": "\u2028 \x00 🙂", "": "",
        "list": [1, [2.5, None], {"b": 1, "a": []}],
    }  # fmt: skip
    received = parse_header(dump_header(canonical_header(header)))
    assert repr(received) == repr(canonical_header(header))  # repr: NaN, -0.0, key order and types all count
    assert received["zero"] is not False
    assert list(received) == sorted(header)
    assert list(received["list"][2]) == ["a", "b"]


def test_copy_is_private():
    inner = [1]
    header = canonical_header({"a": inner})
    inner.append(2)
    assert header == {"a": [1]}


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        ((1, 2), "list(value)"),
        ({1, 2}, "list(value)"),
        (OrderedDict(a=1), "dict(value)"),
        (np.float64(0.5), "value.tolist()"),
        (np.int32(3), "value.tolist()"),
        (torch.tensor(0.5), "value.tolist()"),
        (Stage.FIRST, "int(value)"),
        (b"raw", "torch.frombuffer"),
        (1j, "convert it to None"),
        (2**64, "str(value)"),
        (-(2**63) - 1, "str(value)"),
        ("\ud800", "surrogate"),
        ({1: 2}, "str(key)"),
    ],
)
@pytest.mark.parametrize("wrap", [lambda v: v, lambda v: [[v]], lambda v: {"inner": v}], ids=["bare", "list", "dict"])
def test_other_types_are_refused_by_name(value, hint, wrap):
    with pytest.raises(TypeError) as error:
        canonical_header({"loss": wrap(value)})
    assert "'loss'" in str(error.value)
    assert hint in str(error.value)


def test_type_is_named():
    with pytest.raises(TypeError, match=r"header\['loss'\] is of type numpy.float32"):
        canonical_header({"loss": np.float32(1)})


@pytest.mark.parametrize("key", [1, None, "\ud800"])
def test_keys_are_text(key):
    with pytest.raises(TypeError, match="key"):
        canonical_header({key: 1})


def test_endless_nesting_is_refused():
    loop = []
    loop.append(loop)
    with pytest.raises(TypeError, match="nested deeper"):
        canonical_header({"loop": loop})


def test_length_is_limited():
    assert len(dump_header({"a": "x" * (MAX_HEADER_BYTES - 8)})) == MAX_HEADER_BYTES
    with pytest.raises(ValueError, match="put long lists into the tensors"):
        dump_header({"a": "x" * (MAX_HEADER_BYTES - 7)})
    with pytest.raises(ValueError, match="more than"):
        parse_header(b" " * (MAX_HEADER_BYTES + 1))


@pytest.mark.parametrize(
    "data",
    [
        b"", b"[]", b"null", b"{", b'{"a":1', b'{"a": 1}', b'{"b":1,"a":2}', b'{"a":1,"a":1}', b'{"a":1e2}',
        b'{"a":-0}', b'{"a":1.50}', b'{"a":1e999}', b'{"a":"\\u0041"}', b'{"a":"\\ud800"}', b'{"a":"\xff"}',
        b'{"a":nan}', b'{"a":18446744073709551616}', b'{"a":' + b"9" * 5000 + b"}", b'{"a":' + b"[" * 100_000 + b"}",
        b'{"a":' + b"[" * 40 + b"]" * 40 + b"}", b'\xef\xbb\xbf{"a":1}',
    ],
)  # fmt: skip
def test_any_other_spelling_is_refused(data):
    with pytest.raises(ValueError):
        parse_header(data)
