"""FLUDE, LEGEND and Caesar in one run (examples/compose.py): each part keeps its own promises."""

import pytest
from algorithms import ALGORITHMS
from runs import fit

from edgebolt.caesar import download_ratio
from edgebolt.common.lora import adapter_layers, layers_held


@pytest.fixture(scope="module")
def together():
    """The strategy after six rounds; of each round its plan, outcomes, updates, and when devices were last heard."""
    strategy, module = ALGORITHMS["flude, legend and caesar"].make()
    algorithm, rounds = strategy.algorithm, []
    plan, aggregate = algorithm.plan, algorithm.aggregate

    def planned(server):
        last = server.reports["last_round"].numpy()
        rounds.append({"heard": last.copy(), "plan": plan(server)})
        return rounds[-1]["plan"]

    def aggregated(server, closed):
        if rounds:  # not at the enrolment
            updates = {u.client: algorithm.up.decode(u.message) for u in closed.updates}
            rounds[-1] |= {"outcomes": closed.outcomes, "updates": updates}
        aggregate(server, closed)

    algorithm.plan, algorithm.aggregate = planned, aggregated
    fit(strategy, module, rounds=6)
    return strategy, rounds


def everything(rounds):
    return [outcome for entry in rounds for outcome in entry["outcomes"]]


def test_flude_goes_on_with_the_old_order_and_trains_no_step_twice(together):
    strategy, rounds = together
    sessions = {}
    for number, entry in enumerate(rounds):
        for outcome in entry["outcomes"]:
            sessions.setdefault((outcome.visit.client, outcome.visit.origin(number)), []).append(outcome)
    parts = [outcomes for outcomes in sessions.values() if len(outcomes) > 1]
    assert len(parts) > 2
    for first, *rest in parts:
        for later in rest:
            assert later.visit.start is None and later.visit.settings == first.visit.settings
        assert sum(outcome.steps for outcome in (first, *rest)) <= first.visit.steps
        if rest[-1].delivered:
            assert sum(outcome.steps for outcome in (first, *rest)) == first.visit.steps
    counts = strategy.server.memory["dependability"]
    assert counts["alpha"].sum() + counts["beta"].sum() == 4 * len(counts["alpha"]) + len(everything(rounds))


def test_legend_s_devices_send_what_they_trained(together):
    strategy, rounds = together
    layers, layer_of = (count(strategy.server.models["global"]) for count in (layers_held, adapter_layers))
    depths = set()
    for entry in rounds:
        for outcome in entry["outcomes"]:
            if outcome.delivered:
                update = entry["updates"][outcome.visit.client]
                held = {layer_of[name] for name in update if name in layer_of}
                assert held == set(range(layers - outcome.visit.settings["depth"], layers))
                depths.add(outcome.visit.settings["depth"])
    assert len(depths) > 1


def test_caesar_s_ratios_follow_staleness_and_rank(together):
    _, rounds = together
    fresh = leaning = 0
    for number, entry in enumerate(rounds):
        # One ratio for a cluster of the cohort: between those of its freshest and its stalest device with a model.
        cohort = [v.client for v in entry["plan"] if v.base is None and entry["heard"][v.client] >= 0]
        exact = download_ratio(number - entry["heard"][cohort].astype(float), number + 1)
        for visit in entry["plan"]:
            if visit.client in cohort:
                assert exact.min() - 1e-9 <= visit.settings["down_ratio"] <= exact.max() + 1e-9
                leaning += 1
            assert 0.1 < visit.settings["up_ratio"] <= 0.6 and 0 <= visit.settings["down_ratio"] < 0.6
            if visit.base is None and entry["heard"][visit.client] < 0:
                assert visit.settings["down_ratio"] == 0.0  # it has no model that could fill anything in
                fresh += 1
        for outcome in entry["outcomes"]:
            if outcome.visit.start is None:
                assert outcome.down_bytes < 1000  # an order
    assert fresh and leaning


def test_every_byte_is_in_the_ledger(together):
    strategy, rounds = together
    entries, kinds = strategy.ledger.entries(), strategy.ledger.kinds
    model = entries["kind"] == kinds.index("model")
    told = entries["kind"] == kinds.index("check-in")
    assert entries["nbytes"][model].sum() == sum(o.down_bytes + o.up_bytes for o in everything(rounds))
    assert told.sum() == sum(outcome.visit.base is not None for outcome in everything(rounds)) > 2
    assert (entries["nbytes"][entries["kind"] == kinds.index("enrolment")] > 0).all()
