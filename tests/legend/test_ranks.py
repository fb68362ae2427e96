import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgebolt.legend import rank_distribution


@pytest.mark.parametrize(
    ("layers", "budget", "step", "ranks"),
    [
        (12, 96, 1, [3, 4, 5, 6, 7, 8, 8, 9, 10, 11, 12, 13]),
        (12, 96, 0.5, [5, 6, 6, 7, 7, 8, 8, 9, 9, 10, 10, 11]),
        (12, 96, 1.2, [1, 3, 4, 5, 6, 7, 9, 10, 11, 12, 13, 15]),
        (24, 192, 0.5, [2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8, 8, 9, 9, 10, 10, 11, 11, 12, 12, 13, 13, 14]),
        (12, 96, 0, [8] * 12),
        (1, 5, 3, [5]),
        (4, 4, 10, [1, 1, 1, 1]),
    ],
)
def test_values(layers, budget, step, ranks):
    assert rank_distribution(layers, budget, step) == ranks


@given(st.integers(1, 40), st.integers(0, 400), st.floats(-20, 20), st.integers(1, 3))
def test_the_budget_is_kept_and_ranks_are_sorted(layers, spare, step, least):
    budget = layers * least + spare
    ranks = rank_distribution(layers, budget, step, least)
    assert sum(ranks) == budget and len(ranks) == layers and min(ranks) >= least
    assert ranks == sorted(ranks, reverse=step < 0)
    if step == 0 and budget % layers == 0:
        assert set(ranks) == {budget // layers}


@pytest.mark.parametrize("wrong", [(0, 5, 1), (3, 2, 1), (3, 9, float("nan")), (3, 9, 1, 0)])
def test_refusals(wrong):
    with pytest.raises(ValueError, match="use "):
        rank_distribution(*wrong)
