import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_hat import CHOICE, WIDTH, autoregressive, conversation, engine, gpt2, llama, parts, prompt

from edgebolt.common.decoding import cache_length, new_cache
from edgebolt.hat import CloudEngine, CloudModel, Conversation, Dialogue, Drafting, HatAdapter, InProcess, split


def small(**options):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=20, **options))


def trained(model, seed=0):
    """An adapter that is not the identity."""
    adapter = HatAdapter(model)
    with torch.no_grad():
        weight = adapter.layers.layers[0].output.weight
        weight.normal_(generator=torch.Generator().manual_seed(seed))
    return adapter


@pytest.mark.parametrize("model", [llama, gpt2], ids=["llama", "gpt2"])
def test_it_begins_as_the_identity_in_the_models_dtype(model):
    adapter, rows = HatAdapter(model()), torch.randn(4, WIDTH, dtype=torch.float64)
    cache = new_cache()
    assert torch.equal(adapter(rows, cache), rows) and cache_length(cache) == 4
    assert not torch.equal(trained(model())(rows, new_cache()), rows)
    assert {weight.dtype for weight in adapter.parameters()} == {torch.float64}


@pytest.mark.parametrize("heads", [1, 4])
def test_four_squares_and_a_norm_where_heads_are_equal(heads):
    adapter = HatAdapter(small(num_key_value_heads=heads))
    wide, narrow = 16 * 16, 16 * 4 * heads
    assert sum(weight.numel() for weight in adapter.parameters()) == 2 * wide + 2 * narrow + 16
    assert sum(weight.numel() for weight in HatAdapter(small(num_key_value_heads=1), 4).parameters()) == 4 * wide + 16


def test_gpt2_too_has_four_squares():
    assert sum(weight.numel() for weight in HatAdapter(gpt2()).parameters()) == 4 * WIDTH**2 + WIDTH


@pytest.mark.parametrize("model", [llama, gpt2], ids=["llama", "gpt2"])
def test_chunks_are_the_whole(model):
    adapter, rows = trained(model()), torch.randn(9, WIDTH, dtype=torch.float64)
    whole, cache = adapter(rows, new_cache()), new_cache()
    pieces = torch.cat([adapter(piece, cache) for piece in rows.split([1, 5, 3])])
    torch.testing.assert_close(pieces, whole, rtol=1e-12, atol=1e-12)
    changed = rows.clone()
    changed[6] += 1
    later = adapter(changed, new_cache())
    assert torch.equal(later[:6], whole[:6]) and not torch.equal(later[8], whole[8]), "each row sees those before it"


def test_attention_is_behind_a_norm():
    adapter, rows = trained(llama()), torch.randn(5, WIDTH, dtype=torch.float64)
    added = adapter(rows, new_cache()) - rows
    torch.testing.assert_close(adapter(100 * rows, new_cache()) - 100 * rows, added, rtol=1e-4, atol=1e-4)
    assert added.abs().max() > 0.1


def test_places_matter_where_the_model_turns_them():
    rows = torch.randn(3, WIDTH, dtype=torch.float64)
    apart = torch.tensor([0, 5, 9])
    for model, differs in ((llama(), True), (gpt2(), False)):
        adapter = trained(model)
        near, far = adapter(rows, new_cache()), adapter(rows, new_cache(), apart)
        assert torch.equal(near, far) != differs


@pytest.mark.parametrize("model", [llama, gpt2], ids=["llama", "gpt2"])
def test_save_and_load(tmp_path, model):
    adapter = trained(model())
    adapter.save(tmp_path / "adapter.safetensors")
    loaded, rows = HatAdapter.load(tmp_path / "adapter.safetensors", model()), torch.randn(4, WIDTH).double()
    assert torch.equal(loaded(rows, new_cache()), adapter(rows, new_cache()))
    assert loaded.sizes == adapter.sizes
    assert [file.name for file in tmp_path.iterdir()] == ["adapter.safetensors"]


def test_the_file_is_safetensors_of_the_adapter_alone(tmp_path):
    file = tmp_path / "adapter.safetensors"
    trained(llama()).save(file)
    with safe_open(str(file), "pt") as opened:
        shapes = {name: tuple(opened.get_tensor(name).shape) for name in opened.keys()}  # noqa: SIM118
        assert '"width": 32' in opened.metadata()["hat_adapter"]
    layer = "layers.layers.0."
    assert shapes == {
        f"{layer}norm.weight": (32,),
        f"{layer}query.weight": (32, 32),
        f"{layer}key.weight": (16, 32),
        f"{layer}value.weight": (16, 32),
        f"{layer}output.weight": (32, 32),
    }
    data = file.read_bytes()
    assert len(data) == 8 + int.from_bytes(data[:8], "little") + (32 + 2 * 32 * 32 + 2 * 16 * 32) * 8


def test_heads_of_its_own_are_kept(tmp_path):
    HatAdapter(small(num_key_value_heads=1), 2).save(tmp_path / "a")
    assert HatAdapter.load(tmp_path / "a", small(num_key_value_heads=4)).sizes["key_value_heads"] == 2


def test_another_models_adapter_is_refused(tmp_path):
    HatAdapter(small()).save(tmp_path / "a")
    with pytest.raises(ValueError, match=r"'width': 16.*the model needs .*'width': 32.*train one for it"):
        HatAdapter.load(tmp_path / "a", llama())


def test_other_files_are_refused(tmp_path):
    (tmp_path / "text").write_text("no tensors")
    with pytest.raises(ValueError, match="is no safetensors file"):
        HatAdapter.load(tmp_path / "text", llama())
    save_file({"weight": torch.zeros(2)}, tmp_path / "other")
    with pytest.raises(ValueError, match=r"is no adapter that HatAdapter\.save has written"):
        HatAdapter.load(tmp_path / "other", llama())


@pytest.mark.parametrize("heads", [0, 3, 8])
def test_heads_that_cannot_be_shared_out_are_refused(heads):
    with pytest.raises(ValueError, match=f"key_value_heads={heads}: the model's 4 heads"):
        HatAdapter(small(), heads)


def test_it_shares_nothing_with_the_model():
    model = small()
    mine = {id(weight) for weight in HatAdapter(model).parameters()}
    assert not mine & {id(weight) for weight in model.parameters()}


def test_gpt2_decodes_as_it_does_alone_up_to_its_last_place():
    model = gpt2()
    mine, found = split(model, 2), []
    for adapter, steps in ((HatAdapter(model), 2), (trained(model), 9)):
        talk = Conversation(mine, adapter, prompt(5), 43, CHOICE, Drafting(0.0, 4, 3), stops=())
        for _ in Dialogue(talk, InProcess(CloudEngine(CloudModel(mine.middle)), steps=steps)):
            pass
        found.append(talk.text)
    assert found == [autoregressive(prompt(5), 43, model)] * 2


def test_an_adapter_that_is_wrong_changes_no_text():
    talk = conversation(adapter=trained(llama()), drafting=Drafting(0.0, 4, 3))
    for _ in Dialogue(talk, InProcess(engine())):
        pass
    assert talk.text == autoregressive(prompt(5), 24) and talk.drafted > talk.accepted
    assert parts().width == WIDTH
