"""HAT and its baselines on a simulated fleet: one call, one row of the table."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Generator
from dataclasses import dataclass
from itertools import repeat

import numpy as np
import simpy

from edgebolt.hat.cloud_engine import CloudEngine, Limits
from edgebolt.hat.medusa import MEDUSA_TREE
from edgebolt.hat.simulation.machines import SimulatedCloud, SimulatedDevice, SimulatedText
from edgebolt.hat.simulation.settings import Setting
from edgebolt.hat.simulation.traced_text import CountingModel, DrawnRounds, Round, TracedText

__all__ = ["METHODS", "Method", "Simulated", "simulate"]


@dataclass(frozen=True)
class Method:
    """What a method does.

    Args:
        drafts: "chain" (Λ on the device), "tree" (Medusa's heads) or None.
        chunked: cut the prompt so that upload and cloud overlap.
        ahead: draft ahead while the cloud verifies.
        budget: tokens of a cloud batch; None: all that waits, prompts whole.
    """

    drafts: str | None
    chunked: bool
    ahead: bool
    budget: int | None


METHODS = {
    "U-shape": Method(None, False, False, None),
    "U-Sarathi": Method(None, False, False, 512),
    "U-Medusa": Method("tree", False, False, None),
    "HAT: drafts": Method("chain", False, False, None),
    "HAT: chunks": Method(None, True, False, 512),
    "HAT: drafts, chunks": Method("chain", True, False, 512),
    "HAT": Method("chain", True, True, 512),
}
"""Name -> method. HAT names the three baselines and the ablation; U-Sarathi's budget is its own default."""


@dataclass(frozen=True)
class Simulated:
    """What came of a run; arrays over texts, in seconds.

    Args:
        first: to the first token, from when the device begins with the text: one at a time (ours).
        between: tokens, on average over a text.
        tenth: to the tenth token.
        accept: tokens a round, over all rounds.
        up, down: bytes of rows.
        stages: seconds that each batch was in a stage.
        waited: from the request until the device had done with the texts before.
    """

    first: np.ndarray
    between: np.ndarray
    tenth: np.ndarray
    accept: float
    up: int
    down: int
    stages: np.ndarray
    waited: np.ndarray

    def share_within(self, seconds: float) -> float:
        """Share of texts whose first token came within so many seconds."""
        return float((self.first <= seconds).mean())


def simulate(
    setting: Setting,
    method: Method,
    texts: int = 600,
    warm_up: int = 60,
    seed: int = 0,
    requests: float | None = None,
    rounds: DrawnRounds | None = None,
) -> Simulated:
    """Run a fleet until all texts are complete.

    A device has one text at a time, others wait for it. Requests, devices, links and modes depend on the seed alone,
    so that methods see the same ones.

    Args:
        setting: model, devices, cloud.
        method: of :data:`METHODS`.
        texts: that are counted.
        warm_up: texts before them that are not.
        seed: of requests and devices.
        requests: a second; by default the setting's.
        rounds: what rounds come to; by default with the setting's accept length.
    """
    environment = simpy.Environment()
    engine = CloudEngine(CountingModel(), Limits(method.budget, 1 << 62, 1 << 30))
    cloud = SimulatedCloud(environment, engine, setting.cloud)
    seats: defaultdict[int, simpy.Resource] = defaultdict(lambda: simpy.Resource(environment))
    served: Counter[int] = Counter()
    found: dict[int, SimulatedText] = {}
    waited: dict[int, float] = {}
    tree = MEDUSA_TREE if method.drafts == "tree" else None
    if rounds is None:
        rounds = DrawnRounds(setting.accept_medusa if tree else setting.accept, longest=4 if tree else 8)

    def ask() -> Generator[simpy.Event, None, None]:
        speed_up = (requests or setting.requests) / setting.requests
        for number, (at, device, prompt) in enumerate(setting.arrivals(seed)):
            if number == texts + warm_up:
                return
            yield environment.timeout(at / speed_up - environment.now)
            environment.process(serve(number, device, prompt))

    def serve(number: int, device: int, prompt: int) -> Generator[simpy.Event, None, None]:
        asked = environment.now
        with seats[device].request() as seat:
            yield seat
            timing, link = setting.device(device, served[device] // 5, seed)
            served[device] += 1
            drawn = repeat(Round(0, 0)) if method.drafts is None else rounds.of(seed, number)
            text = TracedText(prompt, setting.new_tokens, drawn, method.ahead, tree)
            mine = SimulatedDevice(environment, timing, link, setting.row_bytes)
            waited[number] = environment.now - asked
            drafting = method.drafts == "chain"
            found[number] = SimulatedText(mine, cloud, text, method.chunked, method.ahead, drafting)
            yield found[number].process

    environment.process(ask())
    environment.run()
    counted = [found[number] for number in range(warm_up, warm_up + texts)]
    times = [np.array(text.timings.tokens) for text in counted]
    traced = [text.text for text in counted if isinstance(text.text, TracedText)]
    verified = sum(text.verified for text in traced)
    return Simulated(
        np.array([each[0] for each in times]),
        np.array([(each[-1] - each[0]) / (len(each) - 1) for each in times]),
        np.array([each[min(9, len(each) - 1)] for each in times]),
        1 + sum(text.accepted for text in traced) / max(verified, 1),
        sum(text.up for text in counted) * setting.row_bytes,
        sum(text.down for text in counted) * setting.row_bytes,
        np.array([stage for _, _, stage in cloud.batches]),
        np.array([waited[number] for number in range(warm_up, warm_up + texts)]),
    )
