"""Every decoder gives the text that the model gives token by token: in float64, token for token."""

import pytest
from decoders import CHOICES, DECODERS, STOP, autoregressive, prompt


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("name", DECODERS)
def test_text_is_the_models(name, choice):
    for length in (1, 2, 37):
        found = DECODERS[name](prompt(length), 24, CHOICES[choice](), length)
        assert found.text == autoregressive(length, 24, choice, length)


@pytest.mark.parametrize("new_tokens", range(1, 9))
@pytest.mark.parametrize("name", ["hat-good-draft", "hat-far-ahead", "hat-bad-draft", "u-medusa", "u-shape"])
def test_the_text_ends_at_its_length_in_the_middle_of_a_draft(name, new_tokens):
    found = DECODERS[name](prompt(4), new_tokens, CHOICES["sampled"](), 0)
    assert found.text == autoregressive(4, new_tokens, "sampled", 0)


def test_drafts_were_taken_refused_and_adopted():
    """Else the equality above would say little."""

    def decoded(name, choice, request=0):
        return DECODERS[name](prompt(37), 24, CHOICES[choice](), request)

    good, bad = decoded("hat-good-draft", "greedy"), decoded("hat-bad-draft", "greedy")
    assert good.accepted > 5 and good.hits > 0
    assert bad.drafted - bad.accepted > 5
    last = {decoded("hat-good-draft", "sampled", request).text[-1] for request in range(12)}
    assert STOP in last and len(last) > 1  # some texts end with the end token, some at their length
