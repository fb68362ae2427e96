import copy
import itertools

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="needs edgebolt-common[llm]")

from edgebolt.common.anatomy import Anatomy  # noqa: E402
from edgebolt.common.decoding import (  # noqa: E402
    DraftTree,
    Embedding,
    Head,
    LayerStack,
    Segment,
    cache_length,
    crop,
    keep,
    new_cache,
    segment_attention,
)

KINDS = ["gpt2", "llama", "mistral", "qwen2"]
TEXT = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6, 5, 35, 8, 9, 7, 9, 3, 2, 38, 4])
ROPE = {"rope_theta": 10000.0, "factor": 2.0}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 48}


def random_rows(count, seed=0, dtype=torch.float64):
    return torch.randn(count, 32, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def held(cache):
    return [part.clone() for layer in cache.layers for part in (layer.keys, layer.values)]


def attention(layer):
    return layer.attn if hasattr(layer, "attn") else layer.self_attn


@torch.no_grad()
def split_run(model, chunks, cuts=(0, 1, 3, 4)):
    """Logits and caches of a model in three parts, chunk by chunk."""
    embed, head = Embedding(model), Head(model)
    stacks = [LayerStack.of(model, *cut) for cut in itertools.pairwise(cuts)]
    caches, found = [new_cache() for _ in stacks], []
    for chunk in chunks:
        start = cache_length(caches[0])
        rows = embed(chunk, torch.arange(start, start + len(chunk)))
        for stack, cache in zip(stacks, caches, strict=True):
            rows = stack(rows, [Segment(cache, len(chunk))])
        found.append(head(rows))
    return torch.cat(found), [part for cache in caches for part in held(cache)]


@pytest.mark.parametrize("chunk", [1, 7, 18])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_split_model_is_the_whole_one_bit_for_bit(decoder, kind, dtype, chunk):
    model, chunks = decoder(kind, dtype), TEXT.split(chunk)
    cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        whole = torch.cat([model(each[None], past_key_values=cache, use_cache=True).logits[0] for each in chunks])
    found, rows = split_run(model, chunks)
    assert found.dtype == dtype and torch.equal(found, whole)
    assert all(torch.equal(*pair) for pair in zip(rows, held(cache), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_change_nothing_but_the_last_bits(decoder, kind):
    whole, _ = split_run(decoder(kind), [TEXT])
    for chunk in (1, 2, 5, 17):
        found, _ = split_run(decoder(kind), TEXT.split(chunk))
        torch.testing.assert_close(found, whole, rtol=0, atol=1e-11)


@pytest.mark.parametrize("options", [{"scale_attn_by_inverse_layer_idx": True}, {"scale_attn_weights": False}])
def test_what_depends_on_a_layers_number_goes_by_the_models_own(decoder, options):
    model = decoder("gpt2", **options)
    with torch.no_grad():
        assert torch.equal(split_run(model, [TEXT])[0], model(TEXT[None]).logits[0])


def test_a_model_that_runs_eagerly_is_split_all_the_same(new_decoder):
    model = new_decoder("llama")
    model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = model(TEXT[None]).logits[0]
        # its softmax is always in float32
        torch.testing.assert_close(split_run(model, TEXT.split(7))[0], expected, rtol=0, atol=1e-5)
    assert {attention(layer).config._attn_implementation for layer in model.model.layers} == {"eager"}


@pytest.mark.parametrize("rope", [{"rope_type": "linear"}, {"rope_type": "yarn"}, {"rope_type": "llama3", **LLAMA3}])
def test_angles_that_do_not_change_with_the_text_are_taken(decoder_of_rope, rope):
    model = decoder_of_rope(rope)
    with torch.no_grad():
        torch.testing.assert_close(split_run(model, TEXT.split(7))[0], model(TEXT[None]).logits[0], rtol=0, atol=1e-11)


@pytest.fixture
def decoder_of_rope(new_decoder):
    return lambda rope: new_decoder("llama", rope_parameters={**ROPE, **rope})


@pytest.mark.parametrize(
    "rope",
    [{"rope_type": "dynamic"}, {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}],
)
def test_angles_that_change_with_the_text_are_refused(decoder_of_rope, rope):
    model = decoder_of_rope(rope)
    with pytest.raises(NotImplementedError, match=rf"rope_type='{rope['rope_type']}'.*Load the model with"):
        LayerStack.of(model, 0, 2)
    with pytest.raises(NotImplementedError, match="angles change"):
        segment_attention(model.config)


@pytest.mark.parametrize(("first", "last"), [(-1, 2), (2, 2), (3, 2), (0, 5), (4, 5)])
def test_layers_that_are_not_there_are_refused(decoder, first, last):
    with pytest.raises(ValueError, match=rf"Layers {first} to {last}: take at least one of the model's 4"):
        LayerStack.of(decoder("llama"), first, last)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_and_buffers_are_the_models_own(new_decoder, kind):
    model = new_decoder(kind)
    stack = LayerStack.of(model, 1, 3)
    layers = Anatomy(model).layers[1:3]
    assert len(stack.layers) == 2
    for mine, theirs in zip(stack.layers, layers, strict=True):
        assert mine is not theirs
        weights, others = dict(mine.named_parameters()), dict(theirs.named_parameters())
        assert weights.keys() == others.keys() and all(weights[name] is others[name] for name in weights)
        assert all(weights[name].data_ptr() == others[name].data_ptr() for name in weights)
        buffers = {buffer.data_ptr() for buffer in theirs.buffers()}
        assert {buffer.data_ptr() for buffer in mine.buffers()} == buffers
    mine = {id(tensor) for tensor in (*stack.parameters(), *stack.buffers())}
    assert mine <= {id(tensor) for tensor in (*model.parameters(), *model.buffers())}


def test_buffers_of_a_layer_are_shared_too(new_decoder):
    model = new_decoder("llama")
    model.model.layers[1].mlp.register_buffer("scale", torch.ones(3))  # no family here has any
    assert LayerStack.of(model, 1, 2).layers[0].mlp.scale is model.model.layers[1].mlp.scale


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_does_not_notice_that_it_was_split(new_decoder, kind):
    model = new_decoder(kind)
    config, layers = copy.deepcopy(model.config.to_dict()), Anatomy(model).layers
    with torch.no_grad():
        before = model(TEXT[None]).logits
        split_run(model, TEXT.split(7))
        cache = transformers.DynamicCache(config=model.config)
        assert torch.equal(model(TEXT[None], past_key_values=cache).logits, before)
    assert cache.get_seq_length() == len(cache.layers[3].keys[0, 0]) == 18
    assert [attention(layer).layer_idx for layer in layers] == [0, 1, 2, 3]
    assert all(attention(layer).config is model.config for layer in layers)
    assert model.config.to_dict() == config and model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("kind", KINDS)
def test_layers_are_numbered_from_0_so_that_their_caches_have_a_length(decoder, kind):
    stack, cache = LayerStack.of(decoder(kind), 2, 4), new_cache()
    assert [attention(layer).layer_idx for layer in stack.layers] == [0, 1]
    with torch.no_grad():
        stack(random_rows(5), [Segment(cache, 5)])
    assert len(cache.layers) == 2 and [layer.keys.shape[2] for layer in cache.layers] == [5, 5]
    assert cache_length(cache) == 5


def test_what_is_learnt_in_a_stack_is_learnt_in_the_model(new_decoder):
    model = new_decoder("llama")
    stack, rows = LayerStack.of(model, 1, 3), random_rows(4)
    stack(rows, [Segment(new_cache(), 1), Segment(new_cache(), 3)]).square().sum().backward()
    learnt = [all(weight.grad is not None for weight in layer.parameters()) for layer in model.model.layers]
    assert learnt == [False, True, True, False]
    with torch.no_grad():
        before = stack(rows, [Segment(new_cache(), 4)])
        model.model.layers[2].mlp.up_proj.weight.zero_()
        assert not torch.equal(stack(rows, [Segment(new_cache(), 4)]), before)


def conversations(stack):
    """Segments of unlike conversations: new ones, longer and shorter ones, a tree, and an own mask; and their rows."""
    tree = DraftTree((1, 2, 3, 4), (-1, -1, 0, 1))
    wants = [(0, 3, None), (6, 1, None), (9, 4, None), (5, 5, tree), (0, 1, None), (2, 1, "hides"), (17, 2, None)]
    segments, rows = [], []
    for seed, (cached, count, extra) in enumerate(wants):
        cache = new_cache()
        if cached:
            stack(random_rows(cached, 100 + seed), [Segment(cache, cached)])
        if extra == "hides":
            segments.append(Segment(cache, count, mask=torch.tensor([[False, True, True]])))
        elif extra is None:
            segments.append(Segment(cache, count))
        else:
            segments.append(Segment(cache, count, extra.positions(cached), extra.mask(cached)))
        rows.append(random_rows(count, seed))
    return segments, rows


@pytest.mark.parametrize("kind", KINDS)
def test_packed_conversations_get_what_each_gets_alone(decoder, kind):
    stack = LayerStack.of(decoder(kind), 1, 4)
    with torch.no_grad():
        segments, rows = conversations(stack)
        lengths = [cache_length(segment.cache) + segment.rows for segment in segments]
        found = stack(torch.cat(rows), segments).split([segment.rows for segment in segments])
        alone, _ = conversations(stack)
        for number, (segment, one, together) in enumerate(zip(alone, rows, segments, strict=True)):
            torch.testing.assert_close(found[number], stack(one, [segment]), rtol=0, atol=1e-12)
            for pair in zip(held(together.cache), held(segment.cache), strict=True):
                torch.testing.assert_close(*pair, rtol=0, atol=1e-12)
    assert [cache_length(segment.cache) for segment in segments] == lengths


def test_what_others_say_does_not_matter(decoder):
    stack = LayerStack.of(decoder("llama"), 0, 2)
    with torch.no_grad():
        (segments, rows), (again, _) = conversations(stack), conversations(stack)
        found = stack(torch.cat(rows), segments)
        loud = [row if number == 2 else 3 * row + 1 for number, row in enumerate(rows)]
        changed = stack(torch.cat(loud), again)
    assert torch.equal(found[4 + 0 : 4 + 4], changed[4 : 4 + 4])
    assert not torch.allclose(found[:4], changed[:4])
    assert all(torch.equal(*pair) for pair in zip(held(segments[2].cache), held(again[2].cache), strict=True))


def test_the_order_of_conversations_does_not_matter(decoder):
    stack = LayerStack.of(decoder("qwen2"), 0, 2)
    with torch.no_grad():
        (segments, rows), (again, _) = conversations(stack), conversations(stack)
        found = stack(torch.cat(rows), segments).split([segment.rows for segment in segments])
        turned = stack(torch.cat(rows[::-1]), again[::-1]).split([segment.rows for segment in again[::-1]])
    for one, other in zip(found, turned[::-1], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("cached", [0, 4])
def test_by_default_rows_follow_the_cache_and_see_what_came_before(decoder, cached):
    stack, (first, other) = LayerStack.of(decoder("llama"), 0, 4), (new_cache(), new_cache())
    with torch.no_grad():
        for cache in (first, other):
            if cached:
                stack(random_rows(cached, 1), [Segment(cache, cached)])
        mask = torch.ones(3, cached + 3, dtype=torch.bool).tril(cached)
        given = stack(random_rows(3), [Segment(first, 3, torch.arange(cached, cached + 3), mask)])
        torch.testing.assert_close(stack(random_rows(3), [Segment(other, 3)]), given, rtol=0, atol=1e-12)


def test_positions_count_and_only_their_differences_in_rotary_models(decoder):
    stack, rows = LayerStack.of(decoder("llama"), 0, 4), random_rows(4)
    with torch.no_grad():
        usual, shifted, spread = (
            stack(rows, [Segment(new_cache(), 4, torch.tensor(positions))])
            for positions in ([0, 1, 2, 3], [20, 21, 22, 23], [0, 3, 7, 20])
        )
    torch.testing.assert_close(shifted, usual, rtol=0, atol=1e-6)  # angles are made in float32
    assert (spread - usual).abs().max() > 1e-2


def test_a_hidden_position_is_as_good_as_gone(decoder):
    stack, (hidden, gone) = LayerStack.of(decoder("llama"), 0, 4), (new_cache(), new_cache())
    with torch.no_grad():
        for cache in (hidden, gone):
            stack(random_rows(5, 1), [Segment(cache, 5)])
        keep(gone, torch.tensor([0, 1, 3, 4]))
        seen = torch.tensor([[True, True, False, True, True, True]])
        found = stack(random_rows(1), [Segment(hidden, 1, mask=seen)])
        torch.testing.assert_close(
            stack(random_rows(1), [Segment(gone, 1, torch.tensor([5]))]), found, rtol=0, atol=1e-12
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_row_that_sees_nothing_spoils_no_other(decoder, dtype):
    stack, mask = LayerStack.of(decoder("llama", dtype), 0, 4), torch.ones(3, 3, dtype=torch.bool).tril()
    mask[1] = False
    mask[2, 1] = False
    rows = random_rows(3, dtype=dtype)
    with torch.no_grad():
        found = stack(rows, [Segment(new_cache(), 3, mask=mask)])
        other = rows.clone()
        other[1] = 1.0
        again = stack(other, [Segment(new_cache(), 3, mask=mask)])
    assert found.isfinite().all() and torch.equal(found[[0, 2]], again[[0, 2]])


def test_a_text_goes_on_after_a_cut(decoder):
    stack, (cut, fresh) = LayerStack.of(decoder("gpt2"), 0, 4), (new_cache(), new_cache())
    with torch.no_grad():
        stack(random_rows(9, 1), [Segment(cut, 9)])
        crop(cut, 4)
        stack(random_rows(9, 1)[:4], [Segment(fresh, 4)])
        found, expected = (stack(random_rows(3), [Segment(cache, 3)]) for cache in (cut, fresh))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


GOOD_MASK = torch.ones(2, 5, dtype=torch.bool)


@pytest.mark.parametrize(
    ("rows", "second", "message"),
    [
        (3, {"rows": 2}, r"3 rows for segments of \[2, 2\]"),
        (5, {"rows": 2}, r"5 rows for segments of \[2, 2\]"),
        (2, {"rows": 0}, r"2 rows for segments of \[2, 0\]"),
        (1, {"rows": -1}, r"1 rows for segments of \[2, -1\]"),
        (4, {"rows": 2, "mask": GOOD_MASK[:, :2]}, r"mask of shape \[2, 2\]: 3 cached and 2 rows need \(2, 5\)"),
        (4, {"rows": 2, "mask": GOOD_MASK[:1]}, r"mask of shape \[1, 5\]"),
        (4, {"rows": 2, "mask": GOOD_MASK[None]}, r"mask of shape \[1, 2, 5\]"),
        (3, {"rows": 1, "mask": GOOD_MASK}, r"mask of shape \[2, 5\]: 3 cached and 1 rows"),
        (4, {"rows": 2, "positions": torch.tensor([3])}, r"positions of shape \[1\] for 2 rows"),
        (4, {"rows": 2, "positions": torch.tensor([3, 4, 5])}, r"positions of shape \[3\] for 2 rows"),
        (4, {"rows": 2, "positions": torch.tensor([[3, 4]])}, r"positions of shape \[1, 2\] for 2 rows"),
    ],
)
def test_a_call_that_fails_leaves_the_caches_as_they_were(decoder, rows, second, message):
    stack, caches = LayerStack.of(decoder("llama"), 0, 2), (new_cache(), new_cache())
    with torch.no_grad():
        for cache in caches:
            stack(random_rows(3, 1), [Segment(cache, 3)])
        before = [held(cache) for cache in caches]
        with pytest.raises(ValueError, match=message):
            stack(random_rows(rows), [Segment(caches[0], 2), Segment(caches[1], **second)])
    for cache, parts in zip(caches, before, strict=True):
        assert all(torch.equal(*pair) for pair in zip(held(cache), parts, strict=True))


def test_positions_are_not_lent_from_one_conversation_to_the_next(decoder):
    stack = LayerStack.of(decoder("llama"), 0, 2)
    one, other = torch.tensor([0, 1, 2]), torch.tensor([0])
    with pytest.raises(ValueError, match=r"positions of shape \[3\] for 2 rows"):
        stack(random_rows(4), [Segment(new_cache(), 2, one), Segment(new_cache(), 2, other)])


def test_one_cache_in_two_segments_is_refused(decoder):
    stack, cache = LayerStack.of(decoder("llama"), 0, 2), new_cache()
    with pytest.raises(ValueError, match="Two segments have one cache"):
        stack(torch.randn(3, stack.layers[0].hidden_size), [Segment(cache, 1), Segment(cache, 2)])
    assert cache.get_seq_length() == 0


def test_nothing_to_run_is_refused(decoder):
    with pytest.raises(ValueError, match="0 rows for segments of \\[\\]"):
        LayerStack.of(decoder("llama"), 0, 2)(random_rows(0), [])


def test_rows_of_another_width_leave_the_cache_as_it_was(decoder):
    stack, cache = LayerStack.of(decoder("llama"), 0, 2), new_cache()
    with pytest.raises(RuntimeError):
        stack(random_rows(3)[:, :16], [Segment(cache, 3)])
    assert cache_length(cache) == 0


def test_own_layers_run_with_the_configuration_of_segments(decoder):
    """As HAT's adapter does: attention parts built anew, from the copied configuration."""
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    model = decoder("llama")
    config = segment_attention(model.config)
    assert config is not model.config and model.config._attn_implementation == "sdpa"
    with torch.random.fork_rng():
        layers = [LlamaDecoderLayer(config, number).double().eval() for number in range(2)]
    stack, caches = LayerStack(layers, model.model.rotary_emb), (new_cache(), new_cache())
    with torch.no_grad():
        found = stack(random_rows(5), [Segment(caches[0], 2), Segment(caches[1], 3)])
        alone = stack(random_rows(5)[2:], [Segment(new_cache(), 3)])
    torch.testing.assert_close(found[2:], alone, rtol=0, atol=1e-12)
