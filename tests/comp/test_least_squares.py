import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgebolt.comp.least_squares import Sublayer, factor, solve


def problem(inputs=12, outputs=7, tokens=60, seed=0, centred=False, mean=0.0):
    """Sums, and in float64 what they are of: the inputs, less their mean if centred, and the weight."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=generator)
    x = torch.randn(tokens, inputs, generator=generator) + mean * torch.randn(inputs, generator=generator)
    sums = Sublayer(weight, centred)
    for part in x.split(25):
        sums.add(part)
    x = x.double()
    return sums, x - x.mean(0) if centred else x, weight.double()


@pytest.mark.parametrize("centred", [False, True])
def test_the_sums_do_not_depend_on_the_batches(centred):
    sums, x, _ = problem(centred=centred, mean=3.0)
    assert sums.tokens == 60 and sums.weight.dtype == torch.float64
    torch.testing.assert_close(sums.gram, x.T @ x, rtol=1e-5, atol=1e-4)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=6), st.sampled_from([0.0, 1.0, 100.0]), st.integers(0, 9))
def test_centred_sums_are_those_of_all_inputs_less_their_mean(sizes, mean, seed):
    """Of batches of any size, empty ones too, whose own means differ, and of means far above what varies."""
    generator = torch.Generator().manual_seed(seed)
    batches = [mean + torch.randn(1, 5, generator=generator) + torch.randn(n, 5, generator=generator) for n in sizes]
    sums = Sublayer(torch.ones(2, 5), centred=True)
    for batch in batches:
        sums.add(batch)
    x = torch.cat(batches).double()
    wanted = x.mean(0) if len(x) else torch.zeros(5, dtype=torch.float64)
    torch.testing.assert_close(sums.mean, wanted, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(sums.gram, (x - wanted).T @ (x - wanted), rtol=1e-4, atol=1e-3)
    assert sums.tokens == sum(sizes)


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("bound", [11, 4096], ids=["float32", "float64"])
def test_sums_survive_their_file(centred, bound, tmp_path, monkeypatch):
    monkeypatch.setattr("edgebolt.comp.least_squares.DOUBLE_UP_TO", bound)
    sums, *_ = problem(centred=centred, mean=2.0)
    sums.save(tmp_path / "sums.safetensors")
    assert (tmp_path / "sums.safetensors").stat().st_size < 4 * (12 * 12 + 12) + 300
    again = Sublayer.load(tmp_path / "sums.safetensors", sums.weight.float())
    assert torch.equal(again.gram, sums.gram.float().to(again.gram)) and torch.equal(again.weight, sums.weight)
    assert again.gram.dtype == again.weight.dtype == (torch.float32 if bound == 11 else torch.float64)
    assert (again.mean is None) is not centred
    assert not centred or torch.equal(again.mean, sums.mean.float().to(again.mean))


@pytest.mark.parametrize("centred", [False, True])
def test_the_mask_problem_is_the_explicit_norm(centred):
    sums, x, weight = problem(centred=centred, mean=1.0)
    kept = torch.tensor([0, 2, 3, 7, 11])
    mask = torch.tensor([0.5, 1.0, -1.5, 2.0, 0.1], dtype=torch.float64)
    explicit = float((x @ weight.T - x[:, kept] * mask @ weight[:, kept].T).square().sum())
    assert sums.masks().error(kept, mask) == pytest.approx(explicit, rel=1e-5)
    assert sums.masks().constant == pytest.approx(float((x @ weight.T).square().sum()), rel=1e-5)


def test_a_mask_on_groups_of_inputs_is_the_explicit_norm():
    sums, x, weight = problem()
    heads = sums.masks(unit=4)
    assert heads.gram.shape == (3, 3)
    kept, mask = torch.tensor([0, 2]), torch.tensor([0.7, -1.2], dtype=torch.float64)
    columns = torch.tensor([0, 1, 2, 3, 8, 9, 10, 11])
    out = x[:, columns] * mask.repeat_interleave(4) @ weight[:, columns].T
    assert heads.error(kept, mask) == pytest.approx(float((x @ weight.T - out).square().sum()), rel=1e-5)


@pytest.mark.parametrize("centred", [False, True])
def test_the_error_of_a_weight_is_the_explicit_norm(centred):
    sums, x, weight = problem(centred=centred, mean=1.0)
    kept = torch.tensor([1, 4, 5])
    other = torch.randn(7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    explicit = float((x @ weight.T - x[:, kept] @ other.T).square().sum())
    assert sums.error(kept, other) == pytest.approx(explicit, rel=1e-5)


def test_the_gram_matrix_is_that_of_the_units_outputs():
    """``G = AᵀA`` with column ``j`` of ``A`` all that unit ``j`` adds to the output."""
    sums, x, weight = problem()
    a = torch.stack([torch.outer(x[:, j], weight[:, j]).flatten() for j in range(12)], dim=1)
    made = sums.masks()
    torch.testing.assert_close(made.gram, a.T @ a, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(made.linear, a.T @ (x @ weight.T).flatten(), rtol=1e-5, atol=1e-3)


def test_tuned_is_the_least_squares_optimum_with_a_pull_towards_one():
    sums, x, weight = problem()
    kept, target = torch.tensor([0, 1, 5, 6, 9]), (x @ weight.T).flatten()
    a = torch.stack([torch.outer(x[:, j], weight[:, j]).flatten() for j in kept.tolist()], dim=1)
    free = torch.linalg.lstsq(a, target[:, None]).solution[:, 0]
    made = sums.masks()
    torch.testing.assert_close(made.tuned(kept, 1e-12), free, rtol=1e-4, atol=1e-5)
    pull = made.ridge(0.5) ** 0.5  # as rows of their own: ‖T − A m‖² + λ‖m − 1‖²
    rows = torch.cat([a, pull * torch.eye(5, dtype=torch.float64)])
    right = torch.cat([target, pull * torch.ones(5, dtype=torch.float64)])
    pulled = torch.linalg.lstsq(rows, right[:, None]).solution[:, 0]
    torch.testing.assert_close(made.tuned(kept, 0.5), pulled, rtol=1e-4, atol=1e-5)


def test_nothing_pruned_leaves_the_mask_at_one():
    sums, *_ = problem()
    torch.testing.assert_close(sums.masks().tuned(torch.arange(12), 1e-2), torch.ones(12, dtype=torch.float64))


def test_a_singular_matrix_gets_a_larger_ridge():
    lower = factor(torch.ones(4, 4, dtype=torch.float64), 0.0)
    assert lower.isfinite().all()
    zero = solve(torch.zeros(3, 3, dtype=torch.float64), torch.zeros(3, 1, dtype=torch.float64), 0.0)
    assert torch.equal(zero, torch.zeros(3, 1, dtype=torch.float64))  # units that never fire


def test_what_is_not_finite_is_an_error_that_says_where_to_look():
    with pytest.raises(ArithmeticError, match=r"nan or infinity. Check the calibration texts"):
        factor(torch.full((3, 3), float("nan")), 1e-6)


@pytest.mark.parametrize("centred", [False, True])
def test_large_layers_are_summed_in_float32(centred, monkeypatch):
    monkeypatch.setattr("edgebolt.comp.least_squares.DOUBLE_UP_TO", 11)
    sums, x, weight = problem(centred=centred, mean=1.0)
    assert sums.gram.dtype == torch.float32
    explicit = float((x[:, 6:] @ weight[:, 6:].T).square().sum())
    assert sums.masks().error(torch.arange(6), torch.ones(6)) == pytest.approx(explicit, rel=1e-3)
