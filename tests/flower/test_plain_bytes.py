import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edgebolt.common.communication import Message, MessageError
from edgebolt.flower.plain_bytes import dump_plain, load_plain

leaves = st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False) | st.text(max_size=4)
keys = st.integers(-9, 9) | st.sampled_from(["tensor", "tuple", "dict", "", "lr"])
nested = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.tuples(inner, inner) | st.dictionaries(keys, inner),
    max_leaves=8,
)


def same(one, other):
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    return type(one) is type(other) and repr(one) == repr(other)


@given(nested)
def test_what_is_read_is_what_was_written(value):
    assert same(load_plain(dump_plain(value)), value)


def test_tensors_and_numbers_that_are_none():
    tensor = torch.tensor([1.5, -0.0])
    found = load_plain(dump_plain({"lr": tensor, "loss": [math.nan, math.inf]}))
    assert torch.equal(found["lr"], tensor)
    assert math.isnan(found["loss"][0])
    assert found["loss"][1] == math.inf


@pytest.mark.parametrize("value", [object(), {1, 2}, 2**70, b"bytes"])
def test_what_cannot_travel_is_refused(value):
    with pytest.raises(TypeError):
        dump_plain(value)


@pytest.mark.parametrize(
    "header", [{}, {"plain": {"tensor": "0"}}, {"plain": {"other": 1}}, {"plain": {"dict": [[1]]}}, {"plain": {}}]
)
def test_other_messages_are_refused(header):
    with pytest.raises(MessageError, match="none of built-ins"):
        load_plain(Message({}, header).to_bytes())
