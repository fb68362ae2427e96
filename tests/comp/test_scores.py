import pytest
import torch

from edgebolt.comp import SCORES
from edgebolt.comp.least_squares import MaskProblem
from edgebolt.comp.scores import Remaining, collinearity, condition, relative


@pytest.fixture
def columns():
    """What each of eight units adds to the output, and the output."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(40, 8, generator=generator, dtype=torch.float64)
    a[:, 3] = a[:, 1] + 0.1 * a[:, 3]  # nearly a copy
    return a, a.sum(1)


def remaining(a, wanted, kept):
    kept = torch.tensor(kept)
    inverse = torch.linalg.inv((a.T @ a)[kept][:, kept])
    problem = MaskProblem(a.T @ a)
    return Remaining(problem, kept, inverse, inverse @ problem.linear[kept])


def best(a, wanted, kept):
    """The objective after an exact solve on the units ``kept``."""
    small = a[:, kept]
    return float((wanted - small @ torch.linalg.lstsq(small, wanted[:, None]).solution[:, 0]).square().sum())


@pytest.mark.parametrize("kept", [list(range(8)), [0, 1, 3, 6, 7]])
def test_condition_is_the_rise_of_the_optimum(columns, kept):
    a, wanted = columns
    full = best(a, wanted, kept)
    rises = [best(a, wanted, [other for other in kept if other != j]) - full for j in kept]
    torch.testing.assert_close(condition(remaining(a, wanted, kept)), torch.tensor(rises, dtype=torch.float64))


def test_collinearity_is_what_a_column_keeps_beside_the_others_and_stewarts_condition_number(columns):
    a, wanted = columns
    left = remaining(a, wanted, list(range(8)))
    beside = []
    for j in range(8):
        others = a[:, [k for k in range(8) if k != j]]
        beside.append(float((a[:, j] - others @ torch.linalg.pinv(others) @ a[:, j]).square().sum()))
    torch.testing.assert_close(collinearity(left), torch.tensor(beside, dtype=torch.float64))
    kappa = a.norm(dim=0) * torch.linalg.pinv(a).norm(dim=1)  # ‖a_j‖ ‖a_j⁺‖
    torch.testing.assert_close(collinearity(left), left.problem.gram.diagonal() / kappa.square())
    assert collinearity(left).argmin() in (1, 3)  # the copies
    torch.testing.assert_close(condition(left), (left.mask * a.norm(dim=0) / kappa).square())


def test_relative_is_the_share_of_the_outputs_norm(columns):
    a, wanted = columns
    torch.testing.assert_close(relative(remaining(a, wanted, [2, 5])), a[:, [2, 5]].norm(dim=0) / wanted.norm())


def test_a_score_of_ones_own_takes_part():
    from edgebolt.comp import Comp
    from edgebolt.comp.selection import removal_order

    SCORES["mine"] = lambda left: -left.kept.double()  # the last goes first
    try:
        assert Comp(score="mine").score == "mine"
        gram = torch.eye(5, dtype=torch.float64)
        order = removal_order(MaskProblem(gram), 2, "mine", step=0.2)
        assert order.units == [4, 3, 2, 1, 0]
    finally:
        del SCORES["mine"]
