import pytest
import torch
from tiny_models import ENCODERS, FAMILIES, LAYERS, WORDS, ids, logits, tiny

from edgebolt.common.anatomy import Anatomy
from edgebolt.comp.calls import capture, run_layer, watching


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
    assert calibration.tokens == int(mask.sum()) and torch.equal(calibration.real[0], mask.bool())


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


def test_what_a_projection_gets_and_gives():
    layer = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    x = torch.randn(5, 3)
    with watching(layer, "1") as seen:
        layer(x)
    layer(x)
    ((inputs, outputs),) = seen
    assert torch.equal(inputs, layer[0](x)) and torch.equal(outputs, layer(x))
    with pytest.raises(RuntimeError), watching(layer, "1"):
        layer(x[:, :2])
    assert not layer[1]._forward_hooks  # after an error too


def test_left_padding_counts_as_padding():
    model = tiny("llama")
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    batch = torch.randint(4, WORDS, (2, 5), generator=torch.Generator().manual_seed(0))
    calibration = capture(model, [lambda: model(batch, attention_mask=mask)])
    from edgebolt.comp.sweep import counted

    assert counted(calibration, 0, skip_first=False).tolist() == mask.bool().tolist()
    assert counted(calibration, 0, skip_first=True).int().tolist() == [[0, 0, 0, 1, 1], [0, 1, 1, 1, 1]]
