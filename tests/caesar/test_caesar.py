import lightning as L
import pytest
import torch
from tiny_run import CLASSES, Net, device, run, same
from torch.utils.data import DataLoader

from edgebolt.caesar import Caesar, CaesarStrategy, Introduction, LevelledBatches, UploadRatios
from edgebolt.common.communication import Dense, HybridSign, TopK
from edgebolt.common.devices import Cut, Fleet
from edgebolt.common.federated import FedAvg, Sizes


def test_without_compression_it_is_uniform_fedavg_bit_for_bit():
    _, plain = run(FedAvg("uniform"))
    _, caesar = run(Caesar(0.0, 0.0, 0.0, level_batches=False, min_numel=1))
    assert same(plain, caesar)
    assert "enrolment" not in caesar.ledger.kinds  # nothing is asked that is not needed


def test_as_many_clusters_as_devices_are_none():
    _, every = run(Caesar(clusters=None, min_numel=1))
    _, five = run(Caesar(clusters=5, min_numel=1))
    _, one = run(Caesar(clusters=1, min_numel=1))
    assert same(every, five) and not same(every, one)


def test_one_encoding_a_cluster(monkeypatch):
    encoded, encode = [], HybridSign.encode
    monkeypatch.setattr(
        HybridSign, "encode", lambda self, tensors: (encoded.append(self.ratio), encode(self, tensors))[1]
    )
    _, strategy = run(Caesar(clusters=2, min_numel=1), rounds=5)
    assert len(encoded) <= 3 * 5 < 25 == sum(row["round/visits"] for row in strategy.history)


def test_devices_introduce_themselves_once():
    _, strategy = run(Caesar())
    counts = strategy.server.memory["caesar/labels"]
    assert counts.shape == (10, CLASSES) and counts.sum() == 320
    assert torch.equal(counts.sum(1).long(), strategy.server.reports["samples"])
    assert strategy.server.reports["batch_size"].tolist() == [8.0] * 10
    entries = strategy.ledger.entries()
    kinds = [strategy.ledger.kinds[code] for code in entries["kind"]]
    assert kinds.count("enrolment") == 20  # an order and an answer each


def test_every_device_has_its_upload_ratio_for_good():
    seen = {}

    class Watched(Caesar):
        def finish(self, server, outcomes):
            super().finish(server, outcomes)
            for outcome in outcomes:
                seen.setdefault(outcome.visit.client, set()).add(outcome.visit.settings["up_ratio"])

    run(Watched(), rounds=6)
    assert all(len(ratios) == 1 for ratios in seen.values())
    all_ratios = sorted(ratio for ratios in seen.values() for ratio in ratios)
    assert 0.1 < all_ratios[0] < all_ratios[-1] <= 0.6 and len(set(all_ratios)) == len(seen)


def test_the_fresh_are_sent_less_and_what_arrives_leans_on_their_own_model():
    _, strategy = run(Caesar(min_numel=1, clusters=None), rounds=6)
    first, last = strategy.history[0], strategy.history[-1]
    assert first["caesar/down_ratio"] == 0 < last["caesar/down_ratio"] <= 0.6
    assert first["round/bytes_down"] > last["round/bytes_down"]
    memory = strategy.loop.devices.memories
    visited = [c for c, last in enumerate(strategy.server.reports["last_round"].tolist()) if last >= 0]
    assert all("model" in memory[client] for client in visited)
    assert {n for n, _ in Net().named_parameters()} == memory[visited[0]]["model"].keys()


def test_the_model_of_a_device_that_died_stays_the_old_one():
    class Dying(Fleet):
        def cut(self, client, steps, round, stage=0):
            return Cut(1) if round == 1 else None

    fleet = Dying([[device()]], torch.zeros(4, dtype=torch.int64).numpy())
    kwargs = {"clients": Sizes([20] * 4), "per_round": 4, "fleet": fleet}
    _, one = run(Caesar(min_numel=1), rounds=1, **kwargs)
    before = {c: m["model"] for c, m in one.loop.devices.memories.items()}
    _, two = run(Caesar(min_numel=1), rounds=2, **kwargs)
    for client, memory in two.loop.devices.memories.items():
        assert all(torch.equal(before[client][name], tensor) for name, tensor in memory["model"].items())
    assert two.server.reports["last_round"].tolist() == [0] * 4


def test_slow_devices_have_small_batches_and_wait_is_less():
    fleet = Fleet.from_profiles([device(1e7), device(2e7), device(4e7), device(4e7)])
    kwargs = {"clients": Sizes([80] * 4), "per_round": 4, "fleet": fleet, "rounds": 3}
    _, level = run(Caesar(min_batch=2), **kwargs)
    _, full = run(Caesar(level_batches=False), **kwargs)
    sizes = {outcome.visit.client: outcome.visit.batch_size for outcome in level.outcomes}
    assert sizes[0] < sizes[1] < min(sizes[2], sizes[3]) and max(sizes.values()) == 8
    assert level.history[-1]["round/waiting_time"] < 0.5 * full.history[-1]["round/waiting_time"]
    assert all(outcome.steps == 3 for outcome in level.outcomes)


def test_the_server_sees_no_old_model():
    _, strategy = run(Caesar(min_numel=1))
    assert "model" not in strategy.server.memory
    sent = {name for _, memory in strategy.loop.devices.memories.items() for name in memory}
    assert sent == {"model"}


def test_paper_bytes_are_fewer_than_those_on_the_wire():
    _, strategy = run(Caesar(min_numel=1), rounds=6)
    for row in strategy.history[1:]:
        assert 0 < row["caesar/paper_bytes"] < row["round/bytes_up"] + row["round/bytes_down"]


def test_other_codecs_get_caesar_s_ratios():
    _, dense = run(Caesar(down=Dense(), up=Dense()), rounds=3)
    assert dense.history[2]["round/bytes_down"] == pytest.approx(dense.history[1]["round/bytes_down"], rel=0.01)
    _, other = run(Caesar(down=TopK(setting="down_ratio", fill="memory")), rounds=5)
    assert other.history[-1]["round/bytes_down"] < 0.9 * dense.history[-1]["round/bytes_down"]


def test_volume_alone_asks_for_no_labels():
    _, strategy = run(Caesar(balance=1.0, level_batches=False))
    assert "enrolment" not in strategy.ledger.kinds
    unlabelled = DataLoader([torch.randn(3) for _ in range(4)], 2)
    with pytest.raises(TypeError, match="No labels found"):
        Introduction().on_client_end(None, None, type("D", (), {"data": lambda self: unlabelled})(), visit_of(True))


def visit_of(introduce):
    from edgebolt.common.federated import Visit

    return Visit(0, 0, start=None, settings={"introduce": introduce})


def test_labels_must_have_been_reported():
    class Mute(Caesar):
        def enrol(self, server):
            return []

    with pytest.raises(ValueError, match=r"Introduction\(\), or use balance=1"):
        run(Mute())


def test_strategy_by_name_and_by_class():
    _, mine = run(None, strategy=CaesarStrategy, max_download=0.3, min_numel=1)
    _, direct = run(Caesar(max_download=0.3, min_numel=1))
    assert same(mine, direct)
    trainer = L.Trainer(strategy="caesar", accelerator="cpu", logger=False, enable_checkpointing=False)
    assert type(trainer.strategy) is CaesarStrategy


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"max_download": 1.0}, "most=1.0"),
        ({"min_upload": 0.7}, "least=0.7"),
        ({"probe_steps": -1}, "probe_steps=-1"),
        ({"min_numel": 0}, "min_numel=0"),
        ({"scope": "layer"}, "scope='layer'"),
        ({"clusters": 0}, "clusters=0"),
        ({"max_batch": 2}, "least=4 is more than most=2"),
    ],
)
def test_arguments(arguments, says):
    with pytest.raises(ValueError, match=says):
        Caesar(**arguments)


def test_parts_compose():
    caesar = Caesar()
    assert [type(part) for part in caesar.configure[1:]] == [UploadRatios, LevelledBatches]
    assert caesar.down.with_settings({"down_ratio": 0.2}) == HybridSign(0.2, "down_ratio", min_numel=1024)
