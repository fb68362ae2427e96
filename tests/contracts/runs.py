"""A small federated run, and what must be equal when two runs are the same."""

from copy import deepcopy
from dataclasses import dataclass
from functools import cache

import lightning as L
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from edgebolt.common.devices import CostModel
from edgebolt.common.federated import FedAvg, FederatedStrategy, Sizes

CLIENTS = 6
SAMPLES = [6, 7, 8, 10, 11, 14]  # in batches of 4 nobody has a last batch of one sample, which BatchNorm refuses
WITH_VAL = [8, 8, 9, 10, 10, 11]  # the same with val=0.3
BATCH = 4
LR = {"sgd": 0.1, "adamw": 0.01}


class Net(L.LightningModule):
    """What makes resuming hard: dropout, BatchNorm with its counter, an optimizer with moments, a schedule."""

    def __init__(self, optimizer="sgd"):
        super().__init__()
        self.save_hyperparameters()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.body = torch.nn.Sequential(
                torch.nn.Linear(8, 12), torch.nn.BatchNorm1d(12), torch.nn.ReLU(), torch.nn.Dropout(0.3)
            )
            self.head = torch.nn.Linear(12, 3)

    def forward(self, x):
        return self.head(self.body(x))

    def loss(self, batch):
        return F.cross_entropy(self(batch[0]), batch[1])

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def validation_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log("val_loss", loss, batch_size=len(batch[1]))
        return loss

    def test_step(self, batch, batch_idx):
        self.log("test_loss", self.loss(batch), batch_size=len(batch[1]))

    def predict_step(self, batch, batch_idx):
        return self(batch[0])

    def make_optimizer(self):
        if self.hparams.optimizer == "sgd":
            return torch.optim.SGD(self.parameters(), LR["sgd"], momentum=0.9)
        return torch.optim.AdamW(self.parameters(), LR["adamw"])

    def configure_optimizers(self):
        optimizer = self.make_optimizer()
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


class LowRankNet(Net):
    """Its first layer is a product ``up @ down``, whose inner dimension may change from visit to visit."""

    def __init__(self, optimizer="sgd"):
        super().__init__(optimizer)
        generator = torch.Generator().manual_seed(0)
        self.body = torch.nn.Dropout(0.3)
        self.down = torch.nn.Parameter(torch.randn(4, 8, generator=generator) / 3)
        self.up = torch.nn.Parameter(torch.randn(12, 4, generator=generator) / 2)

    def forward(self, x):
        return self.head(self.body(F.relu(x @ self.down.T @ self.up.T)))


class LoraNet(Net):
    """A tiny BERT under LoRA of PEFT, with dropout; the samples' numbers become words."""

    def __init__(self, optimizer="sgd"):
        super().__init__(optimizer)
        del self.body, self.head
        self.model = deepcopy(_bert_under_lora())

    def forward(self, x):
        return self.model(input_ids=(x.clamp(-2.9, 2.9) * 10).long() + 30).logits


@cache
def _bert_under_lora():
    from tiny_text import adapted

    return adapted(hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_labels=3).model


def tensors(samples, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 8, generator=generator)
    return TensorDataset(x, (x[:, :3] + torch.randn(samples, 3, generator=generator)).argmax(1))


TRAIN = tensors(sum(SAMPLES), seed=1)
VAL = tensors(20, seed=2)


def train_loader(**kwargs):
    return DataLoader(**{"dataset": TRAIN, "batch_size": BATCH, "shuffle": True, **kwargs})


def val_loader(**kwargs):
    return DataLoader(**{"dataset": VAL, "batch_size": 10, **kwargs})


def make_strategy(algorithm=None, **kwargs):
    defaults = {"clients": Sizes(SAMPLES, seed=0), "per_round": 3, "cost": CostModel(flops_per_sample=1e9)}
    return FederatedStrategy(FedAvg() if algorithm is None else algorithm, **{**defaults, **kwargs})


def make_trainer(strategy, rounds=3, **kwargs):
    defaults = {
        "accelerator": "cpu",
        "max_epochs": rounds,
        "logger": False,
        "enable_checkpointing": any("Checkpoint" in type(c).__name__ for c in kwargs.get("callbacks", ())),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    return L.Trainer(strategy=strategy, **{**defaults, **kwargs})


class Count(L.Callback):
    def __init__(self):
        self.steps, self.validations, self.batches = [], 0, 0

    def on_train_epoch_start(self, trainer, module):
        self.steps.append(0)

    def on_train_batch_end(self, *args):
        self.steps[-1] += 1

    def on_validation_start(self, *args):
        self.validations += 1

    def on_validation_batch_end(self, *args):
        self.batches += 1


@dataclass
class Run:
    strategy: FederatedStrategy
    module: L.LightningModule
    trainer: L.Trainer

    @property
    def model(self):
        return self.strategy.server.models["global"]


def fit(strategy=None, module=None, *, rounds=3, train=None, val=None, ckpt_path=None, weights_only=None, **trainer):
    """One fit; arguments that are not named go to the Trainer."""
    strategy = make_strategy() if strategy is None else strategy
    module = Net() if module is None else module
    run = Run(strategy, module, make_trainer(strategy, rounds, **trainer))
    train, val = train_loader() if train is None else train, val_loader() if val is None else val
    run.trainer.fit(module, train, val, ckpt_path=ckpt_path, weights_only=weights_only)
    return run


def exact(value):
    """A nested value in a form whose ``==`` compares every bit, NaN included."""
    if isinstance(value, torch.Tensor):
        flat = value.detach().cpu().contiguous().flatten()
        return str(value.dtype), tuple(value.shape), flat.view(torch.uint8).numpy().tobytes() if len(flat) else b""
    if isinstance(value, dict):
        return {key: exact(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [exact(item) for item in value]
    if isinstance(value, float):
        return value.hex()
    return value


def state(run):
    """All that a run has come to: two runs with equal states are the same run."""
    strategy, server = run.strategy, run.strategy.server
    return {
        "module": exact(run.module.state_dict()),
        "models": exact(server.models),
        "reports": exact(server.reports),
        "server memory": exact(server.memory),
        "device memories": exact(strategy.loop.devices.memories),
        "clock": exact(strategy.clock.state_dict()),
        "ledger": exact(strategy.ledger.state_dict()),
        "history": exact(strategy.history),
        "rounds": (server.round, run.trainer.current_epoch, run.trainer.global_step),
        "learning rates": [group["lr"] for group in run.trainer.optimizers[0].param_groups],
    }


def assert_same(run, other, note=""):
    found, expected = state(run), state(other)
    different = [name for name in expected if found[name] != expected[name]]
    assert not different, f"{note}: {different} differ"


def holds(weights, model):
    """Whether a state dict holds every tensor of a model, bit for bit."""
    return all(name in weights and torch.equal(weights[name], tensor) for name, tensor in model.items())
