"""Contestants that take turns (A B C A B C ...), so that every ratio compares neighbours in time.

On a machine that others use too, two blocks of runs one after the other differ by more than what is to be measured.
A row of the table is a contestant: pytest-benchmark is handed the seconds of its laps by a timer that they move.
"""

import gc
import time
from dataclasses import dataclass, field
from statistics import median

import torch


@dataclass
class Lap:
    """What a contestant returns: the seconds of its training alone, and what it came to."""

    seconds: float
    cpu_seconds: float | None  # None: of several processes, not known
    steps: int
    weights: dict[str, torch.Tensor]
    figures: dict = field(default_factory=dict)  # exact ones, for `extra_info`
    strategy: object = None


class Timer:
    """Wall and processor seconds between ``start`` and ``stop``."""

    def start(self):
        self.began = time.perf_counter(), time.process_time()

    def stop(self):
        wall, cpu = time.perf_counter(), time.process_time()
        self.seconds, self.cpu_seconds = wall - self.began[0], cpu - self.began[1]


class Replay:
    """The timer of a benchmark: its hand moves by what is put on it, and at no other time."""

    __name__ = "replay"
    now = 0.0

    def __call__(self):
        return self.now

    def put(self, seconds):
        self.now += seconds


replay = Replay()


class Race:
    """``turns`` laps of each contestant, a name -> a callable without arguments that returns a :class:`Lap`."""

    def __init__(self, contestants, turns):
        self.laps = {name: [] for name in contestants}
        for _ in range(turns):
            for name, run in contestants.items():
                if turns > 1:  # else nothing is compared, and in a large process this takes longer than a short lap
                    gc.collect()
                self.laps[name].append(run())

    def __getitem__(self, name):
        return self.laps[name][-1]

    def difference(self, name, baseline):
        """The largest difference of a final weight, over all laps; 0.0 only if every bit is the same."""
        pairs = list(zip(self.laps[name], self.laps[baseline], strict=True))
        for ours, theirs in pairs:
            assert ours.weights.keys() == theirs.weights.keys() and ours.weights
        if all(torch.equal(a.weights[key], b.weights[key]) for a, b in pairs for key in a.weights):
            return 0.0
        return max(float((a.weights[key] - b.weights[key]).abs().max()) for a, b in pairs for key in a.weights)

    def row(self, benchmark, name, baseline, target=None, **info):
        """Make ``name`` the row of this benchmark, compared with ``baseline``; ``target``: figure -> its limit."""
        laps = iter(self.laps[name])
        benchmark.pedantic(lambda: replay.put(next(laps).seconds), rounds=len(self.laps[name]))
        pairs = list(zip(self.laps[name], self.laps[baseline], strict=True))
        seconds = median(lap.seconds for lap in self.laps[name])
        visits = self[name].figures.get("visits")
        ratios = [ours.seconds / theirs.seconds for ours, theirs in pairs]
        cpu = [a.cpu_seconds / b.cpu_seconds for a, b in pairs if a.cpu_seconds and b.cpu_seconds]
        benchmark.extra_info.update(
            baseline=baseline,
            ratio=median(ratios),
            ratio_min=min(ratios),
            ratio_max=max(ratios),
            **({"ratio_cpu": median(cpu)} if cpu else {}),
            steps=self[name].steps,
            us_per_step=1e6 * seconds / self[name].steps,
            **({"ms_per_visit": 1e3 * seconds / visits} if visits else {}),
            weight_difference=self.difference(name, baseline),
            **{"params_trained": sum(tensor.numel() for tensor in self[name].weights.values())} | self[name].figures,
            **({"target": target} if target else {}),
            **info,
        )
