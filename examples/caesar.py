"""Caesar in 40 lines: a small network learns digits on 20 simulated Jetsons, or (``--plain``) in an ordinary fit."""

import argparse

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from edgebolt.caesar import Caesar
from edgebolt.common.communication import TopK, UpdateCompression
from edgebolt.common.devices import Fleet
from edgebolt.common.federated import Dirichlet, FederatedStrategy

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--plain", action="store_true", help="an ordinary fit with the callback UpdateCompression")
parser.add_argument("--epochs", type=int, default=30, help="federated: rounds")
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

federated = FederatedStrategy(
    Caesar(), Dirichlet(20, alpha=0.5), per_round=5, local_steps=10, fleet=Fleet.jetson(20, speed=1e-5)
)
compression = UpdateCompression(TopK(ratio=0.99), error_feedback=True)
strategy, callbacks = ("auto", [compression]) if args.plain else (federated, [])
options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_model_summary": False}
trainer = L.Trainer(max_epochs=args.epochs, strategy=strategy, callbacks=callbacks, **options)
module = Digits()
trainer.fit(module, DataLoader(train, 16, shuffle=True))

accuracy = trainer.test(module, DataLoader(test, 360), verbose=False)[0]["test_acc"]
if args.plain:
    print(f"accuracy {accuracy:.3f} with gradients at {compression.ratio:.4f} of their size")
else:
    ledger, visits = federated.ledger, sum(row["round/visits"] for row in federated.history)
    dense = 2 * visits * sum(p.nbytes for p in module.parameters())
    print(
        f"accuracy {accuracy:.3f} after {trainer.current_epoch} rounds and {federated.clock.now:.1f} simulated seconds"
    )
    print(f"{ledger.total_bytes / 1e6:.2f} MB sent, {ledger.total_bytes / dense:.2f} of the dense tensors")
