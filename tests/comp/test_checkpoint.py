import json
import shutil

import pytest
import torch
from tiny_models import FAMILIES, edit_config, ids, logits, prune, reload, rewrite, saved, tiny
from transformers import AutoConfig

from edgebolt.common.anatomy import Anatomy
from edgebolt.comp.calls import capture
from edgebolt.comp.checkpoint import Checkpoint, Skeleton


def skeleton(folder):
    return Skeleton(AutoConfig.from_pretrained(folder), Checkpoint(folder))


@pytest.mark.parametrize("kind", FAMILIES)
def test_layers_and_what_enters_them_are_those_of_the_model(kind, tmp_path):
    model = tiny(kind)
    made = skeleton(saved(model, tmp_path))
    for index, layer in enumerate(Anatomy(model).layers):
        read = made.layer(index)
        assert not read.training
        assert all(torch.equal(a, b) for a, b in zip(read.parameters(), layer.parameters(), strict=True))
    made.open_embeddings(ids())
    one, other = (capture(m, [lambda m=m: m(ids())]) for m in (model, made.model))
    assert torch.equal(one.hidden[0], other.hidden[0])
    flat = [v for a in (one, other) for call in a.calls[0] for v in (*call[0], *call[1].values())]
    for a, b in zip(flat[: len(flat) // 2], flat[len(flat) // 2 :], strict=True):
        pairs = zip(a, b, strict=True) if isinstance(a, tuple) else [(a, b)]
        assert all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in pairs)


def test_only_rows_of_tokens_that_occur_are_read(tmp_path):
    made = skeleton(saved(tiny("llama"), tmp_path))
    made.open_embeddings(torch.tensor([[7, 4, 7]]))
    assert made.anatomy.embedding.rows.shape == (2, 16)
    assert all(parameter.is_meta for layer in made.anatomy.layers for parameter in layer.parameters())


def test_sharded_checkpoints(tmp_path):
    model = tiny("qwen2")
    saved(model, tmp_path / "one")
    saved(model, tmp_path / "many", max_shard_size="4KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    one, many = Checkpoint(tmp_path / "one"), Checkpoint(tmp_path / "many")
    assert one.files.keys() == many.files.keys()
    assert all(torch.equal(one.tensor(name), many.tensor(name)) for name in one.files)
    name = "model.embed_tokens.weight"
    assert torch.equal(many.rows(name, [3, 17]), one.tensor(name)[[3, 17]])


def test_a_folder_without_weights(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds neither model.safetensors nor"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("kind", ["llama", "bert"])
@pytest.mark.parametrize("names", ["bare", "old"])
def test_checkpoints_without_the_base_prefix_and_with_old_names(kind, names, tmp_path):
    model = tiny(kind)
    base = f"{model.base_model_prefix}."

    def change(tensors):
        if names == "bare":
            return {name.removeprefix(base): tensor for name, tensor in tensors.items()}
        swaps = (("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta"))
        made = {}
        for name, tensor in tensors.items():
            for new, old in swaps:
                name = name.replace(new, old)
            made[name] = tensor
        return made

    rewrite(saved(model, tmp_path / "dense"), change)
    prune(str(tmp_path / "dense"), output=tmp_path / "small", prune_attention=True)
    prune(model, prune_attention=True)
    assert torch.equal(logits(model), logits(reload(tmp_path / "small", kind)))


def test_a_bare_backbone_checkpoint(tmp_path):
    import transformers

    model = tiny("bert", auto="AutoModel")
    prune(str(saved(model, tmp_path / "dense")), output=tmp_path / "small")
    prune(model)
    small = transformers.AutoModel.from_pretrained(tmp_path / "small").eval()
    assert type(small).__name__ == type(model).__name__ == "CompBertModel"
    assert torch.equal(logits(model), logits(small))


def test_what_the_model_has_no_use_for_is_left_behind(tmp_path):
    """Published BERT files hold heads that their named class does not have."""
    dense = rewrite(
        saved(tiny("bert"), tmp_path / "dense"), lambda t: t | {"cls.seq_relationship.weight": torch.ones(2, 16)}
    )
    prune(str(dense), output=tmp_path / "small")
    assert "cls.seq_relationship.weight" not in Checkpoint(tmp_path / "small").files


@pytest.mark.parametrize(
    "name", ["model.layers.2.mlp.up_proj.weight", "model.norm.weight", "model.embed_tokens.weight"]
)
def test_a_missing_tensor_is_refused(name, tmp_path):
    dense = rewrite(saved(tiny("llama"), tmp_path), lambda tensors: {k: v for k, v in tensors.items() if k != name})
    with pytest.raises(ValueError, match=rf"lacks . tensors of LlamaForCausalLM, such as \['{name}'"):
        prune(str(dense), output=tmp_path / "small")
    assert not (tmp_path / "small").exists()


@pytest.mark.parametrize("architectures", [None, ["MyOwnLlama"]])
def test_a_config_that_does_not_name_the_class_is_refused(architectures, tmp_path):
    dense = saved(tiny("llama", tie_word_embeddings=False), tmp_path)
    edit_config(dense, architectures=architectures)
    assert "lm_head.weight" in Checkpoint(dense).files  # which AutoModel would not see
    with pytest.raises(ValueError, match=r"config.json has architectures=.*lest a head is lost"):
        prune(str(dense), output=tmp_path / "small")


def test_a_single_file_is_read_before_an_index_as_in_transformers(tmp_path):
    saved(tiny("llama"), tmp_path / "shards", max_shard_size="4KB")
    index = tmp_path / "shards" / "model.safetensors.index.json"
    assert Checkpoint(tmp_path / "shards").files == json.loads(index.read_text())["weight_map"]
    saved(tiny("llama"), tmp_path / "single")
    shutil.copy(tmp_path / "single" / "model.safetensors", tmp_path / "shards")
    assert set(Checkpoint(tmp_path / "shards").files.values()) == {"model.safetensors"}
