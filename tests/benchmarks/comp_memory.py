"""What pruning a checkpoint of 2 GB takes in memory: ``python tests/benchmarks/comp_memory.py``.

The checkpoint is a random Llama in bfloat16, written a layer at a time. The promise is four of its layers in float32
and hidden states: those of the calibration tokens, and of a few of them in as many models as there are layers.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from edgebolt.comp import Comp
from edgebolt.comp.evaluation import measured_memory

SIZES = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 20}
HEADS = {"num_attention_heads": 16, "num_key_value_heads": 8, "vocab_size": 2000}
SAMPLES, LENGTH = 16, 64


def write_llama(folder, **changes):
    """A checkpoint of random weights with a shard for each layer; returns the bytes of a layer in float32."""
    config = LlamaConfig(**{**SIZES, **HEADS, **changes}, architectures=["LlamaForCausalLM"], dtype="bfloat16")
    width, inner = config.hidden_size, config.intermediate_size
    narrow = width // config.num_attention_heads * config.num_key_value_heads
    shapes = {
        "self_attn.q_proj": (width, width),
        "self_attn.k_proj": (narrow, width),
        "self_attn.v_proj": (narrow, width),
        "self_attn.o_proj": (width, width),
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
    }
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator).div_(shape[-1] ** 0.5).bfloat16()

    files = {}

    def save(tensors, name):
        save_file(tensors, folder / name, {"format": "pt"})
        files.update(dict.fromkeys(tensors, name))

    folder.mkdir(parents=True, exist_ok=True)
    ones = torch.ones(width, dtype=torch.bfloat16)
    for index in range(config.num_hidden_layers):
        inside = f"model.layers.{index}."
        tensors = {f"{inside}{name}.weight": random(*shape) for name, shape in shapes.items()}
        norms = {f"{inside}{name}.weight": ones.clone() for name in ("input_layernorm", "post_attention_layernorm")}
        save(tensors | norms, f"layer-{index}.safetensors")
    ends = {name: random(config.vocab_size, width) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    save({**ends, "model.norm.weight": ones}, "ends.safetensors")
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    index = {"metadata": {"total_size": size}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config.save_pretrained(folder)
    return 4 * (sum(rows * columns for rows, columns in shapes.values()) + 2 * width)


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
