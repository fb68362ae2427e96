"""Tiny dense models of every family, always of the same weights, and what the tests of COMP do with them."""

import json

import torch
import transformers
from safetensors.torch import load_file, save_file

from edgebolt.common.anatomy import Anatomy
from edgebolt.comp import Comp
from edgebolt.comp.blocks import attention_block, matrix

LAYERS, WORDS, WIDTH, INNER, HEADS, HEAD = 4, 60, 16, 48, 4, 4
DECODERS = ("llama", "qwen2", "mistral", "gpt2", "gpt2_inverse")
ENCODERS = ("bert", "roberta", "mpnet")
FAMILIES = DECODERS + ENCODERS
QUIET = {"progress": False}
# What most tests prune by: one layer goes, all others lose neurons.
SOME = {"ratio": 0.5, "depth_fraction": 0.5, "round_to": 1, "variance_bound": 10.0}


def _config(kind, **changes):
    sizes = {"hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": LAYERS}
    sizes |= {"num_attention_heads": HEADS, "vocab_size": WORDS, "max_position_embeddings": 64}
    sizes |= {"initializer_range": 0.2}
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    grouped = {**sizes, **ends, "num_key_value_heads": 2}
    gpt2 = {"n_embd": WIDTH, "n_inner": INNER, "n_layer": LAYERS, "n_head": HEADS, "vocab_size": WORDS}
    gpt2 |= {"n_positions": 64, "initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2}
    windows = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    made = {
        "llama": lambda: transformers.LlamaConfig(**{**grouped, "tie_word_embeddings": True, **changes}),
        "qwen2": lambda: transformers.Qwen2Config(
            **{**grouped, "layer_types": windows, "use_sliding_window": True, "sliding_window": 4, **changes}
        ),
        "mistral": lambda: transformers.MistralConfig(**{**grouped, "sliding_window": 6, **changes}),
        "gpt2": lambda: transformers.GPT2Config(**{**gpt2, **changes}),
        "gpt2_inverse": lambda: transformers.GPT2Config(
            **{**gpt2, "scale_attn_by_inverse_layer_idx": True, **changes}
        ),
        "bert": lambda: transformers.BertConfig(**{**sizes, "pad_token_id": 0, **changes}),
        "roberta": lambda: transformers.RobertaConfig(**{**sizes, "pad_token_id": 1, **changes}),
        "mpnet": lambda: transformers.MPNetConfig(**{**sizes, "pad_token_id": 1, **changes}),
    }
    return made[kind]()


def tiny(kind, auto="", **changes):
    """A new model of a family; a language model (masked for encoders), or what ``auto`` names."""
    auto = auto or auto_class(kind)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, auto).from_config(_config(kind, **changes)).eval()
        with torch.no_grad():  # biases and norms start at zero and one, where mistakes do not show
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.1 * torch.randn(parameter.shape))
            layer = Anatomy(model).layers[1]  # whose last head does little, so that some head goes
            block = attention_block(model.config.model_type, layer, model.config)
            matrix(layer.get_submodule(block.consumer))[:, -block.unit :] *= 0.05
    return model


def auto_class(kind):
    return "AutoModelForCausalLM" if kind in DECODERS else "AutoModelForMaskedLM"


def reload(folder, kind, **kwargs):
    return getattr(transformers, auto_class(kind)).from_pretrained(folder, **kwargs).eval()


def ids(samples=8, tokens=12, seed=0):
    """Token ids, none of them special."""
    return torch.randint(4, WORDS, (samples, tokens), generator=torch.Generator().manual_seed(seed))


def logits(model, batch=None, **kwargs):
    with torch.no_grad():
        out = model(ids(3, 10, seed=7) if batch is None else batch, **kwargs)
    return out[0]


def prune(model, texts=None, output=None, **options):
    """Prune with the options that most tests take."""
    return Comp(**{**SOME, **options}).prune(model, ids(24, 16) if texts is None else texts, output, **QUIET)


def saved(model, folder, **kwargs):
    """A folder with the dense model."""
    model.save_pretrained(folder, **kwargs)
    return folder


def weights(folder):
    """All tensors of a folder."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def rewrite(folder, change):
    """Apply ``change`` to the dict of all tensors of a single-file checkpoint."""
    path = folder / "model.safetensors"
    tensors = change(load_file(path))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"format": "pt"})
    return folder


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def same_state(one, other):
    """Whether two models have the same parameters, bit for bit."""
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
