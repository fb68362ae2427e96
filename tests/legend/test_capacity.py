import numpy as np
import pytest
import torch

from edgebolt.common.federated import Outcome, Server, Visit
from edgebolt.legend import CapacityEstimate


@pytest.fixture
def server():
    return Server(np.array([5, 5, 5]), steps_of=lambda client, size: 1, online=lambda r: np.ones(3, bool),
                  per_round=3, seed=0)  # fmt: skip


def outcome(client=0, forward=6.0, layer=1.0, depth=6, steps=2, down=2.0, up=4.0, probe=0, delivered=True):
    """As a device with these seconds a step, and these seconds for 100 bytes, would be seen."""
    count = steps + probe
    return Outcome(
        visit=Visit(client, steps, settings={"depth": depth}, probe=probe),
        steps=steps,
        delivered=delivered,
        reason="" if delivered else "failed",
        started=0.0,
        finished=9.0,
        down_seconds=down,
        compute_seconds=count * (forward + depth * layer),
        forward_seconds=count * forward,
        up_seconds=up,
        down_bytes=100,
        up_bytes=100,
        energy=1.0,
    )


def test_the_first_measurement_is_taken_as_it_is(server):
    estimate = CapacityEstimate()
    estimate.observe(server, [outcome(1, depth=3)])
    table = estimate.table(server)
    assert table[1].tolist() == pytest.approx([6.0, 1.0, 0.02, 0.04])
    assert table[[0, 2]].isnan().all()


def test_a_constant_stays_to_the_last_bit(server):
    estimate = CapacityEstimate()
    estimate.observe(server, [outcome(forward=0.1, layer=0.3, down=0.7, up=0.9)])
    first = estimate.table(server).clone()
    for _ in range(50):
        estimate.observe(server, [outcome(forward=0.1, layer=0.3, down=0.7, up=0.9)])
    assert torch.equal(estimate.table(server)[0], first[0])


def test_a_step_is_followed_as_the_weight_of_the_past_says(server):
    estimate = CapacityEstimate(smoothing=0.8)
    estimate.observe(server, [outcome(forward=0.0)])
    for m in range(1, 8):
        estimate.observe(server, [outcome(forward=1.0)])
        assert estimate.table(server)[0, 0].item() == pytest.approx(1 - 0.8**m)


def test_the_depth_at_which_it_was_measured_does_not_matter(server):
    estimate = CapacityEstimate(smoothing=0.0)
    for depth in (1, 3, 6):
        estimate.observe(server, [outcome(depth=depth, steps=depth)])
        assert estimate.table(server)[0].tolist() == pytest.approx([6.0, 1.0, 0.02, 0.04])


def test_probes_count_and_failures_do_not(server):
    estimate = CapacityEstimate()
    estimate.observe(server, [outcome(0, steps=0, probe=1), outcome(1, delivered=False), outcome(2, steps=0)])
    table = estimate.table(server)
    assert table[0, 0].item() == 6.0 and table[1:].isnan().all()


def test_times(server):
    estimate = CapacityEstimate()
    estimate.observe(server, [outcome(0), outcome(1, forward=12.0, layer=2.0)])
    sent = np.array([100.0, 200.0, 300.0])
    clients, steps = np.array([0, 1, 2]), np.array([2, 2, 4])
    times = estimate.times(server, clients, steps, sent, sent)
    assert times[0].tolist() == pytest.approx([2 * (6 + k * 1) + (2 + 4) * k for k in (1, 2, 3)])
    assert times[1].tolist() == pytest.approx([2 * (12 + k * 2) + (2 + 4) * k for k in (1, 2, 3)])
    middle = [4 * (9 + k * 1.5) + (2 + 4) * k for k in (1, 2, 3)]  # never measured: the median of the others
    assert times[2].tolist() == pytest.approx(middle)


def test_nobody_was_measured(server):
    clients = np.arange(3)
    assert np.isnan(CapacityEstimate().times(server, clients, clients + 1, np.ones(3), np.ones(3))).all()


def test_refusals():
    for smoothing in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="weight of the past"):
            CapacityEstimate(smoothing)
