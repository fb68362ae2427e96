"""Beliefs about devices, and the selection that they lead to."""

from functools import cache

import numpy as np
import pytest
import torch

from edgebolt.common.federated import Outcome, Server, Visit
from edgebolt.common.random import stream
from edgebolt.flude import DependableSelection, dependability

N, X, ROUNDS = 120, 24, 300


def make_server(n=N, per_round=X, seed=0, online=None):
    def everybody(round):
        return np.ones(n, bool) if online is None else online(round)

    return Server(np.full(n, 10), steps_of=lambda c, b: 5, online=everybody, per_round=per_round, seed=seed)


def outcome(client, delivered, reason=None, steps=5, **visit):
    reason = ("" if delivered else "failed") if reason is None else reason
    times = {"started": 0.0, "finished": 1.0, "down_seconds": 0.0, "compute_seconds": 1.0, "up_seconds": 0.0}
    return Outcome(
        Visit(client, steps, **visit), steps, delivered, reason, **times, down_bytes=1, up_bytes=1, energy=0.0
    )


def seen(selection, *fates, client=0, reason=None):
    server = make_server()
    for fate in fates:
        selection.observe(server, [outcome(client, fate, reason=reason)])
    return server


@pytest.mark.parametrize(
    ("fates", "prior", "mean"),
    [
        ([], (2, 2), 0.5),
        ([True, True, True, False], (2, 2), 0.625),
        ([False] * 4, (2, 2), 0.25),
        ([True], (1, 1), 2 / 3),
        ([], (1, 3), 0.25),
    ],
)
def test_beta_values(fates, prior, mean):
    server = seen(DependableSelection(prior), *fates)
    assert dependability(server, prior)[0] == pytest.approx(mean, abs=1e-12)
    assert dependability(server, prior)[1] == prior[0] / sum(prior)  # nothing is learned of the others
    if fates:
        counts = server.memory["dependability"]
        alpha, beta = float(counts["alpha"][0]), float(counts["beta"][0])
        assert alpha == prior[0] + sum(fates) and beta == prior[1] + len(fates) - sum(fates)


def test_samples_have_the_posterior_s_mean_and_variance():
    selection = DependableSelection(estimate="sample")
    server = seen(selection, True, True, True, False)
    draws = []
    for number in range(4000):
        server.round = number
        draws.append(selection.priority(server)[0])
    alpha, beta = 5, 3
    late = np.array(draws[19:])  # before, four times is more than its fair share of 24 t / 120
    assert abs(late.mean() - 0.625) < 0.01
    assert abs(late.var() - alpha * beta / ((alpha + beta) ** 2 * (alpha + beta + 1))) < 0.002


@pytest.mark.parametrize("reason", ["late", "failed"])  # what became of it after the round had closed
def test_who_misses_the_deadline_has_failed_unless_told_otherwise_and_who_was_not_needed_has_not(reason):
    for deadline, late_fails, mean in [(0.5, True, 0.4), (0.5, False, 0.5), (2.0, True, 0.5)]:
        server, selection = make_server(), DependableSelection(late_fails=late_fails)
        server.memory["deadline"] = deadline
        server.clock.advance_to(0.5)  # when the round closed; the visit ended at 1.0
        selection.observe(server, [outcome(0, False, reason=reason)])
        assert dependability(server)[0] == pytest.approx(mean)
        assert server.memory["dependability"]["chosen"][0] == 1
    plain = seen(DependableSelection(), False, reason="late")  # another rule closed the round
    assert dependability(plain)[0] == pytest.approx(0.4)


def test_enrolment_is_no_test_of_dependability():
    server = make_server()
    DependableSelection().observe(server, [outcome(0, True, steps=0, start=None)])
    assert "dependability" not in server.memory
    DependableSelection().observe(server, [outcome(0, True, steps=0, start=None, base=3, done=5)])  # an upload again
    assert server.memory["dependability"]["alpha"][0] == 3


def test_forgetting_believes_a_device_that_has_changed():
    fates = [False] * 40 + [True] * 40
    stubborn, open_minded = (seen(DependableSelection(forgetting=g), *fates) for g in (1.0, 0.95))
    assert dependability(stubborn)[0] == pytest.approx(42 / 84)
    assert dependability(open_minded)[0] > 0.7
    once = seen(DependableSelection(forgetting=0.98), True)
    assert float(once.memory["dependability"]["alpha"][0]) == pytest.approx(3.0)  # 0.98 * 2 + 0.02 * 2 + 1


def test_priority_falls_beyond_a_fair_share():
    server, selection = seen(DependableSelection(penalty=2.0), *[True] * 4), DependableSelection(penalty=2.0)
    server.round = 4  # a fair share is 24 * 5 / 120 = 1
    assert selection.priority(server)[0] == pytest.approx(6 / 8 / 16)
    assert selection.priority(server)[1] == 0.5
    server.round = 19  # now it is 4
    assert selection.priority(server)[0] == pytest.approx(6 / 8)
    assert DependableSelection(penalty=0).priority(server)[0] == pytest.approx(6 / 8)


def test_only_devices_that_are_online_are_chosen():
    online = np.arange(N) % 5 == 0
    server = make_server(online=lambda round: online)
    for number in range(30):
        server.round = number
        chosen = DependableSelection()(server)
        assert len(chosen) == len(set(chosen.tolist())) == 24 and online[chosen].all()
        DependableSelection().observe(server, [outcome(int(c), number % 2 == 0) for c in chosen])
    few = make_server(online=lambda round: np.arange(N) < 5)
    assert DependableSelection()(few).tolist() == [0, 1, 2, 3, 4]
    assert len(DependableSelection()(make_server(online=lambda round: np.zeros(N, bool)))) == 0


def test_the_exploring_share_falls_to_its_floor():
    server = make_server()
    counts = {
        "alpha": torch.full((N,), 2.0),
        "beta": torch.full((N,), 2.0),
        "chosen": torch.ones(N, dtype=torch.int64),
    }
    counts["alpha"][:24] = 1000.0  # all are known, and these 24 are the best
    server.memory["dependability"] = {n: t.double() if n != "chosen" else t for n, t in counts.items()}
    best = []
    for number in (0, 20, 200, 500):
        server.round = number
        best.append(int((DependableSelection()(server) < 24).sum()))
    assert best[0] < best[1] < best[2] and best[2] >= 24 - round(0.2 * 24) <= best[3]


POLICIES = {
    "dependability alone, new ones explored": {"penalty": 0.0, "explore": "new"},
    "penalty 1, new ones explored": {"penalty": 1.0, "explore": "new"},
    "penalty 2, new ones explored": {"penalty": 2.0, "explore": "new"},
    "default": {},
    "sampled": {"estimate": "sample"},
}
# success rate; shares of updates from the three groups; never delivered; Jain's index: means of five seeds
EXPECTED = {
    "dependability alone, new ones explored": (0.807, (0.85, 0.14, 0.01), 0.38, 0.21),
    "penalty 1, new ones explored": (0.737, (0.69, 0.26, 0.05), 0.29, 0.50),
    "penalty 2, new ones explored": (0.689, (0.58, 0.32, 0.11), 0.18, 0.64),
    "default": (0.666, (0.55, 0.32, 0.13), 0.0, 0.71),
    "sampled": (0.654, (0.52, 0.33, 0.15), 0.0, 0.77),
}


@cache
def simulated(name):
    """300 rounds of selection without training: success rate, shares, never heard, Jain."""
    figures = []
    for seed in range(5):
        server, selection = make_server(seed=seed), DependableSelection(**POLICIES[name])
        group = stream(seed, "groups").permutation(np.arange(N) * 3 // N)
        rates = np.array([0.2, 0.4, 0.6])[group] + stream(seed, "rates").normal(0, 0.05, N)
        delivered, asked = np.zeros(N), 0
        for number in range(ROUNDS):
            server.round = number
            chosen = selection(server)
            fate = stream(seed, "fate", number).random(N) >= rates
            selection.observe(server, [outcome(int(c), bool(fate[c])) for c in chosen])
            delivered[chosen] += fate[chosen]
            asked += len(chosen)
        shares = [delivered[group == g].sum() / delivered.sum() for g in range(3)]
        jain = delivered.sum() ** 2 / (N * (delivered**2).sum())
        figures.append([delivered.sum() / asked, *shares, (delivered == 0).mean(), jain])
    return np.mean(figures, axis=0)


@pytest.mark.parametrize("name", POLICIES)
def test_the_table_of_selection(name):
    success, *shares, never, jain = simulated(name)
    expected = EXPECTED[name]
    assert success == pytest.approx(expected[0], abs=0.03)
    assert shares == pytest.approx(expected[1], abs=0.06)
    assert never == pytest.approx(expected[2], abs=0.06)
    assert jain == pytest.approx(expected[3], abs=0.06)


def test_estimates_approach_the_rates():
    """The page's figure: 0.05 from the rate in the mean after 300 rounds of uniform selection."""
    server, selection = make_server(), DependableSelection(penalty=0)
    rates, errors = stream(0, "rates").uniform(0.1, 0.7, N), []
    for number in range(300):
        chosen = stream(0, "uniform", number).choice(N, X, replace=False)
        fate = stream(0, "fate", number).random(N) >= rates
        selection.observe(server, [outcome(int(c), bool(fate[c])) for c in chosen])
        errors.append(np.abs(dependability(server) - (1 - rates)).mean())
    assert errors[-1] < 0.06 < errors[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prior": (0, 2)}, r"prior=\(0, 2\)"),
        ({"penalty": -1}, "penalty=-1"),
        ({"fair_share": 0}, "fair_share=0"),
        ({"exploration": 1.5}, "exploration=1.5"),
        ({"forgetting": -0.1}, "forgetting=-0.1"),
        ({"explore": "none"}, "'all' or 'new'"),
        ({"estimate": "mode"}, "'mean' or 'sample'"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        DependableSelection(**arguments)
