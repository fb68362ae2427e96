from edgebolt.common.lora import adapter_layers, layers_held, pairs


def names(path, layers):
    return [path.format(layer) + f".lora_{half}.default.weight" for layer in layers for half in "AB"]


def test_layers_are_counted_over_those_with_lora():
    found = adapter_layers([*names("model.encoder.layer.{}.query", [6, 7, 8]), "model.encoder.layer.3.query.weight"])
    assert sorted(found.values()) == [0, 0, 1, 1, 2, 2]


def test_numbers_that_are_always_the_same_do_not_count():
    found = adapter_layers(names("models.1.layers.{}.q_proj", range(11)))
    assert found["models.1.layers.10.q_proj.lora_A.default.weight"] == 10
    assert layers_held(found) == 11


def test_numbers_inside_a_layer_do_not_count():
    inside = [f"layers.{layer}.experts.{e}.up.lora_A.weight" for layer in (0, 1) for e in range(4)]
    assert layers_held(inside) == 2


def test_lora_outside_of_layers_is_left_out():
    outside = ["embed_tokens.lora_embedding_A.default", "lm_head.lora_A.default.weight"]
    assert set(adapter_layers([*names("layers.{}.q", [0, 1]), *outside]).values()) == {0, 1}
    assert not set(outside) & adapter_layers([*names("layers.{}.q", [0, 1]), *outside]).keys()
    assert layers_held(outside) == 0


def test_one_layer_and_none():
    assert layers_held(names("layer.{}.query", [4])) == 1
    assert layers_held(["head.weight", "exploratory.bias"]) == 0 and adapter_layers([]) == {}


def test_pairs_have_both_halves():
    both = names("layer.{}.query", [0])
    assert pairs([*both, "layer.1.query.lora_A.default.weight"]) == [tuple(both)]
