"""One federated run on one engine, in a process of its own: ``python engines_run.py ray lora --json out.json``.

On ranks: ``torchrun --nproc-per-node 2 engines_run.py ranks lora --json out.json``.

``small`` and ``wide`` are visits of one cheap step whose models weigh 10 kB and 4 MB: what a visit costs beside its
training. ``lora`` is workload W2 of ``newsgroups_run.py``.
"""

import argparse
import hashlib
import json
import os
import resource
import time

import lightning as L
import torch
from mnist_run import quiet_trainer
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from edgebolt.common.devices import CostModel
from edgebolt.common.engines import Ranks, RayEngine
from edgebolt.common.federated import IID, ClientCallback, FedAvg, FederatedStrategy

WIDTHS = {"small": 50, "wide": 1000}  # 2,550 and 1,001,000 weights
VISITS, TOY_ROUNDS = 20, 10


class Toy:
    """20 visits a round, each one step of four samples."""

    def __init__(self, width):
        self.width = width

    def module(self):
        width = self.width

        class Linear(L.LightningModule):
            def __init__(self):
                super().__init__()
                with torch.random.fork_rng():
                    torch.manual_seed(0)
                    self.layer = torch.nn.Linear(width, width)

            def training_step(self, batch, batch_idx):
                return F.mse_loss(self.layer(batch[0]), batch[0])

            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), 0.01)

        return Linear()

    def loader(self):
        generator = torch.Generator().manual_seed(0)
        return DataLoader(TensorDataset(torch.randn(4 * VISITS, self.width, generator=generator)), batch_size=4)

    def strategy(self, engine):
        return FederatedStrategy(FedAvg(), clients=IID(VISITS), engine=engine, cost=CostModel(flops_per_sample=1e6))


class Lora:
    """Workload W2."""

    def module(self):
        from newsgroups_run import Classifier

        return Classifier()

    def loader(self):
        from newsgroups_run import BATCH, documents

        return DataLoader(documents(), batch_size=BATCH, shuffle=True)

    def strategy(self, engine):
        from newsgroups_run import strategy_of

        return strategy_of(engine=engine)


class Memory(ClientCallback):
    """The device reports the peak memory of the process that trains it."""

    def on_client_end(self, trainer, module, device, visit):
        return {"pid": os.getpid(), "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


WORK = {"small": (lambda: Toy(WIDTHS["small"]), TOY_ROUNDS), "wide": (lambda: Toy(WIDTHS["wide"]), TOY_ROUNDS)}
WORK["lora"] = (Lora, 3)
ENGINES = {"serial": lambda: "serial", "ranks": Ranks, "ray": lambda: RayEngine(2)}


class Watch(L.Callback):
    """From the first batch, when workers have begun, to the end; and the last peak memory of each process."""

    def __init__(self):
        self.began, self.ended, self.cpu, self.peaks = None, None, 0.0, {}

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if self.began is None:
            self.began, self.cpu = time.time(), -time.process_time()

    def on_train_epoch_end(self, trainer, module):
        for outcome in trainer.strategy.outcomes:
            if "pid" in outcome.report:
                self.peaks[outcome.report["pid"]] = outcome.report["peak_mb"]

    def on_train_end(self, trainer, module):
        self.ended = time.time()
        self.cpu += time.process_time()


def by_hand(rounds):
    """W2 as one would write it, on the batches of our run; seconds and steps."""
    import newsgroups_run

    lap = newsgroups_run.by_hand(newsgroups_run.documents(), rounds)()
    return {"seconds": lap.seconds, "steps": lap.steps, **told_of(lap.weights)}


def told_of(weights):
    return {"weights": digest(weights), "params_trained": sum(tensor.numel() for tensor in weights.values())}


def digest(weights):
    """Of every bit of a model."""
    found = hashlib.sha256()
    for name in sorted(weights):
        found.update(name.encode() + weights[name].detach().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def main(args):
    torch.set_num_threads(args.threads)
    make, rounds = WORK[args.work]
    rounds = args.rounds or rounds
    if args.engine == "hand":
        return by_hand(rounds)
    work, watch = make(), Watch()
    strategy = work.strategy(ENGINES[args.engine]())
    trainer = quiet_trainer(max_epochs=rounds, strategy=strategy, callbacks=[watch, Memory()])
    trainer.fit(work.module(), work.loader())
    if strategy.loop is None:  # another rank than 0
        return None
    return {
        "seconds": watch.ended - watch.began,
        "steps": trainer.global_step,
        "server_cpu_s": watch.cpu,
        "visits": sum(int(row["round/visits"]) for row in strategy.history),
        "startup": watch.began - args.began,
        "peaks_mb": sorted(watch.peaks.values()),
        **told_of(strategy.server.models["global"]),
        "simulated": strategy.clock.now,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("engine", choices=[*ENGINES, "hand"])
    parser.add_argument("work", choices=WORK)
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--rounds", type=int, default=0)
    parser.add_argument("--began", type=float, default=time.time(), help="when the process was started")
    parser.add_argument("--json", required=True)
    found = main(arguments := parser.parse_args())
    if found is not None:
        with open(arguments.json, "w") as file:
            json.dump(found, file)
