import numpy as np
import pytest

from edgebolt.common.devices import Cut, Fleet, Undependability


def fleet(n=120, seed=0, **kwargs):
    return Fleet.jetson(n, seed=seed).undependable(Undependability(**kwargs))


def test_groups_are_equal_and_rates_lie_around_their_means():
    for rates in [(0.2, 0.4, 0.6), (0.1, 0.3, 0.5), (0.4, 0.6, 0.8)]:
        how = Undependability(rates, spread=0.05, online=None)
        groups, drawn = how.groups(120, seed=3), how.failure_rates(120, seed=3)
        assert np.bincount(groups).tolist() == [40, 40, 40]
        for group, rate in enumerate(rates):
            assert abs(drawn[groups == group].mean() - rate) < 0.03
            assert 0.03 < drawn[groups == group].std() < 0.07
        some = fleet(rates=rates, online=None, seed=3)
        failed = [some.cut(c, 5, r) is not None for c in range(120) for r in range(50)]
        assert abs(np.mean(failed) - np.mean(rates)) < 0.03


def test_presence_is_drawn_anew_every_few_rounds():
    some = fleet(4000, online=(0.2, 0.8), online_period=5)
    rates = [Undependability(online=(0.2, 0.8), online_period=5).online_rates(4000, 0, round) for round in (0, 4, 5)]
    assert (rates[0] == rates[1]).all() and not (rates[0] == rates[2]).any()
    assert 0.2 <= rates[0].min() < 0.21 and 0.79 < rates[0].max() <= 0.8
    online = np.array([some.at(round).online for round in range(5)])
    assert abs(online.mean() - 0.5) < 0.02
    assert abs(online[:, rates[0] > 0.7].mean() - 0.75) < 0.03
    assert not (some.at(0).online == some.at(1).online).all()
    assert some.profile(7, 0).online_rate == rates[0][7]
    assert fleet(online=None).at(3).online.all()


def test_groups_by_label_keep_equal_labels_together():
    labels = np.arange(120) % 10
    groups = Undependability(by=labels).groups(120, seed=0)
    assert np.bincount(groups).tolist() == [40, 40, 40]
    # three groups of four labels' devices at most: a label's twelve devices lie in one group, or in two neighbours
    spread = [set(groups[labels == label]) for label in range(10)]
    assert all(max(s) - min(s) <= 1 for s in spread) and sum(len(s) == 1 for s in spread) >= 8
    other = Undependability(by=labels).groups(120, seed=1)
    assert not (groups == other).all()
    random = Undependability().groups(120, seed=0)
    assert all(len(set(random[labels == label])) > 1 for label in range(10))


def test_fates_are_the_environments_own():
    """The same seed, round and device: the same fate, however often and in whichever order one asks."""
    a, b = fleet(seed=5), fleet(seed=5)
    forward = [(a.cut(c, 5, r), bool(a.at(r).online[c])) for r in range(8) for c in range(120)]
    backward = [(b.cut(c, 5, r), bool(b.at(r).online[c])) for r in reversed(range(8)) for c in reversed(range(120))]
    assert forward == backward[::-1]
    plain = Fleet.jetson(120, seed=5)
    fleet(seed=5).at(0)
    assert plain.cut(0, 5, 0) is None and plain.at(0).online.all()  # the fleet that it was made from is as it was


def test_a_higher_rate_keeps_the_failures_of_a_lower_one():
    low, high = (fleet(rates=(rate,), spread=0.0, online=None) for rate in (0.2, 0.6))
    pairs = [(low.cut(c, 10, r), high.cut(c, 10, r)) for c in range(120) for r in range(10)]
    assert all(h == lo for lo, h in pairs if lo is not None)
    assert sum(h is not None for _, h in pairs) > 2 * sum(lo is not None for lo, _ in pairs)


def test_where_a_visit_dies():
    assert Cut.at(0.0, 10) == Cut(0, down=0.0)
    assert Cut.at(0.1, 10) == Cut(0)
    assert Cut.at(0.1 + 0.8 * 0.999, 10) == Cut(9)
    assert Cut.at(0.3, 10, phases=(0.0, 1.0, 0.0)) == Cut(3)
    assert Cut.at(0.5, 0) == Cut(0)
    assert Cut.at(0.99, 3).up == pytest.approx(0.9)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"rates": ()}, "mean failure rate"),
        ({"rates": (0.2, 0.99)}, r"\(0.2, 0.99\).*0 to 0.95"),
        ({"spread": -1}, "standard deviation of 0 or more"),
        ({"online": (0.8, 0.2)}, "lowest <= highest"),
        ({"online": (0.0, 0.5)}, "0 < lowest"),
        ({"online_period": 0}, "1 or more"),
        ({"phases": (0.5, 0.5, 0.5)}, "sum to 1"),
        ({"phases": (0.5, 0.5)}, "three shares"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        Undependability(**kwargs)


def test_one_number_for_each_device():
    with pytest.raises(ValueError, match=r"\(3,\).*120 devices"):
        Fleet.jetson(120).undependable(Undependability(by=[1, 2, 3]))
