import pytest
import torch
from test_least_squares import problem

from edgebolt.comp.blocks import Block
from edgebolt.comp.least_squares import Sublayer
from edgebolt.comp.recovery import Recovered, fold, recovered_weight

NEURONS, HEADS = Block("ffn", "down", 1, 12), Block("attention", "out", 4, 3)


def explicit(x, weight, columns, other):
    """What is missing of the dense output, squared."""
    return float((x @ weight.T - x[:, columns] @ other.T.double()).square().sum())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("recover", ["mask", "lstsq"])
@pytest.mark.parametrize("ridge", [1e-9, 1e-2, 10.0])
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("block", [NEURONS, HEADS], ids=["neurons", "heads"])
def test_no_recovery_raises_the_objective(seed, recover, ridge, centred, block):
    sums, x, weight = problem(seed=seed, centred=centred, mean=0.5)
    kept = torch.tensor([0, 2]) if block is HEADS else torch.tensor([1, 2, 5, 8, 11])
    columns = block.columns(kept)
    found = recovered_weight(sums, block, kept, recover, ridge)
    energy = float((x @ weight.T).square().sum())
    before, after = explicit(x, weight, columns, weight[:, columns]), explicit(x, weight, columns, found.weight)
    assert after < before
    assert (found.before, found.after) == pytest.approx((before / energy, after / energy), rel=1e-4)
    assert found.variance > 0 if recover == "mask" else found.variance == 0


def test_lstsq_is_never_worse_than_the_mask():
    sums, x, weight = problem()
    kept = torch.arange(6)
    errors = [
        explicit(x, weight, kept, recovered_weight(sums, NEURONS, kept, how, 1e-9).weight)
        for how in ("none", "mask", "lstsq")
    ]
    assert errors[0] > errors[1] > errors[2]
    assert torch.equal(recovered_weight(sums, NEURONS, kept, "none").weight, sums.weight[:, :6])


def test_lstsq_is_the_optimum_with_a_pull_towards_the_old_weight():
    sums, x, weight = problem()
    kept = torch.tensor([0, 3, 4, 9])
    pull = (0.5 * float((x.T @ x).diagonal()[kept].mean())) ** 0.5
    rows = torch.cat([x[:, kept], pull * torch.eye(4, dtype=torch.float64)])
    right = torch.cat([x @ weight.T, pull * weight[:, kept].T])
    wanted = torch.linalg.lstsq(rows, right).solution.T
    found = recovered_weight(sums, NEURONS, kept, "lstsq", 0.5).weight
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("recover", ["mask", "lstsq"])
@pytest.mark.parametrize("block", [NEURONS, HEADS], ids=["neurons", "heads"])
def test_a_bias_makes_up_for_the_mean(recover, block):
    sums, x, weight = problem(centred=True, mean=2.0)
    kept = torch.tensor([0, 2])
    found = recovered_weight(sums, block, kept, recover)
    columns, whole = block.columns(kept), x + sums.mean
    given = whole[:, columns] @ found.weight.T + found.shift
    torch.testing.assert_close(given.mean(0), (whole @ weight.T).mean(0), rtol=1e-6, atol=1e-6)
    missing = (whole @ weight.T - given).square().sum() / (x @ weight.T).square().sum()
    assert found.after == pytest.approx(float(missing), rel=1e-4)


def test_without_a_bias_or_a_recovery_nothing_is_shifted():
    assert recovered_weight(problem()[0], NEURONS, torch.arange(5), "lstsq").shift is None
    assert recovered_weight(problem(centred=True)[0], NEURONS, torch.arange(5), "none").shift is None


def test_one_scale_a_head():
    sums, *_ = problem()
    kept = torch.tensor([0, 2])
    weight = recovered_weight(sums, HEADS, kept, "mask", 1e-9).weight
    scale = weight / sums.weight[:, HEADS.columns(kept)]
    assert torch.allclose(scale[:, :4], scale[0, 0]) and torch.allclose(scale[:, 4:], scale[0, 4])
    assert not torch.allclose(scale[0, 0], scale[0, 4])


def test_a_scale_beyond_ten_is_refused():
    """Two inputs that are the same but for a factor, the smaller of which has to make up for the larger."""
    inputs = torch.randn(50, 1, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 1.0])
    for scale, used in ((9.0, True), (11.0, False)):
        sums = Sublayer(torch.tensor([[1.0, scale - 1]]))
        sums.add(inputs)
        found = recovered_weight(sums, Block("ffn", "x", 1, 2), torch.tensor([0]), "mask", 1e-12)
        assert float(found.weight) == pytest.approx(scale if used else 1.0, rel=1e-5)
        assert used or (found.variance == 0.0 and found.after == found.before)


@pytest.mark.parametrize("recover", ["mask", "lstsq"])
def test_what_is_not_finite_is_refused(recover, monkeypatch):
    sums, *_ = problem()
    kept = torch.arange(5)
    monkeypatch.setattr("edgebolt.comp.recovery.solve", lambda gram, right, ridge: right * float("nan"))
    monkeypatch.setattr("edgebolt.comp.least_squares.solve", lambda gram, right, ridge: right * float("nan"))
    found = recovered_weight(sums, NEURONS, kept, recover)
    assert torch.equal(found.weight, sums.weight[:, :5]) and found.variance == 0.0 and found.after == found.before


@pytest.mark.parametrize(("recover", "place"), [("mask", "least_squares"), ("lstsq", "recovery")])
def test_a_solution_that_is_worse_is_refused(recover, place, monkeypatch):
    """The old columns are used, and a bias makes up for what is missing of them."""
    sums, *_ = problem(centred=True, mean=2.0)
    kept = torch.arange(5)
    monkeypatch.setattr(f"edgebolt.comp.{place}.solve", lambda gram, right, ridge: torch.full_like(right, 3.0))
    found = recovered_weight(sums, NEURONS, kept, recover)
    assert torch.equal(found.weight, sums.weight[:, :5]) and found.after == found.before
    torch.testing.assert_close(found.shift, sums.weight[:, 5:] @ sums.mean[5:])


def test_fold_writes_into_both_kinds_of_projection():
    from transformers.pytorch_utils import Conv1D

    weight, shift = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    for module in (torch.nn.Linear(5, 3), Conv1D(3, 5)):
        parameter, bias = module.weight, module.bias.detach().clone()
        x = torch.randn(2, 5)
        for moved in (None, shift):
            fold(module, Recovered(weight, 0.0, 1.0, 0.5, moved))
            wanted = x @ weight.T.float() + bias + (0 if moved is None else moved.float())
            torch.testing.assert_close(module(x), wanted)
        assert module.weight is parameter


def test_a_mask_that_varies_too_much_is_damped():
    """The ridge draws it to one until it is within the bound, and it still lowers the objective."""
    sums, *_ = problem()
    kept = torch.arange(0, 12, 2)
    free = recovered_weight(sums, NEURONS, kept, "mask", 1e-6)
    bound = free.variance / 3
    damped = recovered_weight(sums, NEURONS, kept, "mask", 1e-6, bound)
    assert 0 < damped.variance <= bound < free.variance
    assert free.after < damped.after < damped.before == free.before
