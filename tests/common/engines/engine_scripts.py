"""Fits that end badly, each in processes of its own: ``python engine_scripts.py NAME``; see the tests beside it."""

import os
import sys
import time
from pathlib import Path

sys.path += [str(Path(__file__).parents[2] / "contracts"), str(Path(__file__).parents[2])]

import lightning as L
import torch
from runs import Net, fit, make_strategy

from edgebolt.common.engines import Ranks, RayEngine

RANK = os.environ.get("RANK")


class Slow(Net):
    def training_step(self, batch, batch_idx):
        time.sleep(0.2)
        return super().training_step(batch, batch_idx)


class FailsOnRank(Net):
    def __init__(self, rank):
        super().__init__()
        self.rank = rank

    def training_step(self, batch, batch_idx):
        if self.rank in (RANK, "all"):
            raise ZeroDivisionError(f"in the module's own code on rank {RANK}")
        return super().training_step(batch, batch_idx)


class DiesOnRank(FailsOnRank):
    def training_step(self, batch, batch_idx):
        if self.rank == RANK:
            os._exit(3)
        return Net.training_step(self, batch, batch_idx)


class Says(L.Callback):
    def on_train_batch_end(self, trainer, *args):
        print(f"step {trainer.global_step}", flush=True)


def ray_slow():
    """200 rounds of slow steps, to be interrupted."""
    fit(make_strategy(engine=RayEngine(2, {"cpu": 0.5})), Slow(), rounds=200, callbacks=[Says()])


def rank_fails(rank):
    fit(make_strategy(engine=Ranks(), per_round=6), FailsOnRank(rank))


def rank_dies(rank):
    fit(make_strategy(engine=Ranks(), per_round=6), DiesOnRank(rank))


def own_group():
    torch.distributed.init_process_group("gloo")
    fit(make_strategy(engine=Ranks()))


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
