"""COMP beside its rivals on SmolLM2-135M; see comp_run.py.

Budget, one thread: 35 prunings of 5 to 90 s (29 minutes), each with two perplexities of 4,096 tokens (25 s: 15
minutes); questions at 20 % alone (60 s a model: 8 minutes); two more calibration draws at 20 % for COMP and the two
best rivals (9 minutes); speed (2 minutes). It took 30 and 37 minutes as two processes side by side (``-k``).
Without the clock (``make test``) every method prunes a
tiny random Llama, so that the code is run.
"""

import pytest
import torch
from comp_run import METHODS, RATIOS, answers, available, calibration, dense, load, perplexities

from edgebolt.comp.evaluation import decoding_speeds, measured_memory

DRAWS = ("COMP", "FLAP", "LLM-Pruner")
RUNS = [
    *[(ratio, 0, name) for ratio in RATIOS for name in METHODS],
    *[(0.2, draw, name) for draw in (1, 2) for name in DRAWS],
]


def tiny(folder):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 12}  # LLM-Pruner spares six
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 50}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**sizes, **heads)).save_pretrained(folder)
    return folder


@pytest.mark.benchmark(group="comp")
@pytest.mark.parametrize(("ratio", "draw", "method"), RUNS, ids=lambda part: str(part).replace(" ", "-"))
def test_prune(benchmark, ratio, draw, method, tmp_path):
    short = benchmark.disabled
    if short and (ratio, draw) != (0.2, 0):
        pytest.skip("the short form has one ratio and one draw")
    if not short and not available():
        pytest.skip("SmolLM2 or BoolQ are not installed: run `make data`")
    folder = tiny(tmp_path / "dense") if short else dense()[0]
    batches = [{"input_ids": torch.randint(50, (8, 16))}] if short else calibration(draw)
    whole = load(folder)
    before = sum(parameter.numel() for parameter in whole.parameters())
    layers = sum(parameter.numel() for parameter in whole.model.layers.parameters())
    del whole
    with measured_memory() as memory:
        arguments = (folder, batches, ratio, tmp_path / "small")
        report, model = benchmark.pedantic(METHODS[method], arguments, rounds=1, iterations=1)
    model = model or load(tmp_path / "small")
    after = sum(parameter.numel() for parameter in model.parameters())
    assert report.parameters == (before, after)
    # the smallest unit of ShortGPT is a layer, that of the others a neuron or eight of them
    step = layers / len(report.dropped + report.layers) if method == "ShortGPT" else 8 * model.config.hidden_size * 3
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
    model = benchmark.pedantic(load, (dense()[0],), rounds=1, iterations=1)
    benchmark.extra_info.update(method="dense", perplexity=perplexities(model), accuracy=answers(model))


@pytest.mark.benchmark(group="comp")
def test_speed(benchmark, tmp_path):
    """Prefill and decoding of the dense model and of COMP's at 20 and 50 %, in turns."""
    if benchmark.disabled or not available():
        pytest.skip("the speed of a real model: with the clock on and `make data`")
    models = {"dense": load(dense()[0])}
    for ratio in (0.2, 0.5):
        METHODS["COMP"](dense()[0], calibration(samples=16), ratio, tmp_path / str(ratio))
        models[str(ratio)] = load(tmp_path / str(ratio))
    found = benchmark.pedantic(decoding_speeds, (models,), rounds=1, iterations=1)
    benchmark.extra_info.update(
        method="speed",
        speed={name: {"prefill": result.prefill, "decode": result.decode} for name, result in found.items()},
    )
