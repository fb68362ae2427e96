import lightning as L
import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from edgebolt.common.communication import Dense, Float16, SignSGD, TopK, UpdateCompression
from edgebolt.common.federated import FedAvg, FederatedStrategy


class Net(L.LightningModule):
    def __init__(self, optimizer="sgd"):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.ReLU(), torch.nn.Linear(30, 3))
        self.kind = optimizer
        self.seen = []

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def on_before_zero_grad(self, optimizer):
        self.seen.append([p.grad.clone() for p in self.parameters() if p.grad is not None])

    def configure_optimizers(self):
        made = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[self.kind]
        return made(self.parameters(), 0.05)


def loader():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(96) % 3
    return DataLoader(TensorDataset(torch.randn(96, 20, generator=generator) + labels.unsqueeze(1), labels), 8)


def fit(callbacks=(), epochs=2, module=None, ckpt_path=None, **kwargs):
    module = Net() if module is None else module
    switches = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    kwargs = {"enable_checkpointing": False, **kwargs}
    trainer = L.Trainer(max_epochs=epochs, callbacks=list(callbacks), **switches, **kwargs)
    trainer.fit(module, loader(), ckpt_path=ckpt_path)
    return module, trainer


def weights(module):
    return torch.cat([p.detach().view(-1) for p in module.parameters()])


@pytest.mark.parametrize("on", ["gradients", "weights"])
def test_a_lossless_codec_changes_nothing(on):
    plain, _ = fit()
    compression = UpdateCompression(Dense(), on=on)
    module, trainer = fit([compression])
    assert torch.allclose(weights(module), weights(plain), atol=1e-6 if on == "weights" else 0)
    assert trainer.callback_metrics["compression/error"] < 1e-6 and 1 < compression.ratio < 1.3


def test_gradients_are_what_the_codec_leaves_of_them():
    module, trainer = fit([UpdateCompression(TopK(0.9))])
    assert module.seen
    steps = [gradients for gradients in module.seen if gradients]
    assert all((g != 0).float().mean() <= 0.11 for gradients in steps for g in gradients if g.numel() > 100)
    assert 0 < trainer.callback_metrics["compression/error"] < 1
    assert trainer.callback_metrics["compression/ratio"] > 0


def test_error_feedback_sends_in_the_end_what_was_dropped():
    quiet = [UpdateCompression(TopK(0.95), error_feedback=flag) for flag in (False, True)]
    ends = [weights(fit([callback], epochs=8)[0]) for callback in quiet]
    plain = weights(fit(epochs=8)[0])
    assert (ends[1] - plain).norm() < (ends[0] - plain).norm()


def test_weights_move_only_by_what_is_sent():
    moved = []

    class Watch(L.Callback):
        def on_train_start(self, trainer, module):
            self.before = weights(module).clone()

        def on_train_batch_end(self, trainer, module, *args):
            if trainer.global_step % 4 == 0:
                moved.append((weights(module) - self.before).abs())
                self.before = weights(module).clone()

    compression = UpdateCompression(TopK(0.9, scope="global"), on="weights", every=4)
    _, trainer = fit([compression, Watch()])
    assert len(moved) == trainer.global_step // 4 == 6
    assert all((change > 1e-8).float().mean() <= 0.1 + 1e-3 for change in moved)
    assert compression.dense_bytes == 6 * 4 * len(weights(Net()))


@pytest.mark.parametrize("on", ["gradients", "weights"])
@pytest.mark.parametrize("codec", [TopK(0.9), SignSGD()], ids=repr)
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, on, codec):
    def compression():
        return UpdateCompression(codec, on=on, every=1 if on == "gradients" else 5, error_feedback=True)

    whole, _ = fit([compression()], epochs=4, module=Net("adamw"))
    saving = L.pytorch.callbacks.ModelCheckpoint(tmp_path, save_last=True)
    half, _ = fit([compression(), saving], epochs=2, module=Net("adamw"), enable_checkpointing=True)
    assert not torch.equal(weights(half), weights(whole))
    resumed = compression()
    module, _ = fit([resumed], epochs=4, module=Net("adamw"), ckpt_path=tmp_path / "last.ckpt")
    assert torch.equal(weights(module), weights(whole))
    assert resumed.sent_bytes > 0


def test_accumulated_gradients_are_sent_once():
    compression = UpdateCompression(Float16())
    _, trainer = fit([compression], accumulate_grad_batches=3)
    assert compression.dense_bytes == trainer.global_step * 4 * len(weights(Net())) and trainer.global_step == 8


def test_a_federated_run_is_refused():
    with pytest.raises(ValueError, match=r"Algorithm\(down=..., up=...\)"):
        fit([UpdateCompression(TopK())], strategy=FederatedStrategy(FedAvg()))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"codec": "top-k"}, "codec='top-k'"),
        ({"on": "activations"}, "on='activations'"),
        ({"every": 0}, "every=0"),
        ({"every": 3}, "every=3"),
    ],
)
def test_arguments(arguments, says):
    with pytest.raises(ValueError, match=says):
        UpdateCompression(**{"codec": TopK(), **arguments})
