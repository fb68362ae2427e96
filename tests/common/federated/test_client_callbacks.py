"""KeepModel, ErrorFeedback, ReportLoss, and Oort's selection, which needs the last."""

import lightning as L
import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from edgebolt.common.communication import HybridSign, TopK
from edgebolt.common.federated import (
    Algorithm,
    ErrorFeedback,
    FederatedStrategy,
    KeepModel,
    Oort,
    ReportLoss,
    Server,
    Sizes,
    WeightedMean,
)


class Net(L.LightningModule):
    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = torch.nn.Sequential(torch.nn.Linear(6, 40), torch.nn.Linear(40, 2))
        self.losses = []

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.losses.append(float(loss))
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def run(algorithm, clients=4, rounds=3, **kwargs):
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(10 * clients, 6, generator=generator), torch.arange(10 * clients) % 2)
    strategy = FederatedStrategy(algorithm, clients=Sizes([10] * clients), local_steps=2, **kwargs)
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    module = Net()
    trainer = L.Trainer(max_epochs=rounds, strategy=strategy, enable_model_summary=False, **options)
    trainer.fit(module, DataLoader(data, 5, shuffle=True))
    return module, strategy


def test_the_kept_model_is_what_was_trained_not_what_was_sent():
    class Watched(KeepModel):
        def upload(self, device, visit, update):
            ends[device.id] = {name: start[device.id][name] + change for name, change in update.items()}
            return update

        def install(self, device, visit, tensors):
            start[device.id] = tensors
            return tensors

    start, ends = {}, {}
    _, strategy = run(Algorithm(down=HybridSign(0.5), up=TopK(0.9), callbacks=[Watched()]))
    for client, memory in strategy.loop.devices.memories.items():
        for name, tensor in memory["model"].items():
            assert torch.allclose(tensor, ends[client][name], atol=1e-6)


def test_error_feedback_loses_nothing():
    sent, trained = {}, {}

    class Watched(ErrorFeedback):
        def upload(self, device, visit, update):
            for name, change in update.items():
                trained[device.id, name] = trained.get((device.id, name), 0) + change
            total = super().upload(device, visit, update)
            for name, change in self.codec.decode(self.codec.encode(total)).items():
                sent[device.id, name] = sent.get((device.id, name), 0) + change
            return total

    codec = TopK(0.9)
    _, strategy = run(Algorithm(up=codec, callbacks=[Watched(codec)]))
    for (client, name), change in trained.items():
        kept = strategy.loop.devices.memories[client]["residual"][name]
        assert torch.allclose(sent[client, name] + kept, change, atol=1e-6)
        assert change.numel() < 50 or kept.abs().sum() > 0


def test_reported_losses_are_those_of_the_steps():
    module, strategy = run(Algorithm(callbacks=[ReportLoss()]), rounds=1)
    expected = torch.tensor(module.losses, dtype=torch.float64).view(4, 2).mean(1)
    assert torch.allclose(strategy.server.reports["loss"], expected, atol=1e-6)
    assert all("loss_sum" not in memory for memory in strategy.loop.devices.memories.values())


def server(population=20, per_round=5, round=30):
    made = Server(
        np.full(population, 10),
        steps_of=lambda client, size: 1,
        online=lambda round: np.arange(population) != 3,
        per_round=per_round,
        seed=0,
    )
    made.round = round
    return made


def test_oort_explores_until_it_knows_somebody():
    state = server()
    chosen = Oort()(state)
    assert len(set(chosen.tolist())) == 5 and 3 not in chosen and (np.diff(chosen) > 0).all()


def test_oort_prefers_high_losses_and_avoids_the_slow():
    state = server(round=100)
    state.reports["last_round"][:] = 99
    counts = np.zeros(20)
    for client in range(20):
        state.record(client, {"loss": 5.0 if client >= 10 else 0.1, "visit_seconds": 100.0 if client >= 15 else 1.0})
    for round in range(100, 300):
        state.round = round
        counts[Oort(pace=0.5)(state)] += 1
    assert counts[10:15].min() > counts[:10].max() and counts[10:15].min() > counts[15:].max() and counts[3] == 0


def test_oort_in_a_run():
    algorithm = Algorithm(selector=Oort(), aggregator=WeightedMean(), callbacks=[ReportLoss()])
    _, strategy = run(algorithm, clients=8, rounds=6, per_round=3)
    assert int(strategy.server.reports["visits"].sum()) == 18
    assert int((strategy.server.reports["visits"] > 0).sum()) > 3


@pytest.mark.parametrize(("name", "value"), [("exploration", 2), ("decay", -1), ("penalty", -1), ("clip", 1.5)])
def test_oort_s_arguments(name, value):
    with pytest.raises(ValueError, match=f"{name}={value}"):
        Oort(**{name: value})
