import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgebolt.comp.allocation import layers_to_drop, removal_rates, whole_units


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.tuples(st.floats(1e-8, 2), st.integers(1, 10**7)), min_size=1, max_size=12),
    st.floats(0, 1),
    st.sampled_from(["inverse_importance", "uniform"]),
    st.floats(0.05, 0.99),
)
def test_water_filling_meets_the_sum_under_the_cap(layers, share, allocation, largest):
    importance, sizes = zip(*layers, strict=True)
    remove = share * largest * sum(sizes)
    rates = removal_rates(importance, sizes, remove, allocation, largest)
    assert sum(rate * size for rate, size in zip(rates, sizes, strict=True)) == pytest.approx(
        remove, rel=1e-6, abs=1e-4
    )
    assert all(0 <= rate <= largest + 1e-9 for rate in rates)


def test_below_the_cap_rates_are_inverse_to_importance():
    rates = removal_rates([0.9, 0.1, 0.3], [100, 300, 50], 60)
    assert rates[1] / rates[0] == pytest.approx(9) and rates[2] / rates[0] == pytest.approx(3)
    assert removal_rates([0.9, 0.1, 0.3], [100, 300, 50], 45, "uniform") == pytest.approx([0.1] * 3)


def test_at_the_cap_the_rest_goes_to_the_others():
    rates = removal_rates([1e-9, 0.1, 0.2], [100, 100, 100], 140, largest=0.8)
    assert rates == pytest.approx([0.8, 0.4, 0.2])


def test_more_than_can_go_is_an_error_that_says_how_many_can():
    with pytest.raises(ValueError, match=r"241 parameters .* at most 80% of 300 can go: lower the ratio, raise depth"):
        removal_rates([0.1, 0.2, 0.3], [100, 100, 100], 241)
    assert removal_rates([0.1, 0.2, 0.3], [100, 100, 100], 240) == [0.8, 0.8, 0.8]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 0.8), st.integers(5, 60), st.integers(1, 500)), min_size=1, max_size=10),
    st.sampled_from([1, 2, 8, 64]),
)
def test_whole_units_are_multiples_and_meet_the_sum(layers, round_to):
    rates, units, weights = zip(*layers, strict=True)
    units = [round_to * count for count in units]
    remove = sum(rate * count * weight for rate, count, weight in zip(rates, units, weights, strict=True))
    lost = whole_units(rates, units, weights, round_to)
    assert all(isinstance(number, int) for number in lost)
    assert all(0 <= number < count for number, count in zip(lost, units, strict=True))
    assert all((count - number) % round_to == 0 for number, count in zip(lost, units, strict=True))
    gone = sum(number * weight for number, weight in zip(lost, weights, strict=True))
    assert abs(gone - remove) <= round_to * max(weights) / 2 + 1e-6 * remove
    assert all(number == 0 for number, rate in zip(lost, rates, strict=True) if rate == 0)


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 0.99), st.integers(1, 100)), min_size=1, max_size=8), st.sampled_from([1, 8, 16])
)
def test_something_is_left_of_every_layer_whatever_its_width(layers, round_to):
    rates, units = zip(*layers, strict=True)
    for number, count in zip(whole_units(rates, units, [1] * len(units), round_to), units, strict=True):
        assert 0 <= number < count
        assert number == 0 or (count - number) % round_to == 0


def test_the_least_important_layers_go_and_the_protected_stay():
    importance = [0.01, 0.02, 0.5, 0.03, 0.04]
    assert layers_to_drop(importance, 0.8, 0.75) == [1, 3, 4]
    assert layers_to_drop(importance, 0.8, 0.75, protect=(0, -1)) == [1, 2, 3]
    assert layers_to_drop(importance, 0.4, 1.0, protect=()) == [0, 1]


def test_the_share_of_whole_layers_is_rounded_down_but_not_by_a_float():
    assert len(layers_to_drop([0.5] * 30, 0.1, 1.0)) == 3
    assert len(layers_to_drop([0.5] * 30, 0.3, 1 / 9)) == 1
    assert len(layers_to_drop([0.5] * 30, 0.3, 0.0)) == 0


def test_a_layer_stays_even_without_a_protected_one():
    assert len(layers_to_drop([0.1, 0.2], 0.95, 1.0, protect=())) == 1
    assert layers_to_drop([0.1], 0.95, 1.0) == []


def test_of_equal_layers_the_first_go():
    assert layers_to_drop([0.5] * 6, 0.5, 2 / 3) == [1, 2]
