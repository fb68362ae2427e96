import copy

import pytest
import torch
from tiny_models import ENCODERS, FAMILIES, HEAD, HEADS, INNER, WIDTH, ids, logits, tiny
from torch import nn
from transformers.pytorch_utils import Conv1D

from edgebolt.common.anatomy import FAMILIES as ROWS
from edgebolt.common.anatomy import Anatomy
from edgebolt.comp.blocks import (
    attention_block,
    ffn_block,
    keep_heads,
    keep_neurons,
    parameter_count,
    resize_layer,
    unit_parameters,
)
from edgebolt.comp.calls import capture, run_layer


def one_layer(kind, index=1):
    """Family, model, a copy of a layer, hidden states that enter it and the call."""
    model = tiny(kind)
    calibration = capture(model, [lambda: model(ids(3, 9))])
    layer = copy.deepcopy(Anatomy(model).layers[index])
    return model.config.model_type, model, layer, 2 * calibration.hidden[0], calibration.calls[0][index]


def masked(layer, consumer, gone):
    """The dense layer with the consumer's columns for ``gone`` inputs at zero."""
    layer = copy.deepcopy(layer)
    module = layer.get_submodule(consumer)
    with torch.no_grad():
        (module.weight.T if isinstance(module, nn.Linear) else module.weight)[gone] = 0.0
    return layer


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("part", ["ffn", "attention"])
def test_compact_equals_masked(kind, part):
    family, model, layer, hidden, call = one_layer(kind)
    block = ffn_block(family, layer) if part == "ffn" else attention_block(family, layer, model.config)
    kept = torch.arange(0, block.units, 3) if part == "ffn" else torch.tensor([block.units - 1])
    gone = [i for i in range(block.unit * block.units) if i not in block.columns(kept).tolist()]
    wanted = run_layer(masked(layer, block.consumer, gone), hidden, call)
    assert (wanted - run_layer(layer, hidden, call)).abs().max() > 1e-2
    if part == "ffn":
        keep_neurons(family, layer, kept)
    else:
        keep_heads(family, layer, kept, model.config)
    assert (run_layer(layer, hidden, call) - wanted).abs().max() < 1e-5


@pytest.mark.parametrize("kind", FAMILIES)
def test_twice_a_cut_is_a_cut(kind):
    """Indices count what the layer has now."""
    family, model, layer, hidden, call = one_layer(kind)
    other = copy.deepcopy(layer)
    for kept in (torch.tensor([0, 1, 4, 7, 30]), torch.tensor([0, 2, 4])):
        keep_neurons(family, layer, kept)
    keep_neurons(family, other, torch.tensor([0, 4, 30]))
    if attention_block(family, layer, model.config).units == 4:
        for kept in (torch.tensor([1, 2, 3]), torch.tensor([0, 2])):
            keep_heads(family, layer, kept, model.config)
        keep_heads(family, other, torch.tensor([1, 3]), model.config)
    assert torch.equal(run_layer(layer, hidden, call), run_layer(other, hidden, call))


def test_a_key_value_head_takes_all_of_its_query_heads_along():
    _, model, layer, *_ = one_layer("llama")
    attention = layer.self_attn
    before = {name: getattr(attention, f"{name}_proj").weight.clone() for name in "qkvo"}
    groups = attention.num_key_value_groups
    keep_heads("llama", layer, torch.tensor([1]), model.config)
    half = HEADS // 2 * HEAD
    assert torch.equal(attention.q_proj.weight, before["q"][half:])
    assert torch.equal(attention.o_proj.weight, before["o"][:, half:])
    assert torch.equal(attention.k_proj.weight, before["k"][HEAD:])
    assert torch.equal(attention.v_proj.weight, before["v"][HEAD:])
    assert attention.num_key_value_groups == groups == 2
    assert attention.head_dim == HEAD  # no channel of a head goes: keys and queries are paired by the rotation


def test_biases_go_with_their_rows_and_the_consumers_stays():
    _, model, layer, *_ = one_layer("qwen2")
    attention = layer.self_attn
    before = {name: getattr(attention, f"{name}_proj").bias.clone() for name in "qkv"}
    keep_heads("qwen2", layer, torch.tensor([0]), model.config)
    assert torch.equal(attention.q_proj.bias, before["q"][:8])
    assert torch.equal(attention.k_proj.bias, before["k"][:4]) and torch.equal(attention.v_proj.bias, before["v"][:4])

    _, _, layer, *_ = one_layer("bert")
    first, last = layer.intermediate.dense.bias.clone(), layer.output.dense.bias.clone()
    keep_neurons("bert", layer, torch.tensor([3, 5]))
    assert torch.equal(layer.intermediate.dense.bias, first[[3, 5]])
    assert torch.equal(layer.output.dense.bias, last)


def test_conv1d_has_its_axes_the_other_way_round():
    _, model, layer, *_ = one_layer("gpt2")
    fused, out, up, down = layer.attn.c_attn, layer.attn.c_proj, layer.mlp.c_fc, layer.mlp.c_proj
    weight, bias = fused.weight.clone(), fused.bias.clone()
    keep_heads("gpt2", layer, torch.tensor([0, 2]), model.config)
    keep_neurons("gpt2", layer, torch.tensor([1, 40]))
    rows = [*range(4), *range(8, 12)]
    columns = [WIDTH * part + row for part in range(3) for row in rows]  # queries, keys, values
    assert torch.equal(fused.weight, weight[:, columns]) and torch.equal(fused.bias, bias[columns])
    assert (fused.nx, fused.nf) == (WIDTH, 24) and (out.nx, out.nf) == (8, WIDTH)
    assert (up.nx, up.nf) == (WIDTH, 2) and (down.nx, down.nf) == (2, WIDTH)
    assert (layer.attn.num_heads, layer.attn.split_size) == (2, 8)


@pytest.mark.parametrize("kind", FAMILIES)
def test_attributes_say_what_the_weights_are(kind):
    family, model, layer, *_ = one_layer(kind)
    keep_neurons(family, layer, torch.arange(10))
    keep_heads(family, layer, torch.tensor([0]), model.config)
    for module in layer.modules():
        if isinstance(module, nn.Linear):
            assert module.weight.shape == (module.out_features, module.in_features)
            assert module.bias is None or module.bias.shape == (module.out_features,)
        elif isinstance(module, Conv1D):
            assert module.weight.shape == (module.nx, module.nf) and module.bias.shape == (module.nf,)
        if hasattr(module, "intermediate_size"):
            assert module.intermediate_size == 10
        if kind in ENCODERS and hasattr(module, "all_head_size"):
            assert (module.num_attention_heads, module.all_head_size) == (1, HEAD)


@pytest.mark.parametrize("kind", FAMILIES)
def test_parameters_are_the_same_objects_without_old_gradients(kind):
    family, model, layer, *_ = one_layer(kind)
    before = dict(layer.named_parameters())
    for parameter in before.values():
        parameter.grad = torch.ones_like(parameter)
    keep_neurons(family, layer, torch.arange(7))
    keep_heads(family, layer, torch.tensor([1]), model.config)
    for name, parameter in layer.named_parameters():
        assert parameter is before[name] and parameter.is_contiguous()
        assert parameter.grad is None or parameter.grad.shape == parameter.shape


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_unit_takes_as_many_parameters_along_as_is_planned_with(kind):
    family, model, layer, *_ = one_layer(kind)
    before = parameter_count(layer)
    block = ffn_block(family, layer)
    assert (block.unit, block.units) == (1, INNER)
    one = unit_parameters(family, block, layer, model.config)
    keep_neurons(family, layer, torch.arange(block.units - 1))
    assert before - parameter_count(layer) == one
    before = parameter_count(layer)
    block = attention_block(family, layer, model.config)
    assert block.unit * block.units == HEADS * HEAD
    one = unit_parameters(family, block, layer, model.config)
    keep_heads(family, layer, torch.arange(block.units - 1), model.config)
    assert before - parameter_count(layer) == one


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_fresh_layer_resized_fits_the_state_of_a_cut_one(kind):
    family, model, layer, hidden, call = one_layer(kind)
    fresh = copy.deepcopy(layer)
    for parameter in fresh.parameters():
        parameter.requires_grad_(False)
    keep_neurons(family, layer, torch.arange(9))
    keep_heads(family, layer, torch.tensor([0]), model.config)
    resize_layer(family, fresh, model.config, neurons=9, groups=1)
    fresh.load_state_dict(layer.state_dict())
    assert not any(parameter.requires_grad for parameter in fresh.parameters())
    if kind != "mpnet":  # whose heads are told apart by the relative positions' bias
        assert torch.equal(run_layer(fresh, hidden, call), run_layer(layer, hidden, call))


def test_columns_of_units():
    _, model, layer, *_ = one_layer("llama")
    block = attention_block("llama", layer, model.config)
    assert (block.unit, block.units) == (8, 2)
    assert block.columns(torch.tensor([1])).tolist() == list(range(8, 16))


def test_an_explicit_head_size_counts():
    """Qwen3-like: heads times their size is not the hidden width."""
    model = tiny("llama", head_dim=6)
    layer = Anatomy(model).layers[0]
    block = attention_block("llama", layer, model.config)
    assert (block.unit, block.units) == (12, 2)
    keep_heads("llama", layer, torch.tensor([1]), model.config)
    assert layer.self_attn.q_proj.weight.shape == (12, WIDTH) and logits(model).isfinite().all()


def test_every_family_has_a_row():
    assert {tiny(kind).config.model_type for kind in FAMILIES} <= set(ROWS)
