"""One federated run, wherever its visits are trained: the last line, a sum over the weights, is the same for all.

``python examples/engines.py`` trains here, ``--engine ray`` on actors of Ray, and on two ranks
``torchrun --nproc-per-node 2 examples/engines.py --engine ranks``. Needs scikit-learn.
"""

import argparse
import hashlib

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, random_split

from edgebolt.common.devices import Fleet
from edgebolt.common.federated import Dirichlet, FedAvg, FederatedStrategy


class Digits(L.LightningDataModule):
    """Every worker reads the data itself: what travels is this object as it is before ``setup``."""

    def setup(self, stage):
        digits = load_digits()
        images = torch.tensor(digits.data / 16, dtype=torch.float32)
        everything = TensorDataset(images, torch.tensor(digits.target))
        self.train, self.val = random_split(everything, [0.8, 0.2], torch.Generator().manual_seed(0))

    def train_dataloader(self):
        return DataLoader(self.train, batch_size=10, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.val, batch_size=360)


class Classifier(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(64, 100), torch.nn.ReLU(), torch.nn.Linear(100, 10))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_acc", (self.net(batch[0]).argmax(1) == batch[1]).float().mean(), prog_bar=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--engine", choices=["serial", "ranks", "ray"], default="serial")
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()

    torch.set_num_threads(1)  # as each worker has: how many threads sum decides about last bits
    L.seed_everything(0)
    strategy = FederatedStrategy(
        FedAvg(),
        clients=Dirichlet(50, alpha=0.5),
        per_round=10,
        local_epochs=2,
        fleet=Fleet.jetson(50),
        engine=args.engine,
    )
    options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    trainer = L.Trainer(max_epochs=args.rounds, strategy=strategy, **options)
    module = Classifier()
    trainer.fit(module, datamodule=Digits())

    if strategy.history:  # on ranks: the first alone is the server
        print(f"accuracy {trainer.callback_metrics['val_acc']:.3f} after {args.rounds} rounds, {strategy.engine}")
        print(f"{strategy.clock.now:.1f} simulated seconds, {strategy.ledger.total_bytes / 1e6:.2f} MB")
        weights = b"".join(tensor.numpy().tobytes() for tensor in module.state_dict().values())
        print(f"weights {hashlib.sha256(weights).hexdigest()[:16]}")


if __name__ == "__main__":
    main()
