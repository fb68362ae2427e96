import random

import pytest
import torch
from tiny_hat import (
    ALWAYS,
    MIXED,
    POSITION_BYTES,
    WIDTH,
    Faulty,
    Middle,
    Recorder,
    alone,
    autoregressive,
    close,
    conversation,
    engine,
    parts,
    prompt,
    rows,
    texts,
)

from edgebolt.common.decoding import cache_length, new_cache
from edgebolt.hat import (
    Chunking,
    CloudEngine,
    CloudModel,
    Dialogue,
    Drafting,
    InProcess,
    Limits,
    MedusaConversation,
    MedusaHeads,
    Upload,
)


class Counting(CloudModel):
    """Counts the rows it is given."""

    def __init__(self) -> None:
        super().__init__(parts().middle)
        self.batches = []

    def run(self, work):
        self.batches.append([len(upload.rows) for _, upload in work])
        return super().run(work)


class Device:
    """Steps of a conversation in any order with those of others; knows what to do when the cloud forgets."""

    def __init__(self, key, talk, cloud, chunk=5) -> None:
        self.key, self.talk, self.cloud, self.chunk, self.sequence = key, talk, cloud, chunk, 0
        self.answers, self.begun, self.waits, self.sent, self.since, self.recovered = [], False, 0, None, 1, 0

    def send(self, upload):
        self.sequence += 1
        self.sent, self.waits = upload, self.sequence
        self.cloud.take(self.key, self.sequence, upload, self.answers.append)

    def step(self):
        """Whether there was something to do."""
        if self.talk.done:
            return False
        if self.waits:
            if not self.answers:
                return not self.talk.drafts and self.begun and self.talk.look_ahead()
            self.read(self.answers.pop(0))
        elif self.talk.held < self.talk.prompt_length:
            self.send(self.talk.chunk(self.chunk))
        elif self.talk.drafts:
            self.talk.draft()
        else:
            self.send(self.talk.upload())
        return True

    def read(self, answer):
        assert answer.refused is None
        if answer.sequence < self.since:
            return
        if answer.held is not None:
            last, self.since, self.recovered = self.sent, self.sequence + 1, self.recovered + 1
            for upload in self.talk.resent(answer.held, last.start, 7):
                self.send(upload)
            self.send(last)
        elif answer.sequence == self.waits:
            self.waits = 0
            if not self.sent.reply:
                return
            if self.begun:
                self.talk.receive(answer.deep)
            else:
                self.talk.read_prompt()
                self.talk.begin(answer.deep)
                self.begun = True
            if self.talk.done:
                self.cloud.end(self.key)


def interleaved(cloud, seed, count=16, new_tokens=9, check=lambda: None):
    """Conversations of many kinds, whose steps and the cloud's come in random order."""
    kinds = [(Middle(0.03), ALWAYS), (Middle(0.1), MIXED), (None, None), (Middle(1.0), Drafting(0.0, 3, 2))]
    devices = [
        Device(key, conversation(1 + 3 * key % 23, new_tokens, *kinds[key % 4]), cloud, chunk=1 + key % 7)
        for key in range(count)
    ]
    draw = random.Random(seed)
    for _ in range(20_000):
        if all(device.talk.done for device in devices):
            break
        if draw.random() < 0.1:
            cloud.step()
            check()
        else:
            draw.choice(devices).step()
    for device in devices:
        assert device.talk.text == autoregressive(prompt(device.talk.prompt_length), new_tokens), device.key
    return devices


@pytest.mark.parametrize("budget", [7, None])
def test_many_conversations_at_once_all_get_their_own_text(budget):
    cloud = engine(Limits(batch_tokens=budget))
    devices = interleaved(cloud, seed=1)
    assert sum(device.recovered for device in devices) == 0
    assert cloud.conversations == cloud.cached == 0


def test_too_little_memory_for_all_costs_uploads_and_no_token():
    cloud = engine(Limits(batch_tokens=16, cache_bytes=70 * POSITION_BYTES))

    def check():
        held = [each.cache for each in cloud._held.values()]
        assert sum(map(cache_length, held)) * POSITION_BYTES == cloud.cached <= 70 * POSITION_BYTES

    devices = interleaved(cloud, seed=2, count=8, check=check)
    assert sum(device.recovered for device in devices) > 5
    assert cloud.conversations == cloud.cached == 0


def test_too_few_places_for_all_cost_uploads_and_no_token():
    cloud = engine(Limits(conversations=3))
    devices = interleaved(cloud, seed=3, count=8)
    assert sum(device.recovered for device in devices) > 5
    assert cloud.conversations == 0


def test_a_batch_gives_each_what_it_gets_alone():
    cloud, answers = engine(), {}
    given = {key: rows(3 + key, key) for key in range(4)}
    for key, each in given.items():
        cloud.take(key, 1, Upload(0, each, len(each)), lambda answer, key=key: answers.update({key: answer}))
    assert cloud.step() and not cloud.step()
    for key, each in given.items():
        assert answers[key].sequence == 1 and answers[key].held is answers[key].refused is None
        close(answers[key].deep, alone(each))


def test_answers_do_not_hold_the_whole_batch():
    cloud, answers = engine(), []
    for key in range(4):
        cloud.take(key, 1, Upload(0, rows(30), 1), answers.append)
    cloud.step()
    assert all(answer.deep.untyped_storage().nbytes() == WIDTH * 8 for answer in answers)


@pytest.mark.parametrize("budget", [1, 3, 10])
def test_prompts_that_are_cut_get_what_whole_ones_get(budget):
    model, answers = Counting(), []
    cloud = CloudEngine(model, Limits(batch_tokens=budget))
    given = [rows(11, 1), rows(8, 2)]
    for key, each in enumerate(given):
        cloud.take(key, 1, Upload(0, each, 1), answers.append)
    while cloud.step():
        pass
    assert max(map(sum, model.batches)) == budget and sum(map(sum, model.batches)) == 19
    for answer, each in zip(answers, given, strict=True):
        close(answer.deep, alone(each)[-1:])


def test_drafts_are_run_before_prompts_and_whole():
    model, answers = Counting(), []
    cloud = CloudEngine(model, Limits(batch_tokens=6))
    cloud.take("prompt", 1, Upload(0, rows(9), 1), lambda answer: answers.append(("prompt", answer)))
    cloud.step()
    cloud.take("draft", 1, Upload(0, rows(4), 4), lambda answer: answers.append(("draft", answer)))
    cloud.step()
    assert model.batches == [[6], [4, 2]] and [name for name, _ in answers] == ["draft"]
    cloud.step()
    assert model.batches[2] == [1] and [name for name, _ in answers] == ["draft", "prompt"]


@pytest.mark.parametrize("upload", [Upload(0, rows(9), 5), Upload(0, rows(9), 1, (), (-1, -1, 0, 1, 2, 2, 4, 6))])
def test_what_is_no_plain_prompt_is_not_cut(upload):
    model, answers = Counting(), []
    cloud = CloudEngine(model, Limits(batch_tokens=4))
    cloud.take(0, 1, upload, answers.append)
    cloud.step()
    assert model.batches == [[9]] and len(answers[0].deep) == upload.reply


def test_a_tree_gets_what_each_of_its_paths_gets():
    cloud, answers, given = engine(), [], rows(7)
    cloud.take(0, 1, Upload(0, given[:3], 0), answers.append)
    # behind row 3, the root: 4 and behind it 6; 5
    cloud.take(0, 2, Upload(3, given[3:7], 4, (), (-1, -1, 0)), answers.append)
    while cloud.step():
        pass
    close(answers[1].deep[[0, 1, 3]], alone(given[[0, 1, 2, 3, 4, 6]])[3:])
    close(answers[1].deep[[0, 2]], alone(given[[0, 1, 2, 3, 5]])[3:])
    # root and its second child are kept: positions 3 and 5
    cloud.take(0, 3, Upload(5, given[:2], 2, (3, 5)), answers.append)
    cloud.step()
    close(answers[2].deep, alone(given[[0, 1, 2, 3, 5, 0, 1]])[5:])
    # a kept place that is not there
    cloud.take(0, 4, Upload(5, given[:2], 2, (3, 7)), answers.append)
    assert not cloud.step() and answers[3].held == 7


def test_what_comes_twice_is_run_once_and_answered_again():
    model, first, second, third = Counting(), [], [], []
    cloud = CloudEngine(model)
    cloud.take(0, 1, Upload(0, rows(3), 3), first.append)
    cloud.take(0, 1, Upload(0, rows(3), 3), second.append)  # while the first one waits: over another stream
    assert cloud.waiting(0) == 1 and cloud.step() and not cloud.step()
    assert first == second and len(second) == 1, "which of the two is read by somebody is not known"
    cloud.take(0, 1, Upload(0, rows(3), 3), third.append)  # when it has been answered
    assert third == second and not cloud.step() and model.batches == [[3]]
    assert cloud.waiting(0) == 0 == cloud.waiting("nobody")


def test_what_comes_again_while_it_is_run_is_not_run_again():
    cloud, first, again = engine(), [], []
    cloud.take(0, 1, Upload(0, rows(3), 3), first.append)
    batch = cloud.batch()
    for _ in range(9):
        cloud.take(0, 1, Upload(0, rows(3), 3), again.append)
    cloud.finish(batch, cloud.run(batch))
    assert len(first + again) == 4 and not cloud.step(), "however often it is asked for"


def test_old_uploads_are_dropped():
    cloud, answers = engine(), []
    for sequence in (1, 2):
        cloud.take(0, sequence, Upload(0, rows(3), 3), answers.append)
        cloud.step()
    cloud.take(0, 1, Upload(0, rows(3), 3), answers.append)
    assert not cloud.step() and len(answers) == 2 and cloud.cached == 3 * POSITION_BYTES


def test_a_gap_is_answered_with_what_is_held():
    cloud, answers, given = engine(), [], rows(9)
    cloud.take(0, 1, Upload(0, given[:3], 0), answers.append)
    cloud.step()
    cloud.take(0, 3, Upload(5, given[5:7], 0), answers.append)
    cloud.take(0, 4, Upload(7, given[7:], 2), answers.append)
    assert not cloud.step()
    assert [(answer.sequence, answer.held) for answer in answers[1:]] == [(3, 3), (4, 3)]
    cloud.take(0, 5, Upload(3, given[3:7], 0), answers.append)
    cloud.take(0, 6, Upload(7, given[7:], 2), answers.append)
    while cloud.step():
        pass
    close(answers[-1].deep, alone(given)[7:])


def test_a_conversation_that_is_not_held_is_told_so():
    cloud, answers = engine(), []
    cloud.take(0, 9, Upload(4, rows(2), 2), answers.append)
    assert not cloud.step() and (answers[0].sequence, answers[0].held) == (9, 0)


def test_rows_are_cut_back_when_the_next_ones_come():
    cloud, answers, given = engine(), [], rows(9)
    cloud.take(0, 1, Upload(0, given[:6], 6), answers.append)
    cloud.step()
    cloud.take(0, 2, Upload(2, given[6:], 3), answers.append)
    assert cloud.cached == 6 * POSITION_BYTES
    cloud.step()
    assert cloud.cached == 5 * POSITION_BYTES
    close(answers[1].deep, alone(given[[0, 1, 6, 7, 8]])[2:])


def test_a_restart_in_mid_text_costs_uploads_and_no_token():
    for when in range(3):
        link = Recorder(engine())
        dialogue = Dialogue(conversation(9, 24, Middle(0.03), ALWAYS), link, Chunking(4))
        for number, _ in enumerate(dialogue):
            if number == when:
                link.engine = engine()
        assert dialogue.conversation.text == autoregressive(prompt(9), 24) and dialogue.recovered == 1
        assert max(len(upload.rows) for upload in link.uploads if not upload.reply) <= 4
        assert link.engine.conversations == 0


def test_several_chunks_that_miss_the_same_are_sent_again_once():
    class Forgets(Recorder):
        def receive(self, name):
            if len(self.answers) == 1:
                assert self.engine.waiting(name) == 3 and self.engine._evict()
            return super().receive(name)

    link = Forgets(engine())
    dialogue = Dialogue(conversation(20, 5, None), link, Chunking(2, ahead=3))
    for _ in dialogue:
        pass
    assert [answer.held for answer in link.answers[:4]] == [None, 0, 0, 0]
    assert dialogue.recovered == 1 and dialogue.conversation.text == autoregressive(prompt(20), 5)


@pytest.mark.parametrize("seed", range(4))
def test_what_is_lost_or_doubled_on_the_way_costs_no_token(seed):
    link = Faulty(engine(), random.Random(seed), lost=0.2, doubled=0.2)
    for _ in texts(link, 3, dialogues := [], ahead=1 + seed % 3):
        pass
    assert link.opened > 1
    for key, dialogue in enumerate(dialogues):
        assert dialogue.conversation.text == autoregressive(prompt(9 + key), 20)


def test_what_ends_or_is_let_go_while_it_is_run_gets_no_answer_of_that_run():
    cloud, answers = engine(), []
    for key in "ab":
        cloud.take(key, 1, Upload(0, rows(3), 3), answers.append)
    batch = cloud.batch()
    results = cloud.run(batch)
    cloud.end("a")
    cloud.take("a", 7, Upload(0, rows(2), 2), answers.append)  # the same name begins anew
    assert cloud._evict(spared={"a"})
    cloud.finish(batch, results)
    assert answers == []
    while cloud.step():
        pass
    assert sorted((answer.sequence, len(answer.deep)) for answer in answers) == [(1, 3), (7, 2)]


def test_a_batch_that_fails_refuses_its_own():
    cloud, answers = engine(), []
    cloud.take("kept", 1, Upload(0, rows(3), 3), answers.append)
    cloud.step()
    cloud.take("bad", 1, Upload(0, torch.zeros(2, WIDTH + 1), 2), answers.append)
    batch = cloud.batch()
    with pytest.raises(RuntimeError):
        cloud.run(batch)
    cloud.fail(batch, "no")
    assert answers[1].refused == "no" and set(cloud._held) == {"kept"}


def test_a_model_is_not_given_rows_that_build_on_what_is_not_there():
    cache = new_cache()
    with pytest.raises(ValueError, match="Rows from position 3 on, and 0 are held"):
        CloudModel(parts().middle).run([(cache, Upload(3, rows(1), 1))])
    assert cache_length(cache) == 0


def test_prompts_are_run_in_the_order_in_which_they_came():
    cloud, answers = engine(Limits(batch_tokens=4)), []
    first, second = (conversation(length, 2, None) for length in (12, 9))

    def take(name, sequence, upload):
        cloud.take(name, sequence, upload, lambda answer: answers.append((name, answer.sequence)))

    take("first", 1, first.chunk(6))
    take("second", 1, second.chunk(9))
    take("first", 2, first.chunk(6))  # being newly heard of does not put the first one behind
    while cloud.step():
        pass
    assert answers == [("first", 1), ("second", 1), ("first", 2)]


@pytest.mark.parametrize("every", [1, 2, 3])
def test_a_tree_goes_on_after_the_cloud_has_forgotten(every):
    talk = MedusaConversation(parts(), MedusaHeads(parts()), prompt(9), 20, stops=())
    link = InProcess(engine())
    dialogue = Dialogue(talk, link, Chunking(4))
    for number, _ in enumerate(dialogue):
        if number % every == 0:
            link.engine.end(dialogue.name)
    assert dialogue.recovered > 1
    alone = MedusaConversation(parts(), MedusaHeads(parts()), prompt(9), 20, stops=())
    for _ in Dialogue(alone, InProcess(engine()), Chunking(9)):
        pass
    assert talk.text == alone.text
