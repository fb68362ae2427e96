"""Probes, submodels, parts that observe, and figures: what a server may learn of devices before and between rounds."""

from dataclasses import replace

import pytest
import torch
from runs import CLIENTS, SAMPLES, fit, make_strategy, state

from edgebolt.common.communication import Dense
from edgebolt.common.devices import CostModel, DeviceProfile, Fleet
from edgebolt.common.federated import Algorithm, ClientCallback, FedAvg, Visit

FLOPS = 1e9  # of a sample


def profiles(**changed):
    base = {"memory_bytes": 2**30, "power_w": 10.0, "radio_w": 2.0, "up_bps": 1e6, "down_bps": 2e6}
    return [DeviceProfile(f"d{c}", flops=FLOPS * (1 + c), **{**base, **changed}) for c in range(CLIENTS)]


class Seen:
    """A selector that keeps what it is told."""

    def __init__(self):
        self.told = []

    def __call__(self, server):
        return server.online()[:3]

    def observe(self, server, outcomes):
        self.told.append(outcomes)


class Probing(Algorithm):
    def __init__(self, probe=2, **parts):
        super().__init__(selector=Seen(), **parts)
        self.probe = probe

    def enrol(self, server):
        return [Visit(client, 0, start=None, probe=self.probe) for client in range(server.population)]

    def figures(self, server, outcomes):
        return {"probing/steps": sum(outcome.steps for outcome in outcomes)}


def run(algorithm, rounds=2, **kwargs):
    defaults = {"fleet": Fleet.from_profiles(profiles()), "cost": CostModel(flops_per_sample=FLOPS)}
    return fit(make_strategy(algorithm, **{**defaults, **kwargs}), rounds=rounds)


def test_a_probe_at_enrolment_costs_time_and_energy_and_sends_no_tensors():
    algorithm = Probing()
    enrolment = run(algorithm).strategy and algorithm.selector.told[0]
    assert [outcome.visit.client for outcome in enrolment] == list(range(CLIENTS))
    for outcome in enrolment:
        client = outcome.visit.client
        samples = min(2 * 4, SAMPLES[client])  # two batches of four
        assert outcome.compute_seconds == pytest.approx(samples / (1 + client))
        assert outcome.forward_seconds == pytest.approx(outcome.compute_seconds / 3)
        assert outcome.energy == pytest.approx(
            10 * outcome.compute_seconds + 2 * (outcome.down_seconds + outcome.up_seconds)
        )
        assert outcome.steps == 0 and outcome.timed_steps == 2
        assert outcome.down_bytes < 200 and outcome.up_bytes < 200  # an order, and a report


def test_the_first_round_begins_when_the_slowest_probe_has_ended():
    algorithm = Probing()
    strategy = run(algorithm).strategy
    enrolment, first = algorithm.selector.told[:2]
    assert {outcome.started for outcome in first} == {max(outcome.finished for outcome in enrolment)}
    blind = run(Probing(probe=0)).strategy
    assert blind.clock.now < strategy.clock.now
    assert strategy.history[0]["round/energy"] > blind.history[0]["round/energy"]


def test_speeds_are_known_before_the_first_plan():
    known = []

    class Plans(Probing):
        def plan(self, server):
            known.append({name: report.clone() for name, report in server.reports.items()})
            return super().plan(server)

    run(Plans())
    seconds = known[0]["step_seconds"]
    assert torch.isfinite(seconds).all() and (seconds.diff() < 0).all()  # each device is faster than the one before
    assert torch.allclose(known[0]["forward_seconds"], seconds / 3)
    assert torch.allclose(known[0]["up_bps"], torch.tensor(1e6, dtype=torch.float64))
    assert not known[0]["visits"].any()  # a probe is no visit


def test_a_probe_costs_what_the_device_is_configured_to_do():
    class Freezes(ClientCallback):
        def on_client_start(self, trainer, module, device, visit):
            module.body.requires_grad_("frozen" not in visit.settings)

    class Asks(Probing):
        def enrol(self, server):
            visits = [Visit(c, 0, start=None, lane=f"{c}", settings={"frozen": True} if c else {}) for c in (0, 1)]
            return [replace(visit, probe=1) for visit in visits]

    algorithm = Asks(callbacks=[Freezes()])
    run(algorithm, cost=CostModel())
    forward, head = 2 * (8 * 12 + 12 * 3), 2 * 12 * 3
    for outcome, a_sample in zip(algorithm.selector.told[0], (2 * forward + head, forward + head), strict=True):
        speed = FLOPS * (1 + outcome.visit.client)
        assert outcome.compute_seconds == pytest.approx(4 * a_sample / speed)
        assert outcome.forward_seconds == pytest.approx(4 * forward / speed)


@pytest.mark.parametrize("start", [None, "global"])
def test_callbacks_find_nothing_to_upload_at_enrolment_and_may_add_something(start):
    seen = []

    class Adds(ClientCallback):
        def upload(self, device, visit, update):
            seen.append((visit.probe, set(update)))
            return update if update else {"labels": torch.ones(1000)}

    class Asks(Probing):
        def enrol(self, server):
            return [replace(visit, start=start) for visit in super().enrol(server)]

    algorithm = Asks(callbacks=[Adds()])
    strategy = run(algorithm, rounds=1).strategy
    assert [names for probe, names in seen if probe] == [set()] * CLIENTS
    assert [names for probe, names in seen if not probe] == [set(strategy.server.models["global"])] * 3
    assert all(4000 < outcome.up_bytes < 4300 for outcome in algorithm.selector.told[0])


def test_a_probe_in_a_round_adds_its_time():
    class InRounds(FedAvg):
        probe = 0

        def plan(self, server):
            return [Visit(client, 2, probe=self.probe) for client in range(3)]

    plain, probing = InRounds(), InRounds()
    probing.probe = 1
    first, second = run(plain).strategy, run(probing).strategy
    for one, other in zip(first.outcomes, second.outcomes, strict=True):
        assert one.steps == other.steps == 2 and other.timed_steps == 3
        samples = SAMPLES[one.visit.client]
        assert one.compute_seconds == pytest.approx(min(8, samples) / (1 + one.visit.client))
        assert other.compute_seconds > one.compute_seconds
    weights = [strategy.server.models["global"] for strategy in (first, second)]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())  # nothing was trained


def test_parts_are_told_of_the_enrolment_once_and_of_each_round():
    algorithm = Probing()
    run(algorithm, rounds=3)
    assert [len(outcomes) for outcomes in algorithm.selector.told] == [CLIENTS, 3, 3, 3]
    plain = Algorithm(selector=Seen())
    run(plain, rounds=3)
    assert [len(outcomes) for outcomes in plain.selector.told] == [3, 3, 3]


def test_figures_reach_history_and_callbacks():
    strategy = run(Probing()).strategy
    for row in strategy.history:
        assert row["probing/steps"] == sum(-(-SAMPLES[client] // 4) for client in range(3))


class Half:
    """Odd clients are sent the head alone."""

    def __init__(self):
        self.encoded = []

    def key(self, visit):
        return visit.client % 2

    def __call__(self, tensors, visit):
        self.encoded.append(visit.client)
        return tensors if visit.client % 2 == 0 else {n: t for n, t in tensors.items() if n.startswith("head")}


def test_a_submodel_is_what_is_sent_and_is_encoded_once_a_key():
    part = Half()
    seen = {}

    class Watch(Algorithm):
        def download(self, server, visit):
            seen[server.round, visit.client] = super().download(server, visit)
            return seen[server.round, visit.client]

    strategy = run(Watch(submodel=part), per_round=CLIENTS).strategy
    assert len(part.encoded) == 2 * 2  # two keys in each of two rounds
    for (_, client), message in seen.items():
        names = set(message.tensors)
        assert all(name.startswith("head") for name in names) == bool(client % 2)
    model = strategy.server.models["global"]
    left_out = sum(t.nbytes for name, t in model.items() if not name.startswith("head"))
    sent = [sum(t.nbytes for t in seen[1, client].tensors.values()) for client in (0, 1)]
    assert sent[0] - sent[1] == left_out
    for outcome in strategy.outcomes:  # and the bytes that are counted are those of a message of what is sent
        expected = Dense().encode(Half()(model, outcome.visit)).with_header(visit=outcome.visit.order())
        assert outcome.down_bytes == expected.nbytes


def test_what_is_not_sent_has_the_beginning_s_value():
    starts = {}

    class Watch(ClientCallback):
        def on_client_start(self, trainer, module, device, visit):
            body = module.state_dict()["body.0.weight"].clone()
            starts.setdefault(device.id % 2, []).append(body)

    run(Algorithm(submodel=Half(), callbacks=[Watch()]), rounds=3, per_round=CLIENTS)
    assert all(torch.equal(body, starts[1][0]) for body in starts[1])
    assert not torch.equal(starts[0][0], starts[0][-1])


def test_the_same_run_twice():
    assert state(run(Probing(submodel=Half()))) == state(run(Probing(submodel=Half())))


def test_refusals():
    with pytest.raises(ValueError, match=r"Visit\(probe=-1\)"):
        Visit(0, 1, probe=-1)
