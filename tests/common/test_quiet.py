import copy
import random

import lightning as L
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score, MulticlassPrecision

from edgebolt.common.quiet import quiet


class Messy(L.LightningModule):
    """Touches everything that quiet promises to put back."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))
        self.accuracy = MulticlassAccuracy(3)
        self.mean_loss = MeanMetric()
        self.group = MetricCollection([MulticlassPrecision(3), MulticlassF1Score(3)], prefix="train_")
        self.noise = np.random.default_rng(0)
        self.mask_generator = torch.Generator().manual_seed(0)
        self.losses = []
        self.calls = 0

    def training_step(self, batch, batch_idx):
        x, y = batch
        scores = self.net(x) + torch.rand(3, generator=self.mask_generator)
        loss = nn.functional.cross_entropy(scores, y) * (
            1 + random.random() * 0.1 + np.random.rand() + self.noise.random()
        )
        self.accuracy(scores, y)
        self.mean_loss.update(loss.detach())
        self.group.update(scores, y)
        self.log("loss", loss, prog_bar=True, batch_size=len(x))
        self.log_dict({"accuracy": self.accuracy, "calls": float(self.calls)}, on_epoch=True)
        self.log_dict(self.group, on_step=False, on_epoch=True)
        self.losses.append(loss.detach())
        self.calls += 1
        self.latest = loss.detach()
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def batches(n=4, size=5):
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(size, 6, generator=generator), torch.randint(3, (size,), generator=generator)) for _ in range(n)
    ]


def snapshot(module):
    metrics = [module.accuracy, module.mean_loss, *module.group.values(copy_state=False)]
    return {
        "state": copy.deepcopy(module.state_dict()),
        "grads": [None if p.grad is None else p.grad.clone() for p in module.parameters()],
        "requires_grad": [p.requires_grad for p in module.parameters()],
        "training": [m.training for m in module.modules()],
        "metrics": [copy.deepcopy(metric.metric_state) for metric in metrics],
        "updates": [metric.update_count for metric in metrics],
        "groups": copy.deepcopy(module.group.compute_groups),
        "plain": (list(module.losses), module.calls, hasattr(module, "latest"), sorted(vars(module))),
        "rng": (torch.get_rng_state(), random.getstate(), np.random.get_state()[1:3]),
        "own_rng": (module.noise.bit_generator.state, module.mask_generator.get_state()),
    }


def flat(value):
    """Nested containers as one list of tensors and plain values, with None as a mark."""
    if isinstance(value, dict):
        return [item for key in value for item in [str(key), *flat(value[key])]]
    if isinstance(value, (list, tuple)):
        return [item for part in value for item in flat(part)]
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return [torch.as_tensor(value).double()]
    return [repr(value)]


def equal(left, right):
    left, right = flat(left), flat(right)
    return len(left) == len(right) and all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a is b or a == b
        for a, b in zip(left, right, strict=True)
    )


@pytest.mark.parametrize("warm", [False, True], ids=["fresh", "used"])
def test_no_trace_is_left(warm):
    torch.manual_seed(0)
    module = Messy()
    if warm:  # metric groups are formed, gradients are there
        with_log = batches()[0]
        module.log = module.log_dict = lambda *args, **kwargs: None
        module.training_step(with_log, 0).backward()
        del module.log, module.log_dict
    module.net[1].eval()
    module.net[0].bias.requires_grad_(False)
    before = snapshot(module)
    gradients = [p.grad for p in module.parameters()]
    with quiet(module) as logged:
        assert all(p.grad is None for p in module.parameters())
        module.train()
        for batch in batches():
            module.training_step(batch, 0).backward()
        module.net[0].weight.requires_grad_(False)
        module.net[3].eval()
        during = snapshot(module)
        assert len(logged["loss"]) == 4
    after = snapshot(module)
    for key in before:
        assert equal(before[key], after[key]), key
        if not (warm and key == "groups"):  # formed already
            assert not equal(before[key], during[key]), f"{key} did not change inside: the test would prove nothing"
    assert all(now is then for now, then in zip([p.grad for p in module.parameters()], gradients, strict=True))


def test_everything_comes_back_after_an_error():
    module = Messy()
    before = snapshot(module)
    with pytest.raises(KeyError, match="stop"), quiet(module):
        module.training_step(batches()[0], 0)
        raise KeyError("stop")
    assert equal(before, snapshot(module))
    assert "log" not in vars(module)


def test_what_is_captured():
    torch.manual_seed(0)
    module = Messy()
    with quiet(module) as logged:
        losses = [module.training_step(batch, 0) for batch in batches(2)]
        assert module.accuracy.compute() == logged["accuracy"][0][0].compute()
    assert list(logged) == ["loss", "accuracy", "calls", "train_MulticlassPrecision", "train_MulticlassF1Score"]
    assert [value.item() for value, _ in logged["loss"]] == [loss.item() for loss in losses]
    assert not logged["loss"][0][0].requires_grad
    assert [size for _, size in logged["loss"]] == [5, 5]
    assert logged["calls"] == [(0.0, None), (1.0, None)]
    assert logged["accuracy"][0][0] is module.accuracy


def test_shared_states_of_a_metric_collection_stay_shared():
    module = Messy()
    scores, target = torch.randn(8, 3), torch.randint(3, (8,))
    module.group.update(scores, target)
    module.group.update(scores, target)
    precision, f1 = module.group["MulticlassPrecision"], module.group["MulticlassF1Score"]
    expected = module.group.compute()
    with quiet(module):
        module.training_step(batches()[0], 0)
    assert {key: value.item() for key, value in module.group.compute().items()} == {
        key: value.item() for key, value in expected.items()
    }
    module.group.update(torch.eye(3), torch.arange(3))
    module.group.compute()
    assert torch.equal(precision.tp, f1.tp)
    assert precision.tp.sum() > 0


def test_states_made_in_inference_mode_come_back():
    module = Messy()
    with torch.inference_mode():
        module.mean_loss.update(3.0)
        module.mean_loss.mean_value = module.mean_loss.mean_value + 0.0  # an inference tensor
    with quiet(module), torch.inference_mode():
        module.mean_loss.update(100.0)
        module.mean_loss.mean_value += 1.0
    assert module.mean_loss.compute() == 3.0


def test_nested_modules_that_log_are_heard():
    class Outer(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.inner = Messy()

        def training_step(self, batch, batch_idx):
            return self.inner.training_step(batch, batch_idx)

    outer = Outer()
    with quiet(outer) as logged:
        outer.training_step(batches()[0], 0)
    assert "loss" in logged


def test_a_trainer_sees_nothing_of_it():
    """Two fits, one of them with extra quiet steps at every batch: same weights, same logged metrics."""

    class Intruder(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            with quiet(pl_module) as logged:
                pl_module.training_step(batch, batch_idx).backward()
            assert len(logged["loss"]) == 1

    def fit(callbacks):
        L.seed_everything(0, verbose=False)
        module = Messy()
        trainer = L.Trainer(
            max_epochs=2,
            callbacks=callbacks,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            accelerator="cpu",
        )
        trainer.fit(module, DataLoader(batches(), batch_size=None))
        return module.state_dict(), {k: v.item() for k, v in trainer.callback_metrics.items()}, module.calls

    weights, metrics, calls = fit([])
    weights_quiet, metrics_quiet, calls_quiet = fit([Intruder()])
    assert metrics == metrics_quiet
    assert calls == calls_quiet == 8
    assert all(torch.equal(weights[key], weights_quiet[key]) for key in weights)


def test_lazy_parameters_are_refused():
    class Lazy(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = nn.LazyLinear(3)

    with pytest.raises(ValueError, match="lazy parameters"), quiet(Lazy()):
        pass
