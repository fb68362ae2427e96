"""What happened when in a text, and its picture; the clock counts calls, so that no span is empty."""

import itertools

import pytest
from tiny_hat import ALWAYS, Faulty, Middle, conversation, engine, llama, prompt

from edgebolt.common.decoding import Link
from edgebolt.hat import Chunking, Dialogue, Drafting, HatAdapter, HatClient, InProcess, MedusaHeads, Timings
from edgebolt.hat import draw_timeline as draw


def told(talk, link=None, chunking=None):
    ticks = itertools.count()
    dialogue = Dialogue(talk, link or InProcess(engine()), chunking, clock=lambda: float(next(ticks)))
    for _ in dialogue:
        pass
    return dialogue.timings


def spans(timings, lane, work):
    return [span for span in timings.spans if (span.lane, span.work) == (lane, work)]


def test_every_chunk_draft_look_ahead_and_verification_has_a_span():
    talk = conversation(20, 12, Middle(), Drafting(0.0, 3, 2))
    found = told(talk, chunking=Chunking(8))
    assert [span.tokens for span in spans(found, "device", "prompt")] == [8, 8, 4]
    assert [span.tokens for span in spans(found, "device", "adapter")] == [20]
    assert [span.tokens for span in spans(found, "device", "verify")] == [1, 4, 4, 3]
    assert [span.tokens for span in spans(found, "device", "draft")] == [4, 4, 3]
    assert all(span.tokens <= 4 for span in spans(found, "device", "ahead"))
    assert len(spans(found, "device", "ahead")) == 2, "behind the last draft there is nothing to look ahead to"
    assert [span.tokens for span in spans(found, "away", "prompt")] == [8, 8, 4]
    assert [span.tokens for span in spans(found, "away", "draft")] == [4, 4, 3]
    assert all(0 <= span.start < span.end and span.seconds == span.end - span.start for span in found.spans)
    assert [span.end for span in found.spans] == sorted(span.end for span in found.spans)
    ends = [span.end for span in spans(found, "device", "verify")]
    assert found.tokens == [ends[0]] + [ends[1]] * 4 + [ends[2]] * 4 + [ends[3]] * 3
    # the device does one thing at a time, and looks ahead while the draft is away
    device = [span for span in found.spans if span.lane == "device"]
    assert all(one.end <= other.start for one, other in itertools.pairwise(device))
    for ahead, away in zip(spans(found, "device", "ahead"), spans(found, "away", "draft"), strict=False):
        assert away.start < ahead.start < ahead.end < away.end


def test_without_an_adapter_there_is_nothing_to_read_or_to_look_ahead_to():
    found = told(conversation(5, 4, None))
    assert not spans(found, "device", "adapter") and not spans(found, "device", "ahead")
    assert [span.tokens for span in spans(found, "device", "draft")] == [1, 1, 1]


def test_what_was_lost_on_the_way_is_away_until_its_answer_comes():
    import numpy as np

    link = Faulty(engine(), np.random.default_rng(3), 0.2, 0.1)
    found = told(conversation(20, 16, Middle(0.03), ALWAYS), link, Chunking(4))
    assert link.opened > 0
    away = [span for span in found.spans if span.lane == "away"]
    assert all(span.start < span.end for span in away)
    for draft in spans(found, "device", "draft"):
        assert any(span.start >= draft.end and span.tokens == draft.tokens for span in spans(found, "away", "draft"))


def test_a_client_hands_the_spans_out():
    with HatClient(None, llama(), HatAdapter(llama()), drafting=Drafting(0.0)) as client:
        found = client.generate(prompt(6), new_tokens=5, stops=())
    assert {span.lane for span in found.timings.spans} == {"device", "away"}
    with pytest.raises(ValueError, match="there is no link to shape"):
        HatClient(None, llama(), shape=Link(1.0, 1.0))
    with pytest.raises(ValueError, match="drafted by one of them"):
        HatClient(None, llama(), HatAdapter(llama()), heads=MedusaHeads(client.parts))


def test_a_client_drafts_with_heads_too():
    with HatClient(None, llama()) as plain, HatClient(None, llama(), heads=MedusaHeads(plain.parts)) as medusa:
        wanted, found = (client.generate(prompt(6), new_tokens=9, stops=()) for client in (plain, medusa))
    assert found.tokens == wanted.tokens and found.drafted > 0 == wanted.drafted


def test_the_picture(tmp_path):
    pytest.importorskip("matplotlib")
    timings = told(conversation(20, 40, Middle(0.05), ALWAYS), chunking=Chunking(8))
    first, rounds = draw(timings, tmp_path / "new" / "picture.png", rounds=3, title="A text").axes
    assert (tmp_path / "new" / "picture.png").stat().st_size > 10_000
    verified = spans(timings, "device", "verify")
    assert first.get_xlim()[1] >= timings.first and rounds.get_xlim()[1] >= verified[3].end
    assert rounds.get_xlim()[1] < verified[4].end
    assert [text.get_text() for text in first.texts if text.get_text().startswith("+")] == ["+1"]
    marks = [text.get_text() for text in rounds.texts if text.get_text().startswith("+")]
    assert marks == [f"+{span.tokens}" for span in verified[1:4]]
    # chunks that are away at the same time lie in rows of their own
    bars = [(bar.get_x(), bar.get_x() + bar.get_width(), bar.get_y()) for bar in first.patches if bar.get_y() < 1]
    assert len({place for _, _, place in bars}) == 2
    for one, other in itertools.combinations(bars, 2):
        assert one[2] != other[2] or one[1] <= other[0] or other[1] <= one[0]


def test_the_picture_of_a_single_token(tmp_path):
    pytest.importorskip("matplotlib")
    assert len(draw(told(conversation(5, 1, None)), tmp_path / "one.png").axes) == 1
    with pytest.raises(ValueError, match="0 tokens, rounds=8"):
        draw(Timings(), tmp_path / "none.png")


def test_without_matplotlib_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match=r"edgebolt-hat\[plot\]"):
        draw(Timings([1.0]), tmp_path / "none.png")
