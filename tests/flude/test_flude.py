"""The preset and its strategy."""

import lightning as L
import pytest
import torch
from scripted_run import CLIENTS, Net, run, same, samples
from torch.utils.data import DataLoader

from edgebolt.common.devices import Fleet, Undependability
from edgebolt.common.federated import Deadline, Sizes, Uniform, Visit
from edgebolt.flude import AIMD, Fixed, Flude, FludeStrategy, dependability


def undependable(seed=0):
    how = Undependability(rates=(0.2, 0.4, 0.6), online=(0.5, 0.9), online_period=3)
    return Fleet.jetson(CLIENTS, seed=seed).undependable(how)


def test_a_run_learns_of_its_devices_and_loses_no_work():
    look, strategy = run(Flude(closing=Deadline(None)), 12, fleet=undependable(), per_round=4)
    server, everything = strategy.server, [o for outcomes in look.outcomes for o in outcomes]
    counts = server.memory["dependability"]
    for client in range(CLIENTS):
        fates = [o.delivered for o in everything if o.visit.client == client]
        assert counts["chosen"][client] == len(fates)
        assert counts["alpha"][client] == 2 + sum(fates) and counts["beta"][client] == 2 + len(fates) - sum(fates)
    resumed = [o for o in everything if o.visit.base is not None]
    assert len(resumed) > 3 and all(o.visit.done + o.visit.steps == 5 for o in resumed)
    kept = server.memory["sessions"]["kept"]
    for client, session in kept.items():  # what the server believes is what the device has
        assert strategy.loop.devices.memories[client]["session"]["base"] == session["base"]
        assert strategy.loop.devices.memories[client]["session_steps"] == session["done"]
    assert all(client in kept or "session" not in memory for client, memory in strategy.loop.devices.memories.items())


def test_figures():
    look, strategy = run(Flude(threshold=Fixed(7)), 3, fleet=undependable(), per_round=4)
    for row, outcomes in zip(strategy.history, look.outcomes, strict=True):
        assert row["flude/threshold"] == 7
        assert row["flude/resumed"] == sum(o.visit.base is not None for o in outcomes)
        assert 0 <= row["flude/staleness"] <= 7
    assert strategy.history[-1]["flude/dependability"] == pytest.approx(dependability(strategy.server).mean())


def test_the_threshold_moves():
    _, strategy = run(Flude(threshold=AIMD(first=3, period=1)), 8, fleet=undependable(), per_round=4)
    path = [row["flude/threshold"] for row in strategy.history]
    assert len(set(path)) > 1 and all(1 <= w <= 20 for w in path)


def test_the_strategy_is_registered_and_is_the_preset():
    assert FludeStrategy.strategy_name == "flude"
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    named = L.Trainer(max_epochs=1, strategy="flude", **options).strategy
    assert isinstance(named, FludeStrategy) and isinstance(named.algorithm, Flude)
    strategy = FludeStrategy(
        threshold=Fixed(3), grace=0.5, clients=Sizes([24] * CLIENTS, seed=0), local_steps=5, fleet=undependable(),
        per_round=4,
    )  # fmt: skip
    trainer = L.Trainer(max_epochs=3, strategy=strategy, enable_model_summary=False, **options)
    module = Net()
    trainer.fit(module, DataLoader(samples(), 4, shuffle=True))
    look, _ = run(Flude(threshold=Fixed(3), grace=0.5), 3, fleet=undependable(), per_round=4)
    assert same(strategy.server.models["global"], look.models[-1])
    assert all(torch.isfinite(p).all() for p in module.parameters())


def test_dependability_is_learned_under_every_selector_and_no_device_twice():
    looks = {name: run(Flude(selector=selector, closing=Deadline(slack=None)), 3, per_round=CLIENTS)[1]
             for name, selector in [("own", None), ("uniform", Uniform())]}  # fmt: skip
    for strategy in looks.values():
        assert torch.equal(strategy.server.memory["dependability"]["alpha"], torch.full((CLIENTS,), 5.0).double())


def test_a_round_that_closes_early_has_enrolled_all():
    class Asks(Flude):
        def enrol(self, server):
            return [Visit(client, 0, probe=1) for client in range(server.population)]

    _, strategy = run(Asks(), 1, fleet=Fleet.jetson(CLIENTS))
    assert not strategy.server.reports["step_seconds"].isnan().any()
