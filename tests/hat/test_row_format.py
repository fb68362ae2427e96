import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some

from edgebolt.hat import FORMATS

EXACT = ["float64", "float32", "float16", "bfloat16"]
BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}


def drawn(count, width, seed=0, dtype=torch.float64):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("name", EXACT)
def test_rows_in_the_formats_own_dtype_come_back_bit_for_bit(name):
    rows = drawn(5, 7, dtype=FORMATS[name].dtype)
    back = FORMATS[name].decode(FORMATS[name].encode(rows), 5, 7)
    assert back.dtype == FORMATS[name].dtype and torch.equal(back, rows)


@pytest.mark.parametrize(("name", "step"), [("float32", 2**-24), ("float16", 2**-11), ("bfloat16", 2**-8)])
def test_other_rows_are_rounded_to_the_nearest(name, step):
    rows = drawn(20, 9).clamp_min(0.01)
    back = FORMATS[name].passed(rows)
    assert back.dtype == torch.float64
    assert ((back - rows).abs() <= step * rows.abs()).all() and not torch.equal(back, rows)


@given(some.lists(some.floats(-(2.0**99), 2.0**99, width=32), min_size=1, max_size=8))
@settings(max_examples=50, deadline=None)
def test_int8_is_off_by_half_a_step_at_most(values):
    rows = torch.tensor([values], dtype=torch.float32)
    back = FORMATS["int8"].decode(FORMATS["int8"].encode(rows), 1, len(values))
    step = rows.abs().max() / 127
    assert back.dtype == torch.float32
    assert ((back - rows).abs() <= step * 0.5001 + torch.finfo(torch.float32).tiny).all()


def test_int8_has_a_scale_a_row():
    rows = torch.tensor([[1e-3, -1e-3], [1e4, 0.0], [0.0, 0.0]])
    back = FORMATS["int8"].passed(rows)
    torch.testing.assert_close(back, rows, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", FORMATS)
@given(cuts=some.lists(some.integers(0, 12), max_size=4), seed=some.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_how_rows_are_cut_changes_no_bit(name, cuts, seed):
    rows, ends = drawn(12, 6, seed, torch.float32), [0, *sorted(cuts), 12]
    pieces = [rows[start:end] for start, end in itertools.pairwise(ends)]
    assert b"".join(FORMATS[name].encode(piece) for piece in pieces) == FORMATS[name].encode(rows)
    assert torch.equal(torch.cat([FORMATS[name].passed(piece) for piece in pieces]), FORMATS[name].passed(rows))


@pytest.mark.parametrize("name", FORMATS)
def test_bytes_of_rows(name):
    own = 6 * BYTES[name] + 4 * (name == "int8")
    assert FORMATS[name].row_bytes(6) == own
    assert [len(FORMATS[name].encode(drawn(count, 6))) for count in (0, 1, 3)] == [0, own, 3 * own]
    assert FORMATS[name].decode(b"", 0, 6).shape == (0, 6)
    assert FORMATS[name].name == name


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_not_written(name, bad):
    rows = drawn(3, 4)
    rows[1, 2] = bad
    with pytest.raises(OverflowError):
        FORMATS[name].encode(rows)


def test_what_is_too_large_is_not_written_and_the_message_says_what_to_use():
    rows = torch.tensor([[1.0, 7e4]])
    with pytest.raises(OverflowError, match="up to 7e\\+04 do not fit float16: use 'bfloat16' or 'float32'"):
        FORMATS["float16"].encode(rows)
    assert torch.equal(FORMATS["float16"].passed(torch.tensor([[65504.0]])), torch.tensor([[65504.0]]))
    for name in ("float32", "bfloat16", "int8"):
        with pytest.raises(OverflowError):
            FORMATS[name].encode(torch.tensor([[1e300]], dtype=torch.float64))


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_not_read(name, bad):
    rows = torch.zeros(2, 3, dtype=FORMATS[name].dtype)
    rows[1, 0] = bad
    with pytest.raises(ValueError, match="not finite"):
        FORMATS[name].decode(rows.view(torch.uint8).numpy().tobytes(), 2, 3)


def test_a_scale_that_is_not_finite_is_not_read():
    scale = torch.tensor([math.nan]).view(torch.uint8).numpy().tobytes()
    with pytest.raises(ValueError, match="not finite"):
        FORMATS["int8"].decode(scale + bytes(3), 1, 3)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("count", "width"), [(2, 4), (4, 4), (3, 3), (3, 5), (0, 4)])
def test_wrong_sizes_are_refused(name, count, width):
    data = FORMATS[name].encode(drawn(3, 4))
    with pytest.raises(ValueError, match=f"{len(data)} bytes for {count} rows"):
        FORMATS[name].decode(data, count, width)
    with pytest.raises(ValueError, match="bytes for 3 rows"):
        FORMATS[name].decode(data[:-1], 3, 4)


@given(data=some.binary(max_size=40), count=some.integers(0, 5), width=some.integers(1, 5))
@settings(max_examples=100, deadline=None)
def test_any_bytes_are_rows_or_a_value_error(data, count, width):
    for rows in FORMATS.values():
        try:
            found = rows.decode(data, count, width)
        except ValueError:
            continue
        assert found.shape == (count, width) and found.isfinite().all()


def test_rows_that_need_a_gradient_or_lie_apart_are_written():
    rows = drawn(6, 3).requires_grad_()
    assert FORMATS["float64"].encode(rows.T) == FORMATS["float64"].encode(rows.detach().T.contiguous())
