"""Visits through Flower: what its records add to a visit, in seconds and bytes, and what a real deployment takes.

``test_records`` runs in one process: a grid in memory hands each order to a device's ``ClientApp``, and all messages
are serialised by Flower's protobuf and read again. So it counts what our two halves and the records cost, a device's
own ``Trainer.fit`` for every visit among it, and nothing of processes, HTTP and TLS. ``test_deployment`` has these: a
SuperLink and two SuperNodes, on one machine, so that devices and server share its cores. Most of a visit is there the
start of its process, which imports what it finds: beside transformers, scipy and matplotlib, which torchmetrics looks
for, an import of Lightning takes longer than on a device that has only what it needs.

Bytes are exact: those of the ledger, and those of the records.

Budget: 20 visits of 2 to 90 ms, two contestants, five turns, two sizes: half a minute. The deployment: two runs of
three rounds, 10 to 20 s a round: 3 minutes.
"""

from functools import cache
from importlib.metadata import version
from statistics import median

import pytest

pytest.importorskip("flwr", reason="needs edgebolt-flower, which brings Flower")

import flower_run
from engines_run import WIDTHS, digest
from racing import Race, replay

pytestmark = pytest.mark.benchmark(group="flower", timer=replay)

# Bytes that the records of an order and of an answer may have beside the ledger's message: versions, visit, profile of
# the device, settings of the optimizer and of the Trainer. How large the model is does not matter.
ORDER_BYTES, ANSWER_BYTES = 1500, 300


@pytest.fixture(autouse=True)
def flower_home(tmp_path, monkeypatch):
    """Nothing is written to the user's own Flower home, and Flower calls nobody."""
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "flwr"))
    monkeypatch.setenv("FLWR_TELEMETRY_ENABLED", "0")
    monkeypatch.setenv("FLWR_DISABLE_UPDATE_CHECK", "1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("flower")


@cache
def records_race(work, quick, folder):
    rounds, turns = (2, 1) if quick else (flower_run.ROUNDS, 5)
    contestants = {
        "serial": lambda: flower_run.serial(work, rounds),
        "records": lambda: flower_run.through_records(work, folder / work, rounds),
    }
    return Race(contestants, turns)


@pytest.mark.parametrize("engine", ["serial", "records"])
@pytest.mark.parametrize("work", WIDTHS)
def test_records(benchmark, work, engine, folder):
    """One cheap step a visit: what is left is what carries it."""
    race = records_race(work, benchmark.disabled, folder)
    race.row(benchmark, engine, "serial", flwr=version("flwr"))
    assert benchmark.extra_info["weight_difference"] == 0.0
    serial, records = race["serial"].figures, race["records"].figures
    visits = serial["visits"]
    assert visits == flower_run.CLIENTS * serial["rounds"]
    assert {name: records[name] for name in serial} == serial
    if engine == "serial":
        return
    over = {
        "order_overhead_bytes": (records["order_record_bytes"] - records["bytes_down"]) / visits,
        "answer_overhead_bytes": (records["answer_record_bytes"] - records["bytes_up"]) / visits,
    }
    benchmark.extra_info.update(over)
    assert 0 < over["order_overhead_bytes"] < ORDER_BYTES
    assert 0 < over["answer_overhead_bytes"] < ANSWER_BYTES
    # all clients of a round are sent the same model, which is a record of its own and stored once
    assert records["distinct_order_bytes"] < records["bytes_down"] / flower_run.CLIENTS + visits * ORDER_BYTES


@pytest.fixture(scope="module")
def deployed(folder):
    return flower_run.deploy(folder)


@pytest.mark.slow
@pytest.mark.parametrize("row", ["start", "visit", "round"])
@pytest.mark.parametrize("work", WIDTHS)
def test_deployment(benchmark, work, row, request):
    """``flwr run`` to the first answer; an order to its answer; a round's first order to its last answer."""
    if benchmark.disabled:
        pytest.skip("the short form starts no deployment")
    told, together = request.getfixturevalue("deployed")[work], flower_run.DEVICES
    orders, answers = told["orders"], told["answers"]
    rows = {
        "start": [answers[0] - told["asked"]],
        "visit": [answer - order for order, answer in zip(orders, answers, strict=True)],
        "round": [
            end - begin for begin, end in zip(orders[::together], answers[together - 1 :: together], strict=True)
        ],
    }
    seconds = iter(rows[row])
    benchmark.pedantic(lambda: replay.put(next(seconds)), rounds=len(rows[row]))
    benchmark.extra_info.update(
        flwr=version("flwr"),
        devices=together,
        rounds=flower_run.DEPLOYED_ROUNDS,
        s_to_server=told["began"] - told["asked"],
        s_to_clients=told["clients"] - told["asked"],
        s_to_first_answer=rows["start"][0],
        s_per_visit=median(rows["visit"]),
        s_per_round=median(rows["round"]),
        peak_mb_device=max(told["peaks_mb"]),
    )
    serial = flower_run.serial(work, flower_run.DEPLOYED_ROUNDS, together)
    assert told["weights"] == digest(serial.weights)
