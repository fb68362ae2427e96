import itertools

import pytest
import torch
from tiny_hat import (
    ALWAYS,
    LONGEST,
    MIXED,
    WIDTH,
    Middle,
    Recorder,
    autoregressive,
    conversation,
    engine,
    llama,
    parts,
    prompt,
)

from edgebolt.common.decoding import cache_length, new_cache
from edgebolt.hat import FORMATS, Chunking, CloudModel, Conversation, Dialogue, Drafting, InProcess

NEVER = Drafting(threshold=1.01)


class Talk:
    """A conversation and the cloud's cache, round by round by hand; looks at what both hold."""

    def __init__(self, talk: Conversation, steps=0, chunk=4) -> None:
        self.talk, self.steps, self.cloud, self.cache = talk, steps, CloudModel(parts().middle), new_cache()
        while talk.held < talk.prompt_length:
            upload = talk.chunk(chunk)
            (deep,) = self.cloud.run([(self.cache, upload)])
        talk.read_prompt()
        talk.begin(deep)

    @property
    def device(self):
        return [cache_length(self.talk._shallow), cache_length(self.talk._light)]

    def round(self):
        """One round, and how many tokens were drafted, accepted and looked ahead to."""
        talk, cloud = self.talk, self.cache
        n, adopted = len(talk.text), self.device[0] - (len(talk.text) - 1)
        assert talk.held == n - 1 and cache_length(cloud) >= n - 1
        light = 0 if talk.adapter is None else 1  # without Λ nothing is put through it
        assert self.device == [n - 1 + adopted, light * (n - 1 + adopted)]
        while talk.drafts:
            talk.draft()
        upload = talk.upload()
        drafted = len(upload.rows) - 1
        assert self.device == [n + drafted, light * (n + drafted)]
        ahead = sum(talk.look_ahead() for _ in range(self.steps))
        assert (upload.start, upload.reply, upload.parents, upload.kept) == (n - 1, drafted + 1, None, ())
        (deep,) = self.cloud.run([(cloud, upload)])
        assert cache_length(cloud) == n + drafted and deep.shape == (drafted + 1, WIDTH)
        before, hits = talk.accepted, talk.hits
        new = talk.receive(deep)
        accepted, hit = talk.accepted - before, talk.hits - hits
        if not talk.done:
            assert len(talk.text) == n + accepted + 1 and len(new) == accepted + 1
            assert talk.held == len(talk.text) - 1
            kept = self.device[0] - talk.held
            assert self.device == [talk.held + kept, light * (talk.held + kept)]
            assert (1 <= kept <= ahead) if hit else kept == 0
        return drafted, accepted, ahead


@pytest.mark.parametrize("wrong", range(5))
def test_what_is_rejected_at_each_place_is_cut_on_both_sides(wrong):
    n = 6  # prompt and first token; draft i is chosen behind position n - 2 + i
    adapter = Middle(wrong={n - 1 + wrong} if wrong < 4 else set())
    talk = Talk(conversation(5, 24, adapter, ALWAYS))
    assert talk.round() == (4, wrong, 0)
    assert len(talk.talk.text) == n + wrong + 1
    while not talk.talk.done:
        talk.round()
    assert talk.talk.text == autoregressive(prompt(5), 24)


@pytest.mark.parametrize("steps", range(10))
@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_lengths_of_the_caches_after_every_round(noise, steps):
    talk = Talk(conversation(5, 16, Middle(noise), ALWAYS), steps)
    while not talk.talk.done:
        talk.round()
    assert talk.talk.text == autoregressive(prompt(5), 16)


def test_each_place_is_cut_again_and_again():
    for wrong in ({8, 9}, {5, 7, 9, 11}, set(range(40)), {6, 10, 14}):
        talk = Talk(conversation(5, 16, Middle(wrong=wrong), ALWAYS), steps=3)
        while not talk.talk.done:
            talk.round()
        assert talk.talk.text == autoregressive(prompt(5), 16)


@pytest.mark.parametrize("adapter", [None, Middle()], ids=["no-adapter", "no-confidence"])
def test_rounds_without_a_draft(adapter):
    talk = Talk(conversation(5, 10, adapter, NEVER))
    rounds = []
    while not talk.talk.done:
        rounds.append(talk.round())
    assert rounds == [(0, 0, 0)] * 9
    assert talk.talk.text == autoregressive(prompt(5), 10)


def test_the_threshold_ends_drafts_and_its_token_is_not_sent():
    def lengths(threshold):
        talk = Talk(conversation(5, 24, Middle(0.05), Drafting(threshold, 6, 0)))
        return [talk.round()[0] for _ in range(3)]

    assert lengths(0.0) == [6, 6, 6] and lengths(1.01) == [0, 0, 0]
    assert 0 < sum(lengths(0.3)) < 18
    # exactly while the draft's chance reaches it
    talk = conversation(5, 24, Middle(), Drafting(0.3, 6, 0))
    Talk(talk)
    with torch.no_grad():
        chances = llama()(torch.tensor([autoregressive(prompt(5), 24)])).logits[0].softmax(-1).amax(-1)[5:]
    sure = next(index for index, chance in enumerate(chances.tolist()) if chance < 0.3)
    while talk.drafts:
        talk.draft()
    assert len(talk.upload().rows) == 1 + min(sure, 6)


def test_a_look_ahead_that_hits_begins_the_next_round():
    talk = Talk(conversation(5, 25, Middle(), ALWAYS), steps=5)
    found = [talk.round() for _ in range(2)]
    assert talk.talk.hits == 2 and found == [(4, 4, 5)] * 2
    assert not talk.talk.drafts, "all of the next draft was looked ahead to"
    # the pending token's row is there as well: a step less, and one token is left to draft
    fewer = Talk(conversation(5, 25, Middle(), ALWAYS), steps=4)
    fewer.round()
    assert fewer.talk.drafts
    fewer.talk.draft()
    assert not fewer.talk.drafts


def test_a_look_ahead_that_misses_is_dropped():
    # what is looked ahead to behind the fourth draft is the target's least likely
    talk = Talk(conversation(5, 24, Middle(wrong={9, 14, 19, 24}), ALWAYS), steps=4)
    found = []
    while not talk.talk.done:
        found.append(talk.round()[:2])
    assert talk.talk.hits == 0 and found[:3] == [(4, 4)] * 3
    assert talk.talk.text == autoregressive(prompt(5), 24)


def test_a_rejected_draft_adopts_no_branch():
    talk = Talk(conversation(5, 24, Middle(wrong={7}), ALWAYS), steps=4)
    assert talk.round()[:2] == (4, 2) and talk.talk.hits == 0


@pytest.mark.parametrize("steps", range(10))
@pytest.mark.parametrize("drafting", [ALWAYS, MIXED])
def test_any_number_of_steps_ahead_gives_the_text(drafting, steps):
    talk = conversation(5, 16, Middle(0.03), drafting)
    for _ in Dialogue(talk, InProcess(engine(), steps=steps), Chunking(3)):
        pass
    assert talk.text == autoregressive(prompt(5), 16)


@pytest.mark.parametrize("drafting", [NEVER, Drafting(0.0, 0, 3), Drafting(0.0, 3, 0), Drafting(0.0, 1, 1)])
def test_the_least_of_drafts_and_branches_give_the_text(drafting):
    talk = conversation(5, 10, Middle(0.03), drafting)
    for _ in Dialogue(talk, InProcess(engine(), steps=3)):
        pass
    assert talk.text == autoregressive(prompt(5), 10)


def test_nothing_is_looked_ahead_to_beyond_the_text_or_the_next_draft():
    def ahead(new_tokens, longest):
        talk = Talk(conversation(5, new_tokens, Middle(), Drafting(0.0, longest, 3)), steps=30)
        return talk.round()[2]

    # the first token and 4 drafted ones are there, and one of the cloud: 20 - 6 are left
    assert ahead(20, 4) == 5 and ahead(20, 2) == 3 and ahead(20, 0) == 1
    assert [ahead(new_tokens, 4) for new_tokens in (5, 6, 7, 8, 9)] == [0, 0, 1, 2, 3]


@pytest.mark.parametrize("place", range(10))
def test_a_stop_inside_a_draft_ends_the_text(place):
    whole = autoregressive(prompt(5), 24)
    stop = whole[5 + place]
    end = whole.index(stop, 5) + 1
    for adapter in (Middle(), Middle(0.05), None):
        talk = conversation(5, 24, adapter, ALWAYS, stops={stop})
        new = [token for tokens in Dialogue(talk, InProcess(engine())) for token in tokens]
        assert talk.text == whole[:end] and new == whole[5:end] and talk.done


def test_a_draft_ends_behind_a_stop():
    whole = autoregressive(prompt(5), 24)
    stop = whole[7]  # the second that is drafted
    assert stop not in whole[5:7]
    talk = Talk(conversation(5, 24, Middle(), ALWAYS, stops={stop}))
    assert talk.round() == (2, 2, 0)
    assert talk.talk.done


def test_the_models_own_stops_are_the_default():
    assert conversation(stops=None).stops == parts().stops
    assert Conversation(parts(), None, [7]).stops == parts().stops == frozenset({2})


@pytest.mark.parametrize("new_tokens", range(1, 12))
def test_the_length_ends_the_text_inside_a_draft(new_tokens):
    talk = conversation(5, new_tokens, Middle(), Drafting(0.0, 4, 3))
    link = Recorder(engine(), steps=6)
    for _ in Dialogue(talk, link):
        assert len(talk.text) <= 5 + new_tokens
    assert talk.text == autoregressive(prompt(5), new_tokens) and talk.done and talk.left == 0
    assert max(upload.start + len(upload.rows) for upload in link.uploads) <= 5 + new_tokens


def test_a_text_can_be_as_long_as_the_model_has_places():
    talk = conversation(100, LONGEST - 100, Middle(), ALWAYS)
    for _ in Dialogue(talk, InProcess(engine(), steps=9)):
        pass
    assert talk.text == autoregressive(prompt(100), LONGEST - 100)


@pytest.mark.parametrize("chunk", [1, 4, 11, 50])
def test_rows_on_the_wire_are_those_of_the_protocol(chunk):
    talk = conversation(11, 20, Middle(0.03), ALWAYS)
    link = Recorder(engine(), "float64")
    rounds, drafted = 0, []
    for _ in Dialogue(talk, link, Chunking(chunk)):
        rounds += 1
        drafted.append(talk.drafted)
    prefill = -(-11 // chunk)
    sizes = [(len(upload.rows), upload.reply) for upload in link.uploads]
    assert sum(rows for rows, _ in sizes[:prefill]) == 11 and max(rows for rows, _ in sizes[:prefill]) <= chunk
    assert [reply for _, reply in sizes[:prefill]] == [0] * (prefill - 1) + [1]
    lengths = [after - before + 1 for before, after in itertools.pairwise(drafted)]
    assert sizes[prefill:] == [(length, length) for length in lengths] and len(lengths) == rounds - 1 == talk.rounds
    assert [len(answer.deep) for answer in link.answers] == [reply for _, reply in sizes]
    assert all(
        upload.start == before for upload, before in zip(link.uploads[:prefill], range(0, 11, chunk), strict=True)
    )
    up = sum(len(FORMATS["float16"].encode(upload.rows)) for upload in link.uploads)
    assert up == (11 + talk.drafted + talk.rounds) * WIDTH * 2


def test_u_shape_moves_one_row_each_way():
    talk, link = conversation(5, 10, None), Recorder(engine())
    for _ in Dialogue(talk, link):
        pass
    assert [(len(upload.rows), upload.reply) for upload in link.uploads] == [(5, 1)] + [(1, 1)] * 9
    assert talk.text == autoregressive(prompt(5), 10)


def test_rows_that_are_sent_again_are_those_that_were_sent():
    talk = Talk(conversation(11, 20, Middle(0.05), ALWAYS), chunk=11)
    for _ in range(3):
        talk.round()
    held = talk.talk.held
    again = talk.talk.resent(4, held, 5)
    assert [(upload.start, upload.reply) for upload in again] == [(start, 0) for start in range(4, held, 5)]
    assert sum(len(upload.rows) for upload in again) == held - 4 and talk.talk.resent(held, held, 5) == []
    cache = new_cache()
    fresh = parts().input(torch.tensor(talk.talk.text[:held]), cache)
    torch.testing.assert_close(torch.cat([upload.rows for upload in again]), fresh[4:], rtol=1e-12, atol=1e-12)


def test_answers_of_another_size_are_refused_and_change_nothing():
    talk = Talk(conversation(5, 24, Middle(), ALWAYS)).talk
    while talk.drafts:
        talk.draft()
    before = list(talk.text)
    for rows in (0, 4, 6):
        with pytest.raises(ValueError, match=f"{rows} rows came back for 5"):
            talk.receive(torch.zeros(rows, WIDTH, dtype=torch.float64))
    assert talk.text == before and len(talk.upload().rows) == 5


def test_calls_out_of_turn_are_refused():
    talk = conversation(5, 2, Middle(), ALWAYS)
    talk.chunk(9)
    with pytest.raises(RuntimeError, match="taken whole"):
        talk.chunk(1)
    talk = Talk(conversation(5, 3, Middle(), ALWAYS))
    with pytest.raises(RuntimeError, match="The draft goes on"):
        talk.talk.upload()
    assert not talk.talk.look_ahead(), "while it drafts, nothing is looked ahead to"
    while talk.talk.drafts:
        talk.talk.draft()
    with pytest.raises(RuntimeError, match="The draft has ended"):
        talk.talk.draft()
    talk.round()
    with pytest.raises(RuntimeError, match="The text is complete"):
        talk.talk.upload()


@pytest.mark.parametrize(
    ("before", "new_tokens", "message"),
    [([], 4, "An empty prompt"), ([7], 0, "new_tokens=0"), ([7] * 60, 101, "at most 160 tokens in all")],
)
def test_prompts_and_lengths_out_of_range_are_refused(before, new_tokens, message):
    with pytest.raises(ValueError, match=message):
        Conversation(parts(), None, before, new_tokens)


@pytest.mark.parametrize("wrong", [{"threshold": -0.1}, {"longest": -1}, {"branches": -1}])
def test_settings_of_the_draft_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match="0 or more"):
        Drafting(**wrong)


@pytest.mark.parametrize("wrong", [{"tokens": 0}, {"smallest": 0}, {"smallest": 9, "largest": 8}, {"ahead": 0}])
def test_chunkings_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match="at least 1"):
        Chunking(**wrong)


class Measured(Recorder):
    """A link that knows how fast it is."""

    seconds = 1e-3

    def row_seconds(self):
        return self.seconds

    def cloud_seconds(self, tokens):
        return 0.005 + 0.0002 * tokens

    def batch_tokens(self):
        return 10.0


def test_chunks_are_solved_for_from_what_the_link_has_measured():
    talk, link = conversation(100, 2, None), Measured(engine())
    for _ in Dialogue(talk, link, Chunking(smallest=2)):
        pass
    # 15 ms for 15 rows, and (5 + 2) + (5 + 3) ms in the cloud
    assert [len(upload.rows) for upload in link.uploads[:7]] == [15] * 6 + [10]
    wide, link = conversation(100, 2, None), Measured(engine())
    for _ in Dialogue(wide, link, Chunking(smallest=30, stages=2)):
        pass
    assert [len(upload.rows) for upload in link.uploads[:4]] == [30] * 3 + [10]
    unknown, link = conversation(100, 2, None), Recorder(engine())
    for _ in Dialogue(unknown, link, Chunking(largest=64)):
        pass
    assert [len(upload.rows) for upload in link.uploads[:2]] == [64, 36]


@pytest.mark.parametrize("ahead", [1, 2, 3])
def test_so_many_chunks_are_on_their_way_at_once(ahead):
    class Counted(Recorder):
        waiting = most = 0

        def send(self, *message):
            self.waiting += 1
            self.most = max(self.most, self.waiting)
            super().send(*message)

        def receive(self, name):
            self.waiting -= 1
            return super().receive(name)

    talk, link = conversation(20, 2, None), Counted(engine())
    for _ in Dialogue(talk, link, Chunking(2, ahead=ahead)):
        pass
    assert link.most == ahead and talk.text == autoregressive(prompt(20), 2)


class Second(InProcess):
    """Each answer takes a second of a clock on which nothing else takes any."""

    def __init__(self, *args, **options) -> None:
        super().__init__(*args, **options)
        self.now = 10.0

    def receive(self, name):
        self.now += 1.0
        return super().receive(name)


def test_timings():
    talk, link = conversation(5, 11, Middle(), Drafting(0.0, 4, 0)), Second(engine())
    dialogue = Dialogue(talk, link, clock=lambda: link.now)
    for _ in dialogue:
        pass
    assert dialogue.timings.tokens == [1.0] + [2.0] * 5 + [3.0] * 5
    assert dialogue.timings.first == 1.0 and dialogue.timings.between == 0.2


@pytest.mark.parametrize(("seconds", "steps"), [(0.05, 2), (0.019, 1), (1.0, 5), (0.0, 5)])
def test_as_many_steps_ahead_as_end_before_the_answer(seconds, steps, monkeypatch):
    class Waiting(InProcess):  # `arrived` says no five times; 0 seconds: nothing is known
        def cloud_seconds(self, tokens):
            return seconds

    talk, clock = conversation(5, 24, Middle(0.0), ALWAYS), [0.0]
    step = talk.look_ahead

    def look_ahead():
        clock[0] += 0.02
        return step()

    monkeypatch.setattr(talk, "look_ahead", look_ahead)
    dialogue = Dialogue(talk, Waiting(engine(), steps=5), clock=lambda: clock[0])
    for _ in dialogue:
        pass
    ahead = [span.tokens for span in dialogue.timings.spans if span.work == "ahead"]
    # the first step tells how long one takes; further ones begin while they would end in time
    assert ahead[0] == steps and max(ahead) == steps and talk.text == autoregressive(prompt(5), 24)


def test_texts_of_a_dialogue_that_is_left_are_let_go():
    link = InProcess(engine())
    for _ in Dialogue(conversation(5, 24, Middle(), ALWAYS), link):
        assert link.engine.conversations == 1
        break
    import gc

    gc.collect()
    assert link.engine.conversations == link.engine.cached == 0
