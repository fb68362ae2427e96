"""Constants of the simulated comparison: what HAT's setting says, and what we put in where it does not.

Written before the first comparison was run, committed after it, and not changed since. From the paper's setting,
through a digest: 20 Jetson Xavier and 10 Orin, uplinks of 5 to 10 MB/s, downlinks of 10 to 15 MB/s, a cloud of 4
stages, 128 new tokens, 2 and 3 layers on the device. Worked out from the paper's numbers: seconds of a stage. Ours:
everything that a comment names so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from edgebolt.common.decoding import Link
from edgebolt.common.random import stream
from edgebolt.hat.simulation.machines import CloudTiming, DeviceTiming

__all__ = ["CNN_13B", "SPECBENCH_7B", "Setting"]


@dataclass(frozen=True)
class Setting:
    """A model, its devices and what is asked of it.

    Args:
        name: of the setting.
        width: of hidden states, which travel as float16.
        cloud: seconds of a batch.
        draft_gb: weights that a step of the draft reads, in GB: first layers, Λ and head.
        head_gb: of those, the head's.
        layers_gflop: of the device's first layers, GFLOP a token.
        medusa_gb: weights of Medusa's four heads.
        prompt: draws the tokens of a prompt.
        requests: a second, of all devices together.
        accept: tokens a round of HAT's draft (the paper's, measured on one device).
        accept_medusa: the same, of Medusa.
    """

    name: str
    width: int
    cloud: CloudTiming
    draft_gb: float
    head_gb: float
    layers_gflop: float
    medusa_gb: float
    prompt: Callable[[np.random.Generator], float]
    requests: float
    accept: float
    accept_medusa: float
    new_tokens: int = 128

    @property
    def row_bytes(self) -> int:
        """``A``."""
        return 2 * self.width

    @property
    def adapter_gb(self) -> float:
        """Weights of Λ: ``4 · width²``, two bytes each."""
        return 8 * self.width**2 / 1e9

    def device(self, number: int, mode: int, seed: int) -> tuple[DeviceTiming, Link]:
        """Timing and link of one of 30 devices, in one of its modes.

        Args:
            number: 0 to 29; the first 20 are Xavier, the others Orin.
            mode: how often the mode has been drawn anew: every 5 requests of the device.
            seed: of the fleet.
        """
        draws = stream(seed, "device", number, mode)
        slower = float(draws.choice([1.0, 1.25, 1.6]))  # ours: three power modes
        gb, tflops = (137.0, 4.0) if number < 20 else (204.8, 8.0)  # memory: data sheets; half precision: ours
        layers = (self.draft_gb - self.head_gb - self.adapter_gb) / gb * slower
        timing = DeviceTiming(
            draft=self.draft_gb / gb * slower,
            plain=layers,
            head=self.head_gb / gb * slower,
            prompt_base=layers,
            prompt_token=self.layers_gflop / tflops / 1e3 * slower,
            adapter_token=self.adapter_gb / tflops / 1e3 * slower,  # as many GFLOP a token as GB
            # Medusa reads its heads, then puts the tree's rows through the first layers
            tree=self.medusa_gb / gb * slower + layers,
        )
        # the link is the place's, not the mode's
        place = stream(seed, "link", number)
        return timing, Link(float(place.uniform(5e6, 10e6)), float(place.uniform(10e6, 15e6)), latency=0.002)  # ours

    def arrivals(self, seed: int) -> Iterator[tuple[float, int, int]]:
        """When a text is asked for, by which device, with how many tokens of prompt: Poisson, without end."""
        draws, now = stream(seed, "arrivals"), 0.0
        while True:
            now += float(draws.exponential(1 / self.requests))
            yield now, int(draws.integers(30)), int(np.clip(self.prompt(draws), 16, 3500))


def _spec_bench(draws: np.random.Generator) -> float:
    """Bimodal: no lognormal has its mean of 351 and its ninth decile of 891."""
    return float(draws.lognormal(4.5, 0.45) if draws.random() < 2 / 3 else draws.normal(851, 75))


def _cnn(draws: np.random.Generator) -> float:
    """A lognormal has its mean of 1,037 and its ninth decile of 1,772."""
    return float(draws.lognormal(6.806, 0.526))


SPECBENCH_7B = Setting(
    "Vicuna-7B, Spec-Bench, 6 requests a second", 4096, CloudTiming(4, 0.0040, 0.00003),
    draft_gb=1.20, head_gb=0.26, layers_gflop=0.81, medusa_gb=1.18,
    prompt=_spec_bench, requests=6.0, accept=2.06, accept_medusa=1.89,
)  # fmt: skip

CNN_13B = Setting(
    "Vicuna-13B, CNN/DailyMail, 4 requests a second", 5120, CloudTiming(4, 0.0076, 0.00006),
    draft_gb=2.44, head_gb=0.33, layers_gflop=1.90, medusa_gb=1.52,
    prompt=_cnn, requests=4.0, accept=1.98, accept_medusa=1.75,
)  # fmt: skip
