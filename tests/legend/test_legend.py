import math
from functools import cache
from itertools import pairwise

import pytest
import torch
from tiny_text import LAYERS, accuracy, adapted, fit, loader

from edgebolt.common.devices import DeviceProfile, Fleet
from edgebolt.common.federated import Dirichlet, FederatedStrategy, Outcome, Server, Sizes, Visit, WeightedMean
from edgebolt.common.lora import FedLoRA, adapter_layers, ranks_of
from edgebolt.legend import Legend, LegendStrategy, TopLayers


def run(algorithm, clients=8, rounds=3, fleet=None, module=None, train=None, **kwargs):
    net = adapted() if module is None else module
    strategy = FederatedStrategy(
        algorithm,
        **{"clients": Sizes([12] * clients), "per_round": 4, "local_steps": 2, "fleet": fleet, **kwargs},
    )
    fit(net, strategy, rounds=rounds, train=loader(12 * clients) if train is None else train)
    return net, strategy


def device(flops=1e9, bps=8e6, memory=2**30):
    return DeviceProfile("d", flops, memory, 5.0, 1.0, up_bps=bps, down_bps=bps)


def depths(strategy):
    return {outcome.visit.client: outcome.visit.settings["depth"] for outcome in strategy.outcomes}


@cache
def fedlora():
    return run(FedLoRA())[1]


@pytest.mark.parametrize("anchor", ["deadline", "quantile", "fastest"])
def test_equal_devices_and_uniform_ranks_are_fedlora_bit_for_bit(anchor):
    _, legend = run(Legend(anchor=anchor, step=0.0))
    assert set(depths(legend).values()) == {LAYERS}
    assert [row["round/waiting_time"] for row in legend.history] == [0.0] * 3
    for name, tensor in fedlora().server.models["global"].items():
        assert torch.equal(tensor, legend.server.models["global"][name]), name


def test_one_slow_device_trains_least_and_sets_the_time():
    fleet = Fleet.from_profiles([device(), device(), device(2e7), device()])
    _, legend = run(Legend(), clients=4, fleet=fleet)
    _, plain = run(FedLoRA(), clients=4, fleet=fleet)
    assert depths(legend) == {0: LAYERS, 1: LAYERS, 2: 1, 3: LAYERS}
    slow = next(outcome for outcome in legend.outcomes if outcome.visit.client == 2)
    assert slow.waited == 0 < min(o.waited for o in legend.outcomes if o.visit.client != 2)
    # the probe comes first: compare rounds
    seconds = [[after["round/sim_time"] - before["round/sim_time"] for before, after in pairwise(s.history)]
               for s in (legend, plain)]  # fmt: skip
    assert all(mine < theirs for mine, theirs in zip(*seconds, strict=True))


def test_a_slow_link_is_slow_too():
    fleet = Fleet.from_profiles([device(), device(bps=1e5), device(), device()])
    _, legend = run(Legend(), clients=4, fleet=fleet)
    assert depths(legend) == {0: LAYERS, 1: 1, 2: LAYERS, 3: LAYERS}


def test_estimated_times_are_the_times_that_come():
    """The clock's own seconds, but for the frames of messages."""
    fleet = Fleet.from_profiles([device(1e9 / (1 + c), 1e6 * (1 + c)) for c in range(4)])
    algorithm = Legend()
    _, strategy = run(algorithm, clients=4, fleet=fleet)
    (lcd,) = algorithm.configure
    table = lcd.capacity.table(strategy.server)
    for outcome in strategy.outcomes:
        forward, backward, down, up = table[outcome.visit.client].tolist()
        predicted = outcome.steps * (forward + outcome.visit.settings["depth"] * backward)
        assert predicted == pytest.approx(outcome.compute_seconds, rel=0.15)  # the head's share is spread over layers
        assert down * outcome.down_bytes + up * outcome.up_bytes == pytest.approx(
            outcome.down_seconds + outcome.up_seconds
        )


def test_memory_limits_the_depth_and_excludes_those_where_nothing_fits():
    fleet = Fleet.from_profiles([device(), device(memory=1000), device(), device()])
    _, strategy = run(Legend(), clients=4, fleet=fleet)
    assert sorted(depths(strategy)) == [0, 2, 3]


def test_traffic_is_that_of_the_layers_and_the_head():
    fleet = Fleet.from_profiles([device(), device(2e7), device(2e7), device()])
    _, strategy = run(Legend(freeze_below="omit"), clients=4, fleet=fleet)
    _, loaded = run(Legend(freeze_below="load"), clients=4, fleet=fleet)
    model = strategy.server.models["global"]
    layers = adapter_layers(model)
    for outcome in strategy.outcomes:
        lowest = LAYERS - outcome.visit.settings["depth"]
        tensors = sum(t.nbytes for name, t in model.items() if layers.get(name, LAYERS) >= lowest)
        assert 0 < outcome.up_bytes - tensors < 4000 and 0 < outcome.down_bytes - tensors < 4000  # names and header
    everything = sum(tensor.nbytes for tensor in model.values())
    assert all(everything < outcome.down_bytes < everything + 5000 for outcome in loaded.outcomes)
    for one, other in zip(strategy.outcomes, loaded.outcomes, strict=True):
        assert abs(one.up_bytes - other.up_bytes) < 50


def test_below_its_depth_a_device_has_the_pretrained_layers_or_the_global_ones():
    seen = {}

    def watch(freeze_below):
        algorithm = Legend(freeze_below=freeze_below, depth=1, probe_steps=0)
        install = algorithm.callbacks[0].on_client_start

        def start(trainer, module, device, visit):
            install(trainer, module, device, visit)
            held = dict(module.named_parameters())
            layers = adapter_layers(held)
            seen.setdefault(freeze_below, []).append(
                sum(float(held[name].abs().sum()) for name in layers if "lora_B" in name and layers[name] == 0)
            )

        algorithm.callbacks[0].on_client_start = start
        return algorithm

    class Deep(Legend):
        """Every other round trains all layers, so that there is something below."""

        def plan(self, server):
            self.configure[0].depth = LAYERS if server.round == 0 else 1
            return super().plan(server)

    for mode in ("omit", "load"):
        algorithm = watch(mode)
        algorithm.__class__ = Deep
        run(algorithm, rounds=2)
    assert not any(seen["omit"][4:]) and all(seen["load"][4:])


def mean_of(server, model, updates):
    outcomes = [(Outcome(Visit(c, 1), 1, True, "", 0.0, 1.0, 0.0, 0.0, 0.0, 0, 0, 0.0), u) for c, u in updates]
    return WeightedMean()(server, model, outcomes)


def test_each_layer_is_averaged_over_its_holders():
    import numpy as np

    server = Server(
        np.array([1, 3, 50]), steps_of=lambda c, s: 1, online=lambda r: np.ones(3, bool), per_round=3, seed=0
    )
    model = {f"layer.{layer}.lora_A.weight": torch.full((2,), 10.0) for layer in range(3)}
    poison = {"layer.0.lora_A.weight": torch.full((2,), math.nan)}
    updates = [
        (0, {"layer.2.lora_A.weight": torch.full((2,), 1.0), "layer.1.lora_A.weight": torch.full((2,), 1.0)}),
        (1, {"layer.2.lora_A.weight": torch.full((2,), 5.0), "layer.1.lora_A.weight": torch.full((2,), 5.0)}),
        (2, {"layer.2.lora_A.weight": torch.full((2,), 0.0)}),
    ]
    merged = mean_of(server, model, updates)
    assert merged["layer.1.lora_A.weight"].tolist() == [10 + (1 * 1 + 3 * 5) / 4] * 2  # client 2 has no say
    assert merged["layer.2.lora_A.weight"].tolist() == pytest.approx([10 + (1 * 1 + 3 * 5 + 50 * 0) / 54] * 2)
    assert torch.equal(merged["layer.0.lora_A.weight"], model["layer.0.lora_A.weight"])  # nobody: as it was
    kept = TopLayers()({**model, **poison}, Visit(0, 1, settings={"depth": 2}))
    assert set(kept) == {"layer.1.lora_A.weight", "layer.2.lora_A.weight"}


def test_the_mean_depth_is_logged_and_the_probe_is_paid_for():
    fleet = Fleet.from_profiles([device(), device(2e7), device(), device()])
    _, strategy = run(Legend(), clients=4, fleet=fleet)
    assert [row["legend/depth"] for row in strategy.history] == [(3 * LAYERS + 1) / 4] * 3
    _, blind = run(Legend(probe_steps=0), clients=4, fleet=fleet)
    assert blind.history[0]["legend/depth"] == LAYERS  # nobody was measured yet
    assert blind.history[1]["legend/depth"] < LAYERS
    first, later = (row["round/energy"] for row in strategy.history[:2])
    assert first > 1.2 * later  # a step of four devices at full depth


def test_the_strategy_by_name():
    import lightning as L

    trainer = L.Trainer(strategy="legend", accelerator="cpu", logger=False)
    assert isinstance(trainer.strategy, LegendStrategy)
    strategy = LegendStrategy(anchor="quantile", budget=9, per_round=2, clients=Sizes([12] * 4), local_steps=1)
    net = adapted()
    fit(net, strategy, rounds=1, train=loader(48))
    assert ranks_of(net) == [2, 3, 4]


def test_refusals():
    with pytest.raises(ValueError, match="probe_steps"):
        Legend(probe_steps=-1)
    with pytest.raises(ValueError, match="min_depth=4 and 3 layers carry LoRA"):
        run(Legend(min_depth=4))
    with pytest.raises(ValueError, match="weights="):
        Legend(weights="median")


@pytest.mark.slow
def test_legend_learns_like_fedlora_in_less_simulated_time():
    """Direction, not size: three seeds, texts of four classes, 16 unequal devices; more, but shorter rounds.

    Large batches and a high rate, so that few steps are enough: a step of so small a model takes as long with any.
    """
    scores, seconds = {"legend": [], "fedlora": []}, {"legend": [], "fedlora": []}
    for seed in range(3):
        for name, make, rounds in (("legend", Legend, 10), ("fedlora", FedLoRA, 8)):
            strategy = FederatedStrategy(
                make(), clients=Dirichlet(16, alpha=1.0, seed=seed, min_samples=4), per_round=8, local_steps=4,
                fleet=Fleet.jetson(16, seed=seed, speed=1e-3), seed=seed,
            )  # fmt: skip
            net = adapted(lr=5e-2)
            fit(net, strategy, rounds=rounds, train=loader(960, batch_size=32))
            scores[name].append(accuracy(net, samples=1000))
            seconds[name].append(strategy.clock.now)
    assert sum(scores["fedlora"]) / 3 > 0.25 + 0.2
    assert sum(scores["legend"]) / 3 >= sum(scores["fedlora"]) / 3 - 0.01
    assert all(mine < theirs for mine, theirs in zip(seconds["legend"], seconds["fedlora"], strict=True))
