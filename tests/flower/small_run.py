"""A small federated run whose clients bring loaders of their own, and what must be equal when two are the same."""

import lightning as L
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from edgebolt.common.devices import CostModel, Cut, Fleet
from edgebolt.common.federated import ClientCallback, FedAvg, FederatedStrategy

SAMPLES = [6, 8, 11]
BATCH = 4


class Net(L.LightningModule):
    """What is hard to repeat: dropout, BatchNorm with its counter, an optimizer with moments, a schedule."""

    def __init__(self, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.body = torch.nn.Sequential(
                torch.nn.Linear(8, 12), torch.nn.BatchNorm1d(12), torch.nn.ReLU(), torch.nn.Dropout(0.3)
            )
            self.head = torch.nn.Linear(12, 3)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.head(self.body(batch[0])), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.training_step(batch, batch_idx), batch_size=len(batch[1]))

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), 0.01)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


def tensors(samples, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 8, generator=generator)
    return TensorDataset(x, (x[:, :3] + torch.randn(samples, 3, generator=generator)).argmax(1))


def client_loader(client):
    return DataLoader(tensors(SAMPLES[client], seed=client), batch_size=BATCH, shuffle=True)


def server_loader():
    """Samples of the server's own; nobody trains on them."""
    return DataLoader(tensors(BATCH, seed=99), batch_size=BATCH)


class Counting(ClientCallback):
    """A device remembers how often it has trained and what it last sent, and says so."""

    def upload(self, device, visit, update):
        kept = device.memory.get("sent", {})
        device.memory["visits"] = device.memory.get("visits", 0) + 1
        device.memory["sent"] = {name: tensor.clone() for name, tensor in update.items()}
        return {name: tensor + 0.1 * kept[name] if name in kept else tensor for name, tensor in update.items()}

    def on_client_end(self, trainer, module, device, visit):
        return {"visits": device.memory.get("visits", 0), "taken": device.memory.get("taken", 0)}

    def on_client_delivered(self, device, visit):
        device.memory["taken"] = device.memory.get("taken", 0) + 1


def remembering():
    algorithm = FedAvg()
    algorithm.callbacks.append(Counting())
    return algorithm


def without(*visits):
    """A fleet in which these die before they have the model: clients, or (round, client)."""
    fleet = Fleet.uniform(len(SAMPLES))
    dead = Cut(down=0.0, steps=0, up=None)
    fleet.cut = lambda client, steps, round, stage=0: dead if {client, (round, client)} & set(visits) else None
    return fleet


def fit(clients, engine="serial", algorithm=None, rounds=3, module=None, ckpt_path=None, callbacks=(), **strategy):
    """One fit; gives the strategy and the module."""
    strategy = FederatedStrategy(
        algorithm or FedAvg(), clients=clients, engine=engine, **{"cost": CostModel(flops_per_sample=1e6), **strategy}
    )
    trainer = L.Trainer(
        max_epochs=rounds,
        strategy=strategy,
        accelerator="cpu",
        logger=False,
        callbacks=list(callbacks),
        enable_checkpointing=any("Checkpoint" in type(callback).__name__ for callback in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    module = Net() if module is None else module
    trainer.fit(module, server_loader(), server_loader(), ckpt_path=ckpt_path)
    return strategy, module


def serial(**kwargs):
    return fit([client_loader(client) for client in range(len(SAMPLES))], **kwargs)


def exact(value):
    """A nested value in a form whose ``==`` compares every bit."""
    if isinstance(value, torch.Tensor):
        flat = value.detach().contiguous().flatten()
        return str(value.dtype), tuple(value.shape), flat.view(torch.uint8).numpy().tobytes() if len(flat) else b""
    if isinstance(value, dict):
        return {key: exact(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [exact(item) for item in value]
    return value.hex() if isinstance(value, float) else value


def assert_same(run, other):
    (strategy, module), (expected, reference) = run, other
    pairs = {
        "weights": (module.state_dict(), reference.state_dict()),
        "ledger": (strategy.ledger.state_dict(), expected.ledger.state_dict()),
        "history": (strategy.history, expected.history),
        "clock": (strategy.clock.state_dict(), expected.clock.state_dict()),
        "reports": (strategy.server.reports, expected.server.reports),
    }
    different = [name for name, (found, wanted) in pairs.items() if exact(found) != exact(wanted)]
    assert not different
