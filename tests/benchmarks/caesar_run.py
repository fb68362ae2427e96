"""Caesar against its baselines: a small CNN on MNIST-5k, 80 Jetsons, eight of them a round.

Budget: 100 rounds x 8 devices x 5 steps of at most 32 digits = 4,000 steps a run, some 17 ms each with all that
belongs to it: 68 s a run on one quiet thread, up to 160 s beside other work. 24 runs at p = 5 (eight methods by three
seeds), 6 of variants, 12 at other p: 42 runs, which took 75 minutes of one thread. The learning rate was chosen for
FedAvg alone (``python caesar_run.py --learning-rate 0.1``), on digits held out of the training split with a seed of
their own, weights equal: 0.884, 0.948 and 0.957 with 0.03, 0.1 and 0.2 after 150 rounds. After 100 rounds 0.2 and 0.3
gave 0.950 each with weights by samples, 0.2 gave 0.949 with equal ones. All else was fixed before any two methods
were compared.
"""

import argparse
import tempfile
from copy import deepcopy
from dataclasses import dataclass, field
from statistics import fmean

import lightning as L
import torch
from mnist_run import carrier_file, digits, quiet_trainer
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from edgebolt.caesar import Caesar
from edgebolt.caesar.baselines import CAC, FIC, STC, FedQSGD, FlexCom, PyramidFL
from edgebolt.common.communication import Dense, TopK
from edgebolt.common.devices import Fleet, count_step
from edgebolt.common.devices.constants import BOARDS, WIFI_MAX_BPS, WIFI_MIN_BPS
from edgebolt.common.federated import IID, Dirichlet, FedAvg, FederatedStrategy, FederatedSummary, Outcome

DEVICES, PER_ROUND, STEPS, ROUNDS, BATCH = 80, 8, 5, 100, 32
LEARNING_RATE, DECAY = 0.2, 0.993
# p = 1 / alpha of the Dirichlet partition: how uneven labels are.
SKEWS = {"IID": None, "1": 1.0, "2": 0.5, "5": 0.2, "10": 0.1}

# Seconds that a TX2 in its fastest mode computes in a visit, over the seconds that the dense model takes to it and
# back in the middle of the Wi-Fi range: what ResNet-18 on CIFAR-10 has in this fleet (0.556 G multiply-adds forward,
# three times that with backward, 30 steps of 32 images; 44.7 MB): a small model on slower boards stands for it.
COMPUTE_SHARE = (3 * 2 * 0.556e9 * 30 * 32 / BOARDS[0].flops[0]) / (
    2 * 8 * 44.7e6 / ((WIFI_MIN_BPS + WIFI_MAX_BPS) / 2)
)


class SmallCNN(L.LightningModule):
    """Two convolutions and two linear layers: 105,866 weights, 423 kB."""

    def __init__(self, seed=0, learning_rate=LEARNING_RATE):
        super().__init__()
        self.learning_rate = learning_rate
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.net = nn.Sequential(
                *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
                *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
                *(nn.Linear(1568, 64), nn.ReLU(), nn.Linear(64, 10)),
            )

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_acc", (self.net(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), self.learning_rate)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, DECAY)]


def algorithms():
    """Name -> maker of the algorithm."""
    return {
        "FedAvg": FedAvg,
        "FIC": FIC,
        "CAC": CAC,
        "FlexCom": FlexCom,
        "PyramidFL": PyramidFL,
        "STC": STC,
        "QSGD": FedQSGD,
        "Caesar": Caesar,
        "STC, 0.99": lambda: STC(0.99),
        "Caesar, dense down": lambda: Caesar(down=Dense()),
        "Caesar, dense up": lambda: Caesar(up=Dense()),
        "Caesar, full batches": lambda: Caesar(level_batches=False),
        "Caesar, no signs": lambda: Caesar(down=TopK(setting="down_ratio", fill="memory", min_numel=1024)),
        "Caesar, error feedback": lambda: Caesar(error_feedback=True),
    }


@dataclass
class Run:
    """What a run came to: a row a round; outcomes of the enrolment, if there is one, and of every round."""

    rows: list[dict[str, float]]
    outcomes: list[list[Outcome]]
    steps: int
    strategy: FederatedStrategy = field(repr=False)


def available():
    """Whether the digits are installed."""
    return carrier_file() is not None


def images(held_out=False):
    """Training and test digits, ``[n, 1, 28, 28]``; ``held_out``: the last 800 training digits instead of the test."""
    train, test = digits()
    x, y = train.tensors
    if held_out:
        train, test = TensorDataset(x[:-800], y[:-800]), TensorDataset(x[-800:], y[-800:])
    return tuple(TensorDataset(data.tensors[0].view(-1, 1, 28, 28), data.tensors[1]) for data in (train, test))


def make_fleet(seed, module, train, devices=DEVICES):
    """The Jetsons, slowed down to the share of computing of ResNet-18."""
    batch = next(iter(DataLoader(train, BATCH)))
    flops = STEPS * count_step(deepcopy(module), batch).flops
    transfer = 2 * 8 * sum(p.nbytes for p in module.parameters()) / ((WIFI_MIN_BPS + WIFI_MAX_BPS) / 2)
    return Fleet.jetson(devices, seed=seed, speed=flops / (BOARDS[0].flops[0] * COMPUTE_SHARE * transfer))


def train(
    algorithm,
    skew,
    seed,
    folder,
    rounds=ROUNDS,
    learning_rate=LEARNING_RATE,
    held_out=False,
    devices=DEVICES,
    per_round=PER_ROUND,
    steps=STEPS,
    count=None,
):
    """One run; the short form of the tests has fewer rounds, devices, steps and test digits (``count``)."""
    data, test = images(held_out)
    module = SmallCNN(seed, learning_rate)
    every, observe = [], algorithm.observe
    algorithm.observe = lambda server, outcomes: (every.append(list(outcomes)), observe(server, outcomes))
    alpha = SKEWS[skew]
    strategy = FederatedStrategy(
        algorithm,
        clients=IID(devices, seed=seed) if alpha is None else Dirichlet(devices, alpha=alpha, seed=seed),
        per_round=per_round,
        local_steps=steps,
        fleet=make_fleet(seed, module, data, devices),
        seed=seed,
    )
    summary = FederatedSummary(folder, figure=False)
    trainer = quiet_trainer(max_epochs=rounds, strategy=strategy, callbacks=[summary])
    trainer.fit(module, DataLoader(data, BATCH, shuffle=True), DataLoader(TensorDataset(*test[:count]), 1000))
    return Run(
        rows=summary.rows,
        outcomes=every,
        steps=trainer.global_step,
        strategy=strategy,
    )


def main():
    """How the learning rate was chosen: FedAvg on digits held out of the training split, with a seed of its own."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--learning-rate", type=float, default=LEARNING_RATE)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--weights", choices=["samples", "uniform"], default="samples")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        run = train(FedAvg(args.weights), "5", 100, folder, args.rounds, args.learning_rate, held_out=True)
    print(f"{fmean(row['val_acc'] for row in run.rows[-3:]):.3f}")


if __name__ == "__main__":
    main()
