import pytest
import torch

transformers = pytest.importorskip("transformers", reason="needs edgebolt-common[llm]")

from edgebolt.common.anatomy import FAMILIES, Anatomy, Family  # noqa: E402

BERT_LIKE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
CONFIGS = {
    "bert": transformers.BertConfig(**BERT_LIKE, vocab_size=40),
    "gpt2": transformers.GPT2Config(n_embd=16, n_layer=3, n_head=2, vocab_size=40),
    "llama": transformers.LlamaConfig(**BERT_LIKE, num_key_value_heads=1, vocab_size=40),
    "mistral": transformers.MistralConfig(**BERT_LIKE, num_key_value_heads=1, vocab_size=40),
    "mpnet": transformers.MPNetConfig(**BERT_LIKE, vocab_size=40),
    "qwen2": transformers.Qwen2Config(**BERT_LIKE, num_key_value_heads=1, vocab_size=40),
    "roberta": transformers.RobertaConfig(**BERT_LIKE, vocab_size=40),
}


def test_every_family_has_a_model_here():
    # edgebolt.comp adds rows of its own where it is imported
    assert sorted(CONFIGS) == sorted(kind for kind in FAMILIES if not kind.startswith("comp_"))


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_path_leads_to_what_it_says(kind):
    model = transformers.AutoModelForSequenceClassification.from_config(CONFIGS[kind])
    anatomy = Anatomy(model)
    assert len(anatomy.layers) == 3 and anatomy.head_name in ("classifier", "score")
    assert anatomy.embedding.weight.shape == (40, 16)
    assert anatomy.norm is None or anatomy.norm.weight.shape == (16,)
    assert anatomy.backbone is model.base_model
    for part in ("query", "key", "value", "output"):
        projection = model.get_submodule(anatomy.path(2, part))
        assert projection in set(anatomy.layers[2].modules())
        assert 16 in projection.weight.shape
    widths = [set(anatomy.layers[0].get_submodule(path).weight.shape) for path in anatomy.inside("mlp")]
    assert all(16 in shape for shape in widths) and len(widths) >= 2
    assert anatomy.inside("mlp")[-1] != anatomy.inside("mlp")[0]


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen2", "roberta"])
def test_language_models(kind):
    anatomy = Anatomy(transformers.AutoModelForCausalLM.from_config(CONFIGS[kind]))
    assert anatomy.head_name == "lm_head" and anatomy.head is not None


def test_a_bare_backbone_has_no_head():
    anatomy = Anatomy(transformers.AutoModel.from_config(CONFIGS["bert"]))
    assert anatomy.prefix == "" and anatomy.head is None and len(anatomy.layers) == 3


def test_an_unknown_family_is_told_how_to_add_its_row(monkeypatch):
    config = transformers.OPTConfig(
        hidden_size=16, ffn_dim=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=40, word_embed_proj_dim=16
    )
    model = transformers.OPTForCausalLM(config)
    with pytest.raises(KeyError, match=r"FAMILIES\['opt'\] = Family\("):
        Anatomy(model)
    row = Family(
        layers="decoder.layers",
        embedding="decoder.embed_tokens",
        query="self_attn.q_proj",
        key="self_attn.k_proj",
        value="self_attn.v_proj",
        output="self_attn.out_proj",
        mlp=("fc1", "fc2"),
    )
    monkeypatch.setitem(FAMILIES, "opt", row)
    assert len(Anatomy(model).layers) == 2


def test_other_things_are_refused():
    with pytest.raises(TypeError, match="Linear is no transformers model"):
        Anatomy(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="part='gate'"):
        Anatomy(transformers.AutoModel.from_config(CONFIGS["bert"])).inside("gate")
