"""Algorithms on two ranks: ``torchrun --nproc-per-node 2 on_ranks.py FOLDER KIND [NAME...]`` writes their ends."""

import os
import pickle
import sys
from pathlib import Path

import torch

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from algorithms import ALGORITHMS
from runs import exact, fit, state

from edgebolt.common.engines import Ranks


def main(folder, accelerator, *names):
    torch.set_num_threads(1)
    found = {}
    for name in names or ALGORITHMS:
        row = ALGORITHMS[name]
        run = fit(*row.make(engine=Ranks()), rounds=row.rounds, accelerator=accelerator, devices=1)
        found[name] = {
            "module": exact(run.module.state_dict()),
            "metrics": exact(run.trainer.callback_metrics),
            "state": None if run.strategy.loop is None else state(run),
        }
    (Path(folder) / f"{os.environ['RANK']}.pkl").write_bytes(pickle.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
