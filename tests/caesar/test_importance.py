import numpy as np
import pytest
from scipy.stats import entropy

from edgebolt.caesar import UploadRatios, importance, label_divergence, ranked_ratios
from edgebolt.common.federated import Outcome, Server, Visit

COUNTS = np.random.default_rng(0).integers(0, 20, (6, 4)).astype(float)


def test_divergence_is_scipy_s():
    pooled = COUNTS.sum(0) / COUNTS.sum()
    assert label_divergence(COUNTS) == pytest.approx([entropy(row, pooled) for row in COUNTS])
    assert label_divergence(COUNTS, "uniform") == pytest.approx([entropy(row, np.ones(4)) for row in COUNTS])


def test_nothing_times_its_logarithm_is_nothing():
    assert label_divergence(np.array([[4.0, 0.0], [0.0, 0.0], [0.0, 4.0]])).tolist() == [np.log(2), 0.0, np.log(2)]


def test_ranks_of_five():
    assert ranked_ratios(np.array([5.0, 4, 3, 2, 1])) == pytest.approx([0.2, 0.3, 0.4, 0.5, 0.6])
    assert ranked_ratios(np.ones(5)) == pytest.approx([0.2, 0.3, 0.4, 0.5, 0.6])  # ties: by index
    assert ranked_ratios(np.arange(80.0)).mean() == pytest.approx(0.35 + 0.25 / 80)


@pytest.mark.parametrize("form", ["exp", "inverse", "linear"])
def test_more_samples_and_less_skew_matter_more(form):
    one = importance(np.array([10.0, 20.0, 10.0]), np.array([0.5, 0.5, 0.1]), form=form)
    assert one[1] > one[0] < one[2]
    alike = importance(np.array([10.0, 20.0]), np.zeros(2), form=form)
    assert alike == pytest.approx([0.75, 1.0])  # g(0) = 1


def test_volume_alone_and_balance():
    assert importance(np.array([5.0, 10.0]), None, 1.0).tolist() == [0.5, 1.0]
    assert importance(np.array([5.0, 10.0]), np.array([0.0, 1.0]), 0.0).tolist() == [1.0, np.exp(-1)]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"least": 0.7}, "least=0.7"),
        ({"most": 1.0}, "most=1.0"),
        ({"balance": 2}, "balance=2"),
        ({"divergence": "kl"}, "divergence='kl'"),
        ({"reference": "mine"}, "reference='mine'"),
    ],
)
def test_arguments(arguments, says):
    with pytest.raises(ValueError, match=says):
        UploadRatios(**arguments)


def test_what_a_device_calls_its_classes_costs_no_memory():
    server = Server(
        np.full(3, 5), steps_of=lambda client, size: 1, online=lambda round: np.ones(3, bool), per_round=3, seed=0
    )
    reports = [{"labels": {"0": 5, "999999999999": 3}}, {"labels": {"0": -2, "cat": "many"}}, {"labels": [7]}]
    UploadRatios().observe(server, [outcome(client, report) for client, report in enumerate(reports)])
    assert server.memory["caesar/labels"].tolist() == [[5, 3, 0], [0, 0, 0], [0, 0, 0]]
    assert np.isfinite(UploadRatios().importance(server)).all()


def outcome(client, report):
    visit = Visit(client, 0, start=None)
    return Outcome(visit, 0, True, "", 0.0, 1.0, 0.5, 0.0, 0.5, 1, 1, 0.0, report=report)
