"""Lightning's other arguments and PyTorch's other loaders, each in a real run."""

import subprocess
import sys
from functools import cache

import lightning as L
import pytest
import torch
from algorithms import ALGORITHMS, failing, lost
from lightning.pytorch.tuner import Tuner
from runs import (
    VAL,
    Count,
    Net,
    assert_same,
    exact,
    fit,
    holds,
    make_strategy,
    make_trainer,
    train_loader,
    val_loader,
)
from torch.nn import functional as F

from edgebolt.common.federated import Algorithm, ClientCallback, FedAvg


@cache
def whole():
    """The run with which others are compared: made once, and not touched."""
    return fit()


# ------------------------------------------------------------------------------------------- Trainer arguments


def test_fast_dev_run():
    count = Count()
    run = fit(callbacks=[count], fast_dev_run=True)
    assert (count.steps, count.validations) == ([1], 1)
    assert run.strategy.history[0]["round/delivered"] == 1
    assert not holds(Net().state_dict(), run.model)
    assert fit(fast_dev_run=3).trainer.global_step == 3  # Lightning's batches of one epoch


@pytest.mark.parametrize("name", ALGORITHMS)
def test_limit_train_batches_int(name):
    row, count = ALGORITHMS[name], Count()
    run = fit(*row.make(), rounds=row.rounds, callbacks=[count], limit_train_batches=3)
    free = Count()
    fit(*row.make(), rounds=1, callbacks=[free])
    assert count.steps[0] == min(3, free.steps[0]) and max(count.steps) <= 3
    assert count.validations == len(run.strategy.history) == run.trainer.current_epoch == row.rounds
    assert run.strategy.history[0]["round/visits"] > 0


@pytest.mark.parametrize("limit", [0.5, 0.34, 0.99])
def test_limit_train_batches_float(limit):
    count, free = Count(), Count()
    fit(make_strategy(fleet=failing()), callbacks=[free])
    run = fit(make_strategy(fleet=failing()), callbacks=[count], limit_train_batches=limit)
    assert count.steps == [int(steps * limit) for steps in free.steps]
    assert count.validations == len(run.strategy.history) == 3


@pytest.mark.parametrize("share", [0.0, None])
def test_limit_train_batches_float_in_a_round_without_steps(share):
    count = Count()
    run = fit(make_strategy(**lost(share)()), callbacks=[count], limit_train_batches=0.5)
    assert count.steps[1] == 1 and count.validations == len(run.strategy.history) == 3


def test_limit_train_batches_above_the_plan():
    assert_same(fit(limit_train_batches=1000), whole())


def test_limit_val_batches():
    for limit, batches in ((1, 3), (0.5, 3), (0, 0), (1.0, 6)):
        count = Count()
        run = fit(callbacks=[count], limit_val_batches=limit)
        assert count.batches == batches and len(run.strategy.history) == 3


def test_without_validation():
    strategy, module = make_strategy(), Net()
    make_trainer(strategy).fit(module, train_loader())
    assert holds(module.state_dict(), whole().model)


def test_sanity_validation_changes_nothing():
    assert_same(fit(num_sanity_val_steps=2), whole())
    row = ALGORITHMS["private heads"]
    assert_same(fit(*row.make(), num_sanity_val_steps=2), fit(*row.make()))


def test_check_val_every_n_epoch():
    class Rounds(Count):
        def on_validation_start(self, trainer, module):
            self.validated = [*getattr(self, "validated", []), trainer.current_epoch]

    count = Rounds()
    run = fit(rounds=4, callbacks=[count], check_val_every_n_epoch=2)
    assert count.validated == [1, 3] and len(run.strategy.history) == 4
    assert holds(run.module.state_dict(), fit(rounds=4).model)


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [
        ("bf16-mixed", torch.float32),
        ("64-true", torch.float64),
        ("16-true", torch.float16),
        ("bf16-true", torch.bfloat16),
    ],
)
def test_precision(precision, dtype, tmp_path):
    if precision == "16-true":
        try:
            torch.nn.BatchNorm1d(2, dtype=torch.float16)(torch.ones(3, 2, dtype=torch.float16))
        except RuntimeError as error:
            pytest.skip(f"this CPU build lacks float16 operations: {error}")
    seen = set()

    class Look(ClientCallback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            seen.update(p.grad.dtype for p in module.parameters())

    def make():
        optimizer = "sgd" if precision == "16-true" else "adamw"  # whose epsilon is 0 in float16
        return make_strategy(Algorithm(callbacks=[Look()])), Net(optimizer)

    run = fit(*make(), precision=precision)
    assert seen == {dtype} == {tensor.dtype for tensor in run.model.values()}
    assert all(bool(torch.isfinite(tensor).all()) for tensor in run.model.values())
    assert [f["round/delivered"] for f in run.strategy.history] == [3, 3, 3]
    assert "val_loss" in run.trainer.callback_metrics
    stopped = fit(*make(), precision=precision, max_steps=11)
    stopped.trainer.save_checkpoint(tmp_path / "stopped.ckpt")
    assert_same(fit(*make(), precision=precision, ckpt_path=tmp_path / "stopped.ckpt"), run)


def test_bytes_follow_the_precision():
    single, double = fit(rounds=1), fit(rounds=1, precision="64-true")
    ratio = double.strategy.ledger.total_bytes / single.strategy.ledger.total_bytes
    assert 1.4 < ratio < 2


def test_gradient_clipping():
    norms = {}

    def changes(clip):
        class Look(ClientCallback):
            def on_train_batch_start(self, trainer, module, *args):
                self.before = torch.nn.utils.parameters_to_vector(module.parameters()).clone()

            def on_train_batch_end(self, trainer, module, *args):
                after = torch.nn.utils.parameters_to_vector(module.parameters())
                norms.setdefault(clip, []).append(float((after - self.before).detach().norm()))

        class Plain(Net):
            def make_optimizer(self):
                return torch.optim.SGD(self.parameters(), 1.0)

            def configure_optimizers(self):
                return self.make_optimizer()

        fit(make_strategy(Algorithm(callbacks=[Look()])), Plain(), rounds=1, gradient_clip_val=clip)

    changes(0.05)
    changes(None)
    assert max(norms[0.05]) < 0.0501 and max(norms[None]) > 0.1


def test_gradient_clipping_comes_after_the_proximal_term():
    from edgebolt.common.federated import FedProx

    clipped = fit(make_strategy(FedProx(mu=5.0)), gradient_clip_val=1e-3)
    assert (clipped.model["head.weight"] - Net().state_dict()["head.weight"]).abs().max() < 0.01


@pytest.mark.parametrize("name", ["fedavg", "fedprox", "interrupted visits", "changing ranks"])
def test_hooks_of_a_step_fire_and_change_nothing(name):
    """The core skips hooks that nobody implements; here somebody implements all of them."""
    fired = {}

    def count(hook):
        def run(self, *args, **kwargs):
            fired[hook] = fired.get(hook, 0) + 1

        return run

    hooks = ["on_before_zero_grad", "on_before_backward", "on_after_backward", "on_before_optimizer_step",
             "on_train_batch_start", "on_train_batch_end"]  # fmt: skip
    everything = type("Everything", (L.Callback,), {hook: count(hook) for hook in hooks})()
    row = ALGORITHMS[name]
    run = fit(*row.make(), rounds=row.rounds, callbacks=[everything])
    assert fired == dict.fromkeys(hooks, run.trainer.global_step)
    assert_same(run, fit(*row.make(), rounds=row.rounds))


@pytest.mark.parametrize("hook", ["backward", "optimizer_step", "configure_gradient_clipping", "on_before_backward",
                                  "on_after_backward", "on_before_optimizer_step", "transfer_batch_to_device",
                                  "on_before_batch_transfer", "on_after_batch_transfer", "optimizer_zero_grad",
                                  "on_before_zero_grad", "on_train_batch_start", "lr_scheduler_step"])  # fmt: skip
def test_hooks_of_the_module_are_called(hook):
    calls = []

    def watched(self, *args, **kwargs):
        calls.append(self.trainer.training)
        return getattr(super(Hooked, self), hook)(*args, **kwargs)

    Hooked = type("Hooked", (Net,), {hook: watched})
    run = fit(module=Hooked())
    training = sum(calls)
    assert training >= 3 if hook == "lr_scheduler_step" else training >= run.trainer.global_step
    assert holds(run.model, whole().model)


def test_the_registered_name_in_a_fresh_process():
    code = """
import lightning as L, torch
import edgebolt.common.federated
from torch.utils.data import DataLoader, TensorDataset
class Net(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3, 1)
    def training_step(self, batch, batch_idx):
        return self.layer(batch[0]).square().mean()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)
quiet = dict(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
             enable_model_summary=False)
for name in ("fedavg", "fedprox"):
    trainer = L.Trainer(max_epochs=2, strategy=name, **quiet)
    trainer.fit(Net(), DataLoader(TensorDataset(torch.ones(40, 3)), batch_size=2))
    print(type(trainer.strategy).__name__, trainer.global_step, len(trainer.strategy.history))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines() == ["FedAvgStrategy 40 2", "FedProxStrategy 40 2"], done.stderr


# ------------------------------------------------------------------------------- validate, test, predict, twice


def test_validate_test_predict_after_fit():
    run = fit(make_strategy(fleet=failing()))
    trainer, module = run.trainer, run.module
    with torch.no_grad():
        module.eval()
        outputs = module(VAL.tensors[0])
        expected = F.cross_entropy(outputs, VAL.tensors[1]).item()
    found = trainer.validate(module, val_loader(), verbose=False)
    assert found[0]["val_loss"] == pytest.approx(expected, rel=1e-6)
    assert trainer.test(module, val_loader(), verbose=False)[0]["test_loss"] == pytest.approx(expected, rel=1e-6)
    assert torch.allclose(torch.cat(trainer.predict(module, val_loader())), outputs)
    assert holds(module.state_dict(), run.model)


def test_validate_test_predict_without_fit():
    trainer, module = make_trainer(make_strategy()), Net()
    assert trainer.validate(module, val_loader(), verbose=False)[0].keys() == {"val_loss"}
    assert trainer.test(module, val_loader(), verbose=False)[0].keys() == {"test_loss"}
    assert len(trainer.predict(module, val_loader())) == 2
    assert holds(module.state_dict(), Net().state_dict())
    trainer.fit(module, train_loader(), val_loader())  # and the same Trainer fits afterwards
    assert holds(module.state_dict(), whole().model)


def test_validate_from_a_mid_round_checkpoint(tmp_path):
    run = fit(max_steps=5)
    run.trainer.save_checkpoint(tmp_path / "mid.ckpt")
    module = Net()
    make_trainer(make_strategy()).validate(module, val_loader(), ckpt_path=tmp_path / "mid.ckpt", verbose=False)
    assert holds(module.state_dict(), run.model)


def test_two_fits_in_a_row():
    strategy, module = make_strategy(fleet=failing()), Net()
    first = state_of(fit(strategy, module))
    assert state_of(fit(strategy, Net(), accelerator="auto")) == first  # the same strategy begins afresh
    again = fit(make_strategy(fleet=failing()), module)  # a trained module is trained further
    assert not holds(again.model, fit(make_strategy(fleet=failing())).model)
    assert len(again.strategy.history) == 3


def state_of(run):
    return exact(run.model), exact(run.strategy.clock.state_dict()), exact(run.strategy.ledger.state_dict())


def test_one_algorithm_object_serves_several_runs():
    algorithm = FedAvg(moments="keep")
    first, second = (fit(make_strategy(algorithm, fleet=failing()), Net("adamw")) for _ in range(2))
    assert_same(second, first)


def test_validating_another_checkpoint_leaves_its_weights_in_the_module(tmp_path):
    """As in any Trainer: ``validate(ckpt_path=...)`` after ``fit`` loads these weights."""
    early = fit(rounds=1)
    early.trainer.save_checkpoint(tmp_path / "early.ckpt")
    run = fit()
    run.trainer.validate(run.module, val_loader(), ckpt_path=tmp_path / "early.ckpt", verbose=False)
    assert holds(run.module.state_dict(), early.model)
    run.trainer.save_checkpoint(tmp_path / "now.ckpt", weights_only=True)  # and what is saved now is what it holds
    assert holds(torch.load(tmp_path / "now.ckpt", weights_only=True)["state_dict"], early.model)


# -------------------------------------------------------------------------------------------------- the module


def test_estimated_stepping_batches(tmp_path):
    totals = []

    class OneCycle(Net):
        def configure_optimizers(self):
            totals.append(self.trainer.estimated_stepping_batches)
            optimizer = self.make_optimizer()
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=99)
            return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def make():
        return make_strategy(fleet=failing()), OneCycle()

    count = Count()
    whole = fit(*make(), callbacks=[count])
    assert totals == [3 * count.steps[0]]  # as Lightning estimates: rounds times the length of the first
    for step in range(1, whole.trainer.global_step, 2):
        stopped = fit(*make(), max_steps=step)
        stopped.trainer.save_checkpoint(tmp_path / "stopped.ckpt")
        assert_same(fit(*make(), ckpt_path=tmp_path / "stopped.ckpt"), whole, step)


class Tied(Net):
    def __init__(self):
        super().__init__()
        self.body = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 8))
        self.body[2].weight = self.body[0].weight
        self.head = torch.nn.Linear(8, 3)


def test_tied_weights(tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        start = Tied().state_dict()

    def make():
        module = Tied()
        module.load_state_dict(start)
        return make_strategy(), module

    stopped = fit(*make(), max_steps=10)  # in the second round
    stopped.trainer.save_checkpoint(tmp_path / "stopped.ckpt")
    weights = torch.load(tmp_path / "stopped.ckpt", weights_only=True)["state_dict"]
    shared = stopped.model["body.0.weight"]
    assert "body.2.weight" not in stopped.model
    assert torch.equal(weights["body.0.weight"], shared) and torch.equal(weights["body.2.weight"], shared)
    assert not torch.equal(shared, start["body.0.weight"])
    whole = fit(*make())
    assert whole.module.body[0].weight is whole.module.body[2].weight
    assert_same(fit(*make(), ckpt_path=tmp_path / "stopped.ckpt"), whole)


def test_buffers():
    uploads = []

    class Look(ClientCallback):
        def upload(self, device, visit, update):
            uploads.append((device.samples, update["body.1.running_mean"]))
            return update

    run = fit(make_strategy(Algorithm(callbacks=[Look()])), rounds=1)
    change, total = torch.zeros(12), sum(samples for samples, _ in uploads)
    for samples, update in uploads:
        change.add_(update, alpha=samples / total)
    assert torch.equal(run.model["body.1.running_mean"], change)  # from zeros
    assert "body.1.num_batches_tracked" not in run.model
    assert int(run.module.state_dict()["body.1.num_batches_tracked"]) == 0


def test_frozen_parameters_stay_and_do_not_travel():
    class HalfFrozen(Net):
        def __init__(self):
            super().__init__()
            self.body[0].requires_grad_(False)

    run = fit(module=HalfFrozen())
    assert "body.0.weight" not in run.model and "head.weight" in run.model
    assert torch.equal(run.module.body[0].weight, Net().body[0].weight)
    assert run.strategy.ledger.total_bytes < whole().strategy.ledger.total_bytes


def test_a_module_that_is_built_in_configure_model():
    class Late(Net):
        def __init__(self):
            super().__init__()
            self.kept, self.head = self.head, None

        def configure_model(self):
            if self.head is None:
                self.head = self.kept
                del self.kept

    assert holds(fit(module=Late()).model, whole().model)


def test_a_training_step_that_returns_a_dict_and_logs():
    class Logs(Net):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.log("train_loss", loss, on_step=True, on_epoch=True, batch_size=len(batch[0]))
            return {"loss": loss, "logits": loss.detach()}

    run = fit(module=Logs())
    assert holds(run.model, whole().model)
    assert run.strategy.history == whole().strategy.history
    assert {"train_loss_step", "train_loss_epoch", "client/train_loss"} <= run.trainer.callback_metrics.keys()


def test_a_training_step_that_skips_batches():
    class Skips(Net):
        def training_step(self, batch, batch_idx):
            return None if batch_idx % 4 == 1 else super().training_step(batch, batch_idx)

    count = Count()
    run = fit(module=Skips(), callbacks=[count])
    assert sum(count.steps) == run.trainer.global_step and len(run.strategy.history) == count.validations == 3


def test_masks_of_infinities():
    class Masked(Net):
        def __init__(self):
            super().__init__()
            self.register_buffer("mask", torch.full((3, 3), float("-inf")).triu(1))

    run = fit(module=Masked())
    assert [figures["round/delivered"] for figures in run.strategy.history] == [3, 3, 3]
    assert torch.equal(run.module.mask, Masked().mask)


def test_the_tuner_may_look_for_a_learning_rate(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    class Tunable(Net):
        lr = 0.1

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), self.lr)

    trainer = make_trainer(make_strategy(), rounds=5)
    found = Tuner(trainer).lr_find(Tunable(), train_loader(), num_training=10)
    assert len(found.results["lr"]) >= 9
