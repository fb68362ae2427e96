"""10,000 virtual clients of Fashion-MNIST: ``python engines_fleet.py --folder FOLDER --engine ray``.

FOLDER holds the four files of https://github.com/zalandoresearch/fashion-mnist (Debian: dataset-fashion-mnist). On
ranks: ``torchrun --nproc-per-node 2 engines_fleet.py --folder FOLDER --engine ranks``. 200 clients a round, 20 rounds,
two passes over a client's six images in batches of three: 4,000 visits, 16,000 steps of 2 to 4 ms, and 20 times 10,000
images to validate: a minute and three quarters. Each client has images of two classes at most (McMahan et al. 2017).
Nothing was tuned; the accuracy is that on the test images.
"""

import argparse
import gzip
import json
import resource
import time
from pathlib import Path

import lightning as L
import numpy as np
import torch
from engines_run import ENGINES, Memory, Watch, digest
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from edgebolt.common.devices import Fleet
from edgebolt.common.federated import FedAvg, FederatedStrategy, Shards

CLIENTS, PER_ROUND, ROUNDS, EPOCHS, BATCH = 10_000, 200, 20, 2, 3


class FashionMnist(L.LightningDataModule):
    """Reads its files in ``setup``: what travels to a worker is the name of their folder."""

    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    def setup(self, stage):
        self.train, self.test = self.read("train"), self.read("t10k")

    def read(self, part):
        images, labels = (
            np.frombuffer(
                gzip.decompress((self.folder / f"{part}-{kind}-ubyte.gz").read_bytes()), np.uint8, offset=begin
            )
            for kind, begin in (("images-idx3", 16), ("labels-idx1", 8))
        )
        pixels = torch.from_numpy(images.copy()).view(-1, 1, 28, 28).float().div_(255)
        return TensorDataset(pixels, torch.from_numpy(labels.copy()).long())

    def train_dataloader(self):
        return DataLoader(self.train, batch_size=BATCH, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.test, batch_size=1000)


class Net(L.LightningModule):
    """Two convolutions and two linear layers, 215,370 weights."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(
            torch.nn.Conv2d(1, 16, 5),
            torch.nn.ReLU(),
            torch.nn.MaxPool2d(2),
            torch.nn.Conv2d(16, 32, 5),
            torch.nn.ReLU(),
            torch.nn.MaxPool2d(2),
            torch.nn.Flatten(),
            torch.nn.Linear(512, 384),
            torch.nn.ReLU(),
            torch.nn.Linear(384, 10),
        )

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        accuracy = (self.net(batch[0]).argmax(1) == batch[1]).float().mean()
        self.log("accuracy", accuracy, batch_size=len(batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.05)


class ValidationTime(L.Callback):
    """Its seconds are the server's, whoever trains."""

    seconds = 0.0

    def on_validation_start(self, trainer, module):
        if not trainer.sanity_checking:
            self.seconds -= time.time()

    def on_validation_end(self, trainer, module):
        if not trainer.sanity_checking:
            self.seconds += time.time()


def main(args):
    torch.set_num_threads(1)
    began = time.time()
    strategy = FederatedStrategy(
        FedAvg(),
        clients=Shards(CLIENTS, shards_per_client=2, seed=0),
        per_round=PER_ROUND,
        local_epochs=EPOCHS,
        fleet=Fleet.jetson(CLIENTS, seed=0),
        engine=ENGINES[args.engine](),
    )
    watch, validation = Watch(), ValidationTime()
    trainer = L.Trainer(
        max_epochs=args.rounds,
        strategy=strategy,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        callbacks=[watch, validation, Memory()],
    )
    trainer.fit(Net(), datamodule=FashionMnist(args.folder))
    if strategy.loop is None:
        return
    print(
        json.dumps(
            {
                "engine": args.engine,
                "accuracy": float(trainer.callback_metrics["accuracy"]),
                "visits": sum(int(row["round/visits"]) for row in strategy.history),
                "steps": trainer.global_step,
                "startup": watch.began - began,
                "server_cpu_s": watch.cpu,
                "seconds": watch.ended - watch.began,
                "validation_s": validation.seconds,
                "peaks_mb": sorted(watch.peaks.values()),
                "server_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
                "bytes": strategy.ledger.total_bytes,
                "simulated": strategy.clock.now,
                "weights": digest(strategy.server.models["global"]),
            }
        )
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="of the four files")
    parser.add_argument("--engine", choices=ENGINES, default="serial")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    main(parser.parse_args())
