"""A small federated run of a perceptron with dropout and BatchNorm, shared by the tests of this folder."""

import lightning as L
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from edgebolt.common.devices import Cut, Fleet
from edgebolt.common.federated import FederatedStrategy, Sizes

CLIENTS, SAMPLES = 8, 24


class Net(L.LightningModule):
    def __init__(self, optimizer="adamw"):
        super().__init__()
        self.optimizer = optimizer
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = torch.nn.Sequential(
                *(torch.nn.Linear(8, 12), torch.nn.BatchNorm1d(12), torch.nn.ReLU()),
                *(torch.nn.Dropout(0.3), torch.nn.Linear(12, 3)),
            )

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        if self.optimizer == "adamw":
            optimizer = torch.optim.AdamW(self.parameters(), 0.01)
        else:
            optimizer = torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.7)]


def samples(n=CLIENTS * SAMPLES):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 8, generator=generator)
    return TensorDataset(x, (x[:, :3] + torch.randn(n, 3, generator=generator)).argmax(1))


class Scripted(Fleet):
    """Equal devices whose visits die exactly where ``cuts`` says: (round, client) -> Cut."""

    cuts: dict[tuple[int, int], Cut]

    def cut(self, client, steps, round, stage=0):
        return self.cuts.get((round, client))


def scripted(cuts, clients=CLIENTS):
    fleet = Scripted.uniform(clients)
    fleet.cuts = cuts
    return fleet


class Look(L.Callback):
    """Outcomes and the global model after every round."""

    def __init__(self):
        self.outcomes, self.models = [], []

    def on_train_epoch_end(self, trainer, module):
        self.outcomes.append(list(trainer.strategy.outcomes))
        self.models.append({n: t.clone() for n, t in trainer.strategy.server.models["global"].items()})


def run(algorithm, rounds=4, optimizer="adamw", callbacks=(), **kwargs):
    arguments = {"clients": Sizes([SAMPLES] * CLIENTS, seed=0), "local_steps": 5, **kwargs}
    look, strategy = Look(), FederatedStrategy(algorithm, **arguments)
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer = L.Trainer(
        max_epochs=rounds, strategy=strategy, enable_model_summary=False, callbacks=[look, *callbacks], **options
    )
    trainer.fit(Net(optimizer), DataLoader(samples(), 4, shuffle=True))
    return look, strategy


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(tensor, b[name]) for name, tensor in a.items())
