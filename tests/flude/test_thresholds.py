import math

import numpy as np
import pytest

from edgebolt.flude import AIMD, Fixed, Quantile

NOBODY = np.array([])


def follow(policy, losses, staleness=NOBODY):
    threshold, notes, path = policy.first, {}, []
    for loss in losses:
        threshold = policy.next(threshold, staleness, loss, notes)
        path.append(threshold)
    return path


def test_fixed():
    assert follow(Fixed(3), [1.0, 0.5]) == [3, 3]
    assert Fixed(math.inf).first == math.inf and Fixed(0).first == 0


def test_quantile_follows_the_cohort():
    policy = Quantile(0.5, first=10, rate=0.5)
    assert follow(policy, [None, None], np.array([2.0, 2.0, 8.0])) == [6.0, 4.0]
    assert follow(policy, [None, None]) == [10, 10]
    # a share of those with a cache is at or below the limit that it tends to
    ages = np.arange(1.0, 11.0)
    limit = follow(Quantile(0.8, rate=0.3), [None] * 60, ages)[-1]
    assert (ages <= limit).mean() == 0.8


def test_aimd_one_more_while_the_loss_falls_else_half():
    policy = AIMD(first=5, period=2)
    assert follow(policy, [1.0, 1.0, 0.9, 0.9, 0.8, 0.8]) == [5, 5, 5, 6, 6, 7]
    assert follow(policy, [1.0, 1.0, 0.995, 0.995, 0.9, 0.9]) == [5, 5, 5, 2, 2, 3]
    assert follow(AIMD(first=20, most=20, period=1), [1.0, 0.9, 0.8]) == [20, 20, 20]
    assert follow(AIMD(first=2, least=1, period=1), [1.0] * 5) == [2, 1, 1, 1, 1]
    # a round without a loss counts towards the period; a period without any is prolonged
    assert follow(policy, [1.0, None, None, 0.5]) == [5, 5, 5, 6]
    assert follow(policy, [None, None, 1.0, 0.5, 0.5]) == [5, 5, 5, 5, 6]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Fixed(-1), "rounds=-1"),
        (lambda: Quantile(1.5), "share=1.5"),
        (lambda: Quantile(rate=0), "rate=0"),
        (lambda: AIMD(first=0.5), "least <= first"),
        (lambda: AIMD(period=0), "period=0"),
        (lambda: AIMD(progress=1.0), "progress=1.0"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
