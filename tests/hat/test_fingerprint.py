import copy

import pytest
import torch
from tiny_hat import gpt2, llama, parts

from edgebolt.hat import fingerprint, split


def changed(path, device_layers=2):
    """Of a copy of the model with one weight a little larger."""
    model = copy.deepcopy(llama())
    with torch.no_grad():
        model.get_submodule(path).weight.view(-1)[0] += 0.1
    return fingerprint(split(model, device_layers))


def test_the_same_checkpoint_has_the_same_name():
    assert fingerprint(split(copy.deepcopy(llama()), 2)) == fingerprint(parts())
    assert len(fingerprint(parts())) == 32 and int(fingerprint(parts()), 16)


def test_it_is_the_same_in_every_process():
    # whoever changes this makes devices and clouds of two versions strangers
    model = copy.deepcopy(gpt2())
    with torch.no_grad():
        for number, weight in enumerate(model.parameters()):
            weight.copy_(torch.arange(weight.numel()).view_as(weight) % 7 + number)
    assert fingerprint(split(model, 2)) == "4ad0fa161cb7551504031367c46ac81d"


@pytest.mark.parametrize(
    "path", ["model.embed_tokens", "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj", "model.norm"]
)
def test_another_weight_of_the_device_is_another_name(path):
    assert changed(path) != fingerprint(parts())


def test_the_head_counts():
    assert changed("lm_head") != fingerprint(parts())


def test_another_cut_and_another_model_are_other_names():
    names = {fingerprint(split(llama(), layers)) for layers in (1, 2, 3, 4)}
    names |= {fingerprint(split(llama(1), 2)), fingerprint(split(gpt2(), 2))}
    assert len(names) == 6


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_dtype_does_not_count(dtype):
    model = copy.deepcopy(llama()).float()
    assert fingerprint(split(copy.deepcopy(model).to(dtype), 2)) == fingerprint(split(model, 2))


def test_large_weights_are_sampled_to_their_end():
    from edgebolt.hat.fingerprint import _sample

    for count in (1, 4096, 8191, 8192, 10**6):
        assert min(count, 4096) <= len(_sample(torch.zeros(count))) < 8192
    late = torch.zeros(10**6)
    late[-300:] = 1
    assert _sample(late).any()
