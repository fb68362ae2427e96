"""A small federated run of a perceptron, shared by the tests of this folder."""

import lightning as L
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from edgebolt.common.devices import DeviceProfile
from edgebolt.common.federated import Dirichlet, FederatedStrategy

CLASSES = 4


class Net(L.LightningModule):
    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, CLASSES))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def samples(n=320):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % CLASSES
    return TensorDataset(torch.randn(n, 16, generator=generator) + labels.unsqueeze(1), labels)


def run(algorithm, rounds=4, strategy=FederatedStrategy, **kwargs):
    arguments = {"clients": Dirichlet(10, alpha=0.5, min_samples=8), "per_round": 5, "local_steps": 3, **kwargs}
    made = strategy(**arguments) if algorithm is None else strategy(algorithm, **arguments)
    module = Net()
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer = L.Trainer(max_epochs=rounds, strategy=made, enable_model_summary=False, **options)
    trainer.fit(module, DataLoader(samples(), 8, shuffle=True))
    return module, made


def same(a, b):
    return all(
        torch.equal(tensor, b.server.models["global"][name]) for name, tensor in a.server.models["global"].items()
    )


def device(flops=1e9, bps=8e6):
    return DeviceProfile("d", flops, 2**30, 5.0, 1.0, up_bps=bps, down_bps=bps)
