"""FLUDE in 40 lines: digits on 20 devices that fail and go offline, or (``--plain``) a fit that survives a kill."""

import argparse

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from edgebolt.common.devices import Fleet, Undependability
from edgebolt.common.federated import Dirichlet, FederatedStrategy
from edgebolt.flude import Flude, TrainingCache

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--plain", action="store_true", help="an ordinary fit with the callback TrainingCache")
parser.add_argument("--epochs", type=int, default=30, help="federated: rounds")
parser.add_argument("--folder", default="runs/flude", help="of the snapshot; kill the fit and start it again")
args = parser.parse_args()


class Digits(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(64, 100), torch.nn.ReLU(), torch.nn.Linear(100, 10))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def test_step(self, batch, batch_idx):
        self.log("test_acc", (self.net(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


L.seed_everything(0, verbose=False)
torch.set_num_threads(1)  # matrices this small are slower on several
images, labels = (torch.as_tensor(array) for array in load_digits(return_X_y=True))
data = TensorDataset(images.float() / 16, labels)
train, test = torch.utils.data.random_split(data, [1437, 360], torch.Generator().manual_seed(0))

fleet = Fleet.jetson(20, speed=1e-5).undependable(Undependability(rates=(0.2, 0.4, 0.6), online=(0.5, 0.9)))
federated = FederatedStrategy(Flude(), Dirichlet(20, alpha=0.5), per_round=5, local_steps=10, fleet=fleet)
cache = TrainingCache(args.folder, every_n_steps=20)
strategy, callbacks = ("auto", [cache]) if args.plain else (federated, [])
options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": args.plain, "enable_model_summary": False}
trainer = L.Trainer(max_epochs=args.epochs, strategy=strategy, callbacks=callbacks, **options)
module = Digits()
trainer.fit(module, DataLoader(train, 16, shuffle=True))

accuracy = trainer.test(module, DataLoader(test, 360), verbose=False)[0]["test_acc"]
if args.plain:
    began = "the beginning" if cache.restored_step is None else f"step {cache.restored_step}"
    print(f"accuracy {accuracy:.3f} after {trainer.global_step} steps, begun at {began}")
else:
    visits, delivered, resumed = (
        sum(row[name] for row in federated.history) for name in ("round/visits", "round/delivered", "flude/resumed")
    )
    print(f"accuracy {accuracy:.3f} after {trainer.current_epoch} rounds, {federated.clock.now:.1f} simulated seconds")
    print(f"{delivered} of {visits} visits delivered; {resumed} went on where an earlier one was interrupted")
