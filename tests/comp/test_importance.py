import torch

from edgebolt.comp.importance import BlockInfluence


def test_one_minus_the_mean_cosine_over_tokens_of_all_batches():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(30, 8, generator=generator), torch.randn(30, 8, generator=generator)
    influence = BlockInfluence()
    for a, b in zip(x.split([1, 20, 9]), y.split([1, 20, 9]), strict=True):
        influence.add(a, b)
    cosines = [(a @ b / (a.norm() * b.norm())).item() for a, b in zip(x.double(), y.double(), strict=True)]
    assert abs(influence.value - (1 - sum(cosines) / 30)) < 1e-6


def test_a_layer_that_changes_nothing_has_no_importance():
    influence = BlockInfluence()
    influence.add(torch.eye(4), 3 * torch.eye(4))
    assert abs(influence.value) < 1e-6
