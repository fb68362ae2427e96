"""A job is killed by the kernel, at every step, in every phase, in mid-write, and started again."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

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


def repr_of(snapshot):
    with safe_open(snapshot, framework="pt") as file:
        return file.metadata()["structure"]


def assert_as_if_nothing_had_happened(results):
    (code, whole), *rest = results[0]
    assert code == 0 and not rest and whole["restored"] == [None]
    for number, fits in enumerate(results[1:]):
        *before, (code, last) = fits
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
        {"pair": "max_size_cycle"},
        {"pair": "max_size"},
        {"plateau": True, "validate": 2, "epochs": 4},  # it steps on a figure of an earlier epoch, too
        {"factors": {1: 2}},
        {"estimate": True},
        {"stop": 2, "min_epochs": 2},
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
        "one loader exhausted",
        "plateau",
        "accumulated from an epoch on",
        "loaders asked for in setup",
        "told to stop before it may",
    ],
)
def test_killed_at_every_step(run, options, tmp_path):
    hook = "on_before_zero_grad" if "accumulate" in options else "on_before_optimizer_step"
    last = 8 if "factors" in options or "stop" in options else STEPS // options.get("accumulate", 1)
    steps = range(1, 1 + last, 3 if options else 1)
    scenarios = [[{**options, "kill": (hook, step)}, options] for step in steps]
    results = run(tmp_path, [options], *scenarios)
    assert_as_if_nothing_had_happened(results)
    every = options.get("every", 1)
    went_on = [fits[1][1]["restored"][0] for fits in results[1:]]
    assert went_on == [(step - 1) // every * every for step in steps]
    if "federated" in options:  # large memories lie beside the snapshot, and only what it lists
        for number in range(len(results)):
            cache = tmp_path / str(number) / "cache"
            listed = re.findall(r'\["edgebolt.file","(\w+-\w+)"\]', repr_of(cache / "snapshot.safetensors"))
            assert {path.name for path in (cache / "devices").iterdir()} == {f"{name}.safetensors" for name in listed}
            assert listed


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


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 16}, r"another job: module.*tensors.*here"),
        ({"weight_decay": 0.1}, r"another job: optimizers"),
        ({"batch_size": 2}, r"another job: batches of the training loader there 4, here 9"),
        ({"seed": 5}, r"Batch 3 of the epoch is not the one"),
        ({"pair": "min_size"}, r"another job: number of training loaders there 1, here 2"),
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


def test_other_data_are_refused_once_the_job_has_ended(run, tmp_path):
    first, *refused, again = run(tmp_path, [{}, {"seed": 5}, {"seed": 5, "epochs": 4}, {}])[0]
    for code, result in refused:
        assert code == 1 and re.search(r"Batch 1 of the epoch is not the one", result["error"]), result
    assert again[1] == {**first[1], "restored": [STEPS]}


def test_a_job_that_was_stopped_stays_stopped(run, tmp_path):
    (_, first), (_, again), (_, longer) = run(tmp_path, [{"stop": 6}, {"stop": 6}, {"stop": 6, "epochs": 5}])[0]
    assert again == longer == {**first, "restored": [6]}


def test_several_steps_a_batch(run, tmp_path):
    options = {"manual": True, "every": 3}
    results = run(tmp_path, [options], [{**options, "kill": ("on_before_optimizer_step", 6)}, options])
    assert_as_if_nothing_had_happened(results)
    assert results[1][1][1]["restored"] == [4]  # not 0: no batch begins at step 3


def test_a_loader_without_a_length_is_refused(run, tmp_path):
    ((code, result),) = run(tmp_path, [{"endless": True}])[0]
    assert code == 1 and re.search(r"ValueError: TrainingCache.*DataLoader with a length", result["error"])


def test_a_path_that_is_given_comes_first(run, tmp_path):
    results = run(tmp_path, [{"epochs": 1}, {"ckpt": "last_good.ckpt"}, {"ckpt": "last.ckpt"}])[0]
    assert [(code, result["restored"]) for code, result in results] == [(0, [None])] * 3
