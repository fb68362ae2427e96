from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgebolt.caesar import DownloadRatios, cluster, download_ratio
from edgebolt.common.federated import Server, Visit


def server(last_round, round):
    server = Server(
        np.full(len(last_round), 5),
        steps_of=lambda client, size: 1,
        online=lambda round: np.ones(len(last_round), bool),
        per_round=len(last_round),
        seed=0,
    )
    server.round = round
    server.reports["last_round"][:] = server.reports["last_round"].new_tensor(last_round)
    return server


def ratios(part, server):
    planned = part(server, [Visit(client, 1) for client in range(server.population)])
    return [visit.settings["down_ratio"] for visit in planned]


def test_the_page_s_values():
    assert download_ratio(np.array([1.0]), 1).tolist() == [0.0]
    assert download_ratio(np.array([1.0]), 10)[0] == pytest.approx(0.54)
    assert download_ratio(np.array([10.0]), 10)[0] == 0.0


@pytest.mark.parametrize("staleness", [-1.0, 11.0])
def test_impossible_staleness(staleness):
    with pytest.raises(ValueError, match="use 0 to 10"):
        download_ratio(np.array([staleness]), 10)
    with pytest.raises(ValueError, match="counted from 1"):
        download_ratio(np.array([1.0]), 0)


def test_mean_ratio_of_a_tenth_of_80_devices_over_250_rounds():
    # the page's simulation: 0.509 in the mean, 4 % of the transfers dense
    rng, last, seen = np.random.default_rng(0), np.full(80, -1), []
    for round in range(250):
        chosen = rng.choice(80, 8, replace=False)
        seen.extend(download_ratio((round - last[chosen]).astype(float), round + 1))
        last[chosen] = round
    assert np.mean(seen) == pytest.approx(0.509, abs=0.01)
    assert np.mean(np.array(seen) == 0) == pytest.approx(0.04, abs=0.01)


def test_rounds_count_from_one_and_those_without_a_model_get_it_whole():
    assert ratios(DownloadRatios(), server([-1, -1, -1], 0)) == [0.0, 0.0, 0.0]
    # the second round, t = 2: who took part in the first has staleness 1
    assert ratios(DownloadRatios(clusters=None), server([-1, 0], 1)) == [0.0, pytest.approx(0.3)]


def test_as_many_clusters_as_devices_are_none():
    state = server([-1, 3, 7, 7, 1, 0, 9], 10)
    assert ratios(DownloadRatios(clusters=7), state) == ratios(DownloadRatios(clusters=None), state)


def test_a_cluster_has_the_ratio_of_its_mean_and_the_dense_stay_out():
    got = ratios(DownloadRatios(clusters=2), server([-1, 9, 8, 2, 0], 10))
    expected = [0.0, *(0.6 * (1 - delta / 11) for delta in (1.5, 1.5, 9, 9))]
    assert got == pytest.approx(expected)


@given(st.lists(st.integers(0, 12), min_size=1, max_size=7), st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_clusters_are_the_best_there_are(values, clusters):
    def spread(labels):
        groups = [[v for v, own in zip(values, labels, strict=True) if own == label] for label in set(labels)]
        return sum(sum((v - np.mean(group)) ** 2 for v in group) for group in groups)

    got = cluster(np.array(values, dtype=float), clusters)
    best = min(spread(labels) for labels in product(range(clusters), repeat=len(values)))
    assert spread(got.tolist()) == pytest.approx(best, abs=1e-9)
    assert len(set(got.tolist())) == min(clusters, len(set(values)))


@pytest.mark.parametrize(("argument", "value"), [("most", 1.0), ("most", -0.1), ("clusters", 0), ("clusters", 1.5)])
def test_arguments(argument, value):
    with pytest.raises(ValueError, match=f"{argument}={value}"):
        DownloadRatios(**{argument: value})
