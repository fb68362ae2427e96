import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgebolt.comp.least_squares import MaskProblem
from edgebolt.comp.selection import SCORING_RIDGE, RemovalOrder, removal_order


def problem(units=12, seed=0, rows=60):
    a = torch.randn(rows, units, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return MaskProblem(a.T @ a)


def solved(made, kept):
    """The inverse on some units, and the mask, made anew."""
    gram = made.gram[kept][:, kept] + made.ridge(SCORING_RIDGE) * torch.eye(len(kept), dtype=torch.float64)
    inverse = torch.linalg.inv(gram)
    return inverse, inverse @ made.linear[kept]


def by_hand(made, remove, size, bound=float("inf"), ridge=1e-2):
    """What is left, and how many are gone after each round, with a new inverse for every round."""
    kept, gone, whole, guarded = list(range(len(made.gram))), [], size, True
    while remove > 0:
        inverse, mask = solved(made, torch.tensor(kept))
        size = min(size, remove)
        least = torch.sort(mask.square() / inverse.diagonal(), stable=True).indices[:size].tolist()
        left = torch.tensor([unit for place, unit in enumerate(kept) if place not in least])
        free, used = solved(made, left)[1], made.tuned(left, ridge)
        if guarded and min(float(mask.var(correction=0)) for mask in (free, used)) > bound:
            size, guarded = (size // 2, True) if size > 1 else (whole, False)
            continue
        kept, remove = left.tolist(), remove - size
        gone.append(len(made.gram) - len(kept))
        size = min(whole, 2 * size)
    return kept, gone


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("size", [1, 3])
def test_as_many_as_wanted_are_what_new_inverses_choose(seed, size):
    """Of one order, at the end of a round and within it."""
    made = problem(seed=seed)
    order = removal_order(made, 11, step=size / 12, variance_bound=1e9)
    assert [order.kept(remove).tolist() for remove in range(12)] == [by_hand(made, n, size)[0] for n in range(12)]
    assert order.gone == by_hand(made, 11, size)[1]


@pytest.mark.parametrize("score", ["condition", "relative"])
@pytest.mark.parametrize("size", [1, 3, 5])
def test_rises_are_those_of_the_objective(score, size):
    """Of the least-squares optimum with the ridge of the scores, in which a removed unit's mask is zero."""
    made = problem()

    def optimum(kept):
        return made.constant - float(made.linear[kept] @ solved(made, kept)[1])

    order = removal_order(made, 11, score, step=size / 12, variance_bound=1e9)
    whole = optimum(torch.arange(12))
    assert len(order.rises) == len(order.gone) > 2
    for gone, rise in zip(order.gone, order.rises, strict=True):
        assert rise == pytest.approx((optimum(order.kept(gone)) - whole) / made.constant, rel=1e-6)


def test_the_updated_mask_and_inverse_are_the_exact_ones(monkeypatch):
    """What a score sees after several rounds, against inverting what is left."""
    from edgebolt.comp import SCORES

    made, seen = problem(), []
    monkeypatch.setitem(SCORES, "noted", lambda left: seen.append(left) or left.mask.square())
    removal_order(made, 9, "noted", step=0.25, variance_bound=1e9)
    assert [len(left.kept) for left in seen] == [12, 9, 6, 3]
    # The last is looked at behind the rounds; the inverses of all lie in the memory of one, so only it is whole.
    exact = solved(made, seen[-1].kept)[0]
    torch.testing.assert_close(seen[-1].inverse, exact, rtol=1e-9, atol=1e-12)
    for left in seen:
        torch.testing.assert_close(left.mask, solved(made, left.kept)[1], rtol=1e-9, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 15), st.data())
def test_no_unit_is_lost_or_named_twice(units, data):
    most = data.draw(st.integers(0, units - 1))
    step = data.draw(st.sampled_from([0.01, 0.05, 0.3, 1.0]))
    bound = data.draw(st.sampled_from([0.0, 0.02, 0.1, 1e9]))
    made = problem(units, seed=data.draw(st.integers(0, 3)), rows=units + 2)
    order = removal_order(made, most, step=step, variance_bound=bound)
    assert sorted(order.units) == list(range(units))
    assert order.gone == sorted(set(order.gone)) and (order.gone[-1:] == [most] or most == 0)
    assert order.rises == sorted(order.rises) and len(order.rises) == len(order.gone)
    for remove in range(units):
        kept = order.kept(remove).tolist()
        assert len(kept) == units - remove and kept == sorted(set(kept))


def test_what_is_not_to_go_follows_by_its_last_score():
    made = problem()
    order = removal_order(made, 5, step=1 / 12, variance_bound=1e9)
    inverse, mask = solved(made, order.kept(5))
    last = order.kept(5)[torch.argsort(mask.square() / inverse.diagonal())]
    assert order.units[5:] == last.tolist() and order.gone == [1, 2, 3, 4, 5]


def test_of_equal_units_the_lower_index_goes():
    gram = torch.eye(6, dtype=torch.float64)
    order = removal_order(MaskProblem(gram), 3, step=0.2, variance_bound=9.0)
    assert order.units == list(range(6)) and order.kept(3).tolist() == [3, 4, 5]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("bound", [0.03, 0.1, 0.2])
def test_at_the_bound_rounds_are_halved_and_whole_again_where_a_single_unit_is_too_many(seed, bound):
    made = problem(units=24, seed=seed, rows=26)
    order = removal_order(made, 20, step=1 / 4, variance_bound=bound)
    kept, gone = by_hand(made, 20, 6, bound)
    assert order.gone == gone and order.kept(20).tolist() == kept


def test_halved_rounds_keep_the_mask_calm_as_long_as_they_can():
    made, bound = problem(units=24, rows=40, seed=1), 0.1
    order = removal_order(made, 20, step=1 / 4, variance_bound=bound)
    assert order.gone == [6, 9, 10, 11, 17, 20]
    varies = [float(made.tuned(order.kept(gone), 1e-2).var(correction=0)) for gone in range(1, 21)]
    assert max(varies[gone - 1] for gone in order.gone[:4]) <= bound < varies[12 - 1]
    whole = removal_order(made, 20, step=1 / 4, variance_bound=1e9)
    assert float(made.tuned(whole.kept(12), 1e-2).var(correction=0)) > bound


def test_a_bound_of_zero_is_no_reason_to_remove_less():
    made = problem()
    free, bound = (removal_order(made, 9, step=0.25, variance_bound=bound) for bound in (1e9, 0.0))
    assert free == bound and len(free.gone) == 3


def test_units_that_never_fire_go_first_and_for_nothing():
    made = problem()
    gram, linear = made.gram.clone(), made.linear.clone()
    gram[[2, 5]], gram[:, [2, 5]], linear[[2, 5]] = 0.0, 0.0, 0.0
    order = removal_order(MaskProblem(gram), 3, step=1 / 12, variance_bound=9.0)
    assert order.units[:2] == [2, 5] and order.rises[:2] == [0.0, 0.0] and order.rises[2] > 0


def test_a_block_without_output_costs_nothing():
    zero = torch.zeros(6, 6, dtype=torch.float64)
    order = removal_order(MaskProblem(zero), 4, step=1 / 3)
    order.probed, order.effect = 2, 1e-12
    assert sorted(order.units) == list(range(6)) and order.rises == [0.0, 0.0] == order.costs()


def test_costs_grow_as_the_objective_does_from_the_effect_that_was_measured():
    order = RemovalOrder([2, 0, 1, 3], [1, 2, 3], [0.1, 0.3, 0.9], probed=2, effect=0.06)
    assert order.costs() == pytest.approx([0.02, 0.06, 0.18])
    assert RemovalOrder([0, 1], [1], [0.5]).costs() == [0.0]
    assert RemovalOrder(**json.loads(json.dumps(order.to_plain()))) == order
