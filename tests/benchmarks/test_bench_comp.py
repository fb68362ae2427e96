"""COMP beside its rivals on SmolLM2-135M; see comp_run.py.

Budget, one thread: 35 prunings of 20 to 100 s, each with two perplexities of 8,192 tokens (60 s); the questions at
20 % alone (100 s a model); three calibration draws at 20 % for COMP and the two best rivals. Some 110 minutes of one
thread, 55 of two. Without the clock (``make test``) every method prunes a tiny random Llama, so that the code is run.
"""

import pytest
import torch
from comp_run import METHODS, RATIOS, answers, available, calibration, load, perplexities

from edgebolt.comp.evaluation import measured_memory

DRAWS = ("COMP", "COMP, least squares", "FLAP", "LLM-Pruner")
RUNS = [
    *[(ratio, 0, name) for ratio in RATIOS for name in METHODS],
    *[(0.2, draw, name) for draw in (1, 2) for name in DRAWS],
]


def tiny():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 12}  # LLM-Pruner spares six
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 50}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**sizes, **heads)).eval()


@pytest.mark.benchmark(group="comp")
@pytest.mark.parametrize(("ratio", "draw", "method"), RUNS, ids=lambda part: str(part).replace(" ", "-"))
def test_prune(benchmark, ratio, draw, method):
    short = benchmark.disabled
    if short and (ratio, draw) != (0.2, 0):
        pytest.skip("the short form has one ratio and one draw")
    if not short and not available():
        pytest.skip("SmolLM2 or BoolQ are not installed: run `make data`")
    model = tiny() if short else load()
    batches = [{"input_ids": torch.randint(50, (8, 16))}] if short else calibration(draw)
    before = sum(parameter.numel() for parameter in model.parameters())
    layers = sum(parameter.numel() for parameter in model.model.layers.parameters())
    with measured_memory() as memory:
        report = benchmark.pedantic(METHODS[method], (model, batches, ratio), rounds=1, iterations=1)
    after = sum(parameter.numel() for parameter in model.parameters())
    assert report.parameters == (before, after)
    # the smallest unit of ShortGPT is a layer, that of the others a neuron or eight of them
    step = layers / len(report.dropped + report.layers) if method == "ShortGPT" else 16 * model.config.hidden_size * 3
    assert abs((before - after) - ratio * layers) <= step / 2 + 1
    info = {"method": method, "ratio": ratio, "draw": draw, "parameters": after, "peak_memory": memory.peak}
    benchmark.extra_info.update(info, seconds=report.seconds, dropped=report.dropped)
    if not short:
        benchmark.extra_info.update(perplexity=perplexities(model))
        if (ratio, draw) == (0.2, 0):
            benchmark.extra_info["accuracy"] = answers(model)


@pytest.mark.benchmark(group="comp")
def test_dense(benchmark):
    if benchmark.disabled or not available():
        pytest.skip("what the others are measured beside: with the clock on and `make data`")
    model = benchmark.pedantic(load, rounds=1, iterations=1)
    benchmark.extra_info.update(method="dense", perplexity=perplexities(model), accuracy=answers(model))
