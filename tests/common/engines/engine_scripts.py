"""Fits that end badly, each in processes of its own: ``python engine_scripts.py NAME``; see the tests beside it."""

import os
import sys
import time
import traceback
from pathlib import Path

sys.path += [str(Path(__file__).parents[2] / "contracts"), str(Path(__file__).parents[2])]

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from runs import Net, exact, fit, make_strategy, make_trainer, train_loader

from edgebolt.common.engines import Ranks, RayEngine

RANK = os.environ.get("RANK")


class Slow(Net):
    def training_step(self, batch, batch_idx):
        time.sleep(0.2)
        return super().training_step(batch, batch_idx)


class FailsOnRank(Net):
    def __init__(self, rank):
        super().__init__()
        self.rank = rank

    def training_step(self, batch, batch_idx):
        if self.rank in (RANK, "all"):
            raise ZeroDivisionError(f"in the module's own code on rank {RANK}")
        return super().training_step(batch, batch_idx)


class FailsBeforeTheBeginning(Net):
    def validation_step(self, batch, batch_idx):
        raise ZeroDivisionError(f"in the sanity check on rank {RANK}")


class DiesOnRank(FailsOnRank):
    def training_step(self, batch, batch_idx):
        if self.rank == RANK:
            os._exit(3)
        return Net.training_step(self, batch, batch_idx)


class Says(L.Callback):
    def on_train_batch_end(self, trainer, *args):
        print(f"step {trainer.global_step}", flush=True)


def ray_slow():
    """200 rounds of slow steps, to be interrupted."""
    fit(make_strategy(engine=RayEngine(2, {"cpu": 0.5})), Slow(), rounds=200, callbacks=[Says()])


class Data(L.LightningDataModule):
    def setup(self, stage):
        self.train = train_loader()

    def train_dataloader(self):
        return self.train


def fits_on_ranks(folder):
    """Some that fail on one rank and on all, some that are fine, and one in a process group of the user's own."""
    for case, module in (("1", FailsOnRank("1")), ("all", FailsOnRank("all")), ("early", FailsBeforeTheBeginning())):
        try:
            sanity = {"num_sanity_val_steps": 1} if case == "early" else {}
            fit(make_strategy(engine=Ranks(), per_round=6), module, **sanity)
        except Exception as error:
            Path(folder, f"{case}-{RANK}").write_text("".join(traceback.format_exception(error)))
    expected = exact(fit(make_strategy()).module.state_dict())

    def compare(case, module):
        Path(folder, f"{case}-{RANK}").write_text("same" if exact(module.state_dict()) == expected else "different")

    save = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    fine = fit(make_strategy(engine=Ranks()), callbacks=[save])
    compare("fine", fine.module)
    fine.trainer.save_checkpoint(Path(folder, f"after-{RANK}.ckpt"))
    compare("resumed", fit(make_strategy(engine=Ranks()), ckpt_path=Path(folder, "epoch=0.ckpt")).module)
    module = Net()
    make_trainer(make_strategy(engine=Ranks())).fit(module, datamodule=Data())
    compare("datamodule", module)
    torch.distributed.init_process_group("gloo")
    try:
        fit(make_strategy(engine=Ranks()))
    except RuntimeError as error:
        Path(folder, f"group-{RANK}").write_text(str(error))


def rank_dies(rank):
    fit(make_strategy(engine=Ranks(), per_round=6), DiesOnRank(rank))


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
