import pytest
import torch
from tiny_models import DECODERS, FAMILIES, LAYERS, ids, logits, prune, saved, tiny

from edgebolt.common.anatomy import Anatomy


@pytest.mark.parametrize("kind", FAMILIES)
def test_nothing_to_remove_changes_nothing(kind):
    model = tiny(kind)
    before, kind_before = logits(model), type(model)
    report = prune(model, ratio=0.0)
    assert torch.equal(before, logits(model)) and type(model) is kind_before
    assert report.ratio == 0 and report.dropped == [] and report.parameters[0] == report.parameters[1]


@pytest.mark.parametrize("kind", FAMILIES)
def test_layers_know_their_new_places(kind, pair):
    """Stale ones are an IndexError in a plain forward already, whose cache has as many layers as the config says."""
    model = pair(kind).model
    layers = Anatomy(model).layers
    assert 0 < len(layers) == model.config.num_hidden_layers < LAYERS
    for index, layer in enumerate(layers):
        places = {module.layer_idx for module in layer.modules() if hasattr(module, "layer_idx")}
        assert places <= {index} and (places or kind == "mpnet")
    if kind in DECODERS:
        with torch.no_grad():
            out = model(ids(2, 6), use_cache=True)
        assert out.past_key_values.get_seq_length() == 6
        assert len(out.past_key_values.layers) == len(layers)


def test_lists_of_layers_in_the_config_are_cut_along(pair):
    made = pair("qwen2")
    kept = [entry["layer"] for entry in made.report.layers]
    windows = ["full_attention", "sliding_attention"] * 2
    assert made.model.config.layer_types == [windows[index] for index in kept] != windows
    for layer, entry in zip(Anatomy(made.model).layers, made.report.layers, strict=True):
        assert layer.self_attn.sliding_window == (None if entry["layer"] % 2 == 0 else 4)
    made.model.config.validate()


def test_a_layer_in_the_middle_takes_its_window_along():
    """With layer 1 gone the pattern of windows is no longer every second."""
    model = tiny("qwen2")
    for name in ("o_proj", "down_proj"):  # a layer that does nothing is the first to go
        module = next(m for n, m in model.model.layers[1].named_modules() if n.endswith(name))
        torch.nn.init.zeros_(module.weight)
    before = logits(model, ids(3, 10))
    report = prune(model, ratio=0.25, depth_fraction=1.0)
    assert report.dropped == [1]
    assert model.config.layer_types == ["full_attention", "full_attention", "sliding_attention"]
    torch.testing.assert_close(logits(model, ids(3, 10)), before)


def test_gpt2_keeps_the_scale_of_the_original_depth(pair):
    made = pair("gpt2_inverse")
    for layer, entry in zip(Anatomy(made.model).layers, made.report.layers, strict=True):
        assert layer.attn.scaling == 4**-0.5 / (entry["layer"] + 1)


def test_gpt2_with_a_layer_gone_before_others_reloads_with_the_same_scale(tmp_path):
    from tiny_models import reload

    model = tiny("gpt2_inverse")
    for module in (model.transformer.h[1].attn.c_proj, model.transformer.h[1].mlp.c_proj):
        torch.nn.init.zeros_(module.weight), torch.nn.init.zeros_(module.bias)
    before = logits(model)
    assert prune(model, ratio=0.25, depth_fraction=1.0).dropped == [1]
    torch.testing.assert_close(logits(model), before)
    assert torch.equal(logits(reload(saved(model, tmp_path), "gpt2")), logits(model))


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_key_value_head_is_left_of_every_layer(kind):
    model = tiny(kind)
    report = prune(model, ratio=0.7, largest_rate=0.95, prune_attention=True, variance_bound=1e9)
    assert min(len(entry["groups"]) for entry in report.layers) >= 1
    assert min(len(entry["neurons"]) for entry in report.layers) >= 1
    assert logits(model).isfinite().all()


@pytest.mark.parametrize("kind", FAMILIES)
def test_indices_are_sorted_and_the_same_each_time(kind, pair):
    model = tiny(kind)
    torch.rand(3)  # the global generator has no say
    report = prune(model, prune_attention=True)
    other = pair(kind).report
    assert {**report.to_plain(), "seconds": 0} == {**other.to_plain(), "seconds": 0}
    for entry in report.layers:
        for key in ("neurons", "groups"):
            assert entry[key] == sorted(set(entry[key]))


def test_the_global_generator_is_left_alone(tmp_path):
    model = tiny("llama")
    saved(model, tmp_path / "dense")
    state = torch.get_rng_state()
    prune(model)
    assert torch.equal(state, torch.get_rng_state())
    prune(str(tmp_path / "dense"), output=tmp_path / "small")
    assert torch.equal(state, torch.get_rng_state())


def test_after_an_error_the_model_is_as_it_was(monkeypatch):
    model = tiny("llama")
    before = logits(model)
    monkeypatch.setattr("edgebolt.comp.sweep.recovered_weight", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prune(model)
    assert torch.equal(before, logits(model)) and type(model).__name__ == "LlamaForCausalLM"


@pytest.mark.parametrize("training", [False, True])
def test_the_mode_stays(training):
    model = tiny("bert").train(training)
    prune(model)
    assert model.training is training and all(module.training is training for module in model.modules())


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_chunks_of_the_feed_forward_change_nothing(kind, pair, tmp_path):
    from tiny_models import reload, same_state

    model = tiny(kind, chunk_size_feed_forward=4)
    saved(model, tmp_path / "dense")
    prune(model, prune_attention=True)
    prune(str(tmp_path / "dense"), output=tmp_path / "small", prune_attention=True)
    small = reload(tmp_path / "small", kind)
    assert same_state(model, pair(kind).model) and same_state(model, small)
    for kept in (model, small):
        assert kept.config.chunk_size_feed_forward == 4
        assert {layer.chunk_size_feed_forward for layer in Anatomy(kept).layers} == {4}


@pytest.mark.parametrize("attention", ["flash_attention_2", "flash_attention_3"])
def test_flash_attention_is_refused_before_anything_is_run(attention, monkeypatch):
    model = tiny("llama")
    model.config._attn_implementation = attention
    monkeypatch.setattr("edgebolt.comp.comp.capture_batches", lambda *args: pytest.fail("was run"))
    with pytest.raises(NotImplementedError, match=rf"{attention}.*load it with attn_implementation='sdpa'"):
        prune(model)


def test_frozen_parameters_stay_frozen():
    model = tiny("llama")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    before = {name: parameter for name, parameter in model.named_parameters()}
    prune(model)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert all(any(parameter is old for old in before.values()) for parameter in model.parameters())


@pytest.mark.parametrize("kind", ["llama", "bert"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes_are_kept_and_scored_in_float32(kind, dtype, tmp_path, monkeypatch):
    from tiny_models import reload, same_state, weights

    from edgebolt.comp.least_squares import Sublayer

    seen, add = set(), Sublayer.add

    def noted(self, inputs):
        seen.update((inputs.dtype, self.gram.dtype))
        add(self, inputs)

    monkeypatch.setattr(Sublayer, "add", noted)
    saved(tiny(kind).to(dtype), tmp_path / "dense")
    model = reload(tmp_path / "dense", kind)  # to(dtype) would have rounded the rotations' frequencies too
    prune(str(tmp_path / "dense"), output=tmp_path / "small", prune_attention=True)
    prune(model, prune_attention=True)
    assert seen == {torch.float32, torch.float64}
    assert {tensor.dtype for tensor in weights(tmp_path / "small").values()} == {dtype}
    small = reload(tmp_path / "small", kind)
    assert {parameter.dtype for parameter in small.parameters()} == {dtype} and small.dtype == dtype
    assert same_state(small, model) and torch.equal(logits(small), logits(model))
    wide = reload(tmp_path / "small", kind, dtype=torch.float32)
    assert {parameter.dtype for parameter in wide.parameters()} == {torch.float32}
