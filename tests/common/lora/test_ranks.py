import copy

import pytest
import torch
from tiny_text import bert

from edgebolt.common.lora import pairs, ranks_of, set_ranks


def products(module):
    parameters = dict(module.named_parameters())
    return [(parameters[b] @ parameters[a]).detach() for a, b in pairs(parameters)]


def trained(net):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for a, b in pairs(dict(net.named_parameters())):
            for name in (a, b):
                parameter = net.get_parameter(name)
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return net


def test_growing_keeps_the_function_and_the_scale(module, batch):
    net = trained(module(ranks=2)).eval()
    before = net.model(**batch).logits
    set_ranks(net, [2, 3, 5])
    assert ranks_of(net) == [2, 3, 5]
    torch.testing.assert_close(net.model(**batch).logits, before)
    parameters = dict(net.named_parameters())
    (a, b) = pairs(parameters)[-1]
    assert parameters[a].shape == (5, 16) and parameters[b].shape == (16, 5)
    assert not parameters[b][:, 2:].any() and parameters[a][2:].abs().max() <= 16**-0.5  # as PEFT draws them
    assert parameters[a][2:].std() > 0.3 * 16**-0.5


def test_shrinking_what_was_trained_is_the_best_approximation(module):
    net = trained(module(ranks=4))
    wide = products(net)
    set_ranks(net, [2, 2, 4])
    for was, (narrow, rank) in zip(wide, zip(products(net), [2, 2, 2, 2, 4, 4], strict=True), strict=True):
        left, sizes, right = torch.linalg.svd(was)
        best = left[:, :rank] * sizes[:rank] @ right[:rank]
        torch.testing.assert_close(narrow, best, atol=1e-4, rtol=1e-4)


def test_shrinking_what_was_not_trained_keeps_the_first_rows(module):
    net = module(ranks=4)
    before = {name: parameter.clone() for name, parameter in net.named_parameters()}
    set_ranks(net, [1, 2, 4])
    for a, b in pairs(before):
        here = net.get_parameter(a)
        assert torch.equal(here, before[a][: len(here)]) and not net.get_parameter(b).any()


def test_the_same_ranks_change_nothing(module):
    net = module(ranks=4)
    before = dict(net.named_parameters())
    set_ranks(net, [4, 4, 4])
    assert all(parameter is before[name] for name, parameter in net.named_parameters())


def test_the_configuration_says_the_ranks(module):
    from peft import get_peft_model

    net = module(ranks=4)
    set_ranks(net, [1, 2, 3])
    again = get_peft_model(bert(), copy.deepcopy(net.model.peft_config["default"]))
    assert ranks_of(again) == [1, 2, 3]
    scales = {part.scaling["default"] for part in again.modules() if hasattr(part, "lora_A")}
    assert scales == {2.0}


@pytest.mark.parametrize("ranks", [[1, 2], [1, 2, 0], [1, 2, 17]])
def test_refusals(module, ranks):
    with pytest.raises(ValueError, match="ranks"):
        set_ranks(module(), ranks)
