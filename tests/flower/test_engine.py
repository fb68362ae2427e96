import re
from contextlib import nullcontext

import lightning as L
import pytest
import torch
from fake_grid import FakeGrid
from flwr.app import ConfigRecord, Error, Message, RecordDict
from lightning.pytorch.callbacks import ModelCheckpoint
from small_run import (
    SAMPLES,
    Counting,
    Net,
    assert_same,
    client_loader,
    exact,
    fit,
    remembering,
    serial,
    server_loader,
    without,
)

from edgebolt.common.communication import Message as Encoded
from edgebolt.common.devices import CostModel, Fleet
from edgebolt.common.federated import Algorithm, FedAvg, FederatedStrategy
from edgebolt.flower import FlowerEngine, client_app, records


def app(algorithm=None, module=Net, data=None, **kwargs):
    data = data or (lambda context: client_loader(context.node_config["partition-id"]))
    return client_app(module, data, algorithm or FedAvg(), **{"accelerator": "cpu", **kwargs})


@pytest.fixture
def grid(tmp_path):
    return FakeGrid([app() for _ in SAMPLES], tmp_path)


def flower(grid, timeout=30.0, failures=20, **kwargs):
    engine = FlowerEngine(grid, timeout=timeout, failures=failures, poll=0.01)
    return fit(engine.clients(server_loader(), min_clients=len(SAMPLES), wait=5), engine, **kwargs)


def trained(message):
    return message.metadata.message_type == "train"


@pytest.mark.parametrize("cost", [lambda: CostModel(flops_per_sample=1e6), CostModel], ids=["stated", "counted"])
def test_a_run_is_the_serial_run(grid, cost):
    assert_same(flower(grid, cost=cost()), serial(cost=cost()))


def test_with_devices_that_die_and_a_part_of_the_clients(grid):
    def how():
        return {"fleet": Fleet.jetson(len(SAMPLES), seed=1, failure_rate=0.4), "per_round": 2, "rounds": 4}

    run, expected = flower(grid, **how()), serial(**how())
    assert sum(row["round/failed"] for row in run[0].history)
    assert_same(run, expected)


def remembers(tmp_path):
    return FakeGrid([app(remembering()) for _ in SAMPLES], tmp_path)


def test_devices_remember(tmp_path):
    grid = remembers(tmp_path)
    run, expected = flower(grid, algorithm=remembering()), serial(algorithm=remembering())
    assert_same(run, expected)
    reports = [outcome.report for outcome in run[0].outcomes]
    assert reports == [outcome.report for outcome in expected[0].outcomes]
    assert reports[0] == {"visits": 2, "taken": 2}
    for node in grid.nodes:
        assert len(list((tmp_path / str(node)).glob("client-*/*.memory"))) == 3


def test_callbacks_beside_the_algorithm(tmp_path):
    grid = FakeGrid([app(callbacks=[Counting()]) for _ in SAMPLES], tmp_path)
    assert_same(flower(grid, callbacks=[Counting()]), serial(callbacks=[Counting()]))


def test_no_memory_travels_and_none_is_in_a_checkpoint(tmp_path):
    grid = remembers(tmp_path)
    save = ModelCheckpoint(tmp_path / "saved", filename="{epoch}", save_top_k=-1)
    strategy, _ = flower(grid, algorithm=remembering(), callbacks=[save])
    saved = torch.load(tmp_path / "saved" / "epoch=2.ckpt", weights_only=True)
    for notes in (
        strategy.loop.devices.memories,
        saved["optimizer_states"][0]["federated"]["devices"]["memories"],
    ):
        assert all(len(note["edgebolt.away"]) == 64 for note in notes.values())
        assert {name for note in notes.values() for name in note} == {"edgebolt.away", "edgebolt.unheard"}
    orders = [records.read_order(message.content)[0] for message in grid.pushed if trained(message)]
    assert [order.memory for order in orders[:3]] == [None] * 3
    assert all(re.fullmatch("[0-9a-f]{64}", order.memory) for order in orders[3:])


def test_a_node_that_does_not_say_who_it_is_does_not_hold_up_the_run(grid):
    grid.add(200, app(), 3)
    grid.meddle = lambda message, reply: None if message.metadata.dst_node_id == 200 else reply
    engine = FlowerEngine(grid, poll=0.01)
    with pytest.warns(UserWarning, match=r"begins without nodes \[200\]"):
        assert len(engine.clients(server_loader(), min_clients=3, wait=0.2)) == 3
    with pytest.raises(TimeoutError, match="1 nodes have not answered"):
        FlowerEngine(grid, poll=0.01).clients(server_loader(), min_clients=4, wait=0.2)


def test_a_precision_that_converts_the_weights_is_refused(grid):
    engine = FlowerEngine(grid, poll=0.01)
    clients = engine.clients(server_loader(), min_clients=3)
    trainer = L.Trainer(
        max_epochs=1, strategy=FederatedStrategy(FedAvg(), clients=clients, engine=engine), accelerator="cpu",
        precision="bf16-true", logger=False, enable_checkpointing=False, enable_progress_bar=False,
    )  # fmt: skip
    with pytest.raises(ValueError, match="'bf16-true' changes the module's weights"):
        trainer.fit(Net(), server_loader())


def test_a_resumed_run_finds_what_devices_remember(tmp_path):
    grid = remembers(tmp_path)
    save = ModelCheckpoint(tmp_path / "saved", filename="{epoch}", save_top_k=-1)
    whole = flower(grid, algorithm=remembering(), callbacks=[save])
    resumed = flower(grid, algorithm=remembering(), ckpt_path=tmp_path / "saved" / "epoch=0.ckpt")
    assert_same(resumed, whole)
    assert_same(resumed, serial(algorithm=remembering()))


def test_a_version_that_is_gone_is_a_failed_visit(tmp_path):
    grid = remembers(tmp_path)
    save = ModelCheckpoint(tmp_path / "saved", filename="{epoch}", save_top_k=-1)
    flower(grid, algorithm=remembering(), callbacks=[save])
    for file in (tmp_path / "101").glob("*/*.memory"):
        file.unlink()
    with pytest.warns(UserWarning, match="Client 1 counts as failed.*has no version"):
        strategy, _ = flower(grid, algorithm=remembering(), ckpt_path=tmp_path / "saved" / "epoch=0.ckpt")
    assert [row["round/failed"] for row in strategy.history] == [0, 1, 1]


def test_memories_of_a_simulation_are_refused(tmp_path):
    save = ModelCheckpoint(tmp_path / "saved", filename="{epoch}", save_top_k=-1)
    serial(algorithm=remembering(), callbacks=[save], rounds=1)
    with pytest.raises(ValueError, match="real devices keep that themselves"):
        flower(remembers(tmp_path), algorithm=remembering(), ckpt_path=tmp_path / "saved" / "epoch=0.ckpt")


def test_what_stayed_on_devices_is_not_for_a_simulation(tmp_path):
    save = ModelCheckpoint(tmp_path / "saved", filename="{epoch}", save_top_k=-1)
    flower(remembers(tmp_path), algorithm=remembering(), callbacks=[save], rounds=1)
    with pytest.raises(ValueError, match="have stayed on the devices"):
        serial(algorithm=remembering(), ckpt_path=tmp_path / "saved" / "epoch=0.ckpt")


def test_when_every_visit_fails_the_run_ends(grid):
    grid.meddle = lambda message, reply: Error(code=5, reason="off") if trained(message) else reply
    with pytest.raises(RuntimeError, match=r"5 visits in a row could not be run"):
        flower(grid, failures=None)


def test_a_model_that_several_are_sent_is_spelled_once(grid, monkeypatch):
    spelled = []
    monkeypatch.setattr(
        "edgebolt.flower.engine.model_bytes", lambda message: spelled.append(message) or records.model_bytes(message)
    )
    flower(grid, rounds=2)
    assert len(spelled) == 2


def test_an_error_on_a_device_is_a_failed_visit(grid):
    grid.meddle = lambda message, reply: (
        Error(code=5, reason="it\nis off") if trained(message) and message.metadata.dst_node_id == 102 else reply
    )
    with pytest.warns(UserWarning, match="Client 2 counts as failed: .*it is off"):
        run = flower(grid)
    assert [row["round/failed"] for row in run[0].history] == [1, 1, 1]
    assert_same_weights(run, serial(fleet=without(2)))


def assert_same_weights(run, other):
    assert exact(run[1].state_dict()) == exact(other[1].state_dict())


def test_an_answer_that_does_not_come_is_a_failed_visit(grid):
    grid.meddle = lambda message, reply: None if trained(message) and message.metadata.dst_node_id == 100 else reply
    with pytest.warns(UserWarning, match=r"Client 0 counts as failed.*not answered within 0\.2 s"):
        run = flower(grid, timeout=0.2)
    assert_same_weights(run, serial(fleet=without(0)))


def test_a_client_without_a_node_fails_until_it_comes_back(grid):
    away = {}

    def meddle(message, reply):
        node, round = message.metadata.dst_node_id, message.metadata.group_id
        if trained(message) and (round, node) == ("0", 102):
            away[101], _ = grid.nodes.pop(101)
        if trained(message) and (round, node) == ("1", 102):
            grid.add(500, away[101], 1)  # started anew; Flower gives it another number
        return reply

    grid.meddle = meddle
    with pytest.warns(UserWarning, match="Client 1 counts as failed: .*not connected"):
        strategy, _ = flower(grid)
    assert [row["round/failed"] for row in strategy.history] == [0, 1, 0]


def test_several_failures_in_a_row_end_the_run(grid):
    grid.meddle = lambda message, reply: Error(code=5, reason="off") if trained(message) else reply
    with pytest.raises(RuntimeError, match=r"4 visits in a row could not be run.*off"):
        flower(grid, failures=4)


def garbage():
    def other(**fields):
        return lambda content: RecordDict({"edgebolt.answer": ConfigRecord({**content["edgebolt.answer"], **fields})})

    wrong_client = Encoded({}, {"codec": "dense", "client": 0, "report": {}}).to_bytes()
    wrong_codec = Encoded({}, {"codec": "top-k", "client": 1, "report": {}}).to_bytes()
    return {
        "no record": (lambda content: RecordDict({"other": ConfigRecord({"a": 1})}), "no record 'edgebolt.answer'"),
        "other format": (other(format=2), "has format 2"),
        "bytes": (other(plain=b"garbage"), "too few for a message"),
        "cut off": (lambda content: other(message=content["edgebolt.answer"]["message"][:-1])(content), "claims"),
        "no bytes": (other(message="text"), "'message' is of type str"),
        "other client": (other(message=wrong_client), "is of client 0"),
        "other codec": (other(message=wrong_codec), "codec"),
    }


@pytest.mark.parametrize("kind", garbage())
def test_garbage_is_a_failed_visit(grid, kind):
    change, match = garbage()[kind]

    def meddle(message, reply):
        if trained(message) and message.metadata.dst_node_id == 101:
            reply.content = change(reply.content)
        return reply

    grid.meddle = meddle
    with pytest.warns(UserWarning, match=f"Client 1 counts as failed: .*{match}"):
        strategy, _ = flower(grid, rounds=1)
    assert strategy.history[0]["round/failed"] == 1


def test_garbage_and_other_versions_are_refused_by_the_client(grid, monkeypatch):
    node_app, context = grid.nodes[100]
    with pytest.raises(records.RecordError, match=r"no record 'edgebolt\.order'"):
        node_app(Message(RecordDict(), 100, "train"), context)
    flower(grid, rounds=1)
    order = next(message for message in grid.pushed if trained(message))
    order.content["edgebolt.order"]["versions"] = "torch 1.0"
    with pytest.raises(records.RecordError, match=r"the server has torch 1\.0.*install the same versions"):
        node_app(order, context)


def test_a_node_of_another_version_is_no_client(grid):
    def meddle(message, reply):
        if not trained(message) and message.metadata.dst_node_id == 102:
            reply.content["edgebolt.client"]["versions"] = "torch 1.0"
        return reply

    grid.meddle = meddle
    engine = FlowerEngine(grid, poll=0.01)
    with (
        pytest.warns(UserWarning, match="Node 102 is no client of this run"),
        pytest.raises(TimeoutError, match=r"clients \[0, 1\].*at least 3.*\nNode 102: it has torch 1\.0"),
    ):
        engine.clients(server_loader(), min_clients=3, wait=0.1)


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"partition-id": None}, "partition-id is None"),
        ({"partition-id": "two"}, "partition-id is 'two'"),
        ({"partition-id": 7}, r"clients \[0, 1, 7\]"),
    ],
)
def test_nodes_that_are_no_client_are_named(grid, config, match):
    grid.add(102, app(data=lambda context: client_loader(0)), 2, **config)
    engine = FlowerEngine(grid, poll=0.01)
    refused = nullcontext() if 7 in config.values() else pytest.warns(UserWarning, match="Node 102 is no client")
    with refused, pytest.raises(TimeoutError, match=match):
        engine.clients(server_loader(), min_clients=3, wait=0.1)


def test_a_node_that_was_away_is_asked_again(grid):
    answers = iter([Error(code=5, reason="off")])
    grid.meddle = lambda message, reply: (
        reply if trained(message) or message.metadata.dst_node_id != 101 else next(answers, reply)
    )
    assert len(FlowerEngine(grid, poll=0.01).clients(server_loader(), min_clients=3, wait=5)) == 3


def test_two_nodes_that_are_the_same_client(grid):
    grid.add(103, app(), 1)
    with pytest.raises(ValueError, match="Nodes 101 and 103 both say that they are client 1"):
        FlowerEngine(grid, poll=0.01).clients(server_loader(), min_clients=3, wait=1)


def test_nobody_comes(tmp_path):
    with pytest.raises(TimeoutError, match=r"After 0\.1 s there are clients \[\]"):
        FlowerEngine(FakeGrid([], tmp_path), poll=0.01).clients(server_loader(), wait=0.1)


def test_who_joins_later_is_refused(grid):
    def join(message, reply):
        if trained(message) and 103 not in grid.nodes:
            grid.add(103, app(data=lambda context: client_loader(0)), 3)
        return reply

    grid.meddle = join
    with pytest.warns(UserWarning, match="Node 103 .* client 3, who was not there when the run began"):
        run = flower(grid)
    assert_same(run, serial())


def test_other_weights_are_refused(tmp_path):
    grid = FakeGrid([app(), app(module=lambda: Net(seed=1)), app()], tmp_path)
    with pytest.raises(ValueError, match=r"Clients \[1\] begin with other weights"):
        flower(grid)


def test_other_clients_are_refused(grid):
    with pytest.raises(ValueError, match=r"clients=engine\.clients\(loader\)"):
        fit([client_loader(0), client_loader(1)], FlowerEngine(grid))


def test_evaluation_of_devices_is_refused(grid):
    class PerClient(FedAvg):
        def evaluation(self, server):
            return Algorithm.evaluation(self, server)

    with pytest.raises(ValueError, match=r"PerClient\.evaluation\(\).*stay on the devices"):
        flower(grid, algorithm=PerClient())


@pytest.mark.parametrize(
    "arguments", [{"timeout": 0}, {"poll": 0}, {"failures": 0}, {"failures": True}, {"timeout": float("nan")}]
)
def test_arguments_that_make_no_sense(grid, arguments):
    with pytest.raises(ValueError, match=r"use "):
        FlowerEngine(grid, **arguments)


def test_clients_that_make_no_sense(grid):
    with pytest.raises(TypeError, match="pass a DataLoader"):
        FlowerEngine(grid).clients([1, 2])
    with pytest.raises(ValueError, match="min_clients=0"):
        FlowerEngine(grid).clients(server_loader(), min_clients=0)


def test_an_order_for_another_client_is_refused(grid):
    flower(grid, rounds=1)
    order = next(message for message in grid.pushed if trained(message) and message.metadata.dst_node_id == 101)
    node_app, context = grid.nodes[100]
    with pytest.raises(ValueError, match="the order is for client 1, this is client 0"):
        node_app(order, context)


def test_the_ledger_counts_our_messages(grid):
    strategy, _ = flower(grid, rounds=1)
    orders = [message for message in grid.pushed if trained(message)]
    sent = [
        Encoded.from_bytes(order.content["edgebolt.model"]["bytes"]).with_header(visit=outcome.visit.order()).nbytes
        for order, outcome in zip(orders, strategy.outcomes, strict=True)
    ]
    assert strategy.ledger.down_bytes == sum(sent)
    assert len({order.content["edgebolt.model"].object_id for order in orders}) == 1, "Flower stores it once"
