import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgebolt.common.communication import MessageError
from edgebolt.common.communication.bits import pack_bits, pack_numbers, select, unpack_bits, unpack_numbers
from edgebolt.common.communication.positions import (
    MAX_ENTRIES_PER_BYTE,
    decode_positions,
    encode_positions,
    golomb_parameter,
)


def reader(data):
    """Gives the next so many bytes, as a message would."""
    place = 0

    def take(count):
        nonlocal place
        if count > len(data) - place:
            raise MessageError("not there")
        place += count
        return data[place - count : place]

    return take


def round_trip(mask):
    record, data = encode_positions(mask, int(mask.sum()))
    decoded = decode_positions(record, len(mask), reader(data))
    return record, data, torch.ones_like(mask) if decoded is None else decoded


def random_mask(n, density, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).random(n) < density)


@given(st.lists(st.booleans(), min_size=1, max_size=300))
@settings(max_examples=200, deadline=None)
def test_any_mask_comes_back(bits):
    mask = torch.tensor(bits)
    assert torch.equal(round_trip(mask)[2], mask)


@pytest.mark.parametrize("n", [1, 7, 8, 255, 256, 257, 65_535, 65_536, 65_537, 300_000])
@pytest.mark.parametrize("density", [0.0, 0.0001, 0.003, 0.02, 0.1, 0.3, 0.5, 0.9, 1.0])
def test_every_size_and_density(n, density):
    mask = random_mask(n, density)
    record, data, decoded = round_trip(mask)
    assert torch.equal(decoded, mask)
    assert len(data) <= (n + 7) // 8 and record[1] == int(mask.sum())


@pytest.mark.parametrize("places", [[0], [999_999], [0, 1, 2, 3], [999_996, 999_997, 999_998, 999_999]])
def test_a_few_at_the_ends(places):
    mask = torch.zeros(1_000_000, dtype=torch.bool)
    mask[places] = True
    assert torch.equal(round_trip(mask)[2], mask)


@pytest.mark.parametrize(("density", "coding"), [(1.0, "all"), (0.6, "bitmap"), (0.1, "golomb"), (0.01, "golomb")])
def test_the_shortest_coding_is_named(density, coding):
    assert round_trip(random_mask(100_000, density))[0][0] == coding


def test_a_list_is_the_shortest_for_a_single_place_of_a_few():
    mask = torch.zeros(200, dtype=torch.bool)
    mask[5] = True
    record, data, decoded = round_trip(mask)
    assert record == ["list", 1] and data.tolist() == [5] and torch.equal(decoded, mask)


@given(st.integers(1, 3000), st.floats(0.001, 0.999), st.integers(0, 100))
@settings(max_examples=150, deadline=None)
def test_the_shortest_of_all_codings_is_taken(n, density, seed):
    mask = random_mask(n, density, seed)
    places, low = np.flatnonzero(mask), golomb_parameter(min(float(mask.double().mean()), 0.999) or 0.5)
    sizes = {"bitmap": -(-n // 8), "list": len(places) * (1 if n <= 256 else 2)}
    if low and len(places):
        unary = int(((np.diff(places, prepend=-1) - 1) >> low).sum()) + len(places)
        sizes["golomb"] = -(-unary // 8) + -(-len(places) * low // 8)
    record, data, _ = round_trip(mask)
    if record[0] == "all":
        assert bool(mask.all()) and not len(data)
    elif len(places):
        assert len(data) == sizes[record[0]] == min(sizes.values())


@pytest.mark.parametrize("density", [0.1, 0.01, 0.002])
def test_golomb_takes_the_bits_of_stc_s_formula(density):
    mask = random_mask(1_000_000, density)
    low = golomb_parameter(density)
    bits = low + 1 / (1 - (1 - density) ** 2**low)
    assert 8 * len(round_trip(mask)[1]) == pytest.approx(bits * int(mask.sum()), rel=0.01)


def test_golomb_parameter_at_the_page_s_densities():
    assert [golomb_parameter(p) for p in (0.9, 0.4, 0.1, 0.01, 0.0025)] == [0, 0, 3, 6, 8]


@pytest.mark.parametrize(
    ("record", "data", "n"),
    [
        (["bitmap", 1], [0b11], 8),  # two are marked
        (["bitmap", 1], [0b1], 9),  # too few bytes
        (["bitmap", 1], [0b1, 0b10], 9),  # filling
        (["bitmap", 9], [0xFF], 8),
        (["list", 2], [3, 3], 8),  # does not ascend
        (["list", 1], [9], 9),  # out of range
        (["list", 1], [0], 100_000_000),  # a byte for a hundred million
        (["all", 3], [], 4),
        (["golomb", 1, 3, 1], [0b1], 20_000_000),
        (["golomb", 2, 1, 1], [0b1, 0], 16),  # one end for two entries
        (["golomb", 1, 60, 1], [0b1] + [0] * 8, 16),
        (["golomb", 1, 3], [0b1, 0], 16),
        (["golomb", 1, 1, 2**47], [0b1, 0], 16),
        (["golomb", 1, 4, 1], [0b1000, 0], 16),  # beyond the end
        (["bitmap"], [0], 8),
        ([], [], 8),
        (["bitmap", True], [1], 8),
        (["bitmap", -1], [1], 8),
        (["wavelet", 1], [1], 8),
    ],
)
def test_what_does_not_agree_is_refused(record, data, n):
    with pytest.raises(MessageError):
        decode_positions(record, n, reader(torch.tensor(data, dtype=torch.uint8)))


def test_an_encoder_never_writes_what_a_decoder_refuses():
    mask = torch.zeros(MAX_ENTRIES_PER_BYTE * 30, dtype=torch.bool)
    mask[0] = True
    assert torch.equal(round_trip(mask)[2], mask)
    assert round_trip(torch.zeros(100_000, dtype=torch.bool))[0] == ["bitmap", 0]


@given(st.integers(1, 20), st.data())
@settings(max_examples=50, deadline=None)
def test_numbers_of_any_width(width, data):
    numbers = torch.tensor(data.draw(st.lists(st.integers(0, 2**width - 1), max_size=40)), dtype=torch.int64)
    packed = pack_numbers(numbers, width)
    assert len(packed) == (len(numbers) * width + 7) // 8
    assert torch.equal(unpack_numbers(packed, len(numbers), width), numbers)


def test_bits_and_selection():
    bits = random_mask(77, 0.5)
    assert torch.equal(unpack_bits(pack_bits(bits), 77), bits)
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool):
        values = torch.randn(77).to(dtype)
        assert torch.equal(select(values, bits), values[bits])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("density", [0.003, 0.1, 0.6])
def test_cuda_writes_the_same_bytes(density):
    mask = random_mask(100_003, density)
    record, data = encode_positions(mask, int(mask.sum()))
    there = encode_positions(mask.cuda(), int(mask.sum()))
    assert there[0] == record and torch.equal(there[1].cpu(), data)
    assert torch.equal(decode_positions(record, len(mask), reader(there[1])).cpu(), mask)
