import pytest
import torch
from tiny_models import ids
from tiny_words import tokenizer

from edgebolt.comp.calibration_texts import batches_of, fingerprint

TEXTS = [f"w{number} w{number + 1} w{number + 2}" for number in range(4, 50)]


def made(texts, words=None, samples=100, length=8, batch_size=3, seed=0, padded=False):
    return batches_of(texts, words, samples, length, batch_size, seed, padded)


def test_a_tensor_is_taken_as_it_is():
    batches = made(ids(10, 7), samples=5, batch_size=2)
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(2, 7), (2, 7), (1, 7)]
    assert torch.equal(torch.cat([batch["input_ids"] for batch in batches]), ids(10, 7)[:5])


def test_lists_of_ids_are_joined_and_cut():
    batches = made([[5, 6, 7], [8, 9], [10, 11, 12, 13]], length=4)
    assert torch.equal(batches[0]["input_ids"], torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]]))


def test_texts_of_a_language_model_are_joined_with_end_tokens():
    words = tokenizer()
    batches = made(TEXTS[:4], words, length=16)
    row = batches[0]["input_ids"][0].tolist()
    assert row.count(words.eos_token_id) == 4 and len(row) == 16


def test_the_seed_draws():
    words = tokenizer()
    one, same, other = (made(TEXTS, words, samples=6, seed=seed) for seed in (0, 0, 1))
    assert fingerprint(one) == fingerprint(same) != fingerprint(other)
    state = torch.get_rng_state()
    made(TEXTS, words)
    assert torch.equal(state, torch.get_rng_state())


def test_encoders_get_texts_one_by_one_padded_and_cut():
    words = tokenizer()
    batches = made(["w4", "w5 w6 w7 w8 w9"], words, length=4, padded=True)
    rows = batches[0]["input_ids"]
    assert rows.shape == (2, 4) and sorted(batches[0]["attention_mask"].sum(1).tolist()) == [1, 4]


def test_lists_of_ids_for_encoders_stay_apart():
    texts = [[1, 5, 6, 2], [1, 7, 2], [1, 8, 9, 9, 9, 2]]
    first, second = batches_of(texts, None, 3, 5, 2, seed=0, padded=True, pad=3)
    rows = [[*ids] for batch in (first, second) for ids in batch["input_ids"].tolist()]
    kept = [
        [token for token, real in zip(ids, mask, strict=True) if real]
        for batch in (first, second)
        for ids, mask in zip(batch["input_ids"].tolist(), batch["attention_mask"].tolist(), strict=True)
    ]
    assert sorted(kept) == sorted(text[:5] for text in texts)
    assert all(row[len(text) :] == [3] * (len(row) - len(text)) for row, text in zip(rows, kept, strict=True))
    with pytest.raises(ValueError, match="has no tokens"):
        batches_of([[1], []], None, 2, 4, 2, seed=0, padded=True)


@pytest.mark.parametrize(
    ("texts", "error", "message"),
    [
        ([], ValueError, "not empty"),
        ("one text", ValueError, "use a list of strings"),
        (["w4 w5"], TypeError, "pass tokenizer=, or token ids"),
        ([[1, 2, 3]], ValueError, "have 3 tokens, and a sequence takes 8: give more text, or a smaller length"),
        (torch.ones(4, 4), ValueError, "use int64"),
        (torch.ones(4, dtype=torch.long), ValueError, r"shape \(4,\)"),
    ],
)
def test_what_makes_no_batch_is_refused(texts, error, message):
    with pytest.raises(error, match=message):
        made(texts)
