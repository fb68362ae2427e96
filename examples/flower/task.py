"""What server and clients share: the module, and some data."""

import lightning as L
import torch
from torch.utils.data import DataLoader, TensorDataset


class Net(L.LightningModule):
    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)  # the same weights on every device and the server
            self.layers = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))

    def loss(self, batch):
        return torch.nn.functional.cross_entropy(self.layers(batch[0]), batch[1])

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def validation_step(self, batch, batch_idx):
        hits = (self.layers(batch[0]).argmax(1) == batch[1]).float().mean()
        self.log("accuracy", hits, batch_size=len(batch[1]), prog_bar=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def samples(number, seed):
    """Points around four centres; a real client reads its own files instead."""
    centres = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (number,), generator=generator)
    return TensorDataset(centres[labels] + torch.randn(number, 8, generator=generator), labels)


def loader(number, seed, shuffle=True):
    return DataLoader(samples(number, seed), batch_size=16, shuffle=shuffle)
