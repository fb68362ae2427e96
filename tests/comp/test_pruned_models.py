import inspect
import subprocess
import sys

import pytest
import torch
import transformers
from tiny_models import (
    DECODERS,
    FAMILIES,
    LAYERS,
    auto_class,
    edit_config,
    ids,
    logits,
    prune,
    reload,
    rewrite,
    same_state,
    saved,
    tiny,
    weights,
)

from edgebolt.comp.pruned_models import KINDS, layer_lists


@pytest.mark.parametrize("kind", FAMILIES)
def test_save_pretrained_and_back_is_the_same_bit_for_bit(kind, pair, tmp_path):
    model = pair(kind).model
    small = reload(saved(model, tmp_path), kind)
    assert same_state(small, model) and torch.equal(logits(small), logits(model))
    assert type(small) is type(model) and type(small).__name__.startswith("Comp")


@pytest.mark.parametrize("kind", DECODERS)
def test_generation_with_and_without_a_cache(kind, pair):
    small = reload(pair(kind).small, kind)
    prompt, settings = (
        ids(2, 5, seed=3),
        {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "pad_token_id": 0},
    )
    settings["attention_mask"] = torch.ones_like(prompt)
    cached = small.generate(prompt, use_cache=True, **settings)
    assert cached.shape == (2, 15) and torch.equal(cached, small.generate(prompt, use_cache=False, **settings))
    assert torch.equal(cached, pair(kind).model.generate(prompt, **settings))
    static = small.generate(prompt, cache_implementation="static", **settings)
    assert torch.equal(cached, static)


def test_tied_embeddings_stay_tied_and_whole(pair):
    made = pair("llama")
    small = reload(made.small, "llama")
    for model in (made.model, small):
        embedding = model.get_input_embeddings().weight
        assert model.lm_head.weight.data_ptr() == embedding.data_ptr() and embedding.shape == (60, 16)
    assert "lm_head.weight" not in weights(made.small)


def test_tied_embeddings_that_were_saved_twice_count_once(tmp_path):
    dense = rewrite(
        saved(tiny("llama"), tmp_path / "dense"),
        lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"].clone()},
    )
    report = prune(str(dense), output=tmp_path / "small")
    small = reload(tmp_path / "small", "llama")
    assert small.lm_head.weight.data_ptr() == small.model.embed_tokens.weight.data_ptr()
    assert report.parameters[1] == sum(parameter.numel() for parameter in small.parameters())


def test_untied_heads_come_along(tmp_path):
    model = tiny("llama", tie_word_embeddings=False)
    prune(str(saved(model, tmp_path / "dense")), output=tmp_path / "small")
    small = reload(tmp_path / "small", "llama")
    assert torch.equal(small.lm_head.weight, model.lm_head.weight)
    assert small.lm_head.weight.data_ptr() != small.model.embed_tokens.weight.data_ptr()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mpnet"])
def test_a_pruned_model_is_pruned_again(kind, pair, tmp_path):
    made = pair(kind)
    options = {"ratio": 0.45, "depth_fraction": 0.75, "prune_attention": True, "protect": (0, -1)}
    prune(str(made.small), output=tmp_path / "smaller", **options)
    model = reload(made.small, kind)
    report = prune(model, **options)
    small = reload(tmp_path / "smaller", kind)
    assert same_state(small, model) and torch.equal(logits(small), logits(model))
    assert report.dropped and report.parameters[0] == made.report.parameters[1]
    before = [entry["layer"] for entry in made.report.layers]
    names = [before[entry["layer"]] for entry in report.layers]  # of the dense model
    assert small.config.pruned["layers"] == model.config.pruned["layers"] == names != list(range(len(names)))


def test_an_edited_config_fails_loudly(pair, tmp_path):
    def copy(name):
        return saved(pair("llama").model, tmp_path / name)

    pruned = pair("llama").model.config.pruned
    edit_config(copy("more"), num_hidden_layers=LAYERS)
    with pytest.raises(ValueError, match=r"num_hidden_layers=4 and tells of 3 pruned layers"):
        reload(tmp_path / "more", "llama")
    edit_config(copy("wide"), pruned={**pruned, "neurons": [width + 1 for width in pruned["neurons"]]})
    with pytest.raises(RuntimeError, match=r"size mismatch|mismatched"):
        reload(tmp_path / "wide", "llama")
    edit_config(copy("stock"), pruned=None)
    with pytest.raises(RuntimeError, match=r"size mismatch|mismatched"):
        reload(tmp_path / "stock", "llama")
    with pytest.raises(RuntimeError, match=r"size mismatch|mismatched"):  # by the class of the dense model
        transformers.LlamaForCausalLM.from_pretrained(copy("dense_class"))


@pytest.mark.parametrize("auto", ["AutoModelForCausalLM", "AutoModel"])
def test_ignoring_sizes_is_refused(auto, pair):
    with pytest.raises(ValueError, match=r"would replace weights that do not fit by random ones"):
        getattr(transformers, auto).from_pretrained(pair("llama").small, ignore_mismatched_sizes=True)


@pytest.mark.parametrize("kind", FAMILIES)
def test_nothing_is_initialised_anew(kind, pair):
    _, info = getattr(transformers, auto_class(kind)).from_pretrained(pair(kind).small, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_a_new_head_on_a_pruned_encoder(pair):
    model = transformers.AutoModelForSequenceClassification.from_pretrained(pair("bert").small, num_labels=3)
    assert type(model).__name__ == "CompBertForSequenceClassification"
    assert model.classifier.weight.shape == (3, 16) and model.classifier.weight.std() > 0
    assert all(
        torch.equal(value, pair("bert").model.state_dict()[name])
        for name, value in model.state_dict().items()
        if "layer." in name
    )


@pytest.mark.parametrize(
    "lost", ["model.layers.0.mlp.down_proj.weight", "model.embed_tokens.weight", "model.norm.weight"]
)
def test_a_damaged_checkpoint_is_refused(lost, pair, tmp_path):
    small = saved(reload(pair("llama").small, "llama"), tmp_path)
    rewrite(small, lambda tensors: {name: tensor for name, tensor in tensors.items() if name != lost})
    with pytest.raises(ValueError, match=rf"lacks 1 tensors, such as \['{lost}'\]"):
        reload(small, "llama")


def test_a_model_built_from_a_pruned_config_has_its_sizes_and_sound_weights(pair):
    model = transformers.AutoModelForCausalLM.from_config(pair("llama").model.config)
    wanted = {name: value.shape for name, value in pair("llama").model.state_dict().items()}
    assert {name: value.shape for name, value in model.state_dict().items()} == wanted
    assert logits(model).isfinite().all()
    assert all(0 < parameter.std() < 1 for parameter in model.parameters() if parameter.dim() == 2)


def test_every_family_is_registered():
    for kind in KINDS:
        config = transformers.AutoConfig.for_model(f"comp_{kind}")
        assert config.model_type == f"comp_{kind}" and type(config).__mro__[1].model_type == kind
    from edgebolt.comp import pruned_models

    assert {"CompBertForSequenceClassification", "CompGPT2LMHeadModel"} <= set(vars(pruned_models))
    assert "input_ids" in inspect.signature(pruned_models.CompLlamaForCausalLM.forward).parameters


def test_layer_lists_are_told_by_their_length():
    config = transformers.Qwen2Config(num_hidden_layers=3, layer_types=["full_attention"] * 2 + ["sliding_attention"])
    assert layer_lists(config, [0, 2]) == {"layer_types": ["full_attention", "sliding_attention"]}


def test_a_class_that_no_auto_class_builds_is_refused_before_the_work(monkeypatch):
    monkeypatch.setattr("edgebolt.comp.comp.make_plan", None)
    model = transformers.BertForNextSentencePrediction(tiny("bert").config)
    with pytest.raises(TypeError, match=r"BertForNextSentencePrediction is none of the classes"):
        prune(model)


STOCK = """
import sys, torch, transformers
for kind, auto in {autos!r}.items():
    model = getattr(transformers, auto).from_pretrained(kind).eval()
    with torch.no_grad():
        torch.save(model(torch.load("batch.pt"))[0], f"{{kind}}.pt")
    print(type(model).__name__)
assert not any(name.startswith("edgebolt") for name in sys.modules)
"""


def test_a_uniform_model_loads_without_this_package(tmp_path):
    options = {"uniform": True, "round_to": 4, "variance_bound": 0.0}  # which does not apply
    kinds = ("llama", "qwen2", "mistral", "gpt2", "bert", "roberta", "mpnet")
    for kind in kinds:
        prune(str(saved(tiny(kind), tmp_path / f"dense-{kind}")), output=tmp_path / kind, **options)
    torch.save(ids(3, 10, seed=7), tmp_path / "batch.pt")
    code = STOCK.format(autos={kind: auto_class(kind) for kind in kinds})
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for kind, name in zip(kinds, done.stdout.split(), strict=True):
        model = tiny(kind)
        report = prune(model, **options)
        assert len({len(entry["neurons"]) for entry in report.layers}) == 1 and report.effect == []
        assert torch.equal(torch.load(tmp_path / f"{kind}.pt"), logits(model)), kind
        assert type(model).__name__ == name and not name.startswith("Comp")
        assert not hasattr(model.config, "pruned") and model.config.num_hidden_layers == LAYERS - 1


def test_uniform_after_unequal_is_refused_before_the_work(pair, monkeypatch, tmp_path):
    small = str(pair("llama").small)
    monkeypatch.setattr("edgebolt.comp.comp.capture", None)
    with pytest.raises(ValueError, match=r"has unequal layers already. Start from the dense one"):
        prune(small, output=tmp_path / "x", uniform=True)
    with pytest.raises(ValueError, match="scales the attention of each layer by its place"):
        prune(tiny("gpt2_inverse"), uniform=True)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "mpnet"])
def test_lora_on_a_pruned_model(kind, pair, tmp_path):
    peft = pytest.importorskip("peft")
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(reload(pair(kind).small, kind), LoraConfig(r=2, target_modules="all-linear"))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, batch = torch.optim.AdamW(trained, 0.05), ids(4, 8)
    losses = []
    for _ in range(5):
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.eval().save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(reload(pair(kind).small, kind), tmp_path / "adapter").eval()
    assert torch.equal(logits(again), logits(model))
    merged = model.merge_and_unload()
    assert torch.equal(logits(reload(saved(merged, tmp_path / "merged"), kind)), logits(merged))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_bitsandbytes_loads_a_pruned_model(bits, kind, tmp_path):
    bnb = pytest.importorskip("bitsandbytes")
    # In 4 bits a CPU with AVX-512 takes blocks of 32 rows and 64 columns: round_to is what makes it fit.
    sizes = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 2, "initializer_range": 0.1}
    model = tiny(kind, **sizes, **({"num_key_value_heads": 2} if kind == "llama" else {}))
    options = {"round_to": 64 if bits == 4 else 1, "ratio": 0.4, "prune_attention": True, "seed": 0}
    report = prune(str(saved(model, tmp_path / "dense")), output=tmp_path / "small", **options)
    assert len({len(entry["neurons"]) for entry in report.layers}) > 1 and report.dropped == []
    small = reload(tmp_path / "small", kind)
    how = transformers.BitsAndBytesConfig(load_in_8bit=bits == 8, load_in_4bit=bits == 4)
    packed = reload(tmp_path / "small", kind, quantization_config=how, device_map="cpu")
    layers = [
        name for name, module in small.named_modules() if isinstance(module, torch.nn.Linear) and ".layer" in name
    ]
    assert len(layers) == LAYERS * (7 if kind == "llama" else 6)
    kind_of = bnb.nn.Linear8bitLt if bits == 8 else bnb.nn.Linear4bit
    assert all(isinstance(packed.get_submodule(name), kind_of) for name in layers)
    dense, close = logits(small), logits(packed).float()
    alike = torch.nn.functional.cosine_similarity(dense.flatten(), close.flatten(), dim=0)
    assert alike > (0.99 if bits == 8 else 0.8)
    assert packed.get_memory_footprint() < 0.6 * small.get_memory_footprint()
    with pytest.raises(NotImplementedError, match="weights are quantized"):
        prune(packed)
