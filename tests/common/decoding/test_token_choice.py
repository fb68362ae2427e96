import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers", reason="needs edgebolt-common[llm]")

from edgebolt.common.decoding import TokenChoice  # noqa: E402

SCORES = torch.tensor([0.3, -1.2, 1.5, 0.0, 0.9, -0.4])


def draws(choice, count, scores=SCORES, request=0):
    """How often each token is chosen, at places 1 to ``count``."""
    tokens = [choice(scores, request, position, [0]) for position in range(1, count + 1)]
    return np.bincount(tokens, minlength=len(scores))


@pytest.mark.parametrize("seed", range(5))
def test_greedy_takes_the_largest_score(seed):
    scores = torch.randn(30, generator=torch.Generator().manual_seed(seed))
    assert TokenChoice()(scores, 0, 1, [0]) == int(np.argmax(scores.numpy()))


@pytest.mark.parametrize("size", [3, 8, 40, 1000])
def test_of_equal_scores_greedy_takes_the_first(size):
    scores = torch.zeros(size)
    assert TokenChoice()(scores, 0, 1, [0]) == 0
    scores[size // 2 :] = 1.0
    assert TokenChoice()(scores, 0, 1, [0]) == size // 2


def test_greedy_goes_by_neither_place_nor_seed():
    assert {TokenChoice(seed=seed)(SCORES, seed, 7 * seed, [seed]) for seed in range(5)} == {2}


def test_noise_belongs_to_its_place_and_not_to_the_order_of_calls():
    places = [(request, position) for request in range(4) for position in range(1, 9)]
    scores, choice = torch.zeros(1000), TokenChoice(temperature=1.0, seed=3)
    forth = {place: choice(scores, *place, [0]) for place in places}
    other = TokenChoice(temperature=1.0, seed=3)
    back = {place: other(scores, *place, [0]) for place in reversed(places) for _ in range(2)}
    assert forth == back and len(set(forth.values())) > 24


def test_noise_is_another_for_every_seed_request_and_position():
    choice = TokenChoice(temperature=1.0, seed=1)
    noise = [choice.noise(0, 1, 50), choice.noise(1, 0, 50), choice.noise(1, 1, 50), choice.noise(0, 2, 50)]
    noise.append(TokenChoice(temperature=1.0, seed=2).noise(0, 1, 50))
    for number, one in enumerate(noise):
        assert one.dtype == torch.float64 and one.shape == (50,)
        assert all(abs(np.corrcoef(one, other)[0, 1]) < 0.6 for other in noise[number + 1 :])
    assert torch.equal(noise[0], TokenChoice(temperature=0.5, seed=1).noise(0, 1, 50))


def test_global_generators_are_left_alone():
    torch.manual_seed(0)
    np.random.seed(0)
    expected = torch.rand(1), np.random.rand()
    torch.manual_seed(0)
    np.random.seed(0)
    draws(TokenChoice(temperature=1.0), 3)
    assert (torch.rand(1), np.random.rand()) == expected


@pytest.mark.parametrize(("temperature", "count"), [(1.0, 20_000), (0.6, 5000)])
def test_tokens_are_drawn_from_the_softmax(fits, temperature, count):
    assert fits(draws(TokenChoice(temperature), count), torch.softmax(SCORES.double() / temperature, 0))


def test_requests_are_drawn_from_the_softmax_too(fits):
    choice = TokenChoice(1.0, seed=5)
    tokens = [choice(SCORES, request, 4, [0]) for request in range(5000)]
    assert fits(np.bincount(tokens, minlength=6), torch.softmax(SCORES.double(), 0))


def test_the_test_of_fit_notices_another_distribution(fits):
    assert not fits(draws(TokenChoice(1.0), 3000), torch.softmax(SCORES.double() / 0.8, 0))


def test_top_k_leaves_the_largest(fits):
    expected = torch.softmax(torch.where(SCORES >= 0.3, SCORES.double(), -torch.inf), 0)
    assert fits(draws(TokenChoice(1.0, top_k=3), 3000), expected)
    assert set(draws(TokenChoice(5.0, top_k=1), 50).nonzero()[0]) == {2}
    assert (draws(TokenChoice(5.0, top_k=100), 500) > 0).all()


def test_top_p_leaves_the_smallest_set_of_that_mass(fits):
    shares = torch.softmax(SCORES.double(), 0)
    kept = shares >= shares[0]  # 2, 4 and 0 hold 0.80; 2 and 4 hold 0.66
    assert shares[[2, 4]].sum() < 0.7 < shares[kept].sum()
    expected = torch.where(kept, shares, 0) / shares[kept].sum()
    assert fits(draws(TokenChoice(1.0, top_p=0.7), 3000), expected)
    assert fits(draws(TokenChoice(1.0, top_p=1.0), 3000), shares)


def test_top_p_is_of_what_temperature_and_top_k_leave(fits):
    warm = torch.softmax(SCORES.double() / 2.0, 0)
    kept = torch.tensor([True, False, True, False, True, False])
    # Of the three best 2 and 4 hold 0.80 when warm; of all six they hold less, when cold more.
    of_three = warm[[2, 4]].sum() / warm[kept].sum()
    assert warm[[2, 4]].sum() < 0.7 < of_three < 0.9
    counts = draws(TokenChoice(2.0, top_k=3, top_p=0.7), 3000)
    assert fits(counts, torch.where(warm >= warm[4], warm, 0) / warm[[2, 4]].sum())


def test_processors_come_before_temperature_and_cuts():
    def only_the_last_two(text, scores):
        return torch.where(torch.arange(6) >= 4, scores, -torch.inf)

    counts = draws(TokenChoice(3.0, top_k=2, processors=[only_the_last_two]), 400)
    assert set(counts.nonzero()[0]) == {4, 5}


def test_processors_run_in_order_and_get_text_and_scores_as_in_transformers():
    seen = []

    def note(name):
        def process(text, scores):
            seen.append((name, text.tolist(), text.dtype, tuple(scores.shape)))
            return scores + 1.0

        return process

    TokenChoice(processors=[note("first"), note("second")])(SCORES, 0, 3, (7, 8, 9))
    assert seen == [(name, [[7, 8, 9]], torch.int64, (1, 6)) for name in ("first", "second")]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_processors_of_transformers_work(temperature):
    penalty = transformers.RepetitionPenaltyLogitsProcessor(100.0)
    ngrams = transformers.NoRepeatNGramLogitsProcessor(2)
    choice = TokenChoice(temperature, processors=[penalty, ngrams])
    scores = torch.tensor([9.0, 8.9, 0.0, 0.0])
    assert choice(scores, 0, 2, [0, 2]) == 1 and choice(scores, 0, 2, [1, 2]) == 0
    assert TokenChoice(processors=[ngrams])(scores, 0, 3, [2, 0, 2]) == 1


def test_logits_are_left_as_they_are():
    def bans_in_place(text, scores):
        scores[:, 2] = -torch.inf
        return scores

    scores = SCORES.clone()
    for choice in (TokenChoice(processors=[bans_in_place]), TokenChoice(0.5, top_k=2, processors=[bans_in_place])):
        assert choice(scores, 0, 1, [0]) != 2 and 2 not in choice.best(scores, 0, 1, [0], 2)
        assert torch.equal(scores, SCORES)
    assert TokenChoice()(scores, 0, 1, [0]) == 2


@pytest.mark.parametrize(
    "choice",
    [
        TokenChoice(),
        TokenChoice(1.0),
        TokenChoice(0.7, top_k=5, seed=2),
        TokenChoice(1.5, top_p=0.8),
        TokenChoice(processors=[transformers.RepetitionPenaltyLogitsProcessor(3.0)]),
    ],
    ids=["greedy", "sampled", "top_k", "top_p", "processed"],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_best_of_all_is_the_one_chosen(choice, dtype):
    generator = torch.Generator().manual_seed(0)
    for position in range(1, 60):
        scores = torch.randn(200, generator=generator).mul(0.3).to(dtype)  # bfloat16 has many equal ones
        best = choice.best(scores, 1, position, [4, 5], 3)
        assert best[0] == choice(scores, 1, position, [4, 5]) and len(set(best)) == 3


@pytest.mark.parametrize("size", [3, 8, 40, 1000])
def test_the_best_of_equal_ones_is_the_one_chosen(size):
    scores, choice = torch.zeros(size), TokenChoice()
    for count in range(1, 4):
        best = choice.best(scores, 0, 1, [0], count)
        assert best[0] == choice(scores, 0, 1, [0]) == 0 and len(set(best)) == len(best) == count


def test_the_next_best_would_be_chosen_without_the_best():
    choice, scores = TokenChoice(1.0, seed=9), SCORES.clone()
    best = choice.best(scores, 2, 5, [0], 6)
    for token in best:
        assert choice(scores, 2, 5, [0]) == token
        scores[token] = -torch.inf
    assert choice.best(SCORES, 2, 5, [0], 2) == best[:2] and choice.best(SCORES, 2, 5, [0], 0) == []
    assert sorted(choice.best(SCORES, 2, 5, [0], 100)) == [0, 1, 2, 3, 4, 5]


def test_a_draft_that_scores_alike_offers_what_the_target_will_choose():
    draft, target = TokenChoice(1.0, seed=4), TokenChoice(1.0, seed=4)
    for position in range(1, 50):
        nearly = SCORES + 1e-6
        assert draft.best(nearly, 3, position, [0], 1) == [target(SCORES, 3, position, [0])]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature=-0.1"),
        ({"temperature": 1.0, "top_k": 0}, "top_k=0: keep at least one"),
        ({"temperature": 1.0, "top_k": -3}, "top_k=-3"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p=0.0: use a share"),
        ({"temperature": 1.0, "top_p": 1.1}, "top_p=1.1"),
        ({"top_k": 5}, "top_k=5, top_p=None change nothing at temperature=0"),
        ({"top_p": 0.5}, "top_k=None, top_p=0.5 change nothing"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TokenChoice(**options)


def test_the_list_of_processors_is_not_the_callers():
    given = []
    choice = TokenChoice(0.5, processors=given)
    assert given == [] and len(choice.processors) == 1
