"""What a round costs the server before anybody trains, with 100,000 devices of which 1,000 are chosen."""

import gc
from itertools import count

import numpy as np
import pytest

from edgebolt.common.devices import Fleet, FleetState
from edgebolt.common.federated import FedAvg, Server
from edgebolt.common.federated.loop import FederatedLoop
from edgebolt.common.random import stream

POPULATION, COHORT, SEED = 100_000, 1_000, 0

pytestmark = pytest.mark.benchmark(group="plan")


class NoDevices:
    """The engine of a loop that only plans."""

    def begin_round(self):
        pass


class Rounds:
    """A server and its fleet, ready for one round after the other: no answer can come from a memo."""

    def __init__(self):
        self.fleet = Fleet.jetson(POPULATION, seed=SEED, online_rate=0.9, failure_rate=0.05)
        samples = stream(SEED, "samples").integers(10, 200, POPULATION)
        self.server = Server(
            samples,
            steps_of=lambda client, batch_size: -(-int(samples[client]) // 10),
            online=lambda round: self.fleet.at(round).online,
            per_round=COHORT,
            seed=SEED,
        )
        self.algorithm = FedAvg()
        self.numbers = count()

    def next(self):
        self.server.round = next(self.numbers)

    def plan(self):
        return self.algorithm.plan(self.server)

    def begin(self):
        """As the running loop does: the plan, who will fail and when, and the queue."""
        loop = FederatedLoop(self.algorithm, self.server, self.fleet, devices=NoDevices(), samples_in=None)
        loop.begin_round(limit=lambda steps: steps)
        return loop


@pytest.fixture
def rounds(benchmark):
    benchmark.extra_info.update(population=POPULATION, cohort=COHORT)
    return Rounds()


def timed(benchmark, target, setup):
    # 10 to 50 ms a round, 40 rounds (power modes change every 20): 1 second.
    return benchmark.pedantic(target, setup=setup, rounds=40, warmup_rounds=2)


def test_numpy_choice(benchmark, rounds):
    """The baseline: the draw alone."""
    online = np.flatnonzero(rounds.fleet.at(0).online)
    chosen = timed(
        benchmark, lambda: rounds.server.rng("selection").choice(online, COHORT, replace=False), rounds.next
    )
    assert len(set(chosen.tolist())) == COHORT


def test_plan(benchmark, rounds):
    """Speeds, links and presence of all devices, the cohort and its visits."""
    visits = timed(benchmark, rounds.plan, rounds.next)
    benchmark.extra_info["target"] = {"seconds": 0.5}
    state, clients = rounds.fleet.at(rounds.server.round), [visit.client for visit in visits]
    assert len(clients) == COHORT and clients == sorted(set(clients))
    assert state.online[clients].all()
    assert 0.89 < state.online.mean() < 0.91


def test_begin_round(benchmark, rounds):
    """The same inside the loop, which draws for every visit whether and when its device dies."""
    loop = timed(benchmark, rounds.begin, rounds.next)
    benchmark.extra_info["target"] = {"seconds": 0.5}
    ordered = sum(visit.steps for visit in loop.visits)
    assert len(loop.visits) == COHORT
    assert 0.95 * ordered < loop.planned_steps < 0.99 * ordered  # one in twenty dies, half-way on average


def test_arrays_only(benchmark, rounds):
    """Not an object a device: 100,000 devices are made, planned and drawn with a few thousand objects."""
    gc.collect()
    before = len(gc.get_objects())
    other = Rounds()
    other.next()
    visits = benchmark.pedantic(other.plan, rounds=1)
    state = other.fleet.at(0)
    gc.collect()
    benchmark.extra_info["objects"] = len(gc.get_objects()) - before
    assert benchmark.extra_info["objects"] < 10 * COHORT < POPULATION / 5
    assert len(visits) == COHORT
    assert isinstance(state, FleetState)
    assert all(isinstance(array, np.ndarray) and len(array) == POPULATION for array in vars(state).values())
    assert all(len(column) == POPULATION for column in other.server.reports.values())
