"""A job that is killed at a given instant, as a script that reads lines: a folder and the fits to make there.

One process imports everything; each fit runs in a child of its own, which the kernel kills (SIGKILL) in mid-work, and
in another child that starts the same job again.
"""

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import traceback
from pathlib import Path

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import EarlyStopping, GradientAccumulationScheduler, ModelCheckpoint
from lightning.pytorch.utilities import CombinedLoader
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset

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


class Stream(IterableDataset):
    def __iter__(self):
        yield from Noisy()


class Net(L.LightningModule):
    def __init__(self, width=12, weight_decay=0.01, plateau=False, estimate=False, manual=False):
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = not manual
        self.net = torch.nn.Sequential(
            *(torch.nn.Linear(8, width), torch.nn.BatchNorm1d(width), torch.nn.ReLU()),
            *(torch.nn.Dropout(0.3), torch.nn.Linear(width, 3)),
        )
        self.seen = []

    def setup(self, stage):
        if self.hparams.estimate:
            assert self.trainer.estimated_stepping_batches

    def loss(self, batch):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def training_step(self, batch, batch_idx):
        for _ in range(0 if self.automatic_optimization else 2):
            self.optimizers().zero_grad()
            self.manual_backward(self.loss(batch))
            self.optimizers().step()
        batches = batch.values() if isinstance(batch, dict) else [batch]
        return sum(self.loss(batch) for batch in batches if batch is not None)

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
        if self.hparams.plateau:
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
            schedule = {"scheduler": plateau, "monitor": "val_loss", "strict": False}
            return {"optimizer": optimizer, "lr_scheduler": schedule}
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=100)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Count(L.Callback):
    """Has a state that changes before the step of a batch."""

    calls = 0

    def on_train_batch_start(self, *args):
        self.calls += 1

    def state_dict(self):
        return {"calls": self.calls}

    def load_state_dict(self, state):
        self.calls = state["calls"]


class Stop(L.Callback):
    """Tells the Trainer to stop, once."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == self.step:
            trainer.should_stop = True


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
        federated=False, reload=0, pair=None, plateau=False, estimate=False, manual=False, validate=1, factors=None,
        stop=None, min_epochs=None, endless=False, ckpt=None):  # fmt: skip
    """One fit; returns all that it came to."""
    L.seed_everything(7, verbose=False)
    module = Net(width, weight_decay, plateau, estimate, manual)
    callbacks = [TrainingCache(Path(folder) / "cache", every, job)] if cached else []
    if more:
        callbacks += [
            Count(),
            EarlyStopping("val_loss", patience=50),
            ModelCheckpoint(Path(folder) / "checkpoints", monitor="val_loss", save_last=True, save_top_k=2),
        ]
    if factors:
        callbacks.append(GradientAccumulationScheduler({int(epoch): factor for epoch, factor in factors.items()}))
    if stop:
        callbacks.append(Stop(stop))
    if kill:
        callbacks.append(Kill(*kill))
    if torn:
        tear(*torn)
    strategy = "auto"
    if federated:
        fleet = Fleet.jetson(3, failure_rate=0.3)
        strategy = FederatedStrategy(Flude(grace=0.1), IID(3), local_steps=2, fleet=fleet)
        strategy._files.inline_bytes = 0
    trainer = L.Trainer(
        strategy=strategy, max_epochs=epochs, max_steps=max_steps, callbacks=callbacks, accelerator="cpu",
        logger=False, reload_dataloaders_every_n_epochs=reload, min_epochs=min_epochs,
        check_val_every_n_epoch=validate, val_check_interval=interval, accumulate_grad_batches=accumulate,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=bool(callbacks),
    )  # fmt: skip
    loader = DataLoader(Noisy(seed), batch_size, shuffle=True, num_workers=workers, drop_last=not federated)
    if pair:
        loader = CombinedLoader({"first": loader, "second": DataLoader(Noisy(9, 8), 4, shuffle=True)}, pair)  # shorter
    if endless:
        loader = DataLoader(Stream(), batch_size)
    if ckpt:
        ckpt = shutil.copy(Path(folder) / "checkpoints" / "last.ckpt", Path(folder) / ckpt)
    trainer.fit(module, loader, DataLoader(Noisy(2, 8), 8), ckpt_path=ckpt)
    state = {
        "weights": {name: tensor.tolist() for name, tensor in module.state_dict().items()},
        "moments": repr([sorted(s.items()) for s in trainer.optimizers[0].state.values()]),
        "rates": [group["lr"] for group in trainer.optimizers[0].param_groups],
        "stopper": repr([c.state_dict() for c in trainer.callbacks if isinstance(c, EarlyStopping)]),
        "best": [float(c.best_model_score) for c in trainer.callbacks if isinstance(c, ModelCheckpoint)],
        "steps": [trainer.global_step, trainer.current_epoch],
        "counted": [c.calls for c in trainer.callbacks if isinstance(c, Count)],
    }
    if federated:
        ledger = {name: column.tolist() for name, column in strategy.ledger.entries().items()}
        state |= {"clock": strategy.clock.state_dict(), "ledger": ledger, "history": strategy.history}
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
