"""What pruning a checkpoint of 2 GB takes in memory: ``python tests/benchmarks/comp_memory.py``.

The checkpoint is a random Llama in bfloat16, written a layer at a time. The promise is four of its layers in float32
and hidden states: those of the calibration tokens, and of a few of them in as many models as there are layers.
"""

import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import LlamaConfig

from edgebolt.comp import Comp
from edgebolt.comp.evaluation import measured_memory

sys.path.insert(0, str(Path(__file__).parents[1] / "comp"))
from deep_llama import write_llama

SAMPLES, LENGTH = 16, 64


def measure(folder, options=None, **changes):
    """Write the checkpoint, prune it by a fifth, and return bytes and seconds by name."""
    layer = write_llama(folder / "dense", **changes)
    config = LlamaConfig.from_pretrained(folder / "dense")
    ids = torch.randint(config.vocab_size, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(1))
    comp = Comp(ratio=0.2, samples=SAMPLES, length=LENGTH, **(options or {}))
    sequences = SAMPLES + config.num_hidden_layers * comp.effect_sequences
    streams = 4 * sequences * LENGTH * config.hidden_size
    start = time.perf_counter()
    with measured_memory() as memory:
        report = comp.prune(folder / "dense", ids, folder / "small", progress=False)
    return {
        "checkpoint": report.files[0],
        "layer": layer,
        "streams": streams,
        "bound": 4 * layer + streams,
        "peak": memory.peak,
        "seconds": time.perf_counter() - start,
        "stages": report.seconds,
    }


def main():
    """Print the numbers; arguments are changes to the model's config, such as ``intermediate_size=8192``."""
    changes = {name: int(value) for name, _, value in (argument.partition("=") for argument in sys.argv[1:])}
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), **changes)
    for name in ("checkpoint", "layer", "streams", "bound", "peak"):
        print(f"{name:10} {found[name] / 2**20:8.1f} MiB")
    print(f"{'peak':10} {(found['peak'] - found['streams']) / found['layer']:8.2f} layers beside the streams")
    stages = ", ".join(f"{name} {spent:.1f}" for name, spent in found["stages"].items())
    print(f"{'seconds':10} {found['seconds']:8.1f} ({stages})")


if __name__ == "__main__":
    main()
