import pytest
import torch

transformers = pytest.importorskip("transformers", reason="needs edgebolt-common[llm]")

from edgebolt.common.decoding import Embedding, Head, LayerStack, Segment, longest_text, new_cache  # noqa: E402

KINDS = ["gpt2", "llama", "mistral", "qwen2"]
TEXT = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6])


@pytest.mark.parametrize("kind", KINDS)
def test_the_ends_are_the_models(decoder, kind):
    model = decoder(kind)
    with torch.no_grad():
        seen = model(TEXT[None], output_hidden_states=True)
        assert torch.equal(Embedding(model)(TEXT, torch.arange(8)), seen.hidden_states[0][0])
        rows = LayerStack.of(model, 0, 4)(seen.hidden_states[0][0], [Segment(new_cache(), 8)])
        assert torch.equal(Head(model)(rows), seen.logits[0])


@pytest.mark.parametrize("kind", KINDS)
def test_the_ends_hold_no_weights_of_their_own(decoder, kind):
    model = decoder(kind)
    owned = {id(weight) for weight in model.parameters()}
    for end in (Embedding(model), Head(model)):
        weights = list(end.parameters())
        assert weights and all(id(weight) in owned for weight in weights)


def test_tied_embeddings_stay_tied(new_decoder):
    model = new_decoder("llama", tie_word_embeddings=True)
    assert Head(model).head.weight is Embedding(model).tokens.weight


def test_learned_positions_are_added_and_rotary_ones_are_not(decoder):
    last_first = torch.arange(8).flip(0)
    for kind, changes in (("gpt2", True), ("llama", False)):
        embed = Embedding(decoder(kind))
        changed = (embed(TEXT, torch.arange(8)) - embed(TEXT, last_first)).abs().max() > 1e-3
        assert bool(changed) == changes


@pytest.mark.parametrize(
    "kind", [transformers.LlamaModel, transformers.LlamaForSequenceClassification, transformers.GPT2Model]
)
def test_a_model_without_a_language_head_is_refused(decoder, kind):
    config = decoder("gpt2" if kind is transformers.GPT2Model else "llama").config
    with pytest.raises(ValueError, match=rf"{kind.__name__} has no language-model head: load it with AutoModelForC"):
        Head(kind(config))


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_may_be_as_long_as_there_are_positions(decoder, kind):
    assert longest_text(decoder(kind)) == 96


@pytest.mark.parametrize(
    ("options", "longest"), [({"sliding_window": 8}, 8), ({"sliding_window": None}, 96), ({"sliding_window": 500}, 96)]
)
def test_a_window_limits_a_text(decoder, options, longest):
    assert longest_text(decoder("mistral", **options)) == longest


def test_a_window_that_no_layer_uses_does_not_limit(decoder):
    unused = decoder("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=4)
    one = decoder("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=3)
    assert longest_text(unused) == 96 and longest_text(one) == 8


@pytest.mark.parametrize("kind", ["mistral", "qwen2"])
def test_the_window_is_the_last_length_at_which_nothing_differs(decoder, kind):
    slides = {"use_sliding_window": True, "max_window_layers": 2} if kind == "qwen2" else {}
    model = decoder(kind, sliding_window=6, **slides)
    embed, stack, head, longest = Embedding(model), LayerStack.of(model, 0, 4), Head(model), longest_text(model)
    text = TEXT[: longest + 1]
    with torch.no_grad():
        expected = model(text[None], past_key_values=transformers.DynamicCache(config=model.config)).logits[0]
        found = head(stack(embed(text, torch.arange(len(text))), [Segment(new_cache(), len(text))]))
    difference = (found - expected).abs().amax(1)
    assert difference[:longest].max() < 1e-11 and difference[longest] > 1e-3
