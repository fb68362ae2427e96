"""Garbage of every kind: a MessageError with a sentence, or a message that is exactly the bytes that came."""

import json
import struct
import tracemalloc

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edgebolt.common.communication import Message, MessageError

HEADER = {"codec": "dense", "visit": 3, "report": {"loss": float("nan"), "histogram": [1, 2, 3]}}
SAMPLE = Message(
    {
        "weight": torch.arange(6.0).reshape(2, 3),
        "bias": torch.tensor([0.5, -1.0], dtype=torch.bfloat16),
        "mask": torch.tensor([True, False, True]),
        "steps": torch.tensor(7),
        "empty": torch.zeros(0, 4, dtype=torch.float16),
    },
    HEADER,
).to_bytes()
PREFIX = struct.Struct("<4sIIQ")
_, _, HEADER_LENGTH, BLOB_LENGTH = PREFIX.unpack_from(SAMPLE)
BLOB_START = PREFIX.size + HEADER_LENGTH
DATA_START = BLOB_START + 8 + int.from_bytes(SAMPLE[BLOB_START : BLOB_START + 8], "little")


def check(data, **arguments):
    """The contract: MessageError, or a message whose bytes are these. Returns the error, or None."""
    try:
        message = Message.from_bytes(data, **arguments)
    except MessageError as error:
        assert len(str(error)) > 20
        assert "can't allocate" not in str(error)  # torch's words: nobody tried to make room for what was claimed
        return str(error)
    assert message.to_bytes() == bytes(data)
    assert message.nbytes == len(data)
    return None


def wire(header=b"{}", index=b"{}", data=b"", *, index_length=None, header_length=None, blob_length=None, **prefix):
    """Spells a message with any part forged."""
    if isinstance(index, dict):
        index = json.dumps(index, separators=(",", ":")).encode()
        index += b" " * (-len(index) % 8)
    blob = (len(index) if index_length is None else index_length).to_bytes(8, "little") + index + data
    return (
        PREFIX.pack(
            prefix.get("magic", b"EBLT"),
            prefix.get("version", 1),
            len(header) if header_length is None else header_length,
            len(blob) if blob_length is None else blob_length,
        )
        + header
        + blob
    )


def entry(dtype="F32", shape=(1,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_the_sample_and_the_forger_are_sound():
    assert check(SAMPLE) is None
    assert check(wire(index={"a": entry()}, data=bytes(4))) is None


@given(st.binary(max_size=200))
@settings(max_examples=200, deadline=None, derandomize=True)
@example(b"")
@example(b"EBLT")
@example(bytes(30))
def test_noise(data):
    assert check(data)


@given(st.binary(max_size=200))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_noise_behind_a_good_prefix(data):
    assert check(PREFIX.pack(b"EBLT", 1, 2, len(data)) + b"{}" + data) or data.startswith(b"\x08")


def test_every_cut():
    for length in range(len(SAMPLE)):
        assert check(SAMPLE[:length])


@given(st.binary(min_size=1, max_size=50))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_every_extension(tail):
    assert check(SAMPLE + tail)
    assert check(tail + SAMPLE)


def test_every_bit_before_the_data():
    for position in range(DATA_START):
        for bit in range(8):
            data = bytearray(SAMPLE)
            data[position] ^= 1 << bit
            check(data)


@given(st.lists(st.tuples(st.integers(0, len(SAMPLE) - 1), st.integers(0, 255)), min_size=1, max_size=8))
@settings(max_examples=500, deadline=None, derandomize=True)
def test_bytes_replaced(changes):
    data = bytearray(SAMPLE)
    for position, value in changes:
        data[position] = value
    check(data)


@given(st.integers(0, len(SAMPLE)), st.integers(0, 12), st.binary(max_size=12))
@settings(max_examples=500, deadline=None, derandomize=True)
def test_spans_replaced_with_lengths_made_good(start, removed, inserted):
    data = bytearray(SAMPLE)
    data[start : start + removed] = inserted
    change = len(data) - len(SAMPLE)
    if PREFIX.size <= start and start + removed <= BLOB_START:
        data[: PREFIX.size] = PREFIX.pack(b"EBLT", 1, HEADER_LENGTH + change, BLOB_LENGTH)
    elif start >= BLOB_START:
        data[: PREFIX.size] = PREFIX.pack(b"EBLT", 1, HEADER_LENGTH, BLOB_LENGTH + change)
        if start >= BLOB_START + 8 and start + removed <= DATA_START:
            data[BLOB_START : BLOB_START + 8] = (DATA_START - BLOB_START - 8 + change).to_bytes(8, "little")
    check(data)


def test_max_bytes():
    assert "limit" in check(SAMPLE, max_bytes=len(SAMPLE) - 1)
    assert check(SAMPLE, max_bytes=len(SAMPLE)) is None


FORGED = {
    "magic": (wire(magic=b"PK\x03\x04"), "not a message"),
    "version": (wire(version=2), "wire version 2"),
    "header longer than the message": (wire(header_length=2**32 - 1), "arrived"),
    "header swallows the blob": (wire(header_length=12, blob_length=0), "header is corrupt"),
    "blob longer than the message": (wire(blob_length=2**64 - 1), "arrived"),
    "blob shorter": (wire(blob_length=9), "arrived"),
    "no blob": (PREFIX.pack(b"EBLT", 1, 20, 0) + b'{"a":"' + b"x" * 12 + b'"}', "too few"),
    "index longer than the blob": (wire(index_length=2**62), "index claims"),
    "index by one byte": (wire(index=b"{}      ", index_length=9), "index claims"),
    "index shorter": (wire(index=b"{}      ", index_length=2), "tensors are corrupt"),
    "index not padded": (wire(index=b"{}"), "canonical"),
    "index is no JSON": (wire(index=b"\xff\xfe\xfd\xfc    "), "tensors are corrupt"),
    "index is a list": (wire(index=b"[]      "), "tensors are corrupt"),
    "deep index": (wire(index=b"[" * 80_000), "tensors are corrupt"),
    "metadata": (wire(index={"__metadata__": {"a": "b"}}), "canonical"),
    "huge shape, honest offsets": (wire(index={"a": entry(shape=(2**42,), offsets=(0, 2**44))}), "corrupt"),
    "huge shape, small offsets": (wire(index={"a": entry(shape=(2**42,))}, data=bytes(4)), "corrupt"),
    "shape that overflows": (wire(index={"a": entry(shape=(2**63, 2), offsets=(0, 0))}), "corrupt"),
    "shape that wraps to zero": (wire(index={"a": entry(shape=(2**32, 2**32), offsets=(0, 0))}), "corrupt"),
    "empty shape that overflows": (wire(index={"a": entry(shape=(0, 2**62, 2**62), offsets=(0, 0))}), "tensors are"),
    "empty shape beyond int64": (wire(index={"a": entry(shape=(0, 2**64 - 1), offsets=(0, 0))}), "tensors are"),
    "empty shape of many sizes": (wire(index={"a": entry(shape=(0,) * 10**5, offsets=(0, 0))}), "dimensions"),
    "negative size": (wire(index={"a": entry(shape=(-1,))}, data=bytes(4)), "corrupt"),
    "fractional size": (wire(index={"a": entry(shape=(1.0,))}, data=bytes(4)), "corrupt"),
    "offsets out of range": (wire(index={"a": entry(offsets=(4, 8))}, data=bytes(4)), "corrupt"),
    "offsets reversed": (wire(index={"a": entry(offsets=(4, 0))}, data=bytes(4)), "corrupt"),
    "offsets beyond u64": (wire(index={"a": entry(offsets=(0, 2**70))}, data=bytes(4)), "corrupt"),
    "overlap": (wire(index={"a": entry(), "b": entry()}, data=bytes(4)), "corrupt"),
    "hole": (wire(index={"a": entry(), "b": entry(offsets=(8, 12))}, data=bytes(12)), "corrupt"),
    "unused tail": (wire(index={"a": entry()}, data=bytes(8)), "corrupt"),
    "unsorted": (wire(index={"b": entry(), "a": entry(offsets=(4, 8))}, data=bytes(8)), "canonical"),
    "dtype unknown": (wire(index={"a": entry("F33")}, data=bytes(4)), "corrupt"),
    "dtype not ours": (wire(index={"a": entry("C64", offsets=(0, 8))}, data=bytes(8)), "dtype C64"),
    "dtype of half a byte": (wire(index={"a": entry("F4", shape=(8,))}, data=bytes(4)), "dtype F4"),
    "dtype in lower case": (wire(index={"a": entry("f32")}, data=bytes(4)), "corrupt"),
    "bool of 2": (wire(index={"a": entry("BOOL", offsets=(0, 1))}, data=b"\x02"), "other than 0 and 1"),
    "header in disorder": (wire(header=b'{"b":1,"a":2}', index=b"{}      "), "canonical"),
    "header key twice": (wire(header=b'{"a":1,"a":1}', index=b"{}      "), "canonical"),
    "index name twice": (
        wire(index=b'{"a":{"dtype":"I8","shape":[0],"data_offsets":[0,0]},'
             b'"a":{"dtype":"I8","shape":[0],"data_offsets":[0,0]}}  '),
        "tensor",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FORGED)
def test_forged_parts(name):
    data, words = FORGED[name]
    check(data)  # first call: imports and caches
    tracemalloc.start()
    error = check(data)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert words in (error or "accepted")
    assert peak < 100_000 + 8 * len(data)


def test_header_of_many_small_lists_stays_bounded():
    header = b'{"a":[' + b"[]," * 50_000 + b"[]]}"
    assert check(wire(header=header, index=b"{}      ")) is None
    tracemalloc.start()
    check(wire(header=header, index=b"{}      "))
    _, peak = tracemalloc.get_traced_memory()
    assert peak < 64 * len(header)  # hence the limit of 1 MiB
    tracemalloc.reset_peak()
    before, _ = tracemalloc.get_traced_memory()
    assert "more than" in check(wire(header=header * 8))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak - before < 4 * 8 * len(header)
