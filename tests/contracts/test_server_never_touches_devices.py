"""Server code sees models, reports and messages; what a device remembers stays on the device."""

import pytest
from algorithms import ALGORITHMS
from runs import assert_same, fit, make_strategy
from toys import Cache, Patience

from edgebolt.common.federated import Algorithm, ClientCallback

SERVER_CODE = ["enrol", "plan", "download", "aggregate", "closing_time", "finish", "figures", "evaluation"]
READS_AND_WRITES = ["__getitem__", "__setitem__", "__delitem__", "__contains__", "__iter__", "__len__", "__bool__",
                    "get", "keys", "values", "items", "setdefault", "update", "pop", "copy"]  # fmt: skip


class TouchedDeviceMemory(Exception):
    pass


class Guard:
    """While a method of the algorithm runs, the memories of all devices raise."""

    def __init__(self, strategy):
        self.strategy, self.depth, self.entered = strategy, 0, set()
        algorithm = strategy.algorithm
        for name in [*SERVER_CODE, "observe"]:  # the latter is not called where `finish` is another
            setattr(algorithm, name, self.watched(name, getattr(algorithm, name)))
        guard = self

        class Guarded(dict):
            """A memory, or the dict of all memories."""

            def setdefault(self, key, default=None):
                guard.check()
                if key not in self:  # a new device: its memory is guarded too, whoever keeps a reference to it
                    dict.__setitem__(self, key, Guarded(default) if type(default) is dict else default)
                return dict.__getitem__(self, key)

        for name in READS_AND_WRITES:
            if name != "setdefault":
                setattr(Guarded, name, self.forbidden(name))
        self.memories = Guarded()

    def check(self):
        if self.depth:
            raise TouchedDeviceMemory

    def forbidden(self, name):
        plain = getattr(dict, name, dict.__len__)

        def guarded(memory, *args, **kwargs):
            self.check()
            result = plain(memory, *args, **kwargs)
            return bool(result) if name == "__bool__" else result

        return guarded

    def watched(self, name, method):
        def run(*args):
            self.strategy.loop.devices.memories = self.memories
            self.entered.add(name)
            self.depth += 1
            try:
                return method(*args)
            finally:
                self.depth -= 1

        return run


@pytest.mark.parametrize("name", ALGORITHMS)
def test_algorithms(name):
    row = ALGORITHMS[name]
    strategy, module = row.make()
    guard = Guard(strategy)
    run = fit(strategy, module, rounds=row.rounds)
    assert guard.entered - {"observe"} == set(SERVER_CODE)
    assert run.strategy.loop.devices.memories is guard.memories
    assert_same(run, fit(*row.make(), rounds=row.rounds))


class ReadsMemories(Patience):
    """Asks the devices directly how far they came."""

    def plan(self, server):
        return [visit for visit in super().plan(server) if "reached" not in self.devices().get(visit.client, {})]


class KeepsDevice(Algorithm):
    """Its server half reads what its device half left in a shared object."""

    def __init__(self):
        super().__init__(callbacks=[Cache()])

    def aggregate(self, server, closed):
        self.callbacks[0].device.memory["reached"]


class LooksAtLosses(Algorithm):
    def finish(self, server, outcomes):
        list(self.devices().items())


@pytest.mark.parametrize("cheat", [ReadsMemories, KeepsDevice, LooksAtLosses])
def test_the_guard_catches_cheats(cheat):
    strategy = make_strategy(cheat())
    strategy.algorithm.devices = lambda: strategy.loop.devices.memories
    fit(strategy)
    strategy = make_strategy(cheat())
    strategy.algorithm.devices = lambda: strategy.loop.devices.memories
    Guard(strategy)
    with pytest.raises(TouchedDeviceMemory):
        fit(strategy)


def test_nobody_foresees_a_failure():
    """The environment draws the cut; neither half may see it before it happens."""
    seen = []

    class Server(Algorithm):
        def plan(self, server):
            visits = super().plan(server)
            seen.extend(visit.cut for visit in visits)
            return visits

        def download(self, server, visit):
            seen.append(visit.cut)
            return super().download(server, visit)

    class Client(ClientCallback):
        def install(self, device, visit, tensors):
            seen.append(visit.cut)
            return tensors

        def on_client_start(self, trainer, module, device, visit):
            seen.append(visit.cut)

    strategy = make_strategy(Server(callbacks=[Client()]), fleet=ALGORITHMS["all die half-way"].strategy()["fleet"])
    run = fit(strategy)
    assert run.strategy.history[1]["round/failed"] == 3
    assert len(seen) == 4 * 9 and set(seen) == {None}
