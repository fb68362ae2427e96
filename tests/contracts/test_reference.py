"""Federated averaging against the loop that one would write by hand, bit for bit."""

from copy import deepcopy

import pytest
import torch
from runs import BATCH, LR, SAMPLES, TRAIN, Net, fit, holds, make_strategy
from torch.utils.data import DataLoader, Subset

from edgebolt.common.federated import FedAvg, FedProx, Sizes
from edgebolt.common.random import derive

ROUNDS = 4


def by_hand(cohorts, optimizer, keep=False, uniform=False, mu=0.0, local_epochs=1):
    """Federated averaging in plain torch: returns the weights after every round."""
    index, model, moments, history = Sizes(SAMPLES, seed=0).split(TRAIN), Net(optimizer), {}, []
    floating = [name for name, tensor in model.state_dict().items() if tensor.is_floating_point()]
    for number, cohort in enumerate(cohorts):
        start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        change = {name: torch.zeros_like(start[name]) for name in floating}
        total = sum(1 if uniform else SAMPLES[client] for client in cohort)
        for client in cohort:
            local = deepcopy(model).train()
            anchor = [p.detach().clone() for p in local.parameters()]
            step = local.make_optimizer()
            for group in step.param_groups:
                group["lr"] = LR[optimizer] * 0.5**number
            if keep and client in moments:
                step.load_state_dict({**step.state_dict(), "state": moments[client]})
            generator = torch.Generator().manual_seed(derive(0, "data", number, 0, client))
            data = Subset(TRAIN, index.indices(client))
            loader = DataLoader(data, BATCH, shuffle=True, generator=generator)
            for count, batch in enumerate(batch for _ in range(local_epochs) for batch in loader):
                torch.manual_seed((derive(0, "visit", number, 0, client) + count) % 2**63)  # of dropout
                step.zero_grad()
                local.loss(batch).backward()
                for parameter, sent in zip(local.parameters(), anchor, strict=True):
                    parameter.grad.add_(parameter.detach() - sent, alpha=mu)
                step.step()
            moments[client] = deepcopy(step.state_dict()["state"])
            for name in floating:
                delta = local.state_dict()[name] - start[name]
                change[name].add_(delta, alpha=(1 if uniform else SAMPLES[client]) / total)
        model.load_state_dict({**start, **{name: start[name] + change[name] for name in floating}})
        history.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
    return history


def cohorts_of(run):
    entries = run.strategy.ledger.entries()
    return [entries["client"][(entries["round"] == r) & ~entries["up"]].tolist() for r in range(ROUNDS)]


@pytest.mark.parametrize("keep", [False, True], ids=["moments reset", "moments kept"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_fedavg(optimizer, keep):
    run = fit(make_strategy(FedAvg(moments="keep" if keep else "reset")), Net(optimizer), rounds=ROUNDS)
    cohorts = cohorts_of(run)
    assert [len(cohort) for cohort in cohorts] == [3] * ROUNDS and len({tuple(c) for c in cohorts}) > 1
    expected = by_hand(cohorts, optimizer, keep=keep)
    assert holds(run.module.state_dict(), expected[-1])
    assert not holds(run.module.state_dict(), by_hand(cohorts, optimizer, keep=not keep)[-1])


def test_uniform_weights():
    run = fit(make_strategy(FedAvg(weights="uniform")), rounds=ROUNDS)
    assert holds(run.module.state_dict(), by_hand(cohorts_of(run), "sgd", uniform=True)[-1])


def test_several_local_epochs():
    run = fit(make_strategy(per_round=2, local_epochs=2), rounds=ROUNDS)
    assert holds(run.module.state_dict(), by_hand(cohorts_of(run), "sgd", local_epochs=2)[-1])


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_fedprox(optimizer):
    run = fit(make_strategy(FedProx(mu=0.3)), Net(optimizer), rounds=ROUNDS)
    assert holds(run.module.state_dict(), by_hand(cohorts_of(run), optimizer, mu=0.3)[-1])


def test_fedprox_with_mu_0_is_fedavg():
    averaged, proximal = fit(make_strategy(FedAvg())), fit(make_strategy(FedProx(mu=0)))
    assert holds(proximal.model, averaged.model)
    assert not holds(fit(make_strategy(FedProx(mu=0.1))).model, averaged.model)
