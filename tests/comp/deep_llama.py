"""A checkpoint of random weights, of any size."""

import json

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

SIZES = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 20}
HEADS = {"num_attention_heads": 16, "num_key_value_heads": 8, "vocab_size": 2000}


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
