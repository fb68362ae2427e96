"""The proximal term in a plain Trainer: its gradient, and a resumed fit that keeps its anchor."""

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from edgebolt.common.federated import Proximal

pytestmark = pytest.mark.filterwarnings("ignore:The dirpath has changed", "ignore:You're resuming")
GENERATOR = torch.Generator().manual_seed(0)
X, Y = torch.randn(24, 4, generator=GENERATOR), torch.randint(2, (24,), generator=GENERATOR)


class Linear(L.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(4, 2)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.layer(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5)


def fit(mu, *callbacks, epochs=2, ckpt_path=None, module=None, proximal=None):
    module = module or Linear()
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=bool(callbacks),
        callbacks=[proximal or Proximal(mu), *callbacks],
    )
    trainer.fit(module, DataLoader(TensorDataset(X, Y), batch_size=8), ckpt_path=ckpt_path)
    return module


def by_hand(mu, epochs=2):
    module = Linear()
    anchor = [p.detach().clone() for p in module.parameters()]
    optimizer = module.configure_optimizers()
    for _ in range(epochs):
        for first in range(0, 24, 8):
            optimizer.zero_grad()
            F.cross_entropy(module.layer(X[first : first + 8]), Y[first : first + 8]).backward()
            for parameter, start in zip(module.parameters(), anchor, strict=True):
                parameter.grad += mu * (parameter.detach() - start)
            optimizer.step()
    return module


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("mu", [0.0, 0.5])
def test_plain_fit_equals_the_formula(mu):
    assert same(fit(mu), by_hand(mu))
    assert same(fit(0.0), fit(mu)) == (mu == 0.0)


def test_a_resumed_fit_keeps_its_anchor(tmp_path):
    whole = fit(0.5, ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1))
    assert same(fit(0.5, ckpt_path=tmp_path / "epoch=0.ckpt"), whole)


def test_an_object_that_served_another_fit():
    proximal, other = Proximal(0.5), Linear()
    with torch.no_grad():
        other.layer.weight.add_(1.0)
    fit(0.5, proximal=proximal, module=other)
    assert same(fit(0.5, proximal=proximal), by_hand(0.5))
