import dataclasses
import random

import pytest
import torch

pytest.importorskip("transformers", reason="needs edgebolt-common[llm]")

from edgebolt.common.decoding import (
    DraftTree,
    Embedding,
    Head,
    LayerStack,
    Segment,
    cache_length,
    keep,
    new_cache,
)

PREFIX = [3, 14, 15, 9, 2, 6]  # the last one is the root
KINDS = ["llama", "gpt2", "qwen2"]


def random_tree(seed, nodes=9, vocabulary=50):
    draw = random.Random(seed)
    tokens = tuple(draw.randrange(vocabulary) for _ in range(nodes))
    return DraftTree(tokens, tuple(draw.randrange(-1, node) for node in range(nodes)))


def leaves(tree):
    return [node for node in range(len(tree)) if node not in tree.parents]


def above(tree, node):
    """Nodes on the way up from a node, by the definition."""
    return set() if node < 0 else {node} | above(tree, tree.parents[node])


@pytest.mark.parametrize("seed", range(8))
def test_depths_paths_and_masks_by_definition(seed):
    tree, prefix = random_tree(seed), seed % 4
    seen, positions = tree.mask(prefix), tree.positions(7)
    assert seen.dtype == torch.bool and seen.shape == (10, prefix + 10)
    assert seen[:, : prefix + 1].all() and not seen[0, prefix + 1 :].any()
    assert int(positions[0]) == 7
    for node in range(len(tree)):
        ancestors = above(tree, node)
        assert set(tree.path(node)) == ancestors and tree.path(node)[-1] == node
        assert [tree.parents[each] for each in tree.path(node)] == [-1, *tree.path(node)[:-1]]
        assert tree.depths[node] == len(ancestors)
        assert int(positions[node + 1]) == 7 + len(ancestors)
        assert set(seen[node + 1, prefix + 1 :].nonzero().flatten().tolist()) == ancestors


def test_siblings_share_a_position_and_do_not_see_each_other():
    tree = DraftTree((1, 2, 3), (-1, -1, 0))
    assert tree.positions(10).tolist() == [10, 11, 11, 12]
    seen = tree.mask(0)[1:, 1:]
    assert not seen[0, 1] and not seen[1, 0] and not seen[2, 1]


def test_a_chain_is_causal():
    tree = DraftTree.chain([5, 7, 5])
    assert tree == DraftTree((5, 7, 5), (-1, 0, 1)) and tree.depths == (1, 2, 3)
    assert torch.equal(tree.mask(2), torch.ones(4, 6, dtype=torch.bool).tril(2))
    assert tree.positions(4).tolist() == [4, 5, 6, 7]


def test_an_empty_tree_is_the_root_alone():
    tree = DraftTree((), ())
    assert len(tree) == 0 and tree.depths == () and tree.path(-1) == () and tree == DraftTree.chain([])
    assert tree.mask(3).tolist() == [[True] * 4] and tree.positions(3).tolist() == [3]
    assert tree.child(-1, 0) is None


def test_child_is_the_first_node_with_the_token_below_that_node():
    tree = DraftTree((4, 6, 4, 6, 6), (-1, 0, -1, 2, 2))
    assert tree.child(-1, 4) == 0 and tree.child(0, 6) == 1 and tree.child(2, 6) == 3
    assert tree.child(-1, 6) is None and tree.child(1, 6) is None and tree.child(0, 4) is None


@pytest.mark.parametrize("parents", [(0,), (-1, 1), (-1, 2, 0), (-2,), (-1, -2)])
def test_a_node_follows_an_earlier_one_or_the_root(parents):
    with pytest.raises(ValueError, match="a node follows an earlier one, or -1"):
        DraftTree(tuple(range(len(parents))), parents)


@pytest.mark.parametrize("tokens", [(), (1, 2)])
def test_every_token_has_a_parent(tokens):
    with pytest.raises(ValueError, match=rf"{len(tokens)} tokens and 1 parents"):
        DraftTree(tokens, (-1,))


def test_a_tree_is_fixed_once_it_is_drafted():
    tree = DraftTree.chain([1])
    with pytest.raises(dataclasses.FrozenInstanceError):
        tree.tokens = (2,)
    assert hash(tree) == hash(DraftTree.chain([1]))


class Runner:
    """A model in two stacks, as device and cloud run it."""

    def __init__(self, model):
        self.embedding, self.head = Embedding(model), Head(model)
        self.stacks = [LayerStack.of(model, 0, 1), LayerStack.of(model, 1, 4)]

    @torch.no_grad()
    def __call__(self, tokens, caches, positions=None, mask=None):
        start = cache_length(caches[0])
        where = torch.arange(start, start + len(tokens)) if positions is None else positions
        rows = self.embedding(torch.tensor(tokens), where)
        for stack, cache in zip(self.stacks, caches, strict=True):
            rows = stack(rows, [Segment(cache, len(tokens), positions, mask)])
        return self.head(rows)

    def after(self, tokens):
        """Caches that hold some tokens."""
        caches = new_cache(), new_cache()
        if tokens:
            self(tokens, caches)
        return caches

    def run_tree(self, tree, before=PREFIX):
        caches = self.after(before[:-1])
        prefix = len(before) - 1
        return self([before[-1], *tree.tokens], caches, tree.positions(prefix), tree.mask(prefix)), caches


def difference(one, other):
    """The largest, in keys and values of all layers of all caches."""
    layers = [zip(a.layers, b.layers, strict=True) for a, b in zip(one, other, strict=True)]
    pairs = [(left, right) for each in layers for left, right in each]
    assert len(pairs) == 4 and all(left.keys.shape == right.keys.shape for left, right in pairs)
    return max(
        max(float((left.keys - right.keys).abs().max()), float((left.values - right.values).abs().max()))
        for left, right in pairs
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_every_path_of_a_tree_gives_what_it_gives_as_a_chain(decoder, kind, seed):
    run, tree = Runner(decoder(kind)), random_tree(seed)
    logits, caches = run.run_tree(tree)
    for leaf in leaves(tree):
        path = tree.path(leaf)
        alone = run.after(PREFIX[:-1])
        expected = run([PREFIX[-1], *(tree.tokens[node] for node in path)], alone)
        rows = [0, *(node + 1 for node in path)]
        assert expected.std() > 0.1
        torch.testing.assert_close(logits[rows], expected, rtol=0, atol=1e-11)
    assert {cache_length(cache) for cache in caches} == {len(PREFIX) + len(tree)}


@pytest.mark.parametrize("kind", KINDS)
def test_every_path_gives_what_transformers_gives_for_its_text(decoder, kind):
    model, tree = decoder(kind), random_tree(5)
    logits, _ = Runner(model).run_tree(tree)
    for leaf in leaves(tree):
        path = tree.path(leaf)
        with torch.no_grad():
            whole = model(torch.tensor([[*PREFIX, *(tree.tokens[node] for node in path)]])).logits[0]
        torch.testing.assert_close(logits[[node + 1 for node in path]], whole[-len(path) :], rtol=0, atol=1e-11)


@pytest.mark.parametrize("kind", KINDS)
def test_a_path_taken_out_is_the_cache_of_that_path_alone(decoder, kind):
    run, tree = Runner(decoder(kind)), random_tree(1)
    prefix = len(PREFIX) - 1
    for node in range(-1, len(tree)):
        path, (_, caches) = tree.path(node), run.run_tree(tree)
        for cache in caches:
            keep(cache, torch.tensor([*range(prefix + 1), *(prefix + 1 + each for each in path)]))
        text = [*PREFIX, *(tree.tokens[each] for each in path)]
        alone = run.after(text)
        assert difference(caches, alone) < 1e-11
        # and so the text goes on alike
        torch.testing.assert_close(run([7, 8], caches), run([7, 8], alone), rtol=0, atol=1e-11)


def test_a_tree_right_at_the_beginning_of_a_text(decoder):
    run, tree = Runner(decoder("llama")), random_tree(2)
    logits, _ = run.run_tree(tree, before=[11])
    for leaf in leaves(tree):
        path = tree.path(leaf)
        expected = run([11, *(tree.tokens[node] for node in path)], run.after([]))
        torch.testing.assert_close(logits[[0, *(node + 1 for node in path)]], expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masks_hold_in_low_precision(decoder, dtype):
    run, tree = Runner(decoder("llama", dtype)), DraftTree((4, 9, 4), (-1, -1, 0))
    other = DraftTree((4, 30, 4), (-1, -1, 0))  # what a branch does not see does not change it
    (logits, _), (same, _) = run.run_tree(tree), run.run_tree(other)
    assert logits.isfinite().all()
    assert torch.equal(logits[[0, 1, 3]], same[[0, 1, 3]]) and not torch.equal(logits[2], same[2])
