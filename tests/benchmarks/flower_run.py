"""The same small runs in one process, through Flower's records in memory, and on devices of a real deployment.

The visits are those of ``small`` and ``wide`` in ``engines_run.py``: one cheap step, models of 10 kB and of 4 MB.
What is Flower's is imported where it is used: doctest collects this file where Flower is not installed, too.
"""

import json
import shutil
import sys
import time
from pathlib import Path

import torch
from engines_run import WIDTHS, Memory, Toy, digest
from mnist_run import Timed, figures_of, quiet_trainer
from racing import Lap
from torch.utils.data import DataLoader, TensorDataset

from edgebolt.common.devices import CostModel
from edgebolt.common.federated import FedAvg, FederatedStrategy

HERE = Path(__file__).parent
FLOWER_TESTS = HERE.parent / "flower"
sys.path.append(str(FLOWER_TESTS))  # fake_grid.py, deployment.py

CLIENTS, ROUNDS, BATCH = 4, 5, 4
DEVICES, DEPLOYED_ROUNDS = 2, 3  # of the deployment, whose visits are processes


def loader(work, client):
    """The batch of a client; that of a number which no client has is the server's own."""
    generator = torch.Generator().manual_seed(client)
    return DataLoader(TensorDataset(torch.randn(BATCH, WIDTHS[work], generator=generator)), batch_size=BATCH)


def device(work, callbacks=()):
    """A device's ``ClientApp``."""
    from edgebolt.flower import client_app

    def own_data(context):
        return loader(work, context.node_config["partition-id"])

    return client_app(Toy(WIDTHS[work]).module, own_data, FedAvg(), callbacks, accelerator="cpu")


def fit(work, clients, engine, rounds):
    """One fit; from ``on_train_start`` to ``on_train_end``: Flower's orders go out before the first batch."""
    timed = Timed()
    strategy = FederatedStrategy(FedAvg(), clients=clients, engine=engine, cost=CostModel(flops_per_sample=1e6))
    trainer = quiet_trainer(max_epochs=rounds, strategy=strategy, callbacks=[timed])
    trainer.fit(Toy(WIDTHS[work]).module(), loader(work, client=CLIENTS))
    weights, timer = dict(strategy.server.models["global"]), timed.timer
    return Lap(timer.seconds, timer.cpu_seconds, trainer.global_step, weights, figures_of(strategy), strategy)


def serial(work, rounds=ROUNDS, clients=CLIENTS):
    """Here, one visit after the other."""
    return fit(work, [loader(work, client) for client in range(clients)], "serial", rounds)


def through_records(work, folder, rounds=ROUNDS):
    """Through Flower's records: each message is serialised and read, each visit a device's own ``Trainer.fit``."""
    from fake_grid import FakeGrid

    from edgebolt.flower import FlowerEngine

    grid, answers = FakeGrid([device(work) for _ in range(CLIENTS)], folder), []

    def keep(message, reply):  # they are counted when the clock stands
        assert not reply.has_error(), reply.error.reason
        if message.metadata.message_type == "train":
            answers.append(reply.content)
        return reply

    grid.meddle = keep
    engine = FlowerEngine(grid, timeout=60, poll=0.001)
    clients = engine.clients(loader(work, client=CLIENTS), min_clients=CLIENTS, wait=5)
    lap = fit(work, clients, engine, rounds)
    orders = [message.content for message in grid.pushed if message.metadata.message_type == "train"]
    lap.figures |= {
        "order_record_bytes": sum(map(serialised, orders)),
        "answer_record_bytes": sum(map(serialised, answers)),
        "distinct_order_bytes": distinct(orders),
    }
    return lap


def serialised(records):
    """Bytes of records as Flower's protobuf spells them."""
    from flwr.common.serde import recorddict_to_proto

    return len(recorddict_to_proto(records).SerializeToString())


def distinct(messages):
    """Bytes of the records that differ: a SuperLink stores those that are alike once, by their content."""
    found = [record for records in messages for record in records.config_records.values()]
    return sum({record.object_id: len(record.deflate()) for record in found}.values())


def server(work):
    """The ``ServerApp`` of a deployment: a fit that notes the time of day of each order and answer."""
    from edgebolt.flower import server_app

    def run(engine, context):
        folder, times = Path(context.run_config["folder"]), {"began": time.time(), "orders": [], "answers": []}
        torch.set_num_threads(1)
        submit, answer = engine.submit, engine.answer

        def noted_submit(order):
            times["orders"].append(time.time())
            submit(order)

        def noted_answer(order):
            found = answer(order)
            times["answers"].append(time.time())
            assert not found.failure, found.failure
            return found

        engine.submit, engine.answer = noted_submit, noted_answer
        clients = engine.clients(loader(work, client=CLIENTS), min_clients=DEVICES, wait=180)
        times["clients"] = time.time()
        lap = fit(work, clients, engine, DEPLOYED_ROUNDS)
        times["peaks_mb"] = [outcome.report["peak_mb"] for outcome in lap.strategy.outcomes]
        times["weights"] = digest(lap.weights)
        partial = folder / f"{work}.partial"
        partial.write_text(json.dumps(times))
        partial.rename(folder / f"{work}.json")

    return server_app(run, timeout=300)


APP = """
import sys

sys.path.append({here!r})
from flower_run import {half}

app = {half}({arguments})
"""


def measured_device(work):
    """A device's ``ClientApp``, whose visits report the peak memory of their process."""
    return device(work, [Memory()])


def deploy(folder):
    """A SuperLink with TLS and registered keys, two SuperNodes, one run of each work; work -> times of day and peaks.

    The clock starts when both nodes are online.
    """
    from deployment import Deployment, node_key

    with Deployment(folder) as deployment:
        deployment.superlink()
        deployment.until_it_answers()
        for client in range(DEVICES):
            node_key(folder, f"node{client}")
            code, said = deployment.flwr("supernode", "register", folder / f"node{client}.pub")
            assert code == 0, said
            deployment.supernode(f"node{client}", client)
        wait_for(lambda: online(deployment) == DEVICES, 120, deployment)
        return {work: ask(deployment, work) for work in WIDTHS}


def online(deployment):
    """How many nodes are there."""
    code, said = deployment.flwr("supernode", "list", "--format", "json")
    assert code == 0, said
    return sum(node["status"] == "online" for node in json.loads(said)["nodes"])


def ask(deployment, work):
    """One run on the deployment."""
    app, told = deployment.folder / f"app-{work}", deployment.folder / f"{work}.json"
    app.mkdir()
    shutil.copy(FLOWER_TESTS / "real_app" / "pyproject.toml", app)
    for file, half in (("server_app.py", "server"), ("client_app.py", "measured_device")):
        (app / file).write_text(APP.format(here=str(HERE), half=half, arguments=repr(work)))
    asked = time.time()
    code, said = deployment.flwr("run", app, "--run-config", f'folder="{deployment.folder}"')
    assert code == 0, said
    wait_for(told.exists, 300, deployment)
    return {"asked": asked, **json.loads(told.read_text())}


def wait_for(there, seconds, deployment):
    """Wait, or fail with what the processes have logged."""
    until = time.monotonic() + seconds
    while not there():
        logs = {name: deployment.log(name).read_text()[-2000:] for name in deployment.processes}
        assert time.monotonic() < until, f"nothing after {seconds} s: {logs}"
        time.sleep(0.2)
