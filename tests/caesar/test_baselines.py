import pytest
import torch
from tiny_run import Net, device, run, same

from edgebolt.caesar.baselines import (
    CAC,
    FIC,
    STC,
    FedQSGD,
    FlexCom,
    GradientRatios,
    LinkRatios,
    MissedSteps,
    PyramidFL,
)
from edgebolt.common.communication import MessageError, SparseTernary
from edgebolt.common.devices import Cut, Fleet
from edgebolt.common.federated import FedAvg, Sizes

DENSE = 4 * sum(p.numel() for p in Net().parameters())


def shares(strategy):
    """Bytes of the last round, down and up, over those of dense tensors."""
    row = strategy.history[-1]
    return row["round/bytes_down"] / 5 / DENSE, row["round/bytes_up"] / 5 / DENSE


@pytest.mark.parametrize("make", [lambda: FIC(0.0, min_numel=1), lambda: CAC(0.0, 0.0), lambda: FlexCom(0.0, 0.0)])
def test_at_ratio_zero_they_are_uniform_fedavg(make):
    assert same(run(FedAvg("uniform"))[1], run(make())[1])


def test_both_ways_or_up_alone():
    header = 0.2  # of this small model's bytes
    both = shares(run(FIC(0.6, min_numel=1), rounds=6)[1])
    assert all(0.4 < share < 0.45 + header for share in both)
    down, up = shares(run(FlexCom(0.6, 0.6, min_numel=1), rounds=6)[1])
    assert 1 <= down < 1 + header and 0.4 < up < 0.45 + header
    down, up = shares(run(FedQSGD(min_numel=1))[1])
    assert 1 <= down < 1 + header and up < 0.13 + header


def test_the_slowest_link_has_the_largest_ratio():
    fleet = Fleet.from_profiles([device(bps=bps) for bps in (4e6, 1e6, 8e6, 2e6)])
    _, strategy = run(CAC(min_numel=1), clients=Sizes([20] * 4), per_round=4, fleet=fleet, rounds=2)
    ratios = {o.visit.client: o.visit.settings["up_ratio"] for o in strategy.outcomes}
    assert [ratios[client] for client in (2, 0, 3, 1)] == pytest.approx([0.1, 0.1 + 0.5 / 3, 0.1 + 1 / 3, 0.6])


def test_pyramidfl_lets_those_that_moved_least_send_least():
    _, strategy = run(PyramidFL(min_numel=1), rounds=6)
    norms = strategy.server.reports["update_norm"]
    assert (norms[strategy.server.reports["visits"] > 0] > 0).all()
    assert all("norm_start" not in memory for memory in strategy.loop.devices.memories.values())
    ratios = [o.visit.settings["up_ratio"] for o in strategy.outcomes]
    assert sorted(ratios) == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])


class TestSTC:
    def test_devices_have_the_server_s_model_bit_for_bit(self):
        _, strategy = run(STC(0.9, min_numel=1), rounds=8)
        server, made = strategy.server, strategy.server.memory["stc"]["made"]
        assert made == 8
        fresh = [m for m in strategy.loop.devices.memories.values() if m["version"] == made - 1]
        assert fresh  # who took part in the last round had the model before its step
        step = SparseTernary().decode(_message(server.memory["stc"]["steps"][-1]))
        for memory in fresh:
            for name, tensor in memory["received"].items():
                assert torch.equal(tensor + step[name], server.models["global"][name])

    def test_a_device_that_died_after_receiving_leaves_out_what_it_has(self):
        class Dying(Fleet):
            def cut(self, client, steps, round, stage=0):
                return Cut(1) if client < 5 and round in (1, 3) else None

        fleet = Dying([[device()]], torch.zeros(10, dtype=torch.int64).numpy())
        _, strategy = run(STC(0.9, min_numel=1), rounds=7, fleet=fleet, per_round=10)
        versions = {memory["version"] for memory in strategy.loop.devices.memories.values()}
        assert versions == {6}
        received = [memory["received"] for memory in strategy.loop.devices.memories.values()]
        assert all(torch.equal(own[name], received[0][name]) for own in received for name in own)

    def test_few_steps_are_sent_instead_of_the_model(self):
        _, strategy = run(STC(0.95, min_numel=1), rounds=8, per_round=10)
        assert strategy.history[-1]["round/bytes_down"] < 0.5 * strategy.history[0]["round/bytes_down"]

    def test_what_does_not_continue_the_device_s_model_is_refused(self):
        codec = MissedSteps(SparseTernary(0.5))
        step = SparseTernary(0.5).encode({"w": torch.randn(10)})
        message = codec.encode_steps(4, [step])
        for memory in (None, {}, {"received": {"w": torch.zeros(10)}, "version": 3}):
            with pytest.raises(MessageError, match="steps 4 to 5"):
                codec.decode(message, memory)
        has = {"received": {"w": torch.ones(10)}, "version": 5}
        assert torch.equal(codec.decode(message, has)["w"], torch.ones(10))
        with pytest.raises(MessageError, match=r"header\['first'\]"):
            codec.decode(message.with_header(first="4"), has)


def _message(plain):
    from edgebolt.common.communication import Message

    return Message(*plain)


@pytest.mark.parametrize("part", [LinkRatios, GradientRatios])
def test_arguments(part):
    with pytest.raises(ValueError, match=r"least=0.7, most=0.6"):
        part(least=0.7)
