"""What travels between the server and its workers, and who gets it."""

import threading

import numpy as np
import pytest
import torch

from edgebolt.common.communication import Message
from edgebolt.common.devices import DeviceProfile
from edgebolt.common.engines import Order
from edgebolt.common.engines.memory import dump_memory, load_memory
from edgebolt.common.engines.ranks import _orders, _plain_orders, spread
from edgebolt.common.engines.travel import dumped, same_tensors
from edgebolt.common.federated import Visit

PROFILE = DeviceProfile("board", flops=1e12, memory_bytes=1, power_w=1.0, radio_w=1.0, up_bps=1e6, down_bps=1e6)


def order(number, flops=1.0, message=None, **kwargs):
    visit = Visit(number, 2, settings={"depth": 3})
    message = Message({"w": torch.arange(3.0)}) if message is None else message
    message = message.with_header(visit=visit.order())
    what = {"round": 0, "steps": 2, "died": False, "enrolling": False, "timed": True, "profile": PROFILE, **kwargs}
    return Order(number=number, visit=visit, message=message, flops=flops, **what)


class TestSpread:
    def test_equal_visits_in_equal_parts(self):
        owner = spread([order(number) for number in range(9)], ranks=3)
        assert [owner[number] for number in range(3)] == [0, 0, 0], "rank 0 trains while the others' have no turn"
        assert sorted(owner.values()) == [0] * 3 + [1] * 3 + [2] * 3

    def test_the_dearest_first_to_the_rank_that_has_least(self):
        owner = spread([order(n, flops) for n, flops in enumerate([4.0, 6.0, 1.0, 1.0, 2.0, 2.0])], ranks=3)
        costs = dict(enumerate([4.0, 6.0, 1.0, 1.0, 2.0, 2.0]))
        load = [sum(costs[n] for n, rank in owner.items() if rank == r) for r in range(3)]
        assert load == [4.0, 6.0, 6.0]

    def test_one_rank_has_all(self):
        assert spread([order(0), order(1)], ranks=1) == {0: 0, 1: 0}

    def test_a_single_visit_stays_here(self):
        assert spread([order(7)], ranks=4) == {7: 0}

    def test_visits_without_steps_are_spread_too(self):
        assert sorted(spread([order(n, 0.0) for n in range(4)], ranks=2).values()) == [0, 0, 1, 1]

    def test_it_depends_on_nothing_else(self):
        orders = [order(n, float(n % 5)) for n in range(40)]
        assert spread(orders, 4) == spread(list(orders), 4)


class TestOrders:
    def test_they_arrive_as_they_were(self):
        shared = Message({"w": torch.tensor([0.1, float("nan")]), "n": torch.tensor([2**40])}, {"codec": "dense"})
        memory = dump_memory({"moments": torch.ones(2)})
        told = [(Visit(1, 5, base=2, done=3), 4)]
        sent = [
            order(0, message=shared, memory=memory, groups=[{"lr": 0.1, "betas": (0.9, 0.99), "foreach": None}]),
            order(1, message=shared, delivered=told, died=True),
            order(2, message=Message({})),
        ]
        plain = _plain_orders(sent)
        assert len(plain["messages"]) == 2, "visits that are sent the same share it"
        for before, after in zip(sent, _orders(plain), strict=True):
            for name in before.__dataclass_fields__.keys() - {"message"}:
                assert getattr(after, name) == getattr(before, name), name
            assert after.message.to_bytes() == before.message.to_bytes()

    def test_the_same_tensors(self):
        message = Message({"w": torch.ones(2)}, {"codec": "dense"})
        first, second = message.with_header(visit={"client": 1}), message.with_header(visit={"client": 2})
        assert same_tensors(first) == same_tensors(second)
        assert same_tensors(first) != same_tensors(message.with_header(codec="half"))
        assert same_tensors(first) != same_tensors(Message({"w": torch.ones(2)}, {"codec": "dense"}))


class TestMemory:
    def test_round_trip(self):
        memory = {"model": {"w": torch.tensor([1.5, float("nan")])}, "seen": [1, (2, None)], "text": "ä", 3: True}
        found = load_memory(dump_memory(memory))
        assert found["model"].pop("w").isnan().tolist() == memory["model"].pop("w").isnan().tolist()
        assert found == memory

    def test_equal_memories_have_equal_bytes(self):
        assert dump_memory({"w": torch.ones(3)}) == dump_memory({"w": torch.ones(3)})

    def test_no_code_comes_with_it(self):
        with pytest.raises(Exception, match=r"(?i)weights_only|unsupported"):
            load_memory(dump_memory({"array": np.float64(1.0).__class__, "lock": print}))


class Part:
    def __init__(self, **parts):
        vars(self).update(parts)


@pytest.mark.parametrize(
    ("part", "place"),
    [
        (threading.Lock(), r"module, a lock,"),
        (Part(tokenizer=Part(lock=threading.Lock()), name="x"), r"module\.tokenizer\.lock, a lock,"),
        (Part(tables=[1, {"open": threading.Lock()}]), r"module\.tables\[1\]\['open'\], a lock,"),
    ],
)
def test_what_cannot_be_pickled_is_named(part, place):
    import pickle

    class Job:
        __dataclass_fields__ = ("module",)
        module = part

    def dumps(value):
        if isinstance(value, Job):  # a class of this function cannot be pickled either
            value = value.module
        return pickle.dumps(value)

    with pytest.raises(TypeError, match=place + " cannot be sent to a worker"):
        dumped(Job(), dumps)
