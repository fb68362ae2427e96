import pytest
import torch

from edgebolt.comp.least_squares import Sublayer, factor, solve


def problem(inputs=12, outputs=7, tokens=60, drift=0.3, seed=0):
    """Sums, and the matrices that they are of; the teacher's inputs are others than the student's."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=generator)
    student = torch.randn(tokens, inputs, generator=generator)
    teacher = student + drift * torch.randn(tokens, inputs, generator=generator)
    target = teacher @ weight.T
    sums = Sublayer(weight)
    for part, wanted in zip(student.split(25), target.split(25), strict=True):
        sums.add(part, wanted)
    return sums, student.double(), weight.double(), target.double()


def test_the_sums_do_not_depend_on_the_batches():
    sums, student, _, target = problem()
    assert sums.tokens == 60 and sums.weight.dtype == torch.float64
    torch.testing.assert_close(sums.gram, student.T @ student, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(sums.cross, student.T @ target, rtol=1e-5, atol=1e-4)
    assert sums.energy == pytest.approx(float(target.square().sum()), rel=1e-6)


def test_the_mask_problem_is_the_explicit_norm():
    sums, student, weight, target = problem()
    kept = torch.tensor([0, 2, 3, 7, 11])
    mask = torch.tensor([0.5, 1.0, -1.5, 2.0, 0.1], dtype=torch.float64)
    explicit = float((target - student[:, kept] * mask @ weight[:, kept].T).square().sum())
    assert sums.masks().error(kept, mask) == pytest.approx(explicit, rel=1e-5)


def test_a_mask_on_groups_of_inputs_is_the_explicit_norm():
    sums, student, weight, target = problem()
    heads = sums.masks(unit=4)
    assert heads.gram.shape == (3, 3)
    kept, mask = torch.tensor([0, 2]), torch.tensor([0.7, -1.2], dtype=torch.float64)
    columns = torch.tensor([0, 1, 2, 3, 8, 9, 10, 11])
    out = student[:, columns] * mask.repeat_interleave(4) @ weight[:, columns].T
    assert heads.error(kept, mask) == pytest.approx(float((target - out).square().sum()), rel=1e-5)


def test_the_error_of_a_weight_is_the_explicit_norm():
    sums, student, _, target = problem()
    kept = torch.tensor([1, 4, 5])
    other = torch.randn(7, 3, dtype=torch.float64)
    explicit = float((target - student[:, kept] @ other.T).square().sum())
    assert sums.error(kept, other) == pytest.approx(explicit, rel=1e-5)


def test_the_gram_matrix_is_that_of_the_units_outputs():
    """``G = AᵀA`` with column ``j`` of ``A`` all that unit ``j`` adds to the output."""
    sums, student, weight, target = problem()
    a = torch.stack([torch.outer(student[:, j], weight[:, j]).flatten() for j in range(12)], dim=1)
    made = sums.masks()
    torch.testing.assert_close(made.gram, a.T @ a, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(made.linear, a.T @ target.flatten(), rtol=1e-5, atol=1e-3)


def test_tuned_is_the_least_squares_optimum_with_a_pull_towards_one():
    sums, student, weight, target = problem()
    kept = torch.tensor([0, 1, 5, 6, 9])
    a = torch.stack([torch.outer(student[:, j], weight[:, j]).flatten() for j in kept.tolist()], dim=1)
    free = torch.linalg.lstsq(a, target.flatten()[:, None]).solution[:, 0]
    made = sums.masks()
    torch.testing.assert_close(made.tuned(kept, 1e-12), free, rtol=1e-4, atol=1e-5)
    pull = made.ridge(0.5) ** 0.5  # as rows of their own: ‖T − A m‖² + λ‖m − 1‖²
    rows = torch.cat([a, pull * torch.eye(5, dtype=torch.float64)])
    right = torch.cat([target.flatten(), pull * torch.ones(5, dtype=torch.float64)])
    pulled = torch.linalg.lstsq(rows, right[:, None]).solution[:, 0]
    torch.testing.assert_close(made.tuned(kept, 0.5), pulled, rtol=1e-4, atol=1e-5)


def test_nothing_pruned_and_the_same_inputs_leave_the_mask_at_one():
    sums, *_ = problem(drift=0.0)
    torch.testing.assert_close(sums.masks().tuned(torch.arange(12), 1e-2), torch.ones(12, dtype=torch.float64))


def test_a_singular_matrix_gets_a_larger_ridge():
    lower = factor(torch.ones(4, 4, dtype=torch.float64), 0.0)
    assert lower.isfinite().all()
    zero = solve(torch.zeros(3, 3, dtype=torch.float64), torch.zeros(3, 1, dtype=torch.float64), 0.0)
    assert torch.equal(zero, torch.zeros(3, 1, dtype=torch.float64))  # units that never fire


def test_what_is_not_finite_is_an_error_that_says_where_to_look():
    with pytest.raises(ArithmeticError, match=r"nan or infinity. Check the calibration texts"):
        factor(torch.full((3, 3), float("nan")), 1e-6)


def test_large_layers_are_summed_in_float32(monkeypatch):
    monkeypatch.setattr("edgebolt.comp.least_squares.DOUBLE_UP_TO", 11)
    sums, student, weight, target = problem()
    assert sums.gram.dtype == torch.float32
    kept = torch.arange(6)
    explicit = float((target - student[:, :6] @ weight[:, :6].T).square().sum())
    assert sums.masks().error(kept, torch.ones(6)) == pytest.approx(explicit, rel=1e-3)
