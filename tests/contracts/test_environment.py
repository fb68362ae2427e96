"""What happens to devices depends on seeds alone: not on the algorithm, not on the order in which visits run."""

import numpy as np
import pytest
import torch
from algorithms import ALGORITHMS, failing
from runs import CLIENTS, SAMPLES, TRAIN, Net, assert_same, exact, fit, holds, make_strategy, state

from edgebolt.common.federated import Algorithm, ClientCallback, FedAvg, FedProx, Sizes


@pytest.mark.parametrize("name", ALGORITHMS)
def test_same_seed_same_run(name):
    row = ALGORITHMS[name]
    first = fit(*row.make(), rounds=row.rounds)
    torch.manual_seed(999)  # nothing depends on the global generators as they were ...
    np.random.seed(999)
    assert_same(fit(*row.make(), rounds=row.rounds), first)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_other_seed_other_run(name):
    row = ALGORITHMS[name]
    first, second = (fit(*row.make(seed=seed), rounds=row.rounds) for seed in (0, 1))
    assert state(first)["models"] != state(second)["models"]


def rearranged(row, order):
    strategy, module = row.make()
    plan = strategy.algorithm.plan
    strategy.algorithm.plan = lambda server: order(plan(server))
    return fit(strategy, module, rounds=row.rounds)


def shuffled(visits):
    return [visits[i] for i in np.random.Generator(np.random.PCG64(len(visits))).permutation(len(visits))]


@pytest.mark.parametrize("order", [lambda visits: visits[::-1], shuffled], ids=["reversed", "shuffled"])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_order_of_execution_changes_nothing(name, order):
    row = ALGORITHMS[name]
    planned, other = state(rearranged(row, list)), state(rearranged(row, order))
    ledgers = [ledger_rows(planned.pop("ledger")), ledger_rows(other.pop("ledger"))]
    assert ledgers[0] == ledgers[1]
    assert [name for name in planned if planned[name] != other[name]] == []


def ledger_rows(ledger):
    """The entries of a ledger's state, in an order that does not depend on when they were made."""
    columns = []
    for name, (dtype, shape, data) in ((n, c) for n, c in ledger.items() if n != "kinds"):
        size = len(data) // max(1, shape[0])
        columns.append([(name, dtype, data[i * size : (i + 1) * size]) for i in range(shape[0])])
    return sorted(zip(*columns, strict=True))


def test_the_order_really_was_another():
    row = ALGORITHMS["fedavg"]
    planned, other = rearranged(row, list), rearranged(row, lambda visits: visits[::-1])
    clients = [run.strategy.ledger.entries()["client"].tolist() for run in (planned, other)]
    assert clients[0] != clients[1] and sorted(clients[0]) == sorted(clients[1])


class Diary(ClientCallback):
    """What each visit met with: the device's profile and data."""

    def __init__(self):
        self.met = {}

    def install(self, device, visit, tensors):
        labels = torch.cat([labels for _, labels in device.data()])
        self.met[(device.round, device.id)] = (device.profile, device.samples, exact(labels))
        return tensors


def observed(algorithm, **kwargs):
    """Cohort, environment and failures of a run."""
    diary, fates = Diary(), {}
    algorithm.callbacks.append(diary)
    finish = algorithm.finish

    def noted(server, outcomes):
        for outcome in outcomes:
            fates[(server.round, outcome.visit.client)] = (outcome.visit.cut, outcome.steps, outcome.reason)
        finish(server, outcomes)

    algorithm.finish = noted
    kwargs = {"fleet": failing(), **kwargs}
    run = fit(make_strategy(algorithm, **kwargs), rounds=4)
    arrays = [exact(torch.tensor(v)) for r in range(4) for v in vars(kwargs["fleet"].at(r)).values()]
    return diary.met, fates, arrays, run


class Everyone:
    def __call__(self, server):
        return np.arange(server.population)


def test_same_environment_for_every_algorithm():
    met, fates, arrays, _ = observed(FedAvg())
    for other in (FedAvg("uniform", "keep"), FedProx(mu=0.1)):
        assert observed(other)[:3] == (met, fates, arrays)
    everyone = observed(Algorithm(selector=Everyone()))  # an algorithm that asks for others meets the same for each
    assert everyone[2] == arrays
    assert len(everyone[1]) == 4 * CLIENTS > len(fates) == 12
    assert all(everyone[0][key] == met[key] for key in met)
    assert all(everyone[1][key] == fates[key] for key in fates)
    assert {reason for _, _, reason in fates.values()} == {"", "failed"}


def test_another_run_seed_changes_cohorts_and_not_the_environment():
    met, fates, arrays, run = observed(FedAvg())
    other_met, other_fates, other_arrays, other = observed(FedAvg(), seed=1)
    assert met.keys() != other_met.keys()
    assert arrays == other_arrays
    assert all(met[key] == other_met[key] for key in met.keys() & other_met.keys())
    assert all(fates[key] == other_fates[key] for key in fates.keys() & other_fates.keys())
    assert not holds(run.model, other.model)


def test_partition_and_fleet_have_seeds_of_their_own():
    index, other = (Sizes(SAMPLES, seed=seed).split(TRAIN) for seed in (0, 1))
    assert any(index.indices(c).tolist() != other.indices(c).tolist() for c in range(CLIENTS))
    met = observed(FedAvg())[0]
    moved = observed(FedAvg(), clients=Sizes(SAMPLES, seed=1))[0]
    assert met.keys() == moved.keys() and any(met[key][2] != moved[key][2] for key in met)
    assert all(met[key][0] == moved[key][0] for key in met)


class Poison(ClientCallback):
    """Client 2 and nobody else uploads NaN, client 4 infinity."""

    def upload(self, device, visit, update):
        bad = {2: float("nan"), 4: float("inf")}.get(device.id)
        if bad is None:
            return update
        return {name: torch.full_like(t, bad) if name == "head.bias" else t for name, t in update.items()}


def test_updates_that_are_not_finite_are_dropped_counted_and_logged():
    with pytest.warns(UserWarning, match=r"NaN or infinity.*\[2, 4\]"):
        run = fit(make_strategy(Algorithm(callbacks=[Poison()]), per_round=6), rounds=2)
    assert [f["round/rejected"] for f in run.strategy.history] == [2, 2]
    assert [f["round/delivered"] for f in run.strategy.history] == [4, 4]
    assert run.trainer.callback_metrics["round/rejected"] == 2
    assert all(bool(torch.isfinite(tensor).all()) for tensor in run.model.values())
    entries = run.strategy.ledger.entries()
    lost = entries["up"] & ~entries["delivered"]
    assert sorted(entries["client"][lost].tolist()) == [2, 2, 4, 4]  # the bytes were sent all the same

    class Others:
        def __call__(self, server):
            return np.array([0, 1, 3, 5])

    assert holds(run.model, fit(make_strategy(Algorithm(selector=Others())), rounds=2).model)


def test_a_loss_of_nan_costs_its_client_only():
    class Diverges(Net):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * float("nan") if self.trainer.strategy.loop.visit.client == 3 else loss

    run = fit(make_strategy(per_round=6), Diverges(), rounds=2)
    assert [f["round/rejected"] for f in run.strategy.history] == [1, 1]
    assert all(bool(torch.isfinite(tensor).all()) for tensor in run.model.values())
