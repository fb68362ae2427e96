import functools

import numpy as np
import pytest
import torch

VOCABULARY, LAYERS = 50, 4
SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 96,
}  # fmt: skip
GPT2_SIZES = {"n_embd": 32, "n_layer": LAYERS, "n_head": 4, "vocab_size": VOCABULARY, "n_positions": 96}


@pytest.fixture(scope="session")
def new_decoder():
    """Builds a random decoder: the same for the same arguments, with weights so large that tokens matter."""
    transformers = pytest.importorskip("transformers", reason="needs edgebolt-common[llm]")

    def build(kind, dtype=torch.float64, **options):
        config = transformers.AutoConfig.for_model(kind, **{**(GPT2_SIZES if kind == "gpt2" else SIZES), **options})
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(8 if weight.dim() == 2 else 1)
        return model.to(dtype).eval()

    return build


@pytest.fixture(scope="session")
def decoder(new_decoder):
    """The same, built once for all tests: not to be changed."""
    return functools.cache(new_decoder)


@pytest.fixture(scope="session")
def fits():
    """Pearson's test: whether counts may come from probabilities; true by chance in all but 3 of 100 000 cases."""

    def check(counts, probabilities):
        counts, expected = np.asarray(counts, float), np.asarray(probabilities, float) * np.sum(counts)
        assert (counts[expected == 0] == 0).all()
        counts, expected = counts[expected > 0], expected[expected > 0]
        assert expected.min() >= 5, "too few draws for the test"
        freedom = len(counts) - 1
        limit = freedom * (1 - 2 / (9 * freedom) + 4 * (2 / (9 * freedom)) ** 0.5) ** 3  # Wilson and Hilferty
        return ((counts - expected) ** 2 / expected).sum() < limit

    return check
