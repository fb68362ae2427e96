"""What a run of the dense model measures: what each block does at the end of the network, and the sums."""

from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch
from tiny_models import INNER, LAYERS, ids, prune, tiny

from edgebolt.common.anatomy import Anatomy
from edgebolt.comp import Comp
from edgebolt.comp.blocks import attention_block, ffn_block, matrix
from edgebolt.comp.calls import capture_batches, scaled_inputs, watching
from edgebolt.comp.in_memory import LayersInMemory
from edgebolt.comp.least_squares import Sublayer
from edgebolt.comp.selection import removal_order
from edgebolt.comp.sweep import Seconds, survey_layers

pytestmark = pytest.mark.slow

OPTIONS = Comp(prune_attention=True, largest_rate=0.8, step=0.05, variance_bound=10.0, ridge=0.05)


def padded(count, size):
    """Batches of sequences, every third of which is padded on the right."""
    rows, mask = ids(count, 12), torch.ones(count, 12, dtype=torch.long)
    mask[::3, 8:] = 0
    batch = {"input_ids": rows, "attention_mask": mask}
    return [{name: value[start : start + size] for name, value in batch.items()} for start in range(0, count, size)]


def surveyed(model, batches, folder, **options):
    calibration = capture_batches(model, batches)
    return survey_layers(LayersInMemory(model), calibration, folder, replace(OPTIONS, **options), Seconds())


def run(model, batches, layer, path, inside=None):
    """Of each batch: what the projection at ``path`` gets, what leaves the last layer, and what the model gives."""
    seen, left, given = [], [], []
    anatomy = Anatomy(model)
    for batch in batches:
        with ExitStack() as stack:
            if inside is not None:
                stack.enter_context(scaled_inputs(anatomy.layers[layer], path, *inside))
            inputs = stack.enter_context(watching(anatomy.layers[layer], path))
            last = anatomy.layers[-1].register_forward_hook(
                lambda _, args, out: left.append(out[0] if isinstance(out, tuple) else out)
            )
            with torch.no_grad():
                given.append(model(**batch)[0])
            last.remove()
        seen.append(inputs[0])
    return seen, left, given


def divergence(logits, others):
    """Kullback and Leibler's, in nats."""
    expected, found = logits.double().log_softmax(-1), others.double().log_softmax(-1)
    return float((expected.exp() * (expected - found)).sum())


def by_hand(model, batches, index, name, sequences):
    """The order of a block, how many of its units go, and the effect of that."""
    layer, kind = Anatomy(model).layers[index], model.config.model_type
    block = ffn_block(kind, layer) if name == "ffn" else attention_block(kind, layer, model.config)
    consumer = layer.get_submodule(block.consumer)
    sums = Sublayer(matrix(consumer), centred=consumer.bias is not None)
    inputs, dense, chances = run(model, batches, index, block.consumer)
    real = [batch["attention_mask"].bool() for batch in batches]
    for given, counts in zip(inputs, real, strict=True):
        sums.add(given[counts])
    problem = sums.masks(block.unit)
    order = removal_order(problem, min(int(0.8 * block.units), block.units - 1), variance_bound=OPTIONS.variance_bound)
    gone = min(order.gone, key=lambda count: abs(count - block.units / 4))
    kept = order.kept(gone)
    scale = torch.zeros(block.units, dtype=torch.float64)
    scale[kept] = problem.tuned(kept, OPTIONS.ridge)
    inside = scale.repeat_interleave(block.unit).float(), None if sums.mean is None else sums.mean.float()
    _, cut, found = run(model, batches, index, block.consumer, inside)
    counts = real[0][:sequences]
    if "CausalLM" in type(model).__name__ or "LMHead" in type(model).__name__:
        words = torch.cat([batch["input_ids"].flatten() for batch in batches]).unique()
        expected, got = (made[0][:sequences][counts][:, words] for made in (chances, found))
        return order, gone, divergence(expected, got) / len(got)
    cosines = torch.cosine_similarity(dense[0][:sequences][counts], cut[0][:sequences][counts], dim=-1)
    return order, gone, float(1 - cosines.double().mean())


@pytest.mark.parametrize(
    ("kind", "auto"), [*((kind, "") for kind in ("llama", "qwen2", "gpt2", "bert", "mpnet")), ("llama", "AutoModel")]
)
@pytest.mark.parametrize(("size", "sequences"), [(8, 3), (3, 4)], ids=["some", "all"])
def test_an_effect_is_that_of_one_block_in_the_whole_model(kind, auto, size, sequences, tmp_path):
    """On the first sequences of the first batch, which may have fewer; padding does not count.

    It is that on the next token of a causal language model, among tokens that occur, and else on the hidden states.
    """
    model, batches = tiny(kind, auto), padded(24, size)
    survey = surveyed(model, batches, tmp_path, effect_sequences=sequences)
    effects = []
    for index, orders in enumerate(survey.orders):
        assert list(orders) == ["attention", "ffn"]
        for name, found in orders.items():
            order, gone, effect = by_hand(model, batches, index, name, sequences)
            assert (found.units, found.gone, found.probed) == (order.units, order.gone, gone)
            assert found.effect == pytest.approx(effect, rel=2e-3, abs=1e-7)
            effects.append(effect)
    assert min(effects) > 1e-6 and max(effects) > 1.5 * min(effects)
    assert survey.effect() == [own["ffn"].effect for own in survey.orders]
    assert survey.orders[0]["ffn"].probed == INNER // 4


def test_what_later_sequences_hold_has_no_say(tmp_path):
    """But for the sums, which do not depend on the order of sequences."""
    model, batch = tiny("llama"), ids(8, 12)
    effects = []
    for rows in (batch, torch.cat([batch[:2], batch[2:].flip(0)])):
        survey = surveyed(model, [{"input_ids": rows}], tmp_path, effect_sequences=2)
        effects.append(survey.effect())
    assert effects[0] == pytest.approx(effects[1], rel=1e-3)
    other = surveyed(model, [{"input_ids": batch.flip(0)}], tmp_path, effect_sequences=2)
    assert other.effect() != pytest.approx(effects[0], rel=1e-3)


def test_without_token_ids_the_effect_is_that_on_hidden_states(tmp_path):
    model, batch = tiny("llama"), ids(8, 12)
    wanted = surveyed(model.model, [{"input_ids": batch}], tmp_path)
    hidden = model.get_input_embeddings()(batch).detach()
    assert surveyed(model, [{"inputs_embeds": hidden}], tmp_path).effect() == wanted.effect()
    assert surveyed(model, [{"input_ids": batch}], tmp_path).effect() != pytest.approx(wanted.effect(), rel=0.1)


def test_the_first_token_can_be_left_out_of_the_effect(tmp_path):
    batches = [{"input_ids": ids(8, 12), "attention_mask": torch.ones(8, 12, dtype=torch.long)}]
    model = tiny("llama")
    whole, without = (surveyed(model, batches, tmp_path, skip_first=skip).effect() for skip in (False, True))
    assert whole != pytest.approx(without, rel=1e-3)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_layer_that_does_nothing_has_the_least_effect_and_loses_most(kind):
    model = tiny(kind)
    idle = Anatomy(model).layers[2].mlp
    torch.nn.init.zeros_((idle.down_proj if kind == "llama" else idle.c_proj).weight)
    report = prune(model, ratio=0.3, depth_fraction=0.0, largest_rate=0.8)
    widths = [len(entry["neurons"]) for entry in report.layers]
    assert report.effect[2] == min(report.effect) < 1e-6 and sorted(report.effect)[1] > 1e-4
    assert widths[2] == INNER - int(0.8 * INNER) and sorted(widths)[1] > widths[2]


def test_what_costs_least_goes():
    report = prune(tiny("llama"), ratio=0.3, depth_fraction=0.0)
    widths = [len(entry["neurons"]) for entry in report.layers]
    assert len(report.effect) == LAYERS and len(set(widths)) > 1
    assert widths[report.effect.index(max(report.effect))] > widths[report.effect.index(min(report.effect))]


@pytest.mark.parametrize(
    "options", [{"allocation": "uniform"}, {"allocation": "inverse_importance"}, {"uniform": True}]
)
def test_where_no_effect_is_asked_for_none_is_measured(options, monkeypatch):
    monkeypatch.setattr("edgebolt.comp.sweep.first_sequences", None)
    assert prune(tiny("llama"), **options).effect == []


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
@pytest.mark.parametrize("recover", ["none", "mask", "lstsq"])
def test_on_average_a_projection_with_a_bias_gives_what_it_gave(kind, recover):
    """On the dense model's inputs, of every block."""
    dense, model, batch = tiny(kind), tiny(kind), ids(24, 16)
    report = prune(model, batch, recover=recover, prune_attention=True, ratio=0.3, depth_fraction=0.0)
    alike = []
    for entry, old, new in zip(report.layers, Anatomy(dense).layers, Anatomy(model).layers, strict=True):
        blocks = {"neurons": ffn_block(kind, old), "groups": attention_block(kind, old, dense.config)}
        for name, block in blocks.items():
            if len(entry[name]) == block.units:
                continue
            inputs = run(dense, [{"input_ids": batch}], entry["layer"], block.consumer)[0][0].flatten(0, 1)
            before, after = (layer.get_submodule(block.consumer) for layer in (old, new))
            left = inputs[:, block.columns(torch.tensor(entry[name]))]
            with torch.no_grad():
                given, wanted = after(left).mean(0), before(inputs).mean(0)
            alike.append(torch.allclose(given, wanted, rtol=1e-4, atol=1e-5))
            assert torch.equal(before.bias, after.bias) is (recover == "none")
    assert len(alike) >= LAYERS and set(alike) == {recover != "none"}


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_an_effect_is_that_of_the_block_as_it_is_folded(kind, tmp_path):
    """Also where a bias makes up for the mean of what is missing."""
    from edgebolt.comp.blocks import keep_neurons
    from edgebolt.comp.recovery import fold, recovered_weight

    model, batches = tiny(kind), padded(24, 8)
    options = {"prune_attention": False, "recover": "mask"}
    survey = surveyed(model, batches, tmp_path, **options)
    words = torch.cat([batch["input_ids"].flatten() for batch in batches]).unique()
    real = batches[0]["attention_mask"].bool()[: OPTIONS.effect_sequences]

    def chances():
        with torch.no_grad():
            return model(**batches[0])[0][: OPTIONS.effect_sequences][real][:, words]

    dense = chances()
    for index, orders in enumerate(survey.orders):
        layer = Anatomy(model).layers[index]
        block = ffn_block(model.config.model_type, layer)
        sums = Sublayer.load(
            tmp_path / f"sums-{index:05d}-ffn.safetensors", matrix(layer.get_submodule(block.consumer))
        )
        kept = orders["ffn"].kept(orders["ffn"].probed)
        found = recovered_weight(sums, block, kept, "mask", OPTIONS.ridge, OPTIONS.variance_bound)
        model = tiny(kind)
        layer = Anatomy(model).layers[index]
        keep_neurons(model.config.model_type, layer, kept)
        fold(layer.get_submodule(block.consumer), found)
        assert orders["ffn"].effect == pytest.approx(divergence(dense, chances()) / len(dense), rel=2e-3, abs=1e-6)
        model = tiny(kind)


def test_dead_neurons_do_not_make_the_others_free(tmp_path):
    """A third of a layer is dead: its effect is measured where more than these are gone."""
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[:16] = 0
    order = surveyed(model, padded(24, 8), tmp_path, prune_attention=False).orders[1]["ffn"]
    assert set(order.units[:16]) == set(range(16)) and order.probed > 16
    assert order.costs()[-1] > order.costs()[order.gone.index(order.probed)] > 1e-6
    assert max(cost for gone, cost in zip(order.gone, order.costs(), strict=True) if gone <= 16) < 1e-6
