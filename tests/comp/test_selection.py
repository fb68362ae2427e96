import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgebolt.comp.least_squares import MaskProblem
from edgebolt.comp.selection import SCORING_RIDGE, select


def problem(units=12, seed=0, rows=60):
    a = torch.randn(rows, units, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    wanted = a.sum(1)
    return MaskProblem(a.T @ a, a.T @ wanted, float(wanted @ wanted))


def by_hand(made, remove, size):
    """The same selection, with a new inverse after every round."""
    kept, ridge = list(range(len(made.gram))), made.ridge(SCORING_RIDGE)
    while remove > 0:
        now = torch.tensor(kept)
        gram = made.gram[now][:, now] + ridge * torch.eye(len(kept), dtype=torch.float64)
        inverse = torch.linalg.inv(gram)
        mask = inverse @ made.linear[now]
        score = mask.square() / inverse.diagonal()
        gone = torch.sort(score, stable=True).indices[: min(size, remove)].tolist()
        kept = [unit for place, unit in enumerate(kept) if place not in gone]
        remove -= len(gone)
    return kept


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("size", [1, 3])
def test_updates_choose_what_new_inverses_choose(seed, size):
    made = problem(seed=seed)
    assert select(made, 7, step=size / 12, variance_bound=1e9).tolist() == by_hand(made, 7, size)


def test_the_updated_mask_and_inverse_are_the_exact_ones(monkeypatch):
    """What a score sees after several rounds, against inverting what is left."""
    from edgebolt.comp import SCORES

    made, seen = problem(), []
    monkeypatch.setitem(SCORES, "noted", lambda left: seen.append(left) or left.mask.square())
    select(made, 9, "noted", step=0.25, variance_bound=1e9)
    assert [len(left.kept) for left in seen] == [12, 9, 6]
    for left in seen:
        gram = made.gram[left.kept][:, left.kept]
        exact = torch.linalg.inv(gram + made.ridge(SCORING_RIDGE) * torch.eye(len(gram), dtype=torch.float64))
        torch.testing.assert_close(left.inverse, exact, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(left.mask, exact @ made.linear[left.kept], rtol=1e-9, atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 15), st.data())
def test_as_many_go_as_asked_and_the_rest_is_sorted(units, data):
    remove = data.draw(st.integers(0, units - 1))
    step = data.draw(st.sampled_from([0.01, 0.05, 0.3, 1.0]))
    kept = select(problem(units), remove, step=step, variance_bound=1e9).tolist()
    assert len(kept) == units - remove and kept == sorted(set(kept))


def test_of_equal_units_the_lower_index_goes():
    gram = torch.eye(6, dtype=torch.float64)
    assert select(MaskProblem(gram, gram.sum(1), 6.0), 3, step=0.2, variance_bound=9.0).tolist() == [3, 4, 5]


def test_a_bound_of_zero_freezes_the_layer():
    assert len(select(problem(), 6, variance_bound=0.0)) == 12


def test_at_the_bound_the_round_is_halved_until_a_single_unit_is_too_many():
    made = problem(units=16, rows=18)
    free = select(made, 12, step=0.25, variance_bound=1e9)
    bound = 0.1
    kept = select(made, 12, step=0.25, variance_bound=bound)
    assert 4 < len(kept) < 16 and len(free) == 4
    assert float(made.tuned(kept, 1e-2).var(correction=0)) <= bound
    # One more, the least important, would pass the bound.
    gram = made.gram[kept][:, kept] + made.ridge(SCORING_RIDGE) * torch.eye(len(kept), dtype=torch.float64)
    inverse = torch.linalg.inv(gram)
    mask = inverse @ made.linear[kept]
    least = int((mask.square() / inverse.diagonal()).argmin())
    more = torch.cat([kept[:least], kept[least + 1 :]])
    assert float(made.tuned(more, 1e-2).var(correction=0)) > bound


def test_units_that_never_fire_go_first():
    made = problem()
    gram, linear = made.gram.clone(), made.linear.clone()
    gram[[2, 5]], gram[:, [2, 5]], linear[[2, 5]] = 0.0, 0.0, 0.0
    kept = select(MaskProblem(gram, linear, made.constant), 2, variance_bound=9.0)
    assert kept.tolist() == [0, 1, 3, 4, 6, 7, 8, 9, 10, 11]
