import pytest
from tiny_models import INNER, LAYERS, tiny

from edgebolt.common.anatomy import Anatomy
from edgebolt.comp import Comp
from edgebolt.comp.blocks import parameter_count
from edgebolt.comp.plan import Plan, make_plan

IMPORTANCE = [0.9, 0.2, 0.1, 0.3]


def plan(kind="llama", **options):
    model = tiny(kind)
    layers = list(Anatomy(model).layers)
    return make_plan(model.config.model_type, model.config, layers, IMPORTANCE, Comp(**options)), layers


def removed(made, layers, neuron=3 * 16, group=2 * 16 * (4 + 8)):
    gone = sum(parameter_count(layers[index]) for index in made.dropped)
    return gone + sum(made.neurons) * neuron + sum(made.groups) * group


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5])
@pytest.mark.parametrize("attention", [False, True])
@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_the_ratio_is_met_within_half_a_neuron(ratio, attention, depth):
    made, layers = plan(ratio=ratio, depth_fraction=depth, prune_attention=attention, round_to=1, largest_rate=0.95)
    wanted = ratio * sum(map(parameter_count, layers))
    assert abs(removed(made, layers) - wanted) <= 3 * 16 / 2
    assert len(made.dropped) == int(ratio * depth * LAYERS)
    assert all(made.neurons[index] == made.groups[index] == 0 for index in made.dropped)


def test_one_key_value_head_is_left_of_every_layer():
    made, _ = plan(ratio=0.7, depth_fraction=0.0, prune_attention=True, round_to=1, largest_rate=0.95)
    assert max(made.groups) == 1 and all(number < INNER for number in made.neurons)


def test_widths_are_multiples():
    made, _ = plan(ratio=0.3, round_to=8)
    for index, number in enumerate(made.neurons):
        assert index in made.dropped or (INNER - number) % 8 == 0


def test_less_important_layers_lose_more():
    made, _ = plan(ratio=0.3, depth_fraction=0.0, round_to=1)
    assert made.neurons[2] > made.neurons[1] > made.neurons[3] > made.neurons[0] > 0
    same, _ = plan(ratio=0.3, depth_fraction=0.0, round_to=1, allocation="uniform")
    assert max(same.neurons) - min(same.neurons) <= 1


def test_uniform_layers_lose_equally_many():
    made, _ = plan(ratio=0.4, depth_fraction=0.7, round_to=4, uniform=True)
    assert made.dropped == [2] and len({number for index, number in enumerate(made.neurons) if index != 2}) == 1
    assert (INNER - made.neurons[0]) % 4 == 0


def test_nothing_to_remove():
    made, _ = plan(ratio=0.0)
    assert made.dropped == [] and made.neurons == made.groups == [0] * LAYERS
    assert plan(ratio=0.0, uniform=True, round_to=32)[0].neurons == [0] * LAYERS


def test_too_much_is_refused():
    with pytest.raises(ValueError, match=r"at most 80% of .* can go: lower the ratio"):
        plan(ratio=0.9, depth_fraction=0.0)


def test_a_quota_is_handed_on_in_proportion():
    made = Plan([1.0] * 4, [], [10, 4, 8, 4], [0] * 4, [40] * 4)
    assert made.hand_on(0, unmet=8, round_to=1) == 0
    assert made.neurons == [10, 6, 12, 6]


def test_only_multiples_are_handed_on_and_no_layer_gets_more_than_it_can_lose():
    made = Plan([1.0] * 4, [], [16, 8, 8, 0], [0] * 4, [40, 16, 40, 40])
    assert made.hand_on(0, unmet=24, round_to=8) == 0
    assert made.neurons == [16, 16, 24, 0]  # a layer that loses nothing goes on losing nothing
    assert made.hand_on(1, unmet=24, round_to=8) == 8
    assert made.neurons == [16, 16, 40, 0]
    assert made.hand_on(2, unmet=8, round_to=8) == 8  # nobody is behind


def test_a_plan_survives_json():
    import json

    made, _ = plan(ratio=0.3, prune_attention=True)
    assert Plan(**json.loads(json.dumps(made.to_plain()))) == made
