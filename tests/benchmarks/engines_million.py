"""The server of a million devices: ``python engines_million.py``; what it takes to begin, a round, and its memory.

Devices have two samples of four numbers each, the model 2,550 weights; 1,000 of them train a step a round, here. It is
the server's part that is looked at: partition, fleet, reports, plan, ledger and a checkpoint.
"""

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

import torch
from engines_run import Toy, Watch
from mnist_run import quiet_trainer
from torch.utils.data import DataLoader, TensorDataset

from edgebolt.common.devices import CostModel, Fleet
from edgebolt.common.federated import IID, FedAvg, FederatedStrategy


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main(devices, rounds):
    torch.set_num_threads(1)
    data = TensorDataset(torch.zeros(2 * devices, 4))
    before, began = peak(), time.time()
    strategy = FederatedStrategy(
        FedAvg(),
        clients=IID(devices),
        per_round=1000,
        fleet=Fleet.jetson(devices, seed=0),
        cost=CostModel(flops_per_sample=1e6),
    )
    watch = Watch()
    trainer = quiet_trainer(max_epochs=rounds, strategy=strategy, callbacks=[watch])
    toy = Toy(4)
    trainer.fit(toy.module(), DataLoader(data, batch_size=2))
    after = peak()
    with tempfile.TemporaryDirectory() as folder:
        started, path = time.time(), Path(folder) / "end.ckpt"
        trainer.save_checkpoint(path)
        saved, size = time.time() - started, path.stat().st_size
    return {
        "devices": devices,
        "startup_s": watch.began - began,
        "round_s": (watch.ended - watch.began) / rounds,
        "server_mb": after - before,
        "checkpoint_mb": size / 1e6,
        "checkpoint_s": saved,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--devices", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    for number in arguments.devices:
        print(json.dumps(main(number, arguments.rounds)))
