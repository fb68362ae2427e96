"""PyTorch's other loaders and data sets, each in a real run."""

import lightning as L
import numpy as np
import pytest
import torch
from runs import (
    BATCH,
    CLIENTS,
    SAMPLES,
    TRAIN,
    Count,
    Net,
    assert_same,
    fit,
    holds,
    make_strategy,
    make_trainer,
    train_loader,
    val_loader,
)
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from edgebolt.common.devices import Fleet
from edgebolt.common.federated import Sizes

INDEX = Sizes(SAMPLES, seed=0).split(TRAIN)
PARTS = [Subset(TRAIN, INDEX.indices(client)) for client in range(CLIENTS)]


class Rows(Dataset):
    """The same samples through ``__getitem__``."""

    targets = TRAIN.tensors[1]

    def __len__(self):
        return len(TRAIN)

    def __getitem__(self, index):
        return TRAIN[index]


def test_every_way_to_the_same_samples_is_the_same_run():
    reference = fit()
    assert_same(fit(train=train_loader(dataset=Rows())), reference)
    assert_same(fit(make_strategy(clients=PARTS)), reference)
    assert_same(fit(make_strategy(clients=[DataLoader(p, BATCH, shuffle=True) for p in PARTS])), reference)
    assert_same(fit(make_strategy(clients=PARTS.__getitem__, fleet=Fleet.uniform(CLIENTS))), reference)
    columns = DataLoader(TRAIN, BATCH, shuffle=True, collate_fn=torch.utils.data.default_collate, pin_memory=False)
    assert_same(fit(train=columns), reference)
    assert not holds(fit(train=train_loader(shuffle=False)).model, reference.model)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_workers(tmp_path):
    def workers():
        return train_loader(dataset=Rows(), num_workers=2)

    reference = fit(rounds=2)
    assert_same(fit(rounds=2, train=workers()), reference)
    stopped = fit(rounds=2, train=workers(), max_steps=4)
    stopped.trainer.save_checkpoint(tmp_path / "stopped.ckpt")
    assert_same(fit(rounds=2, train=workers(), ckpt_path=tmp_path / "stopped.ckpt"), reference)


class Noisy(Rows):
    """Augmentation from the global generators, as torchvision's transforms draw."""

    def __getitem__(self, index):
        x, y = TRAIN[index]
        return x + torch.randn(8) + float(np.random.rand()), y


def test_random_transforms_resume_exactly(tmp_path):
    whole = fit(train=train_loader(dataset=Noisy()))
    assert_same(fit(train=train_loader(dataset=Noisy())), whole)
    for step in (2, 5, 8, 12):
        stopped = fit(train=train_loader(dataset=Noisy()), max_steps=step)
        stopped.trainer.save_checkpoint(tmp_path / "stopped.ckpt")
        resumed = fit(train=train_loader(dataset=Noisy()), ckpt_path=tmp_path / "stopped.ckpt")
        assert_same(resumed, whole, step)


class Named(Rows):
    def __getitem__(self, index):
        x, y = TRAIN[index]
        return {"x": x, "labels": y}


class NamedNet(Net):
    def loss(self, batch):
        return super().loss((batch["x"], batch["labels"]))

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch), batch_size=len(batch["x"]))


def test_dict_batches():
    train = DataLoader(Named(), BATCH, shuffle=True)
    run = fit(module=NamedNet(), train=train, val=DataLoader(Named(), 20))
    assert holds(run.model, fit().model)


def test_graph_batches():
    data = pytest.importorskip("torch_geometric.data")
    loader = pytest.importorskip("torch_geometric.loader")
    nn = pytest.importorskip("torch_geometric.nn")
    generator = torch.Generator().manual_seed(0)
    graphs = [
        data.Data(
            x=torch.randn(n, 8, generator=generator),
            edge_index=torch.stack([torch.arange(n), torch.arange(n).roll(1)]),
            y=torch.tensor([n % 3]),
        )
        for n in (torch.arange(30) % 5 + 3).tolist()
    ]

    class GraphNet(L.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.conv, self.head = nn.GCNConv(8, 6), torch.nn.Linear(6, 3)

        def loss(self, batch):
            return F.cross_entropy(
                self.head(nn.global_mean_pool(self.conv(batch.x, batch.edge_index), batch.batch)), batch.y
            )

        def training_step(self, batch, batch_idx):
            self.log("loss", self.loss(batch), batch_size=batch.num_graphs)
            return self.loss(batch)

        def validation_step(self, batch, batch_idx):
            self.log("val_loss", self.loss(batch), batch_size=batch.num_graphs)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.5)

    from edgebolt.common.federated import IID

    count = Count()
    train, val = loader.DataLoader(graphs, batch_size=2, shuffle=True), loader.DataLoader(graphs, batch_size=10)
    run = fit(make_strategy(clients=IID(5), cost=None), GraphNet(), train=train, val=val, callbacks=[count])
    assert count.steps == [9, 9, 9] and count.validations == 3  # 3 clients with 6 graphs each
    assert run.strategy.clock.now > 0 and not holds(GraphNet().state_dict(), run.model)


def test_a_datamodule():
    class Data(L.LightningDataModule):
        def train_dataloader(self):
            return train_loader()

        def val_dataloader(self):
            return val_loader()

    strategy, module = make_strategy(), Net()
    make_trainer(strategy).fit(module, datamodule=Data())
    assert holds(module.state_dict(), fit().model)


def test_loaders_of_the_module():
    class Whole(Net):
        def train_dataloader(self):
            return train_loader()

        def val_dataloader(self):
            return val_loader()

    module = Whole()
    make_trainer(make_strategy()).fit(module)
    assert holds(module.state_dict(), fit().model)


def test_several_validation_loaders():
    class Two(Net):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            super().validation_step(batch, batch_idx)

    count = Count()
    run = fit(module=Two(), val=[val_loader(), val_loader(batch_size=5)], callbacks=[count])
    assert count.batches == 3 * (2 + 4)
    assert {"val_loss/dataloader_idx_0", "val_loss/dataloader_idx_1"} <= run.trainer.callback_metrics.keys()


def test_clients_with_loaders_of_their_own_need_no_cuttable_main_loader():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(TRAIN)

    own = [DataLoader(Subset(TRAIN, range(8 * c, 8 * c + 8)), batch_size=4, shuffle=True) for c in range(6)]
    run = fit(make_strategy(clients=own), train=DataLoader(Stream(), batch_size=4))
    assert len(run.strategy.history) == 3
