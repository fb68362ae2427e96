import copy
import pickle

import lightning as L
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from edgebolt.common.devices import CostModel, SavedBytes, count_step

B, D, H, C = 8, 12, 20, 5


class Mlp(L.LightningModule):
    def __init__(self, output="tensor"):
        super().__init__()
        self.first, self.second = nn.Linear(D, H), nn.Linear(H, C)
        self.output = output
        self.calls = []

    def training_step(self, batch, batch_idx):
        self.calls.append(batch_idx)
        Mlp.total += 1
        x, y = batch
        loss = nn.functional.cross_entropy(self.second(self.first(x).relu()), y)
        self.log("loss", loss)
        return {"tensor": loss, "dict": {"loss": loss, "extra": 1}, "none": None, "empty": {}}[self.output]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture(autouse=True)
def no_calls():
    Mlp.total = 0


def batch(size=B):
    return torch.randn(size, D), torch.randint(C, (size,))


# forward; weight gradients; input gradient of the second layer only
FLOPS = 2 * B * (D * H + H * C) * 2 + 2 * B * H * C


@pytest.mark.parametrize("output", ["tensor", "dict"])
def test_an_mlp_costs_its_closed_form(output):
    module = Mlp(output)
    assert count_step(module, batch()).flops == FLOPS
    assert CostModel().sample_flops(module, batch(), B, {}) == FLOPS / B


def test_the_forward_part_is_counted_apart():
    module, forward = Mlp(), 2 * B * (D * H + H * C)
    assert count_step(module, batch()).forward_flops == forward
    cost = CostModel()
    assert cost.sample_parts(module, batch(), B, {}) == (FLOPS / B, forward / B)
    module.requires_grad_(False)
    assert cost.sample_parts(module, batch(), B, {"frozen": True}) == (forward / B, forward / B)
    resumed = CostModel()
    resumed.load_state_dict(cost.state_dict())
    assert resumed.sample_parts(module, None, B, {}) == (FLOPS / B, forward / B)


def test_of_a_stated_cost_a_third_is_forward():
    assert CostModel(flops_per_sample=6e9).sample_parts(Mlp(), None, 4, {}) == pytest.approx((6e9, 2e9))

    class Own(Mlp):
        def flops(self, settings, batch_size):
            return 1200 * batch_size

    assert CostModel().sample_parts(Own(), None, 4, {}) == pytest.approx((1200.0, 400.0))


def test_frozen_layers_cost_less():
    module = Mlp()
    module.first.requires_grad_(False)
    assert count_step(module, batch()).flops == 2 * B * (D * H + H * C) + 2 * B * H * C
    module.requires_grad_(False)
    assert count_step(module, batch()).flops == 2 * B * (D * H + H * C)


def test_saved_bytes_are_the_hand_count():
    # Input of the first layer, output of relu (also input of the second layer), output of log-softmax, the targets,
    # and the scalar total weight of the loss.
    expected = 4 * B * D + 4 * B * H + 4 * B * C + 8 * B + 4
    assert count_step(Mlp(), batch()).saved_bytes == expected
    frozen = Mlp()
    frozen.first.requires_grad_(False)  # nothing to the left of the second layer is needed
    assert count_step(frozen, batch()).saved_bytes == expected - 4 * B * D


def test_shared_storages_and_buffers_are_not_counted_twice():
    norm, x = nn.BatchNorm1d(6), torch.randn(10, 6, requires_grad=True)
    with SavedBytes([*norm.parameters(), *norm.buffers()]) as saved:
        y = norm(x)
        first = saved.nbytes
        (x * x).sum() + (x[:5] * x[5:]).sum()
    assert first == saved.nbytes == 4 * 60 + 2 * 4 * 6  # the input; mean and inverse deviation of the batch
    assert y.shape == x.shape
    sparse = torch.eye(4).to_sparse()
    dense = torch.randn(4, 3, requires_grad=True)
    with SavedBytes() as saved:
        torch.sparse.mm(sparse, dense)
    assert saved.nbytes == 2 * 4 * 8 + 4 * 4  # indices and values


def test_no_trace_is_left_of_a_count():
    class Noisy(Mlp):
        def training_step(self, batch, batch_idx):
            x, y = batch
            return super().training_step((nn.functional.dropout(x, 0.5), y), batch_idx)

    module, nominal = Noisy(), batch()
    before = copy.deepcopy(module.state_dict())
    rng = torch.get_rng_state()
    with torch.no_grad():  # planning may happen anywhere
        assert count_step(module, nominal).flops == FLOPS
    assert torch.equal(rng, torch.get_rng_state())
    assert all(p.grad is None for p in module.parameters())
    assert all(torch.equal(value, module.state_dict()[key]) for key, value in before.items())
    assert module.calls == []


def test_equal_settings_are_counted_once():
    module, cost = Mlp(), CostModel()
    settings = {"depth": 3, "ranks": [1, 2], "rate": 0.5}
    same = {"rate": np.float64(0.5), "ranks": (np.int64(1), 2), "depth": torch.tensor(3)}
    first = cost.sample_flops(module, batch(), B, settings)
    assert cost.sample_flops(module, None, B, same) == first
    assert cost.sample_flops(module, batch(), B, {**settings, "ranks": torch.tensor([1, 2])}) == first
    assert Mlp.total == 1
    module.first.requires_grad_(False)
    assert cost.sample_flops(module, batch(), B, {**settings, "depth": 2}) < first
    assert Mlp.total == 2
    other = Mlp()  # another module is counted anew
    cost.sample_flops(other, batch(), B, settings)
    assert Mlp.total == 3


def test_counts_survive_a_checkpoint_and_a_journey():
    module, cost = Mlp(), CostModel()
    first = cost.sample_flops(module, batch(), B, {"depth": 1})
    resumed = CostModel()
    resumed.load_state_dict(cost.state_dict())
    assert resumed.sample_flops(module, None, B, {"depth": 1}) == first
    assert pickle.loads(pickle.dumps(cost)).sample_flops(module, None, B, {"depth": 1}) == first
    assert Mlp.total == 1


def test_a_module_may_know_better():
    class Own(Mlp):
        def flops(self, settings, batch_size):
            return 1000.0 * settings["depth"] * batch_size

    assert CostModel().sample_flops(Own(), None, 4, {"depth": 3}) == 3000.0
    assert CostModel(flops_per_sample=5).sample_flops(Own(), None, 4, {"depth": 3}) == 5.0
    assert Mlp.total == 0
    Own.flops = lambda self, settings, batch_size: 0
    with pytest.raises(ValueError, match=r"Own.flops\(settings, batch_size\) must be .* got 0"):
        CostModel().sample_flops(Own(), None, 4, {"depth": 3})


def test_zero_is_an_error_with_the_way_out():
    class Scatter(Mlp):
        def training_step(self, batch, batch_idx):
            return torch.zeros(3).scatter_add(0, torch.tensor([0, 1]), self.first.bias[:2]).sum()

    with pytest.raises(ValueError, match=r"Scatter counts 0 operations: .*CostModel\(flops_per_sample=...\)"):
        CostModel().sample_flops(Scatter(), batch(), B, {})


@pytest.mark.parametrize("output", ["none", "empty"])
def test_a_step_without_loss_is_an_error(output):
    with pytest.raises(ValueError, match="must return a loss tensor or a dict with 'loss'"):
        count_step(Mlp(output), batch())


def test_manual_optimization_is_an_error():
    module = Mlp()
    module.automatic_optimization = False
    with pytest.raises(ValueError, match="Mlp optimizes manually"):
        CostModel().sample_flops(module, batch(), B, {})


def test_a_step_may_take_the_batch_alone():
    class Short(Mlp):
        def training_step(self, batch):
            return self.first(batch[0]).sum()

    assert count_step(Short(), batch()).flops == 2 * 2 * B * D * H


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_it_counts_inside_a_trainer_in_any_precision(precision):
    class Counting(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.step = count_step(pl_module, batch)

    class Attached(Mlp):
        def training_step(self, batch, batch_idx):
            assert self.trainer.max_epochs == 1
            return super().training_step(batch, batch_idx)

    counting = Counting()
    trainer = L.Trainer(
        max_epochs=1,
        limit_train_batches=1,
        precision=precision,
        callbacks=[counting],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Attached(), DataLoader([batch()], batch_size=None))
    assert counting.step.flops == FLOPS


def test_arguments_are_checked():
    for bad in (0, -1.0, float("inf"), True, "many"):
        with pytest.raises(ValueError, match="flops_per_sample must be a finite number of operations above 0"):
            CostModel(flops_per_sample=bad)
    with pytest.raises(ValueError, match="batch_size must be at least 1 sample, got 0"):
        CostModel().sample_flops(Mlp(), batch(), 0, {})
    with pytest.raises(TypeError, match="settings must hold numbers"):
        CostModel().sample_flops(Mlp(), batch(), B, {"mask": object()})
