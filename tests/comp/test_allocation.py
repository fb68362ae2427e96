from itertools import accumulate, pairwise, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgebolt.comp.allocation import layers_to_drop, rates_by_cost, removal_rates, whole_units


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
    with pytest.raises(ValueError, match=r"241 parameters .* at most 240 can go: lower the ratio, raise depth"):
        removal_rates([0.1, 0.2, 0.3], [100, 100, 100], 241)
    assert removal_rates([0.1, 0.2, 0.3], [100, 100, 100], 240) == [0.8, 0.8, 0.8]


@st.composite
def curves(draw, convex=False):
    """Some blocks: shares and costs that grow, and how many parameters each has."""
    found = []
    for _ in range(draw(st.integers(1, 5))):
        steps = draw(st.lists(st.floats(0, 10), min_size=1, max_size=6))
        steps = sorted(steps) if convex else steps
        last = draw(st.floats(0.1, 0.95))
        shares = [last * (number + 1) / len(steps) for number in range(len(steps))]
        found.append(list(zip(shares, accumulate(steps), strict=True)))
    return found, [draw(st.integers(1, 10**6)) for _ in found]


def cost(curve, rate):
    """Of a share that is gone, straight between the points of the curve."""
    for (start, low), (end, high) in pairwise([(0.0, 0.0), *curve]):
        if rate <= end + 1e-9:
            return low + (high - low) * (rate - start) / (end - start)
    raise AssertionError


@settings(max_examples=100, deadline=None)
@given(curves(), st.floats(0, 1))
def test_one_price_meets_the_sum_and_no_curve_is_left(made, share):
    made, sizes = made
    remove = share * sum(curve[-1][0] * size for curve, size in zip(made, sizes, strict=True))
    rates = rates_by_cost(made, sizes, remove)
    gone = sum(rate * size for rate, size in zip(rates, sizes, strict=True))
    assert gone == pytest.approx(remove, rel=1e-9, abs=1e-6)
    assert all(0 <= rate <= curve[-1][0] + 1e-9 for rate, curve in zip(rates, made, strict=True))


@settings(max_examples=100, deadline=None)
@given(curves(convex=True), st.floats(0, 1))
def test_nothing_cheaper_stays_than_what_goes(made, share):
    made, sizes = made
    rates = rates_by_cost(made, sizes, share * sum(c[-1][0] * size for c, size in zip(made, sizes, strict=True)))
    gone, left = [0.0], []
    for curve, size, rate in zip(made, sizes, rates, strict=True):
        for start, end in pairwise([(0.0, 0.0), *curve]):
            price = (end[1] - start[1]) / (end[0] - start[0]) / size
            if rate > start[0] + 1e-9:
                gone.append(price)
            if rate < end[0] - 1e-9:
                left.append(price)
    assert not left or max(gone) <= min(left) * (1 + 1e-6) + 1e-12


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.floats(0, 10), min_size=1, max_size=4), min_size=1, max_size=4), st.data())
def test_no_division_in_equal_pieces_costs_less(steps, data):
    """Every way to take pieces of ten parameters, also along curves that are not convex."""
    sizes = [10 * len(own) + 5 for own in steps]  # five of each block stay
    made = [
        [(10 * (number + 1) / size, total) for number, total in enumerate(accumulate(sorted(own)))]
        for own, size in zip(steps, sizes, strict=True)
    ]
    pieces = data.draw(st.integers(0, sum(map(len, steps))))
    ways = [way for way in product(*(range(len(own) + 1) for own in steps)) if sum(way) == pieces]
    best = min(sum(([0.0, *accumulate(sorted(own))])[n] for own, n in zip(steps, way, strict=True)) for way in ways)
    rates = rates_by_cost(made, sizes, 10 * pieces)
    assert sum(cost(curve, rate) for curve, rate in zip(made, rates, strict=True)) == pytest.approx(best, abs=1e-6)


def test_what_is_cheap_behind_something_dear_is_weighed_with_it():
    """Alone, the first piece of the first block would be the dearest of all, and what is behind it never reached."""
    dear = [(0.2, 3.0), (0.8, 3.2)]
    assert rates_by_cost([dear, [(0.4, 2.0), (0.8, 4.0)]], [100, 100], 80) == [0.8, 0.0]
    assert rates_by_cost([dear, [(0.4, 1.0), (0.8, 4.0)]], [100, 100], 80) == [0.4, 0.4]
    winding = [(0.2, 1.0), (0.4, 3.0), (0.6, 3.1), (0.8, 9.0)]  # 5 a share, 5.25 on to 0.6, 29.5
    assert rates_by_cost([winding, [(0.8, 3.9)]], [100, 100], 60) == [0.0, 0.6]
    assert rates_by_cost([winding, [(0.8, 4.1)]], [100, 100], 60) == [0.2, 0.4]
    assert rates_by_cost([winding, [(0.8, 8.0)]], [100, 100], 60) == [0.6, 0.0]


def test_a_large_block_is_cheap_by_the_parameter():
    assert rates_by_cost([[(0.8, 1.0)], [(0.8, 1.0)]], [100, 300], 120) == [0.0, 0.4]


def test_a_block_that_can_lose_nothing_loses_nothing():
    assert rates_by_cost([[], [(0.5, 1.0)]], [100, 100], 50) == [0.0, 0.5]
    with pytest.raises(ValueError, match=r"51 parameters should leave .* at most 50 can go: .*raise largest_rate"):
        rates_by_cost([[], [(0.5, 1.0)]], [100, 100], 51)


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
