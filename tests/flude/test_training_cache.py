"""A job is killed by the kernel, at every step, in every phase, in mid-write, and started again."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

JOB = Path(__file__).parent / "killed_job.py"
STEPS = 12  # of the whole run: three epochs of four batches
KILLED = -signal.SIGKILL


@pytest.fixture(scope="module")
def run():
    """``run(folder, fits, fits, ...)``: the fits of a job, one after the other; (code, result) of each."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    with subprocess.Popen([sys.executable, JOB], env=environment, **pipes) as worker:

        def send(folder, *jobs):
            results = []
            for number, fits in enumerate(jobs):
                worker.stdin.write(json.dumps([str(folder / str(number)), fits]) + "\n")
                worker.stdin.flush()
                results.append(json.loads(next(line for line in worker.stdout if line.startswith("@"))[1:]))
            return results

        yield send
        worker.stdin.close()


def assert_as_if_nothing_had_happened(results, killed=True, every=1):
    (code, whole), *rest = results[0]
    assert code == 0 and not rest and whole["restored"] == [None]
    for number, fits in enumerate(results[1:]):
        *before, (code, last) = fits
        if killed:
            assert [code for code, _ in before] == [KILLED] * len(before), (number, before)
        assert code == 0, last
        assert {**last, "restored": None} == {**whole, "restored": None}, number


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"every": 3},
        {"interval": 0.5},
        {"accumulate": 2},
        {"workers": 2, "every": 2},
        {"max_steps": STEPS},
        {"federated": True, "every": 2, "epochs": 4},
        {"reload": 1},
        {"pair": True},
    ],
    ids=[
        "every step",
        "every third",
        "validation in mid-epoch",
        "accumulated",
        "workers",
        "max_steps",
        "federated",
        "loaders made anew",
        "two loaders",
    ],
)
def test_killed_at_every_step(run, options, tmp_path):
    hook = "on_before_zero_grad" if "accumulate" in options else "on_before_optimizer_step"
    steps = range(1, 1 + STEPS // options.get("accumulate", 1), 3 if options else 1)
    scenarios = [[{**options, "kill": (hook, step)}, options] for step in steps]
    results = run(tmp_path, [options], *scenarios)
    assert_as_if_nothing_had_happened(results)
    every = options.get("every", 1)
    went_on = [fits[1][1]["restored"][0] for fits in results[1:]]
    assert went_on == [(step - 1) // every * every for step in steps]


@pytest.mark.slow
@pytest.mark.parametrize(
    "hook",
    [
        *("on_train_batch_start", "on_after_backward", "on_train_batch_end", "on_train_epoch_start"),
        *("on_validation_batch_end", "on_validation_end", "on_train_epoch_end", "on_train_end"),
    ],
)
def test_killed_in_every_phase(run, hook, tmp_path):
    numbers = [1] if hook == "on_train_end" else [1, 3] if "epoch" in hook else [3, 6]
    assert_as_if_nothing_had_happened(
        run(
            tmp_path,
            [{"interval": 0.5}],
            *([{"interval": 0.5, "kill": (hook, n)}, {"interval": 0.5}] for n in numbers),
        )
    )


@pytest.mark.parametrize("how", ["header", "middle", "before rename", "after rename"])
def test_torn_writes(run, how, tmp_path):
    scenarios = [[{"torn": (how, at)}, {}] for at in (1, 6, STEPS + 1)]  # the last one is that of the end
    results = run(tmp_path, [{}], *scenarios)
    assert_as_if_nothing_had_happened(results)
    for number in range(1, len(scenarios) + 1):  # nothing of the torn files is left
        assert [path.name for path in (tmp_path / str(number) / "cache").iterdir()] == ["snapshot.safetensors"]


def test_killed_again_and_again(run, tmp_path):
    """Every leg gets two steps further, and dies in another place."""
    legs = [{"kill": (hook, 3)} for hook in ("on_before_optimizer_step", "on_train_batch_end", "on_after_backward")]
    assert_as_if_nothing_had_happened(run(tmp_path, [{}], [*legs, *legs[:2], {}]))


def test_the_cache_changes_nothing(run, tmp_path):
    (_, plain), (_, cached) = (fits[0] for fits in run(tmp_path, [{"cached": False}], [{}]))
    assert {**plain, "restored": 0} == {**cached, "restored": 0}


def test_a_job_that_has_ended_ends_at_once_and_may_be_prolonged(run, tmp_path):
    results = run(tmp_path, [{"epochs": 3}], [{"epochs": 2}, {"epochs": 2}, {"epochs": 3}])
    whole, (first, again, longer) = results[0][0][1], (result for _, result in results[1])
    assert again == {**first, "restored": [8]}
    assert {**longer, "restored": 0} == {**whole, "restored": 0} and longer["restored"] == [8]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 16}, r"another job: module.*tensors.*here"),
        ({"weight_decay": 0.1}, r"another job: optimizers"),
        ({"batch_size": 2}, r"another job: batches of the training loader there 4, here 9"),
        ({"seed": 5}, r"Batch 3 of the epoch is not the one"),
        ({"job": {"note": 2}}, r"another job: job= there None, here \{'note': 2\}"),
    ],
)
def test_a_changed_job_is_refused_and_nothing_is_lost(run, change, message, tmp_path):
    kill = {"kill": ("on_before_optimizer_step", 3)}
    results = run(tmp_path, [{}], [kill, change, {}])
    (_, whole), (dead, refused, last) = results[0][0], results[1]
    assert dead[0] == KILLED and refused[0] == 1
    assert re.search(message, refused[1]["error"]), refused
    assert "begin anew" in refused[1]["error"]
    assert {**last[1], "restored": 0} == {**whole, "restored": 0}  # the job as it was goes on
