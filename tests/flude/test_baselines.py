"""What the baselines are known by."""

import numpy as np
import pytest
import torch
from scripted_run import CLIENTS, run, same, scripted

from edgebolt.common.devices import Cut, Fleet
from edgebolt.common.federated import Algorithm, Deadline, FedAvg
from edgebolt.flude.baselines import MIFA, SAFA, ImpatientFedAvg, OortFedAvg

ALL_WAIT = Deadline(slack=None)


def test_patience_makes_fedavg():
    ours, _ = run(ImpatientFedAvg(ALL_WAIT), 3, per_round=4)
    theirs, _ = run(FedAvg(), 3, per_round=4)
    assert all(same(a, b) for a, b in zip(ours.models, theirs.models, strict=True))


def test_late_updates_are_left_out_and_counted():
    algorithm = ImpatientFedAvg()
    algorithm.closing = lambda server, outcomes: sorted(o.finished for o in outcomes)[CLIENTS // 2]
    look, strategy = run(algorithm, 2, fleet=Fleet.jetson(CLIENTS), per_round=CLIENTS)
    late = {o.visit.client for o in look.outcomes[0] if o.reason == "late"}
    assert strategy.history[0]["round/late"] == len(late) == CLIENTS - CLIENTS // 2 - 1
    assert strategy.history[0]["round/sim_time"] == sorted(o.finished for o in look.outcomes[0])[CLIENTS // 2]
    in_time = np.array(sorted(set(range(CLIENTS)) - late))
    only, _ = run(Algorithm(selector=lambda server: in_time), 1, fleet=Fleet.jetson(CLIENTS))
    assert same(look.models[0], only.models[0])


def test_oort_reports_losses_and_explores():
    look, strategy = run(OortFedAvg(ALL_WAIT), 6, per_round=3)
    assert not strategy.server.reports["loss"].isnan().all()
    assert len({o.visit.client for outcomes in look.outcomes for o in outcomes}) > 5


def test_mifa_moves_by_what_it_remembers():
    """The first round is FedAvg's with equal weights; a device that is away is stood in for by its last update."""
    first, _ = run(MIFA(ALL_WAIT), 1)
    average, _ = run(FedAvg(weights="uniform"), 1)
    assert all(torch.allclose(first.models[0][n], average.models[0][n], atol=1e-6) for n in first.models[0])
    lost = {(1, client): Cut(2) for client in range(CLIENTS)}
    look, strategy = run(MIFA(ALL_WAIT), 2, fleet=scripted(lost))
    start = {n: t for n, t in strategy.loop.devices.initial.items()}
    for name, tensor in look.models[1].items():  # nobody delivered: the same step once more
        assert torch.allclose(tensor - look.models[0][name], look.models[0][name] - start[name], atol=1e-6), name
    one = {(1, client): Cut(2) for client in range(1, CLIENTS)}
    partly, memory = run(MIFA(ALL_WAIT), 2, fleet=scripted(one))
    latest = memory.server.memory["mifa"]
    assert len(latest) == CLIENTS
    for name, tensor in partly.models[1].items():
        mean = sum(latest[client][name] for client in range(CLIENTS)) / CLIENTS
        assert torch.allclose(tensor - partly.models[0][name], mean, atol=1e-6), name


def test_safa_with_everybody_in_time_is_fedavg():
    ours, strategy = run(SAFA(quota=1.0, closing=ALL_WAIT), 3)
    theirs, _ = run(FedAvg(), 3)
    for a, b in zip(ours.models, theirs.models, strict=True):
        assert all(torch.allclose(a[n], b[n], atol=1e-6) for n in a)
    assert all(o.visit.start == "global" for outcomes in ours.outcomes for o in outcomes)
    assert set(strategy.server.memory["safa"]["cache"]) == set(range(CLIENTS))


def test_safa_goes_on_with_old_models_until_they_are_too_old():
    """Device 3 delivers, then fails four times: it goes on with its own model, and at lag 2 is sent the new one."""
    fails = {(r, 3): Cut(2) for r in (1, 2, 3, 4)}
    look, strategy = run(SAFA(lag=2, quota=1.0, closing=ALL_WAIT), 6, fleet=scripted(fails))
    starts = [{o.visit.client: o.visit.start for o in outcomes}[3] for outcomes in look.outcomes]
    assert starts == ["global", "global", None, "global", "global", "global"]
    assert strategy.server.memory["safa"]["version"][3] == 5


def test_safa_stands_in_for_those_who_fail():
    lost = {(1, client): Cut(2) for client in range(CLIENTS)}
    look, strategy = run(SAFA(quota=1.0, closing=ALL_WAIT), 2, fleet=scripted(lost))
    assert len(strategy.server.memory["safa"]["cache"]) == CLIENTS
    for name, tensor in look.models[1].items():  # the models of round 0 are merged once more
        assert torch.allclose(tensor, look.models[0][name], atol=1e-6), name


def test_safa_ends_a_round_when_those_not_picked_before_fill_the_quota():
    look, strategy = run(SAFA(quota=0.25, closing=ALL_WAIT), 4, fleet=Fleet.jetson(CLIENTS), optimizer="sgd")
    first, second = ({o.visit.client for o in outcomes if o.delivered} for outcomes in look.outcomes[:2])
    assert len(first) == 2  # a quarter of eight, the fastest
    assert len(second - first) == 2  # the former ones may have been faster, and did not fill it
    assert strategy.server.memory["safa"]["picked"].sum() >= 2


@pytest.mark.parametrize(
    ("make", "message"),
    [(lambda: SAFA(lag=0), "lag=0"), (lambda: SAFA(quota=0), "quota=0"), (lambda: SAFA(quota=2), "quota=2")],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
