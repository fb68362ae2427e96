import random
from collections import OrderedDict
from dataclasses import dataclass
from enum import Enum, IntEnum

import numpy as np
import pytest
import torch

from edgebolt.flude.resumable_loader import RandomStates, ResumableLoader, digest
from edgebolt.flude.snapshot_file import read_snapshot, write_snapshot


class Colour(IntEnum):
    RED = 3


class Mode(str, Enum):  # noqa: UP042  # `str` of it is no value of it
    FAST = "fast"


def test_everything_comes_back(tmp_path):
    shared = torch.arange(6.0)
    state = {
        "plain": [1, -2.5, float("inf"), True, None, "text", 2**80],
        "nested": {"tuple": (1, (2, 3)), "set": {1, 2}, "bytes": b"\x00\xff", 5: {None: "none", (1, 2): "pair"}},
        "tensors": [
            shared,
            shared[2:4],
            shared.view(2, 3).T,
            torch.tensor(3),
            torch.zeros(0, 4),
            torch.tensor([True]),
        ],
        "dtypes": [torch.ones(3, dtype=d) for d in (torch.bfloat16, torch.float16, torch.int8, torch.int64)],
        "numpy": np.array([1, 2**32 - 1], dtype=np.uint32),
        "scalar": np.float64(0.1),
        "ordered": OrderedDict(b=1, a=2),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "colour": Colour.RED,
        "mode": {Mode.FAST: Mode.FAST},
    }
    write_snapshot(tmp_path / "s.safetensors", state)
    back = read_snapshot(tmp_path / "s.safetensors")
    assert list(back) == list(state)
    for name in ("plain", "nested", "scalar", "colour", "mode"):
        assert back[name] == state[name], name
    assert list(back["ordered"]) == ["b", "a"]
    for name in ("tensors", "dtypes"):
        assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(back[name], state[name], strict=True)), (
            name
        )
    assert back["numpy"].dtype == np.uint32 and back["numpy"].tolist() == [1, 2**32 - 1]
    assert torch.equal(back["parameter"], torch.ones(2))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (object(), r"state\['a'\]\[1\] is a object"),
        (torch.ones(2).to_sparse(), "sparse"),
        (torch.ones(2, dtype=torch.complex64), "complex64"),
        (np.array(["x"]), "ndarray"),
        (lambda: 0, "function"),
    ],
)
def test_what_a_snapshot_cannot_hold(tmp_path, value, message):
    path = tmp_path / "s.safetensors"
    write_snapshot(path, {"old": 1})
    with pytest.raises(TypeError, match=message):
        write_snapshot(path, {"a": [0, value]})
    assert read_snapshot(path) == {"old": 1} and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("damage", [b"", b"\x00" * 5, b"\xff" * 50, "half", "foreign", "structure"])
def test_a_damaged_file_is_refused_with_the_way_out(tmp_path, damage):
    path = tmp_path / "s.safetensors"
    write_snapshot(path, {"w": torch.ones(100)})
    whole = path.read_bytes()
    if damage == "foreign":
        from safetensors.torch import save_file

        save_file({"w": torch.ones(1)}, path)
    else:
        changes = {"half": whole[: len(whole) // 2], "structure": whole.replace(b"dict", b"dyct")}
        path.write_bytes(changes[damage] if isinstance(damage, str) else damage)
    with pytest.raises(ValueError, match=r"no whole snapshot.*begin anew"):
        read_snapshot(path)


def test_random_states_come_back():
    own = torch.Generator().manual_seed(3)
    states = RandomStates(torch.utils.data.DataLoader([1, 2], shuffle=True, generator=own))
    saved = states.read()

    def draw():
        return (
            torch.rand(3).tolist(),
            np.random.rand(),
            random.random(),
            random.gauss(0, 1),
            torch.rand(1, generator=own),
        )

    first = draw()
    assert draw() != first
    states.write(saved)
    assert draw() == first


def loader(shuffle=True, n=10):
    return torch.utils.data.DataLoader(range(n), batch_size=2, shuffle=shuffle)


def test_an_exhausted_loader_stays_exhausted():
    first = ResumableLoader(loader(), due=lambda: True)
    assert len(list(first)) == 5
    place = first.place()
    second = ResumableLoader(loader(), due=lambda: False)
    second.resume_at(place)
    assert list(second) == [] and len(list(second)) == 5  # the next epoch is whole
    longer = ResumableLoader(loader(n=12), due=lambda: False, resume=place)
    with pytest.raises(ValueError, match=r"Batch 6 of the epoch"):
        list(longer)


class ByEpoch(torch.utils.data.Sampler):
    epoch = 0

    def __len__(self):
        return 10

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        yield from random.Random(self.epoch).sample(range(10), 10)


@pytest.mark.parametrize("sampler", [None, ByEpoch()])
@pytest.mark.parametrize("over", [True, False])
def test_an_epoch_that_has_ended_is_compared(sampler, over):
    def made(data):
        return torch.utils.data.DataLoader(data, batch_size=2, shuffle=sampler is None, sampler=sampler)

    first = ResumableLoader(made(range(10)), due=lambda: False)
    if sampler is not None:
        sampler.set_epoch(3)
    iterator = iter(first)
    for _ in range(5 if over else 2):
        next(iterator)
    place = first.place_after(over, epoch=3)
    if sampler is not None:
        sampler.set_epoch(0)
    before = torch.get_rng_state()
    ResumableLoader(made(range(10)), due=lambda: False).resume_at(place)
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(ValueError, match=r"Batch 1 of the epoch.*begin anew"):
        ResumableLoader(made(range(1, 11)), due=lambda: False).resume_at(place)


@pytest.mark.parametrize("drawn", range(5))
def test_a_loader_begins_where_another_was(drawn):
    torch.manual_seed(0)
    batches = [batch.tolist() for batch in loader()]
    torch.manual_seed(0)
    first = ResumableLoader(loader(), due=lambda: True)
    iterator = iter(first)
    for _ in range(drawn + 1):
        next(iterator)
    place = first.place()
    torch.manual_seed(123)
    second = ResumableLoader(loader(), due=lambda: False, resume=place)
    assert len(second) == 5
    assert [batch.tolist() for batch in second] == batches[drawn:]
    expected = torch.rand(1)
    torch.manual_seed(123)
    assert len(list(second)) == 5  # the next epoch is whole
    list(first)
    assert torch.rand(1) != expected


def test_another_batch_than_the_one_that_was_to_come_is_refused():
    first = ResumableLoader(loader(False), due=lambda: True)
    next(iter(first))
    place = first.place()
    with pytest.raises(ValueError, match=r"Batch 1 of the epoch.*begin anew"):
        next(iter(ResumableLoader(loader(False, n=12), due=lambda: False, resume={**place, "digest": "0"})))


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_digests_tell_batches_apart():
    class Graph:
        def __init__(self, x):
            self.x = x

        def to_dict(self):
            return {"x": self.x}

    @dataclass
    class Pair:
        x: torch.Tensor
        y: int = 0

    sparse = torch.eye(2).to_sparse()
    objects = np.array([1, "text"], dtype=object)
    batches = [
        torch.arange(4), torch.arange(4.0), torch.arange(4).view(2, 2), {"a": torch.arange(4)}, [torch.arange(4)],
        ("x", 1), ("x", 2), np.arange(4), None, Graph(torch.ones(1)), Graph(torch.zeros(1)), torch.zeros(0),
        sparse, 2 * sparse, torch.eye(3).to_sparse(), sparse.to_sparse_csr(), sparse.to_sparse_csc(), np.int64(1),
        Pair(torch.ones(1)), Pair(torch.zeros(1)), Pair(torch.ones(1), 1), objects, objects[:1],
        torch.nested.nested_tensor([torch.ones(1), torch.ones(2)], layout=torch.jagged),
    ]  # fmt: skip
    digests = [digest(batch) for batch in batches]
    assert len(set(digests)) == len(batches)
    assert digest({"a": torch.arange(4)}) == digests[3]
    assert digest(Pair(torch.ones(1))) == digest(Pair(torch.ones(1)))
    assert digest(np.array([1, "te" + "xt"], dtype=object)) == digest(objects)
