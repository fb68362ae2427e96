"""The table of algorithms that the contract suite runs over: a new algorithm joins by a row."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runs import CLIENTS, WITH_VAL, LoraNet, LowRankNet, Net, make_strategy
from toys import Buffered, Clusters, Enrolled, Groups, Patience, Probed, Ranks, StaleModel, blackout

from edgebolt.caesar import Caesar
from edgebolt.caesar.baselines import CAC, STC, PyramidFL
from edgebolt.common.devices import CostModel, Fleet, Undependability
from edgebolt.common.federated import Algorithm, FedAvg, FedProx, Sizes
from edgebolt.common.lora import HetLoRA
from edgebolt.flude import Fixed, Flude
from edgebolt.flude.baselines import MIFA, SAFA, OortFedAvg
from edgebolt.legend import Legend


@dataclass(frozen=True)
class Row:
    """How to make a short run of one algorithm.

    Args:
        algorithm: makes the algorithm; called for every run.
        strategy: makes further arguments of ``FederatedStrategy``; called for every run.
        optimizer: ``"sgd"`` or ``"adamw"``.
        module: class of the module, called with the optimizer's name.
        rounds: length of the run.
        like: another row, whose mechanisms it shares: the dearest tests take that one alone.
    """

    algorithm: Callable[[], Algorithm]
    strategy: Callable[[], dict[str, Any]] = field(default=lambda: {"fleet": failing()})
    optimizer: str = "sgd"
    module: type[Net] = Net
    rounds: int = 3
    like: str = ""

    def make(self, algorithm=None, **strategy):
        """A fresh strategy and module, the first two arguments of ``runs.fit``."""
        algorithm = self.algorithm() if algorithm is None else algorithm
        return make_strategy(algorithm, **{**self.strategy(), **strategy}), self.module(self.optimizer)


def failing(rate=0.3):
    """Unequal devices, some of which die."""
    return Fleet.jetson(CLIENTS, seed=0, failure_rate=rate)


def undependable():
    """Groups that fail more or less often; some devices are offline."""
    how = Undependability(rates=(0.2, 0.4, 0.6), online=(0.6, 0.9), online_period=2)
    return {"fleet": Fleet.jetson(CLIENTS, seed=0).undependable(how)}


def counted():
    """Costs are counted, so that depths differ."""
    return {"fleet": Fleet.jetson(CLIENTS, seed=0, failure_rate=0.1, speed=1e-4), "cost": CostModel()}


def mixed():
    """Costs are counted, and devices fail."""
    how = Undependability(rates=(0.3, 0.5), online=None)
    fleet = Fleet.jetson(CLIENTS, seed=0, speed=1e-4).undependable(how)
    return {"fleet": fleet, "cost": CostModel(), "per_round": 4}


def composed():
    """The algorithm of examples/compose.py."""
    folder = str(Path(__file__).parents[2] / "examples")
    if folder not in sys.path:
        sys.path.append(folder)
    from compose import Composed

    return Composed()


def lost(at_share):
    return lambda: {"fleet": blackout(CLIENTS, at_share)}


ALGORITHMS = {
    "fedavg": Row(FedAvg),
    "fedavg, kept moments": Row(lambda: FedAvg(moments="keep"), optimizer="adamw"),
    "fedprox": Row(lambda: FedProx(mu=0.1), like="fedavg"),
    "groups": Row(Groups, lambda: {"fleet": failing(0.1), "per_round": 4}),
    "interrupted visits": Row(Patience, lambda: {"fleet": failing(0.5)}, optimizer="adamw", rounds=4),
    "stale models": Row(StaleModel, lambda: {"fleet": failing(0.1)}),
    "changing ranks": Row(Ranks, optimizer="adamw", module=LowRankNet),
    "private heads": Row(Clusters, lambda: {"fleet": failing(0.1), "clients": Sizes(WITH_VAL, seed=0, val=0.3)}),
    "buffered": Row(Buffered, lambda: {"fleet": failing(0.1)}),
    "all die at once": Row(FedAvg, lost(0.0)),
    "all die half-way": Row(FedAvg, lost(0.5)),
    "all uploads lost": Row(FedAvg, lost(1.0)),
    "all offline": Row(FedAvg, lost(None)),
    "enrolment": Row(Enrolled),
    "measured speeds": Row(Probed, counted, optimizer="adamw"),
    "hetlora": Row(lambda: HetLoRA(min_rank=1, max_rank=4), optimizer="adamw", module=LoraNet, rounds=2),
    "caesar": Row(lambda: Caesar(min_numel=1, min_batch=2), counted),
    "caesar, error feedback": Row(
        lambda: Caesar(min_numel=1, min_batch=2, error_feedback=True), counted, rounds=2, like="caesar"
    ),
    "cac": Row(lambda: CAC(min_numel=1), rounds=2, like="caesar"),
    "pyramidfl": Row(lambda: PyramidFL(min_numel=1), rounds=2, like="caesar"),
    "stc": Row(lambda: STC(min_numel=1), like="caesar"),
    "flude": Row(lambda: Flude(grace=0.1), undependable, optimizer="adamw", rounds=4),
    "flude, models merged": Row(
        lambda: Flude(threshold=Fixed(9), cache_every=2, merged="models"), undependable, like="flude"
    ),
    "oort, deadline": Row(OortFedAvg, undependable, rounds=2, like="flude"),
    "safa": Row(lambda: SAFA(lag=2), undependable, rounds=3, like="flude"),
    "mifa": Row(MIFA, undependable, rounds=2, like="flude"),
    "flude, legend and caesar": Row(composed, mixed, optimizer="adamw", module=LoraNet, rounds=2, like="flude"),
    "legend": Row(lambda: Legend(ranks=None), counted, optimizer="adamw", module=LoraNet, rounds=2),
}

DISTINCT = [name for name, row in ALGORITHMS.items() if not row.like]
