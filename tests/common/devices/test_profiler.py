import json

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from edgebolt.common.devices import CostModel, DeviceProfile, DeviceProfiler, Fleet

B, D, H, C = 8, 12, 20, 5
FLOPS = 2 * B * (D * H + H * C) * 2 + 2 * B * H * C
SAVED = 4 * B * D + 4 * B * H + 4 * B * C + 8 * B + 4  # see test_cost: input, relu, log-softmax, targets, scalar


class Mlp(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(D, H), nn.Linear(H, C)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = nn.functional.cross_entropy(self.second(self.first(x).relu()), y)
        self.log("loss", loss, on_epoch=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


def fit(module, *callbacks, epochs=2):
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(5 * B, D), torch.randint(C, (5 * B,)))
    trainer = L.Trainer(
        max_epochs=epochs,
        callbacks=list(callbacks),
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(data, batch_size=B, shuffle=True))
    return trainer


def test_a_fit_writes_a_profile_that_a_fleet_reads(tmp_path, capsys):
    path = tmp_path / "machine.json"
    profiler = DeviceProfiler(path, steps=4, warmup=2, name="my-board", power_w=7.0, up_bps=2e6, failure_rate=0.25)
    fit(Mlp(), profiler)
    content = json.loads(path.read_text())
    measured = content["measured"]
    assert measured["flops_per_step"] == FLOPS
    assert measured["saved_for_backward_bytes"] == SAVED
    assert measured["timed_steps"] == 4
    assert measured["steps_per_second"] == pytest.approx(1 / measured["step_seconds"])
    assert 0 < measured["step_seconds"] < 5
    assert content["flops"] == pytest.approx(FLOPS / measured["step_seconds"])
    assert measured["peak_memory_bytes"] >= 0
    assert content["memory_bytes"] > 2**28  # a machine that runs torch has more
    profile = DeviceProfile.from_json(path)
    assert profile == profiler.profile
    assert (profile.name, profile.power_w, profile.up_bps, profile.failure_rate) == ("my-board", 7.0, 2e6, 0.25)
    assert Fleet.uniform(3, profile).profile(2, 0) == profile
    printed = capsys.readouterr().out
    assert profiler.table() in printed
    assert "Device profile 'my-board'" in printed
    assert f"{SAVED:,} bytes" in printed


def test_training_is_not_changed_bit_for_bit():
    def weights(*callbacks):
        L.seed_everything(3, verbose=False)
        module = Mlp()
        trainer = fit(module, *callbacks)
        return [p.detach().clone() for p in module.parameters()], trainer.callback_metrics["loss_epoch"].item()

    (plain, loss), (watched, loss_watched) = weights(), weights(DeviceProfiler())
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))
    assert loss == loss_watched


def test_a_short_fit_measures_what_it_can():
    profiler = DeviceProfiler(steps=100, warmup=3)
    fit(Mlp(), profiler)  # ten steps
    assert profiler.measured["timed_steps"] == 7


def test_a_fit_within_the_warmup_says_so(tmp_path):
    profiler = DeviceProfiler(tmp_path / "p.json", warmup=10)
    with pytest.warns(UserWarning, match="measured nothing: training ended after 10 steps with warmup=10"):
        fit(Mlp(), profiler)
    assert profiler.profile is None
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(RuntimeError, match="nothing has been measured yet"):
        profiler.table()


def test_a_second_fit_is_measured_anew():
    profiler = DeviceProfiler(steps=3, warmup=0)
    fit(Mlp(), profiler)
    first = profiler.profile
    module = Mlp()
    module.first.requires_grad_(False)
    fit(module, profiler)
    assert profiler.measured["flops_per_step"] == FLOPS - 2 * B * (D * H + H * C)  # no gradient further left
    assert profiler.profile is not first


def test_stated_operations_and_the_batch_size():
    by_hand = DeviceProfiler(cost=CostModel(flops_per_sample=1e6), warmup=0)
    fit(Mlp(), by_hand, epochs=1)
    assert by_hand.measured["flops_per_step"] == B * 1e6
    stated = DeviceProfiler(cost=CostModel(flops_per_sample=1e6), warmup=0, batch_size=3, memory_bytes=123)
    fit(Mlp(), stated, epochs=1)
    assert stated.measured["flops_per_step"] == 3e6
    assert stated.profile.memory_bytes == 123


def test_manual_optimization_wants_stated_operations():
    class Manual(Mlp):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    with pytest.raises(ValueError, match="Manual optimizes manually"):
        fit(Manual(), DeviceProfiler(), epochs=1)
    profiler = DeviceProfiler(cost=CostModel(flops_per_sample=1e6), warmup=0)
    fit(Manual(), profiler, epochs=1)
    assert profiler.measured["saved_for_backward_bytes"] is None
    assert "not measured" in profiler.table()


def test_a_foreign_trainer_is_refused():
    class Trainer:
        pass

    with pytest.raises(TypeError, match=r"lightning.pytorch.Trainer, got .*Trainer; write 'import lightning as L'"):
        DeviceProfiler().setup(Trainer(), Mlp(), "fit")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "steps=0"),
        ({"warmup": -1}, "warmup=-1"),
        ({"batch_size": 0}, "got 0"),
        ({"power_w": -1.0}, "power_w must not be negative, got -1.0"),
        ({"up_bps": 0}, "up_bps must be above 0, got 0"),
        ({"memory_bytes": 0}, "memory_bytes must be above 0, got 0"),
    ],
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        DeviceProfiler(**arguments)


@pytest.mark.gpu
def test_a_gpu_is_measured_by_its_own_counters(tmp_path):
    profiler = DeviceProfiler(tmp_path / "gpu.json", steps=4, warmup=2)
    data = TensorDataset(torch.randn(5 * B, D), torch.randint(C, (5 * B,)))
    trainer = L.Trainer(max_epochs=2, callbacks=[profiler], accelerator="gpu", devices=1, logger=False,
                        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    trainer.fit(Mlp(), DataLoader(data, batch_size=B))
    assert profiler.measured["peak_memory_bytes"] > SAVED
    assert profiler.profile.memory_bytes == torch.cuda.get_device_properties(0).total_memory
