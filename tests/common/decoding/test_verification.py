import itertools
import random

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", reason="needs edgebolt-common[llm]")

from edgebolt.common.decoding import DraftTree, TokenChoice, Verified, committed, verify

PROMPT = [1, 0, 2]


def no_token_twice_in_a_row(text, scores):
    """A processor that needs a node's own path."""
    banned = torch.arange(scores.shape[1]) == text[0, -1]
    return torch.where(banned, -torch.inf, scores)


CHOICES = {
    "greedy": TokenChoice(),
    "sampled": TokenChoice(1.0, seed=1),
    "cut": TokenChoice(0.8, top_k=3, top_p=0.9, seed=2),
    "processed": TokenChoice(processors=[no_token_twice_in_a_row]),
    "sampled and processed": TokenChoice(1.0, seed=3, processors=[no_token_twice_in_a_row]),
}


def target(text, vocabulary=4):
    """Logits after a text: random ones that depend on all of it."""
    seed = int.from_bytes(bytes([vocabulary, *text]), "big") % 2**31
    return torch.from_numpy(np.random.RandomState(seed).randn(vocabulary))


def token_by_token(text, count, choice, request, vocabulary=4):
    text = list(text)
    for _ in range(count):
        text.append(choice(target(text, vocabulary), request, len(text), text))
    return text


def path_tokens(tree, node):
    return [tree.tokens[each] for each in tree.path(node)]


def target_of(tree, text, vocabulary=4):
    return torch.stack([target([*text, *path_tokens(tree, node)], vocabulary) for node in range(-1, len(tree))])


def random_tree(seed, nodes, vocabulary=4):
    draw = random.Random(seed)
    parents = tuple(draw.randrange(-1, node) for node in range(nodes))
    return DraftTree(tuple(draw.randrange(vocabulary) for _ in range(nodes)), parents)


def longest_match(tree, tokens):
    """Nodes of the longest path that reads as ``tokens`` do, of twins the first: by trying all paths."""
    twins = {
        node
        for node in range(len(tree))
        for other in range(node)
        if (tree.parents[other], tree.tokens[other]) == (tree.parents[node], tree.tokens[node])
    }
    paths = [tree.path(node) for node in range(-1, len(tree)) if not twins & set(tree.path(node))]
    fitting = [path for path in paths if [tree.tokens[node] for node in path] == tokens[: len(path)]]
    return max(fitting, key=len)


TREES = [
    *[random_tree(seed, nodes) for seed in range(12) for nodes in (3, 12, 25)],
    DraftTree((), ()),
    *[DraftTree.chain([token, token]) for token in range(4)],  # width 1
    *[DraftTree.chain([token]) for token in range(4)],  # width 1, depth 1
    DraftTree((0, 1, 2, 3), (-1,) * 4),  # depth 1, one of which is right
    DraftTree((2, 2, 2, 2, 0, 1, 3, 2), (-1, -1, 0, 1, 2, 3, 0, 5)),  # twins with unlike children
    DraftTree(tuple(range(4)) * 5, (-1,) * 4 + (0,) * 4 + (1,) * 4 + (2,) * 4 + (3,) * 4),  # all texts of 2
]


@pytest.mark.parametrize("name", CHOICES)
def test_a_round_gives_what_token_by_token_gives(name):
    choice, accepted = CHOICES[name], []
    for request, tree in enumerate(TREES):
        alone = token_by_token(PROMPT, len(tree) + 1, choice, request)[len(PROMPT) :]
        found = verify(tree, target_of(tree, PROMPT), choice, request, PROMPT)
        assert list(found.tokens) == alone[: len(found.tokens)]
        assert found.nodes == longest_match(tree, alone)
        assert len(found.tokens) == found.accepted + 1 == len(found.nodes) + 1
        accepted.append(found.accepted)
    assert {0, 1, 2} <= set(accepted) and accepted[-1] == 2  # the cases are not trivial


@pytest.mark.parametrize("name", CHOICES)
def test_a_whole_text_is_what_token_by_token_gives_whatever_is_drafted(name):
    text, choice, rounds = list(PROMPT), CHOICES[name], 0
    while len(text) < 60:
        tree = random_tree(rounds, random.Random(rounds).randrange(9))
        text += verify(tree, target_of(tree, text), choice, 7, text).tokens
        rounds += 1
    assert text == token_by_token(PROMPT, len(text) - len(PROMPT), choice, 7)
    assert rounds < 50


def test_a_right_draft_is_taken_whole_and_one_token_comes_on_top():
    for choice in CHOICES.values():
        tokens = token_by_token(PROMPT, 6, choice, 0)[len(PROMPT) :]
        tree = DraftTree.chain(tokens[:5])
        assert verify(tree, target_of(tree, PROMPT), choice, 0, PROMPT) == Verified((0, 1, 2, 3, 4), tuple(tokens))


@pytest.mark.parametrize("wrong", range(5))
def test_a_draft_is_taken_up_to_the_first_wrong_token(wrong):
    choice = CHOICES["sampled"]
    tokens = token_by_token(PROMPT, 6, choice, 0)[len(PROMPT) :]
    drafted = [*tokens[:wrong], (tokens[wrong] + 1) % 4, *tokens[wrong + 1 : 5]]
    tree = DraftTree.chain(drafted)
    found = verify(tree, target_of(tree, PROMPT), choice, 0, PROMPT)
    assert found == Verified(tuple(range(wrong)), tuple(tokens[: wrong + 1])) and found.accepted == wrong


def test_processors_see_the_nodes_own_path():
    seen = []

    def note(text, scores):
        seen.append(text[0].tolist())
        return scores

    logits = torch.eye(4)[[1, 0, 3, 0, 2]]  # after the root 1, after the second node 3, after the fourth 2
    tree = DraftTree((2, 1, 2, 3), (-1, -1, 0, 1))
    found = verify(tree, logits, TokenChoice(processors=[note]), 0, (9, 8))
    assert found == Verified((1, 3), (1, 3, 2))
    assert seen == [[9, 8], [9, 8, 1], [9, 8, 1, 3]]


def test_noise_goes_by_request_and_position_in_the_text():
    asked = []

    def choice(logits, request, position, text):
        asked.append((request, position, list(text)))
        return 1

    verify(DraftTree.chain([1, 1]), torch.zeros(3, 4), choice, 5, [3, 3, 3])
    assert asked == [(5, 3, [3, 3, 3]), (5, 4, [3, 3, 3, 1]), (5, 5, [3, 3, 3, 1, 1])]


def test_the_text_is_left_as_it_is():
    text, tree = list(PROMPT), DraftTree.chain([0])
    verify(tree, target_of(tree, text), TokenChoice(), 0, text)
    assert text == PROMPT


@pytest.mark.parametrize("rows", [0, 2, 4])
def test_one_row_of_logits_a_node_and_one_for_the_root(rows):
    with pytest.raises(ValueError, match=rf"{rows} rows of logits for a tree of 2"):
        verify(DraftTree.chain([1, 2]), torch.zeros(rows, 4), TokenChoice(), 0, [0])


FIXED = DraftTree((0, 3, 3, 1, 0, 4), (-1, -1, 0, 0, 1, 1))


@pytest.mark.parametrize(("tree", "rounds"), [(FIXED, 20_000), (DraftTree.chain([2, 2]), 6000)], ids=["tree", "chain"])
def test_two_tokens_are_distributed_as_the_targets(fits, tree, rounds):
    vocabulary = 5
    after = {(): target([9], vocabulary), **{(one,): target([9, one], vocabulary) for one in range(vocabulary)}}
    logits = torch.stack([after.get(tuple(path_tokens(tree, node)), after[()]) for node in range(-1, len(tree))])
    first = torch.softmax(after[()], 0)
    expected = torch.stack([first[one] * torch.softmax(after[(one,)], 0) for one in range(vocabulary)])
    choice, counts, accepted = TokenChoice(1.0, seed=8), np.zeros((vocabulary, vocabulary)), 0
    for request in range(rounds):
        found = verify(tree, logits, choice, request, [9])
        tokens, accepted = [*found.tokens], accepted + found.accepted
        if len(tokens) < 2:
            tokens += verify(DraftTree((), ()), after[(tokens[0],)][None], choice, request, [9, *tokens]).tokens
        counts[tokens[0], tokens[1]] += 1
    assert fits(counts.flatten(), expected.flatten())
    assert accepted > rounds / 20


@pytest.mark.parametrize(
    ("tokens", "left", "stops", "text", "ends"),
    [
        ([4, 2, 7], 5, {2}, [4, 2], True),  # EOS inside
        ([4, 2, 7], 2, (), [4, 2], True),  # cap inside
        ([4, 2, 7, 1], 3, {2}, [4, 2], True),  # both, EOS first
        ([4, 2, 7, 1], 2, {7}, [4, 2], True),  # both, cap first: what is behind does not matter
        ([4, 2, 7], 2, {2}, [4, 2], True),  # both at once
        ([4, 2, 7], 3, {2, 4}, [4], True),  # the first of two
        ([4, 2, 7], 4, {7}, [4, 2, 7], True),  # EOS at the end
        ([4, 2, 7], 3, (), [4, 2, 7], True),  # cap at the end
        ([4, 2, 7], 4, {9}, [4, 2, 7], False),
        ([], 4, {9}, [], False),
        ([4], 0, (), [], True),
    ],
)
def test_a_text_ends_with_a_stop_or_when_it_is_full(tokens, left, stops, text, ends):
    assert committed(tokens, left, stops) == (text, ends)


def test_committed_is_what_taking_token_after_token_gives():
    for length, left, stop in itertools.product(range(5), range(1, 6), range(4)):
        for tokens in itertools.product(range(3), repeat=length):
            text, ends = [], False
            for token in tokens:
                if not ends:
                    text.append(token)
                    ends = token == stop or len(text) == left
            assert committed(tokens, left, {stop}) == (text, ends)
            assert committed(list(tokens), left, [stop]) == (text, ends)
