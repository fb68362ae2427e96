import pytest
import torch
from test_least_squares import problem

from edgebolt.comp.blocks import Block
from edgebolt.comp.least_squares import Sublayer
from edgebolt.comp.recovery import fold, recovered_weight

NEURONS, HEADS = Block("ffn", "down", 1, 12), Block("attention", "out", 4, 3)


def explicit(student, target, columns, weight):
    return float((target - student[:, columns] @ weight.T.double()).square().sum())


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("recover", ["mask", "lstsq"])
@pytest.mark.parametrize("ridge", [1e-9, 1e-2, 10.0])
@pytest.mark.parametrize("block", [NEURONS, HEADS], ids=["neurons", "heads"])
def test_no_recovery_raises_the_objective(seed, recover, ridge, block):
    sums, student, weight, target = problem(seed=seed, drift=0.5)
    kept = torch.tensor([0, 2]) if block is HEADS else torch.tensor([1, 2, 5, 8, 11])
    columns = block.columns(kept)
    recovered, variance, _, _ = recovered_weight(sums, block, kept, recover, ridge)
    before = explicit(student, target, columns, weight[:, columns])
    assert explicit(student, target, columns, recovered) <= before * (1 + 1e-6)
    assert variance >= 0 and (recover == "mask" or variance == 0)
    if ridge < 1:
        assert explicit(student, target, columns, recovered) < before


def test_lstsq_is_never_worse_than_the_mask():
    sums, student, _, target = problem(drift=0.5)
    kept = torch.arange(6)
    errors = [
        explicit(student, target, kept, recovered_weight(sums, NEURONS, kept, how, 1e-9)[0])
        for how in ("none", "mask", "lstsq")
    ]
    assert errors[0] > errors[1] > errors[2]
    assert torch.equal(recovered_weight(sums, NEURONS, kept, "none")[0], sums.weight[:, :6])


def test_one_scale_a_head():
    sums, *_ = problem(drift=0.5)
    kept = torch.tensor([0, 2])
    weight, *_ = recovered_weight(sums, HEADS, kept, "mask", 1e-9)
    scale = weight / sums.weight[:, HEADS.columns(kept)]
    assert torch.allclose(scale[:, :4], scale[0, 0]) and torch.allclose(scale[:, 4:], scale[0, 4])
    assert not torch.allclose(scale[0, 0], scale[0, 4])


def test_a_scale_beyond_ten_is_refused():
    weight, inputs = torch.ones(1, 2), torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
    for factor, used in ((9.0, True), (11.0, False)):
        sums = Sublayer(weight)
        sums.add(inputs, factor * inputs[:, :1])
        kept = torch.tensor([0])
        got, variance, *_ = recovered_weight(sums, Block("ffn", "x", 1, 2), kept, "mask", 1e-12)
        assert (float(got) == pytest.approx(factor)) if used else (float(got) == 1.0 and variance == 0.0)


@pytest.mark.parametrize("recover", ["mask", "lstsq"])
def test_what_is_not_finite_is_refused(recover, monkeypatch):
    sums, *_ = problem()
    kept = torch.arange(5)
    monkeypatch.setattr("edgebolt.comp.recovery.solve", lambda gram, right, ridge: right * float("nan"))
    monkeypatch.setattr("edgebolt.comp.least_squares.solve", lambda gram, right, ridge: right * float("nan"))
    weight, variance, *_ = recovered_weight(sums, NEURONS, kept, recover)
    assert torch.equal(weight, sums.weight[:, :5]) and variance == 0.0


def test_a_solution_that_is_worse_is_refused(monkeypatch):
    sums, *_ = problem()
    kept = torch.arange(5)
    monkeypatch.setattr("edgebolt.comp.least_squares.solve", lambda gram, right, ridge: torch.full_like(right, 3.0))
    weight, *_ = recovered_weight(sums, NEURONS, kept, "mask")
    assert torch.equal(weight, sums.weight[:, :5])


def test_fold_writes_into_both_kinds_of_projection():
    from transformers.pytorch_utils import Conv1D

    weight = torch.randn(3, 5, dtype=torch.float64)
    for module in (torch.nn.Linear(5, 3), Conv1D(3, 5)):
        parameter = module.weight
        fold(module, weight)
        x = torch.randn(2, 5)
        torch.testing.assert_close(module(x), x @ weight.T.float() + module.bias)
        assert module.weight is parameter


def test_a_mask_that_varies_too_much_is_damped():
    """The ridge draws it to one until it is within the bound, and it still lowers the objective."""
    sums, *_ = problem(drift=0.5)
    kept = torch.arange(0, 12, 2)
    free = recovered_weight(sums, NEURONS, kept, "mask", 1e-6)
    bound = free.variance / 3
    damped = recovered_weight(sums, NEURONS, kept, "mask", 1e-6, bound)
    assert 0 < damped.variance <= bound < free.variance
    assert free.after < damped.after < damped.before == free.before
