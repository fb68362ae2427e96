"""Federated learning from a YAML file by ``LightningCLI``; without arguments it fits ``federated.yaml``.

``python examples/federated_cli.py fit --config examples/federated.yaml --trainer.max_epochs=5`` makes it shorter.
Needs scikit-learn and ``pip install 'edgebolt-common[cli,plot]'``; writes ``runs/federated_cli/``.
"""

import sys
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.cli import LightningCLI
from sklearn.datasets import load_digits
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, random_split


class Classifier(L.LightningModule):
    """A small network for 8x8 digits.

    Args:
        lr: learning rate of the devices' SGD.
    """

    def __init__(self, lr: float = 0.1):
        super().__init__()
        self.lr = lr
        self.net = torch.nn.Sequential(torch.nn.Linear(64, 100), torch.nn.ReLU(), torch.nn.Linear(100, 10))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_acc", (self.net(batch[0]).argmax(1) == batch[1]).float().mean(), prog_bar=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.lr)


class Digits(L.LightningDataModule):
    """scikit-learn's digits, four fifths for training.

    Args:
        batch_size: of each device.
    """

    def __init__(self, batch_size: int = 10):
        super().__init__()
        self.batch_size = batch_size

    def setup(self, stage):
        digits = load_digits()
        dataset = TensorDataset(torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target))
        self.train, self.val = random_split(dataset, [0.8, 0.2], torch.Generator().manual_seed(0))

    def train_dataloader(self):
        return DataLoader(self.train, self.batch_size, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.val, batch_size=360)


if __name__ == "__main__":
    config = Path(__file__).with_name("federated.yaml")
    arguments = None if sys.argv[1:] else ["fit", "--config", str(config)]
    LightningCLI(Classifier, Digits, save_config_callback=None, args=arguments)
