"""An ordinary Lightning script and its federated twin: marks (1) to (3) are all that differs. Needs scikit-learn.

``python examples/federated.py`` trains over 50 simulated devices, ``--central`` without any.
"""

import argparse

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, random_split

from edgebolt.common.devices import Fleet  # (1)
from edgebolt.common.federated import Dirichlet, FedAvg, FederatedStrategy  # (2)


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
    parser.add_argument("--central", action="store_true", help="train as it was, without devices")
    parser.add_argument("--epochs", type=int, default=30, help="federated: rounds")
    args = parser.parse_args()

    L.seed_everything(0)
    digits = load_digits()
    images = torch.tensor(digits.data / 16, dtype=torch.float32)
    train, val = random_split(TensorDataset(images, torch.tensor(digits.target)), [0.8, 0.2])

    federated = FederatedStrategy(  # (3)
        FedAvg(), clients=Dirichlet(50, alpha=0.5), per_round=10, local_epochs=2, fleet=Fleet.jetson(50)
    )
    strategy = "auto" if args.central else federated
    options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    trainer = L.Trainer(max_epochs=args.epochs, strategy=strategy, **options)
    trainer.fit(Classifier(), DataLoader(train, batch_size=10, shuffle=True), DataLoader(val, batch_size=360))

    print(f"accuracy {trainer.callback_metrics['val_acc']:.3f} after {trainer.current_epoch} epochs")
    if not args.central:
        up, down = federated.ledger.up_bytes / 1e6, federated.ledger.down_bytes / 1e6
        print(f"{federated.clock.now:.1f} simulated seconds, {up:.2f} MB up, {down:.2f} MB down")


if __name__ == "__main__":
    main()
