"""A tiny model of every family, always of the same weights."""

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="needs edgebolt-common[llm]")
pytest.importorskip("peft", reason="needs edgebolt-common[llm]")

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
LABELS = {"vocab_size": 60, "num_labels": 4, "pad_token_id": 0}
CONFIGS = {
    "bert": transformers.BertConfig(**SIZES, **LABELS),
    "gpt2": transformers.GPT2Config(n_embd=16, n_layer=3, n_head=2, **LABELS),
    "llama": transformers.LlamaConfig(**SIZES, **LABELS, num_key_value_heads=1),
    "mpnet": transformers.MPNetConfig(**SIZES, **LABELS),
    "qwen2": transformers.Qwen2Config(**SIZES, **LABELS, num_key_value_heads=1),
    "roberta": transformers.RobertaConfig(**SIZES, **LABELS),
}


def _made(auto, kind):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return auto.from_config(CONFIGS[kind])


def classifier(kind):
    return _made(transformers.AutoModelForSequenceClassification, kind)


def causal(kind):
    return _made(transformers.AutoModelForCausalLM, kind)
