from functools import cache

import pytest

from edgebolt.hat import CloudEngine
from edgebolt.hat.simulation import CNN_13B, METHODS, SPECBENCH_7B, DrawnRounds, TracedText, simulate

TEXTS, SETTINGS = 24, {"7B": SPECBENCH_7B, "13B": CNN_13B}


@cache
def run(setting, method):
    return simulate(SETTINGS[setting], METHODS[method], TEXTS, warm_up=6)


def change(setting, method, other, what):
    """By which share a method's mean differs from another's."""
    return getattr(run(setting, method), what).mean() / getattr(run(setting, other), what).mean() - 1


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_order_of_the_ablation(setting):
    # drafts leave the first token as it is, chunks bring it on, looking ahead saves time between tokens alone
    assert abs(change(setting, "HAT: drafts", "U-shape", "first")) < 0.02
    assert change(setting, "HAT: drafts", "U-shape", "between") < -0.1
    assert change(setting, "HAT: chunks", "U-shape", "first") < -0.02
    assert abs(change(setting, "HAT", "HAT: drafts, chunks", "first")) < 0.02
    assert -0.3 < change(setting, "HAT", "HAT: drafts, chunks", "between") < -0.05
    assert change(setting, "HAT", "U-Sarathi", "first") < 0 and change(setting, "HAT", "U-Sarathi", "between") < -0.2


def test_simulated_seconds_are_the_same_each_time():
    again = simulate(SPECBENCH_7B, METHODS["HAT"], TEXTS, warm_up=6)
    for name in ("first", "between", "tenth", "waited", "stages"):
        assert (getattr(again, name) == getattr(run("7B", "HAT"), name)).all()


def test_rows_that_travel_are_those_of_the_protocol():
    plain, drafted, tree = (run("7B", name) for name in ("U-shape", "HAT: drafts", "U-Medusa"))
    row = SPECBENCH_7B.row_bytes
    rounds = TEXTS * (SPECBENCH_7B.new_tokens - 1)
    assert plain.down == (TEXTS + rounds) * row  # a row for the prompt's end, a row for each token after the first
    prompts = plain.up - rounds * row
    assert run("7B", "HAT: chunks").up == plain.up  # in pieces, but the same rows
    # of a draft every row goes up and comes down, and so does every node of a tree
    assert drafted.up - prompts == drafted.down - TEXTS * row
    assert (tree.up - prompts) % (11 * row) == 0


@pytest.mark.parametrize("method", ["U-shape", "U-Medusa", "HAT"])
def test_each_token_is_verified_once(method, monkeypatch):
    texts, uploads = [], []
    take, begin = CloudEngine.take, TracedText.__init__
    monkeypatch.setattr(CloudEngine, "take", lambda self, *given: uploads.append(given[2]) or take(self, *given))
    monkeypatch.setattr(TracedText, "__init__", lambda self, *given: texts.append(self) or begin(self, *given))
    simulate(SPECBENCH_7B, METHODS[method], TEXTS, warm_up=0)
    assert len(texts) == TEXTS and all(text.done for text in texts)
    for text in texts:  # the first token is the prompt's; each round adds what was accepted and one of the target's
        assert 1 + text.verified + text.accepted == text.new_tokens
    assert sum(upload.reply > 0 for upload in uploads) == TEXTS + sum(text.verified for text in texts)


def test_a_text_has_as_many_tokens_as_its_rounds_commit():
    found = run("7B", "HAT")
    assert found.accept == pytest.approx(SPECBENCH_7B.accept, abs=0.25)
    assert (found.tenth >= found.first).all() and 0 <= found.share_within(0.5) <= 1


@pytest.mark.parametrize("wrong", [{"accept_length": 0.5}, {"accept_length": 9.0}, {"right": 0.0}, {"hit": 1.5}])
def test_rounds_that_cannot_be_drawn_are_refused(wrong):
    with pytest.raises(ValueError, match="chances are in"):
        DrawnRounds(**{"accept_length": 2.0, **wrong})
