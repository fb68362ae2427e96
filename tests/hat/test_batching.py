from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as some

from edgebolt.hat import next_batch


@dataclass(eq=False)
class Waits:
    rows: int
    verifies: bool


UPLOADS = some.lists(some.builds(Waits, rows=some.integers(1, 40), verifies=some.booleans()), max_size=12)
BUDGETS = some.integers(1, 60)


@given(UPLOADS, BUDGETS)
@settings(max_examples=300, deadline=None)
def test_what_every_batch_obeys(waiting, budget):
    batch = next_batch(waiting, budget)
    jobs, counts = [job for job, _ in batch], [rows for _, rows in batch]
    kinds = [job.verifies for job in jobs]
    assert bool(batch) == bool(waiting)
    assert len(set(map(id, jobs))) == len(jobs)
    assert all(1 <= rows <= job.rows for job, rows in batch)
    assert all(rows == job.rows for job, rows in batch if job.verifies), "what is verified is not cut"
    assert kinds == sorted(kinds, reverse=True), "what is verified comes first"
    assert sum(counts) <= budget or (len(batch) == 1 and kinds == [True]), "the budget holds but for one large upload"
    for kind in (True, False):
        mine = [id(job) for job in jobs if job.verifies == kind]
        assert mine == [id(job) for job in waiting if id(job) in mine], "in order of arrival"
    assert sum(rows < job.rows for job, rows in batch) <= 1, "one prompt at most is cut"


@given(UPLOADS, BUDGETS)
@settings(max_examples=200, deadline=None)
def test_room_that_is_left_goes_to_prompts(waiting, budget):
    batch = next_batch(waiting, budget)
    taken = sum(rows for _, rows in batch)
    left = sum(job.rows for job in waiting if not job.verifies)
    prompts = sum(rows for job, rows in batch if not job.verifies)
    assert prompts == left or taken >= budget
    out = [job for job in waiting if job.verifies and all(job is not each for each, _ in batch)]
    assert all(job.rows > budget - (taken - prompts) for job in out), "what is to be verified stays out for room alone"


@given(UPLOADS, BUDGETS)
@settings(max_examples=100, deadline=None)
def test_all_that_waits_is_run_some_time(waiting, budget):
    waiting, batches = list(waiting), 0
    while waiting:
        for job, rows in next_batch(waiting, budget):
            job.rows -= rows
        waiting = [job for job in waiting if job.rows]
        batches += 1
        assert batches <= 12 * 41


def test_a_prompt_gets_on_beside_drafts_that_never_end():
    prompt, run = Waits(100, False), 0
    while prompt.rows:
        for job, rows in next_batch([*(Waits(5, True) for _ in range(3)), prompt], 20):
            job.rows -= rows
        run += 1
    assert run == 20  # 5 of 20 rows are left for it


def test_a_large_draft_is_run_once_it_is_the_first():
    large, small = Waits(50, True), Waits(3, True)
    assert next_batch([small, large], 20) == [(small, 3)]
    assert next_batch([large, small, Waits(9, False)], 20) == [(large, 50)]


def test_without_a_budget_everything_goes_whole_as_it_came():
    waiting = [Waits(900, False), Waits(5, True), Waits(70, False)]
    assert next_batch(waiting, None) == [(waiting[0], 900), (waiting[1], 5), (waiting[2], 70)]
    assert next_batch([], None) == next_batch([], 5) == []
