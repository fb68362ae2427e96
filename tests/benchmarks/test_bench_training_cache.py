"""What a snapshot costs: ``TrainingCache`` beside Lightning's ``ModelCheckpoint`` at the same steps, and neither.

The same fit of a perceptron of 1.86 million weights with AdamW (22 MB a snapshot) on the digits; every contestant ends
with the same weights, bit for bit. The second race is FLUDE with and without the device's cache, at every step.
Budget: 200 steps a lap, some 12 ms each, three contestants, seven turns: 50 s; 300 steps of the small CNN, two
contestants, seven turns: 70 s.
"""

import tempfile
from functools import cache
from pathlib import Path

import lightning as L
import mnist_run
import pytest
import torch
from caesar_run import SmallCNN, available, images
from lightning.pytorch.callbacks import ModelCheckpoint
from racing import Lap, Race, replay
from torch.nn import functional as F
from torch.utils.data import DataLoader

from edgebolt.common.federated import Algorithm, Dirichlet, FederatedStrategy, Uniform
from edgebolt.flude import Fixed, Flude, StaleMean, TrainingCache

pytestmark = [
    pytest.mark.benchmark(group="cache", timer=replay),
    pytest.mark.skipif(not available(), reason="the digits are not installed: run `make data`"),
]
STEPS, EVERY = 200, 20


class Wide(L.LightningModule):
    """784-1024-1024-10."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            layers = [torch.nn.Linear(784, 1024), torch.nn.ReLU(), torch.nn.Linear(1024, 1024), torch.nn.ReLU()]
            self.net = torch.nn.Sequential(*layers, torch.nn.Linear(1024, 10))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-3)


def plain(make_callback, steps):
    """A fit with one more callback."""
    torch.manual_seed(0)
    train, _ = mnist_run.digits()
    with tempfile.TemporaryDirectory() as folder:
        timed, module = mnist_run.Timed(), Wide()
        callbacks = [timed, *make_callback(folder)]
        switches = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
        trainer = L.Trainer(
            max_steps=steps,
            callbacks=callbacks,
            accelerator="cpu",
            enable_checkpointing=len(callbacks) > 1,
            **switches,
        )
        trainer.fit(module, DataLoader(train, 32, shuffle=True))
        written = sum(path.stat().st_size for path in Path(folder).rglob("*.*"))
    weights = {name: p.detach().clone() for name, p in module.named_parameters()}
    return Lap(timed.timer.seconds, timed.timer.cpu_seconds, trainer.global_step, weights, {"bytes_written": written})


@cache
def race(quick):
    steps, turns = (40, 1) if quick else (STEPS, 7)
    return Race(
        {
            "neither": lambda: plain(lambda folder: [], steps),
            "ModelCheckpoint": lambda: plain(
                lambda folder: [
                    ModelCheckpoint(folder, every_n_train_steps=EVERY, save_top_k=1, enable_version_counter=False)
                ],
                steps,
            ),
            "TrainingCache": lambda: plain(lambda folder: [TrainingCache(folder, every_n_steps=EVERY)], steps),
        },
        turns,
    )


@pytest.mark.parametrize("name", ["neither", "ModelCheckpoint", "TrainingCache"])
def test_snapshots(benchmark, name):
    run = race(benchmark.disabled)
    run.row(benchmark, name, baseline="neither", every=EVERY)
    assert run.difference(name, "neither") == 0.0
    assert bool(run[name].figures["bytes_written"]) == (name != "neither")


def federated(algorithm, rounds):
    """Sixty devices of the digits, twelve a round, none of which fails."""
    train, _ = images()
    timed, module = mnist_run.Timed(), SmallCNN()
    clients = Dirichlet(60, alpha=0.2, seed=0)
    strategy = FederatedStrategy(algorithm, clients=clients, per_round=12, local_steps=5)
    trainer = mnist_run.quiet_trainer(max_epochs=rounds, strategy=strategy, callbacks=[timed])
    trainer.fit(module, DataLoader(train, 32, shuffle=True))
    figures = mnist_run.figures_of(strategy)
    weights = dict(strategy.server.models["global"])
    return Lap(timed.timer.seconds, timed.timer.cpu_seconds, trainer.global_step, weights, figures)


@cache
def federated_race(quick):
    rounds, turns = (1, 1) if quick else (5, 7)
    every, never = Flude(selector=Uniform(), threshold=Fixed(0)), Algorithm(aggregator=StaleMean())
    every.closing = None
    return Race({"no cache": lambda: federated(never, rounds), "cache": lambda: federated(every, rounds)}, turns)


@pytest.mark.parametrize("name", ["no cache", "cache"])
def test_device_cache(benchmark, name):
    run = federated_race(benchmark.disabled)
    run.row(benchmark, name, baseline="no cache")
    assert run.difference(name, "no cache") == 0.0
