import pytest
import torch
from tiny_models import ENCODERS, FAMILIES, LAYERS, WORDS, ids, logits, tiny

from edgebolt.common.anatomy import Anatomy
from edgebolt.comp.calls import capture, first_sequences, run_layer, scaled_inputs, watching


@pytest.mark.parametrize(
    ("kind", "implementation"), [*((k, "eager") for k in FAMILIES), *((k, "sdpa") for k in FAMILIES[:-1])]
)
def test_layer_by_layer_equals_the_model(kind, implementation):  # MPNet has eager attention only
    model = tiny(kind, auto="AutoModel", attn_implementation=implementation)
    batch, mask = ids(3, 10), torch.ones(3, 10, dtype=torch.long)
    if kind in ENCODERS:
        mask[1, 7:] = 0
    layers = list(Anatomy(model).layers)
    calibration = capture(model, [lambda: model(batch, attention_mask=mask)])
    assert list(Anatomy(model).layers) == layers and len(calibration.calls[0]) == LAYERS
    hidden = calibration.hidden[0]
    for index, layer in enumerate(layers):
        hidden = run_layer(layer, hidden, calibration.calls[0][index])
    norm = Anatomy(model).norm
    hidden = hidden if norm is None else norm(hidden)
    assert torch.equal(hidden, logits(model, batch, attention_mask=mask))
    assert torch.equal(calibration.real[0], mask.bool())


def test_a_cache_is_left_alone():
    model = tiny("llama")
    calibration = capture(model, [lambda: model(ids(2, 6), use_cache=True)])
    for _ in range(2):  # a cache would have grown
        out = run_layer(Anatomy(model).layers[1], calibration.hidden[0], calibration.calls[0][1])
    assert out.shape == (2, 6, 16)


def test_the_model_comes_back_after_an_error():
    model = tiny("bert")
    before = logits(model)
    with pytest.raises(ZeroDivisionError):
        capture(model, [lambda: model(ids()), lambda: 1 / 0])
    assert torch.equal(before, logits(model))
    assert not model.bert._forward_pre_hooks


def test_a_batch_that_does_not_reach_the_layers_is_an_error():
    with pytest.raises(ValueError, match=r"ran through BertForMaskedLM without reaching its last layer"):
        model = tiny("bert")
        capture(model, [lambda: model.bert.embeddings(ids())])


def test_hidden_states_are_float32_whatever_the_model_is():
    model = tiny("llama").to(torch.bfloat16)
    calibration = capture(model, [lambda: model(ids(2, 6))])
    assert calibration.hidden[0].dtype == torch.float32
    cos, sin = calibration.calls[0][0][1]["position_embeddings"]
    assert cos.dtype == sin.dtype == torch.float32


def test_what_a_projection_gets():
    layer = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    x = torch.randn(5, 3)
    with watching(layer, "1") as seen:
        layer(x)
    layer(x)
    (inputs,) = seen
    assert torch.equal(inputs, layer[0](x))
    with pytest.raises(RuntimeError), watching(layer, "1"):
        layer(x[:, :2])
    assert not layer[1]._forward_pre_hooks  # after an error too


def test_left_padding_counts_as_padding():
    model = tiny("llama")
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    batch = torch.randint(4, WORDS, (2, 5), generator=torch.Generator().manual_seed(0))
    calibration = capture(model, [lambda: model(batch, attention_mask=mask)])
    from edgebolt.comp.sweep import counted

    assert counted(calibration, 0, skip_first=False).tolist() == mask.bool().tolist()
    assert counted(calibration, 0, skip_first=True).int().tolist() == [[0, 0, 0, 1, 1], [0, 1, 1, 1, 1]]


def test_a_projections_inputs_are_scaled_inside_the_block():
    layer, x = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)), torch.randn(5, 3)
    scale = torch.tensor([0.0, 1.0, 2.0, 0.5])
    plain = layer(x)
    with scaled_inputs(layer, "1", scale):
        scaled = layer(x)
    torch.testing.assert_close(scaled, (layer[0](x) * scale) @ layer[1].weight.T + layer[1].bias)
    assert torch.equal(layer(x), plain)
    with pytest.raises(RuntimeError), scaled_inputs(layer, "1", torch.ones(3)):
        layer(x)
    assert not layer[1]._forward_pre_hooks  # after an error too


def test_of_a_call_the_first_sequences_are_cut_and_what_all_share_stays():
    mask, shared, places = torch.randn(6, 1, 5, 5), torch.randn(1, 5, 8), torch.arange(6)
    rotations = (torch.randn(6, 5, 8), shared)
    named = {"position_ids": torch.randn(6, 5), "cache_position": places, "use_cache": False}
    args, kwargs = first_sequences(((mask, rotations, None), named), sequences=6, count=2)
    assert torch.equal(args[0], mask[:2]) and torch.equal(args[1][0], rotations[0][:2])
    assert args[1][1] is shared and args[2] is None and isinstance(args[1], tuple)
    assert kwargs["position_ids"].shape == (2, 5)
    assert kwargs["cache_position"] is places and kwargs["use_cache"] is False


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("count", [1, 3])
def test_the_first_sequences_run_alone_as_among_others(kind, count):
    """With padding, whose mask has a row for each sequence, and rotations that all share."""
    model, mask = tiny(kind), torch.ones(5, 10, dtype=torch.long)
    mask[0, 7:] = mask[3, 4:] = 0
    calibration = capture(model, [lambda: model(ids(5, 10), attention_mask=mask)])
    whole = calibration.hidden[0]
    some = whole[:count].clone()
    for index, layer in enumerate(Anatomy(model).layers):
        call = calibration.calls[0][index]
        whole, some = run_layer(layer, whole, call), run_layer(layer, some, first_sequences(call, 5, count))
    real = mask[:count].bool()
    torch.testing.assert_close(some[real], whole[:count][real], rtol=1e-4, atol=1e-5)
