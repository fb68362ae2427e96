import pytest
import torch
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as some

from edgebolt.hat import FORMATS, RowFormat, Upload
from edgebolt.hat.wire import MOST_ANSWERED, hat_pb2, read_upload, written_upload

NAME, WIDTH, MOST, LONGEST = bytes(range(16)), 4, 8, 20
ROWS = FORMATS["float32"]


def read(message, rows=ROWS):
    return read_upload(message, rows, WIDTH, MOST, LONGEST)


def message(count=3, **changed):
    fields = {"conversation": NAME, "sequence": 1, "start": 10, "count": count, "reply": count}
    rows = ROWS.encode(torch.ones(min(count, 100), WIDTH))
    return hat_pb2.Upload(**{**fields, "rows": rows, **changed})


def test_what_is_written_is_read():
    rows = torch.randn(4, WIDTH)
    for upload in (
        Upload(0, rows, 0),
        Upload(7, rows, 1),
        Upload(16, rows, 4),
        Upload(9, rows, 4, (6, 8, 11), (-1, 0, 0)),
        Upload(9, rows[:1], 1, (), ()),
    ):
        sent = written_upload(NAME, 5, upload, ROWS).SerializeToString()
        found = read(hat_pb2.Upload.FromString(sent))
        assert torch.equal(found.rows, upload.rows)
        same = (found.start, found.reply, found.kept, found.parents)
        assert same == (upload.start, upload.reply, upload.kept, upload.parents)


@pytest.mark.parametrize("name", FORMATS)
def test_a_message_is_its_rows_and_a_little_more(name):
    rows, form = torch.randn(5, WIDTH), FORMATS[name]
    sent = written_upload(NAME, 5, Upload(2, rows, 5), form)
    assert len(sent.rows) == 5 * form.row_bytes(WIDTH) and (sent.count, sent.reply) == (5, 5)
    assert sent.ByteSize() - len(sent.rows) < 40


def test_the_ends_of_all_ranges_are_taken():
    for good in (
        message(1, start=0),
        message(MOST, start=LONGEST - MOST),
        message(reply=0),
        message(2, sequence=2**64 - 1),
        message(kept=[7, 8, 9]),
        message(start=10, kept=[0x7FFFFFFF]),
        message(tree=True, parents=[-1, 0], start=LONGEST),
    ):
        assert len(read(good).rows) == good.count


class Untouched(RowFormat):
    def decode(self, data, count, width):
        raise AssertionError("bytes were looked at before the numbers were")


@pytest.mark.parametrize(
    ("changed", "message_"),
    [
        ({"conversation": b"short"}, "named by 16 bytes, not 5"),
        ({"conversation": b""}, "named by 16 bytes, not 0"),
        ({"conversation": bytes(17)}, "named by 16 bytes, not 17"),
        ({"sequence": 0}, "numbered from 1"),
        ({"count": 0}, "0 rows: an upload has 1 to 8"),
        ({"count": MOST + 1}, "9 rows: an upload has 1 to 8"),
        ({"count": 2**32 - 1}, "4294967295 rows: an upload has 1 to 8"),
        ({"start": LONGEST - 2}, "up to position 21: a text has at most 20"),
        ({"start": 2**32 - 1}, "a text has at most 20"),
        ({"start": LONGEST + 1, "tree": True, "parents": [-1, 0]}, "start=21"),
        ({"reply": 4}, "reply=4 do not fit 3 rows"),
        ({"kept": [9, 8]}, "kept positions are ascending"),
        ({"kept": [8, 8]}, "kept positions are ascending"),
        ({"kept": range(11)}, "among the 10 that are kept"),
        ({"start": 0, "kept": [0]}, "among the 0 that are kept"),
        ({"kept": [6, 8, 9]}, "lie behind those that are kept anyway"),
        ({"parents": [-1, 0]}, "Parents belong to a tree"),
        ({"tree": True}, "0 parents for 3 rows"),
        ({"tree": True, "parents": [-1]}, "1 parents for 3 rows"),
        ({"tree": True, "parents": [-1, 0, 1]}, "3 parents for 3 rows"),
        ({"tree": True, "parents": [-1, 1]}, "follows an earlier one"),
        ({"tree": True, "parents": [0, 0]}, "follows an earlier one"),
        ({"tree": True, "parents": [-2, 0]}, "follows an earlier one"),
        ({"tree": True, "parents": [-(2**31), 2**31 - 1]}, "follows an earlier one"),
    ],
)
def test_what_is_out_of_range_is_refused_before_rows_are_looked_at(changed, message_):
    with pytest.raises(ValueError, match=message_):
        read(message(**{**changed}) if "count" in changed else message(**changed), Untouched("none", torch.float32))


@pytest.mark.parametrize(
    ("changed", "message_"),
    [
        ({"reply": MOST_ANSWERED + 1}, "rows to be answered: a draft has at most 256"),
        ({"tree": True, "parents": [-1] * (MOST_ANSWERED + 9)}, "rows to be answered"),
        ({"reply": 1, "kept": range(MOST_ANSWERED + 1)}, "257 kept positions or parents"),
    ],
)
def test_a_draft_has_a_bound_whatever_a_chunk_has(changed, message_):
    count, longest = MOST_ANSWERED + 10, 10_000
    fields = {"conversation": bytes(16), "sequence": 1, "start": 5000, "count": count, **changed}
    with pytest.raises(ValueError, match=message_):
        read_upload(hat_pb2.Upload(**fields), Untouched("none", torch.float32), WIDTH, count, longest)


@pytest.mark.parametrize("count", [2, 4])
def test_bytes_that_are_not_those_of_the_rows_are_refused(count):
    with pytest.raises(ValueError, match=f"48 bytes for {count} rows"):
        read(message(count, rows=ROWS.encode(torch.ones(3, WIDTH))))
    with pytest.raises(ValueError, match="48 bytes for 3 rows: 96 as float64 of width 4"):
        read(message(), FORMATS["float64"])


def test_numbers_that_are_not_finite_are_refused():
    bad = torch.full((3, WIDTH), float("nan")).view(torch.uint8).numpy().tobytes()
    with pytest.raises(ValueError, match="not finite"):
        read(message(rows=bad))


@given(some.binary(max_size=200))
@settings(max_examples=300, deadline=None)
def test_random_bytes_are_refused_or_read(data):
    try:
        found = hat_pb2.FromDevice.FromString(data)
        read(found.upload)
    except (ValueError, DecodeError):
        pass


UINTS = some.one_of(some.integers(0, 25), some.integers(0, 2**32 - 1))


@given(
    some.fixed_dictionaries(
        {
            "conversation": some.binary(min_size=15, max_size=17) | some.just(NAME),
            "sequence": some.integers(0, 2**64 - 1),
            "start": UINTS,
            "count": UINTS | some.integers(1, 3),
            "reply": UINTS | some.integers(0, 3),
            "rows": some.sampled_from([b"", bytes(16), bytes(32), bytes(48), bytes(50)]),
            "kept": some.lists(UINTS, max_size=4),
            "tree": some.booleans(),
            "parents": some.lists(some.integers(-3, 4) | some.integers(-(2**31), 2**31 - 1), max_size=3),
        }
    )
)
@settings(max_examples=400, deadline=None)
def test_what_is_read_is_in_range(fields):
    sent = hat_pb2.FromDevice(upload=hat_pb2.Upload(**fields)).SerializeToString()
    try:
        found = read(hat_pb2.FromDevice.FromString(sent).upload)
    except ValueError:
        return
    count = len(found.rows)
    assert 1 <= count <= MOST and 0 <= found.reply <= count and 0 <= found.start <= LONGEST
    assert found.parents is None or len(found.parents) == count - 1
    assert found.parents is not None or found.start + count <= LONGEST
    assert list(found.kept) == sorted(set(found.kept)) and len(found.kept) <= found.start


def test_a_field_of_a_later_protocol_is_passed_over():
    later = message().SerializeToString() + b"\xf8\x3f\x01"  # field 1023
    assert len(read(hat_pb2.Upload.FromString(later)).rows) == 3
