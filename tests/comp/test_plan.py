import json

import pytest
from tiny_models import INNER, LAYERS, logits, prune, tiny

from edgebolt.common.anatomy import Anatomy
from edgebolt.comp import Comp
from edgebolt.comp.blocks import parameter_count
from edgebolt.comp.plan import Survey, make_plan
from edgebolt.comp.selection import RemovalOrder

IMPORTANCE = [0.9, 0.2, 0.1, 0.3]
EFFECT = [0.4, 0.02, 0.01, 0.03]


def order(units, effect, most=0.95):
    """Units that go one by one, the objective growing with the square of how many are gone."""
    gone = list(range(1, min(int(most * units), units - 1) + 1))
    return RemovalOrder(list(range(units)), gone, [(n / units) ** 2 for n in gone], max(1, units // 4), effect)


def survey(effect=EFFECT, most=0.95):
    orders = [{"attention": order(2, 5 * value, most), "ffn": order(INNER, value, most)} for value in effect]
    return Survey(IMPORTANCE, orders)


def plan(kind="llama", found=None, **options):
    model = tiny(kind)
    layers = list(Anatomy(model).layers)
    return make_plan(model.config.model_type, model.config, layers, found or survey(), Comp(**options)), layers


def removed(made, layers, neuron=3 * 16, group=2 * 16 * (4 + 8)):
    gone = sum(parameter_count(layers[index]) for index in made.dropped)
    return gone + sum(made.neurons) * neuron + sum(made.groups) * group


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5])
@pytest.mark.parametrize("attention", [False, True])
@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("allocation", ["effect", "inverse_importance", "uniform"])
def test_the_ratio_is_met_within_half_a_neuron(ratio, attention, depth, allocation):
    options = {"ratio": ratio, "depth_fraction": depth, "prune_attention": attention, "allocation": allocation}
    made, layers = plan(**options, round_to=1, largest_rate=0.95)
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
    options = {"ratio": 0.3, "depth_fraction": 0.0, "round_to": 1}
    made, _ = plan(**options, allocation="inverse_importance")
    assert made.neurons[2] > made.neurons[1] > made.neurons[3] > made.neurons[0] > 0
    same, _ = plan(**options, allocation="uniform")
    assert max(same.neurons) - min(same.neurons) <= 1


def test_layers_lose_until_the_next_neuron_of_each_would_cost_as_much():
    """Where the cost grows with the square of the share, shares are inverse to the effect."""
    made, _ = plan(found=survey([0.03, 0.02, 0.01, 0.03]), ratio=0.3, round_to=1)
    prices = [effect * (2 * gone + 1) for effect, gone in zip([3, 2, 1, 3], made.neurons, strict=True)]
    assert made.neurons[0] == pytest.approx(made.neurons[2] / 3, abs=1) and made.neurons[2] < 0.95 * INNER - 1
    assert max(prices) - min(prices) <= 2 * 3 * 1.5


def test_heads_and_neurons_have_one_price():
    """Heads that do little go before neurons that do much, and the other way round."""
    cheap, dear = survey(), survey()
    for own in cheap.orders:
        own["attention"].effect = 1e-9
    for own in dear.orders:
        own["attention"].effect = 1e9
    options = {"ratio": 0.3, "prune_attention": True, "round_to": 1}
    assert plan(found=cheap, **options)[0].groups == [1] * LAYERS
    assert plan(found=dear, **options)[0].groups == [0] * LAYERS


def test_a_block_of_which_nothing_can_go_stays_whole():
    found = survey()
    for own in found.orders:
        own["attention"] = RemovalOrder([0, 1], [], [])
    made, layers = plan(found=found, ratio=0.3, prune_attention=True, round_to=1)
    assert made.groups == [0] * LAYERS
    assert abs(removed(made, layers) - 0.3 * sum(map(parameter_count, layers))) <= 3 * 16 / 2


def test_uniform_layers_lose_equally_many():
    made, _ = plan(ratio=0.4, depth_fraction=0.7, round_to=4, uniform=True)
    assert made.dropped == [2] and len({number for index, number in enumerate(made.neurons) if index != 2}) == 1
    assert (INNER - made.neurons[0]) % 4 == 0


def test_nothing_to_remove():
    made, _ = plan(ratio=0.0)
    assert made.dropped == [] and made.neurons == made.groups == [0] * LAYERS
    assert plan(ratio=0.0, uniform=True, round_to=32)[0].neurons == [0] * LAYERS


@pytest.mark.parametrize("allocation", ["effect", "uniform"])
def test_too_much_is_refused(allocation):
    with pytest.raises(ValueError, match=r"at most 7,\d\d\d can go: lower the ratio"):
        plan(found=survey(most=0.8), ratio=0.9, allocation=allocation, largest_rate=0.8)


@pytest.mark.parametrize("ratio", [0.05, 0.2, 0.5])
@pytest.mark.parametrize("options", [{}, {"allocation": "uniform"}, {"uniform": True}])
def test_a_multiple_that_is_too_coarse_is_refused_and_nothing_is_changed(ratio, options):
    model = tiny("llama")
    before = logits(model)
    with pytest.raises(ValueError, match=r"round_to=64: with layers of \[48\] neurons, .* could not go: lower it"):
        prune(model, **{"ratio": ratio, "depth_fraction": 0.0, "round_to": 64, **options})
    assert (logits(model) == before).all() and type(model).__name__ == "LlamaForCausalLM"


def test_a_multiple_that_heads_or_layers_leave_nothing_to_is_taken():
    assert plan(ratio=0.25, depth_fraction=1.0, round_to=64)[0].neurons == [0] * LAYERS
    found = survey()
    for own in found.orders:
        own["attention"].effect = 1e-9
    made, _ = plan(found=found, ratio=0.125, prune_attention=True, round_to=64)
    assert sum(made.groups) == LAYERS and made.neurons == [0] * LAYERS


def test_a_survey_survives_json():
    found = survey()
    found.orders[1]["ffn"].rises[0] = 0.1 + 0.2
    assert Survey.from_plain(json.loads(json.dumps(found.to_plain()))) == found
    assert found.effect() == EFFECT and Survey([1.0], [{}]).effect() == []
