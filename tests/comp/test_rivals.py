"""Each rival against a property of its original, worked out by hand; and what is the same for all of them."""

import copy

import pytest
import torch
from tiny_models import logits, reload, tiny
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from edgebolt.comp.blocks import attention_block, ffn_block
from edgebolt.comp.calls import capture_batches
from edgebolt.comp.in_memory import LayersInMemory
from edgebolt.comp.rivals import RIVALS, Flap, LlmPruner, Magnitude, ShortGpt, WandaSp
from edgebolt.comp.rivals.flap import fluctuation
from edgebolt.comp.rivals.inputs import measure
from edgebolt.comp.rivals.llm_pruner import loss_gradients, taylor_scores
from edgebolt.comp.rivals.magnitude import magnitude_scores
from edgebolt.comp.rivals.short_gpt import block_influence
from edgebolt.comp.rivals.wanda_sp import wanda_scores

pytestmark = pytest.mark.slow

LAYERS, WIDTH, INNER, WORDS, HEADS, GROUPS, HEAD = 4, 32, 64, 97, 8, 4, 4
NEURON, GROUP = 3 * WIDTH, WIDTH * HEAD * (2 * 2 + 2)
ALL = {**{name: kind() for name, kind in RIVALS.items()}, "llm-pruner": LlmPruner(first=1, last=1)}


def llama(seed=0, **changes):
    sizes = {"hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": LAYERS, "vocab_size": WORDS}
    sizes |= {"num_attention_heads": HEADS, "num_key_value_heads": GROUPS, "max_position_embeddings": 64}
    ends = {"initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**{**sizes, **ends, **changes})).eval()


def token_ids(samples=6, tokens=12, seed=0, words=WORDS):
    return torch.randint(3, words, (samples, tokens), generator=torch.Generator().manual_seed(seed))


BATCHES = [{"input_ids": part} for part in token_ids().split(4)]


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def layer_count(model):
    return count(model.model.layers)


def watched(model, path):
    """Inputs and outputs of a projection while the model runs over all batches: tokens by width."""
    inputs, outputs = [], []

    def note(_, args, out):
        inputs.append(args[0].flatten(0, 1))
        outputs.append(out.flatten(0, 1))

    hook = model.get_submodule(path).register_forward_hook(note)
    with torch.no_grad():
        for batch in BATCHES:
            model(**batch)
    hook.remove()
    return torch.cat(inputs), torch.cat(outputs)


def group_parts(layer, group):
    """The weights of a key-value head and of the two query heads that read it."""
    attention, own, queries = layer.self_attn, slice(group * HEAD, (group + 1) * HEAD), slice(group * 8, group * 8 + 8)
    return [
        attention.q_proj.weight[queries],
        attention.k_proj.weight[own],
        attention.v_proj.weight[own],
        attention.o_proj.weight[:, queries],
    ]


def neuron_parts(layer, neuron):
    return [
        layer.mlp.gate_proj.weight[neuron],
        layer.mlp.up_proj.weight[neuron],
        layer.mlp.down_proj.weight[:, neuron],
    ]


def blocks(model, layer):
    return ffn_block("llama", layer), attention_block("llama", layer, model.config)


def stay(scores, remove):
    return sorted(sorted(range(len(scores)), key=[float(score) for score in scores].__getitem__)[remove:])


# What is the same for all


@pytest.mark.parametrize("ratio", [0.2, 0.44])
@pytest.mark.parametrize("name", ALL)
def test_the_ratio_is_met_and_the_result_is_a_pruned_model(name, ratio):
    model = llama().train()
    dense, total = count(model), layer_count(model)
    embedding = model.model.embed_tokens.weight
    report = ALL[name].prune(model, BATCHES, ratio)
    unit = total / LAYERS if name == "shortgpt" else NEURON
    assert abs(dense - count(model) - ratio * total) <= unit / 2 + 1
    assert report.parameters == (dense, count(model)) and report.ratio == pytest.approx((dense - count(model)) / total)
    assert type(model).__name__ == "CompLlamaForCausalLM" and model.training
    assert model.model.embed_tokens.weight is embedding and len(report.layers) == len(model.model.layers)
    model.eval()
    prompt = {"input_ids": token_ids(2, 5), "attention_mask": torch.ones(2, 5, dtype=torch.int64)}
    written = [model.generate(**prompt, max_new_tokens=6, do_sample=False, use_cache=cache) for cache in (True, False)]
    assert torch.equal(*written)


@pytest.mark.parametrize("name", sorted(set(ALL) - {"shortgpt"}))
def test_without_attention_all_heads_stay(name):
    model = llama()
    rival = {"llm-pruner": LlmPruner(attention=False, first=1, last=1)}.get(name) or RIVALS[name](attention=False)
    report = rival.prune(model, BATCHES, 0.15)
    assert all(layer["groups"] == list(range(GROUPS)) for layer in report.layers)
    assert report.ratio == pytest.approx(0.15, abs=NEURON / layer_count(llama()))


@pytest.mark.parametrize("name", ALL)
def test_nothing_goes_at_zero(name):
    model = llama()
    before = copy.deepcopy(model.state_dict())
    report = ALL[name].prune(model, BATCHES, 0)
    assert type(model) is LlamaForCausalLM and report.ratio == 0 and not report.dropped
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", ALL)
def test_what_stays_is_what_it_was_and_gives_what_the_masked_model_gives(name):
    rival = Flap(bias=False) if name == "flap" else ALL[name]
    model = llama()
    masked = copy.deepcopy(model)
    report = rival.prune(model, BATCHES, 0.3)
    with torch.no_grad():
        for layer in report.layers:
            dense = masked.model.layers[layer["layer"]]
            for neuron in set(range(INNER)) - set(layer["neurons"]):
                for part in neuron_parts(dense, neuron):
                    part.zero_()
            for group in set(range(GROUPS)) - set(layer["groups"]):
                for part in group_parts(dense, group):
                    part.zero_()
        for index in report.dropped:
            masked.model.layers[index].self_attn.o_proj.weight.zero_()
            masked.model.layers[index].mlp.down_proj.weight.zero_()
        ids = token_ids(3, 10, seed=5)
        torch.testing.assert_close(model(ids).logits, masked(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", sorted(set(ALL) - {"flap"}))
def test_results_are_saved_and_loaded(name, tmp_path):
    model = llama()
    ALL[name].prune(model, BATCHES, 0.3)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(reload(tmp_path, "llama")), logits(model))


@pytest.mark.parametrize("name", ALL)
def test_half_precision_stays(name):
    model = llama().bfloat16()
    report = ALL[name].prune(model, BATCHES, 0.3)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert report.ratio == pytest.approx(0.25 if name == "shortgpt" else 0.3, abs=0.01)
    assert logits(model).isfinite().all()


@pytest.mark.parametrize("kind", ["qwen2", "gpt2", "bert", "mpnet"])
@pytest.mark.parametrize("name", ["magnitude", "wanda-sp", "shortgpt", "flap"])
def test_other_families(name, kind):
    model = tiny(kind)
    before = count(model)
    ids = token_ids(6, 10, words=60)
    report = RIVALS[name]().prune(model, [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}], 0.3)
    assert report.parameters == (before, count(model)) and report.ratio == pytest.approx(0.3, abs=0.06)
    assert logits(model).isfinite().all()


@pytest.mark.parametrize("name", ["wanda-sp", "shortgpt", "flap", "llm-pruner"])
def test_padding_does_not_count(name):
    plain, padded = llama(), llama()
    ids = token_ids(4, 10)
    mask = torch.cat([torch.ones_like(ids), torch.zeros(4, 3, dtype=torch.int64)], 1)
    ALL[name].prune(plain, [{"input_ids": ids}], 0.4)
    batch = {"input_ids": torch.cat([ids, torch.full((4, 3), 7)], 1), "attention_mask": mask}
    ALL[name].prune(padded, [batch], 0.4)
    assert padded.config.pruned == plain.config.pruned
    torch.testing.assert_close(logits(padded, ids), logits(plain, ids), rtol=1e-4, atol=1e-4)


def test_what_cannot_be_pruned_is_refused_and_left_as_it_was():
    model = llama()
    for ratio, batches, message in ((1, BATCHES, "ratio=1"), (0.2, [], "batches is empty"), (0.99, BATCHES, "lower")):
        with pytest.raises(ValueError, match=message):
            Magnitude().prune(model, batches, ratio)
    with pytest.raises(ValueError, match="set attention=True"):
        WandaSp(attention=False).prune(model, BATCHES, 0.8)
    with pytest.raises(ValueError, match="set attention=True"):
        Flap(attention=False).prune(model, BATCHES, 0.8)
    multi_query = llama(num_key_value_heads=1)  # its one key-value head stays, so neurons are too few
    with pytest.raises(ValueError, match="let more layers"):
        Magnitude().prune(multi_query, BATCHES, 0.72)
    with pytest.raises(ValueError, match="leave none of the 4 layers"):
        LlmPruner().prune(model, BATCHES, 0.2)
    assert type(model) is LlamaForCausalLM and count(model) == count(llama())
    with pytest.raises(ValueError, match="score='sum'"):
        LlmPruner(score="sum")
    with pytest.raises(ValueError, match="first=-1"):
        LlmPruner(first=-1)


# Magnitude


def test_magnitude_is_the_norm_of_all_coupled_weights():
    model = llama()
    report = Magnitude().prune(copy.deepcopy(model), BATCHES, 0.3)
    for layer, left in zip(model.model.layers, report.layers, strict=True):
        layer.requires_grad_(False)
        neurons = [torch.cat([part.flatten() for part in neuron_parts(layer, unit)]).norm() for unit in range(INNER)]
        groups = [torch.cat([part.flatten() for part in group_parts(layer, unit)]).norm() for unit in range(GROUPS)]
        ffn, attention = blocks(model, layer)
        torch.testing.assert_close(magnitude_scores("llama", layer, ffn, model.config), torch.stack(neurons))
        torch.testing.assert_close(magnitude_scores("llama", layer, attention, model.config), torch.stack(groups))
        assert left["neurons"] == stay(neurons, INNER - len(left["neurons"]))
        assert left["groups"] == stay(groups, GROUPS - len(left["groups"]))


@pytest.mark.parametrize("kind", ["gpt2", "qwen2"])
def test_magnitude_with_biases_and_fused_projections(kind):
    model = tiny(kind)
    layers = LayersInMemory(model)
    layer, size = layers.layers[1], 4
    if kind == "gpt2":
        rows = [part * 16 + 2 * size + torch.arange(size) for part in range(3)]  # head 2 of 4
        fused = layer.attn.c_attn
        parts = [part for own in rows for part in (fused.weight[:, own], fused.bias[own])]
        parts.append(layer.attn.c_proj.weight[2 * size : 3 * size])
        neuron = [layer.mlp.c_fc.weight[:, 5], layer.mlp.c_fc.bias[5], layer.mlp.c_proj.weight[5]]
        group = 2
    else:
        attention = layer.self_attn
        parts = [p for m in (attention.k_proj, attention.v_proj) for p in (m.weight[size:], m.bias[size:])]
        parts += [attention.q_proj.weight[8:], attention.q_proj.bias[8:], attention.o_proj.weight[:, 8:]]
        neuron, group = neuron_parts(layer, 5), 1
    for block, unit, own in (
        (attention_block(kind, layer, model.config), group, parts),
        (ffn_block(kind, layer), 5, neuron),
    ):
        brute = torch.cat([part.flatten() for part in own]).norm()
        found = magnitude_scores(kind, layer, block, model.config)
        assert len(found) == block.units
        torch.testing.assert_close(found[unit], brute.detach())


# Wanda-sp


def test_wanda_is_weights_times_norms_of_inputs_behind_pruned_layers():
    model, student = llama(), llama()
    report = WandaSp().prune(copy.deepcopy(model), BATCHES, 0.3)
    for index, left in enumerate(report.layers):
        layer = student.model.layers[index].requires_grad_(False)  # those before it are pruned by now
        scores = []
        for path, size in (("mlp.down_proj", 1), ("self_attn.o_proj", 2 * HEAD)):
            inputs, _ = watched(student, f"model.layers.{index}.{path}")
            weight = layer.get_submodule(path).weight
            of_inputs = [
                sum(abs(float(weight[row, j])) * float(inputs[:, j].norm()) for row in range(WIDTH))
                for j in range(weight.shape[1])
            ]
            scores.append([sum(of_inputs[at : at + size]) for at in range(0, len(of_inputs), size)])
        assert left["neurons"] == stay(scores[0], INNER - len(left["neurons"]))
        assert left["groups"] == stay(scores[1], GROUPS - len(left["groups"]))
        if index == 0:
            calibration = capture_batches(model, BATCHES)
            sums, _ = measure(layer, blocks(model, layer), calibration, calibration.hidden, 0)
            for block, brute in zip(blocks(model, layer), scores, strict=True):
                found = wanda_scores(layer, block, sums[block.name])
                torch.testing.assert_close(found, torch.tensor(brute, dtype=torch.float64), rtol=1e-4, atol=0)
        with torch.no_grad():
            for neuron in set(range(INNER)) - set(left["neurons"]):
                layer.mlp.down_proj.weight[:, neuron] = 0
            for group in set(range(GROUPS)) - set(left["groups"]):
                group_parts(layer, group)[-1].zero_()


# ShortGPT


def test_short_gpt_removes_the_layers_of_the_lowest_block_influence():
    model = llama()
    with torch.no_grad():  # the second changes next to nothing, the last little
        for index, scale in ((1, 1e-3), (3, 0.1)):
            model.model.layers[index].self_attn.o_proj.weight.mul_(scale)
            model.model.layers[index].mlp.down_proj.weight.mul_(scale)
    brute = []
    for index in range(LAYERS):
        seen = []
        hook = model.model.layers[index].register_forward_hook(
            lambda _, args, out, seen=seen: seen.append((args[0], out))
        )
        with torch.no_grad():
            for batch in BATCHES:
                model(**batch)
        hook.remove()
        cosines = [F.cosine_similarity(entering, out, dim=-1).flatten() for entering, out in seen]
        brute.append(1 - float(torch.cat(cosines).mean()))
    assert block_influence(model, LayersInMemory(model), BATCHES) == pytest.approx(brute, abs=1e-5)
    expected = copy.deepcopy(model)
    report = ShortGpt().prune(model, BATCHES, 0.5)
    assert report.dropped == sorted(sorted(range(LAYERS), key=brute.__getitem__)[:2]) == [1, 3]
    ids, out = token_ids(3, 10, seed=5), []
    expected.model.layers = torch.nn.ModuleList([expected.model.layers[0], expected.model.layers[2]])
    for one in (model, expected):
        with torch.no_grad():
            out.append(one(ids, use_cache=False).logits)
    torch.testing.assert_close(*out)


# FLAP


def test_flap_scores_are_fluctuations_and_one_cut_goes_through_all_layers():
    model = llama()
    scores = []
    calibration = capture_batches(model, BATCHES)
    hidden = calibration.hidden
    for index, layer in enumerate(model.model.layers):
        inputs, _ = watched(model, f"model.layers.{index}.mlp.down_proj")
        brute = inputs.double().var(0) * layer.mlp.down_proj.weight.detach().double().norm(dim=0) ** 2
        brute = (brute - brute.mean()) / brute.std(correction=0)
        sums, hidden = measure(layer, blocks(model, layer), calibration, hidden, index)
        ffn, attention = blocks(model, layer)
        torch.testing.assert_close(fluctuation(layer, ffn, sums["ffn"]), brute, rtol=1e-3, atol=1e-4)
        assert len(fluctuation(layer, attention, sums["attention"])) == GROUPS
        scores.append(brute)
    report = Flap(attention=False).prune(model, BATCHES, 0.3)
    kept = [float(scores[left["layer"]][unit]) for left in report.layers for unit in left["neurons"]]
    gone = sorted({float(value) for own in scores for value in own} - set(kept))
    assert gone[-1] <= min(kept) + 1e-3
    assert len({len(left["neurons"]) for left in report.layers}) > 1  # layers lose unequally


@pytest.mark.parametrize("attention", [False, True])
def test_the_bias_of_flap_keeps_the_mean_output(attention):
    dense = llama()
    model = copy.deepcopy(dense)
    report = Flap(attention=attention).prune(model, BATCHES, 0.3)
    for index, left in enumerate(report.layers):
        inputs, outputs = watched(dense, f"model.layers.{index}.mlp.down_proj")
        module = model.model.layers[index].mlp.down_proj
        pruned = module(inputs[:, left["neurons"]])
        torch.testing.assert_close(pruned.mean(0), outputs.mean(0), rtol=1e-4, atol=1e-5)
        inputs, outputs = watched(dense, f"model.layers.{index}.self_attn.o_proj")
        columns = [group * 8 + at for group in left["groups"] for at in range(8)]
        pruned = model.model.layers[index].self_attn.o_proj(inputs[:, columns])
        torch.testing.assert_close(pruned.mean(0), outputs.mean(0), rtol=1e-4, atol=1e-5)
    first = watched(model, f"model.layers.0.{'self_attn.o_proj' if attention else 'mlp.down_proj'}")[1]
    same = watched(dense, f"model.layers.0.{'self_attn.o_proj' if attention else 'mlp.down_proj'}")[1]
    torch.testing.assert_close(first.mean(0), same.mean(0), rtol=1e-4, atol=1e-5)  # in the model itself


def test_neurons_that_do_not_fluctuate_go_first_and_are_not_missed(tmp_path):
    sizes = {"n_embd": 16, "n_inner": 48, "n_layer": 1, "n_head": 4, "vocab_size": WORDS, "n_positions": 64}
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=2, initializer_range=0.3)).eval()
    constant = [2, 3, 5, 7, 11, 13, 17, 19, 23]
    perceptron = model.transformer.h[0].mlp
    with torch.no_grad():
        perceptron.c_fc.bias.normal_()
        perceptron.c_fc.weight[:, constant] = 0  # gelu(bias), whatever enters
    before, total = logits(model, token_ids(3, 10)), count(model.transformer.h)
    report = Flap(attention=False).prune(model, BATCHES, 9 * (16 + 16 + 1) / total)
    assert sorted(set(range(48)) - set(report.layers[0]["neurons"])) == constant
    torch.testing.assert_close(logits(model, token_ids(3, 10)), before, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path)  # GPT-2 has the biases
    assert torch.equal(logits(reload(tmp_path, "gpt2")), logits(model))


def test_biases_that_a_config_cannot_tell_of_are_not_saved(tmp_path):
    model = llama()
    Flap().prune(model, BATCHES, 0.3)
    with pytest.raises(NotImplementedError, match=r"Flap\(bias=False\)"):
        model.save_pretrained(tmp_path)
    assert copy.deepcopy(model).model.layers[0].mlp.down_proj.bias is not None
    model = llama()
    Flap(bias=False).prune(model, BATCHES, 0.3)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(reload(tmp_path, "llama")), logits(model))


# LLM-Pruner


def mean_loss(model):
    logs = [model(**batch).logits[:, :-1].log_softmax(-1) for batch in BATCHES]
    picked = [log.gather(2, batch["input_ids"][:, 1:, None]) for log, batch in zip(logs, BATCHES, strict=True)]
    return -torch.cat([own.flatten() for own in picked]).mean()


def test_taylor_scores_are_sums_of_weights_times_gradients_and_what_the_loss_changes_by():
    model = llama().double()
    loss = mean_loss(model)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    shadow = copy.deepcopy(model)  # holds the gradients as weights, so that both are cut alike
    for name, parameter in shadow.named_parameters():
        parameter.data = gradients[name]
    layer, twin = model.model.layers[1], shadow.model.layers[1]
    with loss_gradients(model, BATCHES) as found:
        assert found == pytest.approx(loss.item(), rel=1e-6)  # transformers takes the loss in float32
        scores = {
            score: [taylor_scores("llama", layer, block, model.config, score) for block in blocks(model, layer)]
            for score in ("vector", "element")
        }
    assert all(parameter.grad is None for parameter in model.parameters())
    for which, units, parts in ((0, INNER, neuron_parts), (1, GROUPS, group_parts)):
        for unit in range(0, units, 5 if units == INNER else 1):
            products = [w.detach() * g.detach() for w, g in zip(parts(layer, unit), parts(twin, unit), strict=True)]
            vector = abs(sum(float(product.sum()) for product in products))
            element = sum(float(product.abs().sum()) for product in products)
            assert float(scores["vector"][which][unit]) == pytest.approx(vector, rel=1e-3, abs=1e-6)
            assert float(scores["element"][which][unit]) == pytest.approx(element, rel=1e-3)
            losses, own, dense = [], parts(layer, unit), [part.detach().clone() for part in parts(layer, unit)]
            with torch.no_grad():
                for scale in (0.99, 1.01, 1):
                    for part, was in zip(own, dense, strict=True):
                        part.copy_(scale * was)
                    losses.append(float(mean_loss(model)))
            assert abs(losses[1] - losses[0]) / 0.02 == pytest.approx(vector, rel=1e-2, abs=5e-4)


@pytest.mark.parametrize("score", ["element", "vector"])
def test_llm_pruner_takes_the_lowest_of_the_inner_layers(score):
    model = llama()
    with loss_gradients(model, BATCHES):
        scores = [
            [taylor_scores("llama", layer, block, model.config, score) for block in blocks(model, layer)]
            for layer in model.model.layers
        ]
    report = LlmPruner(first=1, last=1, score=score).prune(model, BATCHES, 0.2)
    for left, (neurons, groups) in zip(report.layers, scores, strict=True):
        assert left["neurons"] == stay(neurons, INNER - len(left["neurons"]))
        assert left["groups"] == stay(groups, GROUPS - len(left["groups"]))
    assert [len(left["neurons"]) < INNER for left in report.layers] == [False, True, True, False]
    assert [len(left["groups"]) for left in report.layers] == [4, 2, 3, 4]  # 40 % of 4 is 1.6: 2, then 1


def test_gradients_and_frozen_weights_are_as_before():
    model = llama().requires_grad_(False)
    model.lm_head.weight.requires_grad_(True)
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    with loss_gradients(model, BATCHES):
        assert model.model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["lm_head.weight"]
    assert (model.lm_head.weight.grad == 1).all() and model.model.layers[0].mlp.up_proj.weight.grad is None


def test_llm_pruner_needs_a_language_model():
    ids = token_ids(6, 10, words=60)
    with pytest.raises(ValueError, match="needs a causal language model"):
        LlmPruner(first=1, last=1).prune(tiny("llama", "AutoModel"), [{"input_ids": ids}], 0.2)
