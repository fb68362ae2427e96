"""A job that is killed at a given instant, as a script that reads lines: a folder and the fits to make there.

One process imports everything; each fit runs in a child of its own, which the kernel kills (SIGKILL) in mid-work, and
in another child that starts the same job again.
"""

import hashlib
import json
import os
import random
import signal
import sys
import traceback
from pathlib import Path

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from edgebolt.common.devices import Fleet
from edgebolt.common.federated import IID, FederatedStrategy
from edgebolt.flude import Flude, TrainingCache, snapshot_file

EPOCHS, BATCHES = 3, 5


class Noisy(Dataset):
    """Augmented by three global generators, so that the place in each of them matters."""

    def __init__(self, seed=1, n=4 * BATCHES - 1):
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(n, 8, generator=generator)
        self.y = self.x[:, :3].argmax(1)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        noise = torch.randn(8) + float(np.random.rand()) + random.random()
        return self.x[index] + 0.1 * noise, self.y[index]


class Net(L.LightningModule):
    def __init__(self, width=12, weight_decay=0.01):
        super().__init__()
        self.save_hyperparameters()
        self.net = torch.nn.Sequential(
            *(torch.nn.Linear(8, width), torch.nn.BatchNorm1d(width), torch.nn.ReLU()),
            *(torch.nn.Dropout(0.3), torch.nn.Linear(width, 3)),
        )
        self.seen = []

    def loss(self, batch):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def training_step(self, batch, batch_idx):
        return sum(map(self.loss, batch.values())) if isinstance(batch, dict) else self.loss(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch))

    def on_validation_epoch_end(self):
        if not self.trainer.sanity_checking:
            self.seen.append(float(self.trainer.callback_metrics["val_loss"]))

    def on_save_checkpoint(self, checkpoint):
        checkpoint["seen"] = self.seen

    def on_load_checkpoint(self, checkpoint):
        self.seen = list(checkpoint["seen"])

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), 0.01, weight_decay=self.hparams.weight_decay)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=100)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Kill(L.Callback):
    """SIGKILL in one hook, at its n-th call of this process."""

    def __init__(self, hook, call):
        self.left = call
        setattr(self, hook, self.strike)

    def strike(self, *args):
        self.left -= 1
        if not self.left:
            os.kill(os.getpid(), signal.SIGKILL)


def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


def tear(how, at):
    """Die in the write of the ``at``-th snapshot: after a part of the file, or before it gets its name."""
    save, replace, count = snapshot_file.save_file, os.replace, [0]

    def torn_save(tensors, path, metadata):
        count[0] += 1
        save(tensors, path, metadata=metadata)
        if count[0] == at and how in ("header", "middle"):
            whole = Path(path).read_bytes()
            Path(path).write_bytes(whole[: 4 if how == "header" else len(whole) // 2])
            die()

    def torn_replace(source, target):
        if count[0] == at and how in ("before rename", "after rename") and str(target).endswith(".safetensors"):
            if how == "after rename":
                replace(source, target)
            die()
        replace(source, target)

    snapshot_file.save_file, os.replace = torn_save, torn_replace


def fit(folder, every=1, epochs=EPOCHS, kill=None, torn=None, seed=1, width=12, weight_decay=0.01, batch_size=4,
        accumulate=1, workers=0, interval=1.0, job=None, more=True, max_steps=-1, cached=True,
        federated=False, reload=0, pair=False):  # fmt: skip
    """One fit; returns all that it came to."""
    L.seed_everything(7, verbose=False)
    module = Net(width, weight_decay)
    callbacks = [TrainingCache(Path(folder) / "cache", every, job)] if cached else []
    if more:
        callbacks += [
            EarlyStopping("val_loss", patience=50),
            ModelCheckpoint(Path(folder) / "checkpoints", monitor="val_loss", save_last=True, save_top_k=2),
        ]
    if kill:
        callbacks.append(Kill(*kill))
    if torn:
        tear(*torn)
    strategy = "auto"
    if federated:
        fleet = Fleet.jetson(3, failure_rate=0.3)
        strategy = FederatedStrategy(Flude(grace=0.1), IID(3), local_steps=2, fleet=fleet)
    trainer = L.Trainer(
        strategy=strategy, max_epochs=epochs, max_steps=max_steps, callbacks=callbacks, accelerator="cpu",
        logger=False, reload_dataloaders_every_n_epochs=reload,
        accumulate_grad_batches=accumulate, val_check_interval=interval, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=bool(callbacks),
    )  # fmt: skip
    loader = DataLoader(Noisy(seed), batch_size, shuffle=True, num_workers=workers, drop_last=not federated)
    if pair:
        loader = {"first": loader, "second": DataLoader(Noisy(9, 8), 4, shuffle=True)}  # a shorter one: begun anew
    trainer.fit(module, loader, DataLoader(Noisy(2, 8), 8))
    state = {
        "weights": {name: tensor.tolist() for name, tensor in module.state_dict().items()},
        "moments": repr([sorted(s.items()) for s in trainer.optimizers[0].state.values()]),
        "rates": [group["lr"] for group in trainer.optimizers[0].param_groups],
        "stopper": repr([c.state_dict() for c in trainer.callbacks if isinstance(c, EarlyStopping)]),
        "best": [float(c.best_model_score) for c in trainer.callbacks if isinstance(c, ModelCheckpoint)],
        "steps": [trainer.global_step, trainer.current_epoch],
    }
    parts = {name: hashlib.sha256(json.dumps(part).encode()).hexdigest()[:12] for name, part in state.items()}
    restored = [c.restored_step for c in trainer.callbacks if isinstance(c, TrainingCache)]
    return {**parts, "validations": module.seen, "restored": restored}


def child(folder, scenario):
    """Run in a process of its own: ``(signal or exit code, what it came to or the error)``."""
    answer = Path(folder) / "answer.json"
    answer.unlink(missing_ok=True)
    pid = os.fork()
    if not pid:
        try:
            answer.write_text(json.dumps(fit(folder, **scenario)))
        except BaseException as error:
            answer.write_text(
                json.dumps({"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()})
            )
            os._exit(1)
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    code = -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
    return code, json.loads(answer.read_text()) if answer.exists() else None


def main():
    torch.set_num_threads(1)
    for line in sys.stdin:
        folder, runs = json.loads(line)
        Path(folder).mkdir(parents=True)
        print("\n@" + json.dumps([child(folder, scenario) for scenario in runs]), flush=True)


if __name__ == "__main__":
    main()
