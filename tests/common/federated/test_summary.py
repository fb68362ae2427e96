import csv
import math
import os
import sys

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from edgebolt.common.devices import CostModel, Fleet
from edgebolt.common.federated import FedAvg, FederatedStrategy, FederatedSummary, Sizes, read_rounds

SAMPLES = [4, 8, 12, 16]  # at batch size 4 a client has one to four steps
generator = torch.Generator().manual_seed(0)
X = torch.randn(60, 5, generator=generator)
DATA = TensorDataset(X, X[:, :3].argmax(1))


class Net(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(5, 3)
        torch.nn.init.zeros_(self.net.weight)
        torch.nn.init.zeros_(self.net.bias)

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_acc", (self.net(batch[0]).argmax(1) == batch[1]).float().mean())
        self.log("val, odd name", F.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def run(folder, rounds=4, callbacks=(), ckpt_path=None, figure=False, metric="val_acc", module=None, **trainer):
    summary = FederatedSummary(folder, metric=metric, figure=figure)
    strategy = FederatedStrategy(
        FedAvg(),
        clients=Sizes(SAMPLES, seed=0),
        per_round=2,
        fleet=Fleet.jetson(4, seed=1, failure_rate=0.2),
        cost=CostModel(flops_per_sample=1e9),
    )
    options = {
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
    }
    trainer = L.Trainer(
        strategy=strategy, max_epochs=rounds, callbacks=[*callbacks, summary], **{**options, **trainer}
    )
    module = Net() if module is None else module
    loaders = DataLoader(DATA, batch_size=4, shuffle=True), DataLoader(DATA, batch_size=60)
    try:
        trainer.fit(module, *loaders, ckpt_path=ckpt_path)
    finally:
        summary.trainer = trainer
    return summary, strategy


def cells(folder):
    with (folder / "rounds.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# what a row says


class Witness(Callback):
    """What the Trainer itself shows after each validation and epoch."""

    def __init__(self):
        self.val, self.train = [], []

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.val.append(trainer.callback_metrics["val_acc"].item())

    def on_train_epoch_end(self, trainer, pl_module):
        self.train.append(trainer.callback_metrics["train_loss"].item())


def test_rows_are_the_history_and_the_metrics(tmp_path):
    witness = Witness()
    summary, strategy = run(tmp_path / "new" / "folder", callbacks=[witness])
    rows = read_rounds(tmp_path / "new" / "folder")
    assert rows == summary.rows and len(rows) == len(strategy.history) == 4
    for row, figures in zip(rows, strategy.history, strict=True):
        assert {name: row[name] for name in figures} == figures
    assert [row["val_acc"] for row in rows] == witness.val
    assert [row["train_loss"] for row in rows] == witness.train
    assert all("val, odd name" in row for row in rows)
    assert [path.name for path in (tmp_path / "new" / "folder").iterdir()] == ["rounds.csv"]


def test_totals_are_the_ledgers(tmp_path):
    summary, strategy = run(tmp_path)
    up = down = 0
    for row, (sent_up, sent_down) in zip(summary.rows, strategy.ledger.by_round().values(), strict=True):
        up, down = up + sent_up, down + sent_down
        assert (row["bytes_up_total"], row["bytes_down_total"]) == (up, down)
    assert (up, down) == (strategy.ledger.up_bytes, strategy.ledger.down_bytes)
    assert [row["round/sim_time"] for row in summary.rows][-1] == strategy.clock.now
    assert all(type(cell) in (int, float) for row in summary.rows for cell in row.values())


def test_a_round_without_validation_has_no_old_metric(tmp_path):
    run(tmp_path, check_val_every_n_epoch=2)
    assert [bool(row["val_acc"]) for row in cells(tmp_path)] == [False, True, False, True]
    assert all(row["train_loss"] for row in cells(tmp_path))


def test_a_round_whose_training_logs_nothing_has_no_old_metric(tmp_path):
    class Rare(Net):
        def training_step(self, batch, batch_idx):
            if self.trainer.current_epoch % 2:
                return F.cross_entropy(self.net(batch[0]), batch[1])
            return super().training_step(batch, batch_idx)

    run(tmp_path, module=Rare())
    assert [bool(row["train_loss"]) for row in cells(tmp_path)] == [True, False, True, False]


def test_an_epoch_that_ends_in_mid_round_adds_no_row(tmp_path):
    whole, strategy = run(tmp_path / "whole", rounds=2)
    steps = whole.trainer.global_step
    stopped, strategy = run(tmp_path / "stopped", max_steps=steps + 1)
    assert strategy.loop.running and stopped.trainer.global_step == steps + 1
    assert stopped.rows == whole.rows
    assert (tmp_path / "stopped" / "rounds.csv").read_bytes() == (tmp_path / "whole" / "rounds.csv").read_bytes()


def test_validate_alone_leaves_the_record(tmp_path):
    module = Net()
    summary, _ = run(tmp_path, rounds=2, module=module)
    before = (tmp_path / "rounds.csv").read_bytes()
    with torch.no_grad():
        module.net.weight.neg_()
    summary.trainer.validate(module, DataLoader(DATA, batch_size=60), verbose=False)
    assert (tmp_path / "rounds.csv").read_bytes() == before


def test_a_new_fit_begins_anew(tmp_path):
    run(tmp_path, rounds=3)
    first = (tmp_path / "rounds.csv").read_bytes()
    again, _ = run(tmp_path, rounds=2)
    assert len(again.rows) == 2 and first.startswith((tmp_path / "rounds.csv").read_bytes())


# resuming


def test_a_resumed_run_goes_on(tmp_path):
    whole, _ = run(tmp_path / "whole")
    keeper = ModelCheckpoint(tmp_path / "saved", "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    run(tmp_path / "resumed", callbacks=[keeper])
    for epoch in range(3):
        resumed, _ = run(tmp_path / "resumed", ckpt_path=tmp_path / "saved" / f"epoch={epoch}.ckpt")
        assert resumed.rows == whole.rows
        assert (tmp_path / "resumed" / "rounds.csv").read_bytes() == (tmp_path / "whole" / "rounds.csv").read_bytes()


def test_a_checkpoint_of_a_validation_has_its_round(tmp_path):
    """Lightning forgets what the epoch's training logged; all else is there."""
    whole, _ = run(tmp_path / "whole")
    keeper = ModelCheckpoint(tmp_path / "saved", "{epoch}", save_top_k=-1, save_on_train_epoch_end=False)
    run(tmp_path / "saving", callbacks=[keeper])
    for epoch in range(3):
        resumed, _ = run(tmp_path / "resumed", ckpt_path=tmp_path / "saved" / f"epoch={epoch}.ckpt")
        assert "train_loss" not in resumed.rows[epoch]
        resumed.rows[epoch]["train_loss"] = whole.rows[epoch]["train_loss"]
        assert resumed.rows == whole.rows


def test_a_run_resumed_from_any_step_has_every_round(tmp_path):
    whole, strategy = run(tmp_path / "whole")
    keeper = ModelCheckpoint(tmp_path / "saved", "{step}", save_top_k=-1, every_n_train_steps=1)
    run(tmp_path / "steps", callbacks=[keeper])
    steps = whole.trainer.global_step
    assert len(list((tmp_path / "saved").iterdir())) == steps > 8
    for step in range(1, steps):  # after the last there is nothing to resume
        resumed, _ = run(tmp_path / "resumed", ckpt_path=tmp_path / "saved" / f"step={step}.ckpt")
        exact = [
            {name: row[name] for name in plain} for row, plain in zip(resumed.rows, strategy.history, strict=True)
        ]
        assert exact == strategy.history
        assert resumed.rows[-1]["val_acc"] == whole.rows[-1]["val_acc"]


def test_rows_load_without_pickle(tmp_path):
    keeper = ModelCheckpoint(dirpath=tmp_path, filename="last")
    summary, _ = run(tmp_path, rounds=2, callbacks=[keeper])
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]["FederatedSummary"]
    assert state == summary.state_dict() == {"rows": summary.rows}


def test_a_summary_that_joins_later_has_the_earlier_rounds(tmp_path):
    keeper = ModelCheckpoint(dirpath=tmp_path / "saved", filename="two")
    run(tmp_path / "without", rounds=2, callbacks=[keeper])
    checkpoint = torch.load(tmp_path / "saved" / "two.ckpt", weights_only=True)
    del checkpoint["callbacks"]["FederatedSummary"]
    torch.save(checkpoint, tmp_path / "saved" / "bare.ckpt")
    whole, _ = run(tmp_path / "whole")
    joined, _ = run(tmp_path / "joined", ckpt_path=tmp_path / "saved" / "bare.ckpt")
    assert [row["bytes_up_total"] for row in joined.rows] == [row["bytes_up_total"] for row in whole.rows]
    assert ["val_acc" in row for row in joined.rows] == [False, False, True, True]


# the file


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    def fail(source, target):
        raise OSError("disk full")

    run(tmp_path, rounds=2)
    before = (tmp_path / "rounds.csv").read_bytes()
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        run(tmp_path, rounds=2)
    assert (tmp_path / "rounds.csv").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["rounds.csv"]


def test_the_file_is_whole_after_each_round(tmp_path):
    class Reader(Callback):
        def __init__(self):
            self.lengths = []

        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch:
                self.lengths.append(len(cells(tmp_path)))

    reader = Reader()
    run(tmp_path, callbacks=[reader])
    assert reader.lengths == [1, 2, 3]


def test_nan_and_infinity_come_back(tmp_path):
    class Odd(Net):
        def validation_step(self, batch, batch_idx):
            self.log("val_acc", math.nan)
            self.log("val_loss", -math.inf)

    run(tmp_path, rounds=1, module=Odd())
    (row,) = read_rounds(tmp_path)
    assert math.isnan(row["val_acc"]) and row["val_loss"] == -math.inf


# the figure


def test_the_figure_is_drawn_at_the_end(tmp_path):
    pytest.importorskip("matplotlib")
    run(tmp_path, figure=True)
    assert (tmp_path / "rounds.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_after_an_exception_there_is_what_there_is(tmp_path, error):
    pytest.importorskip("matplotlib")

    class Failing(Net):
        def on_train_epoch_start(self):
            if self.trainer.current_epoch == 2:
                raise error("in round 2")

    with pytest.raises((error, SystemExit)):
        run(tmp_path, figure=True, module=Failing())
    assert len(cells(tmp_path)) == 2
    assert (tmp_path / "rounds.png").exists()


def test_without_matplotlib_there_is_a_warning_and_the_file(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.warns(UserWarning, match=r"pip install 'edgebolt-common\[plot\]'"):
        run(tmp_path, rounds=2, figure=True)
    assert [path.name for path in tmp_path.iterdir()] == ["rounds.csv"] and len(cells(tmp_path)) == 2


def test_a_metric_that_is_not_logged_is_named(tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.warns(UserWarning, match=r"'val_f1' is in no round.*'val_acc'"):
        run(tmp_path, rounds=1, figure=True, metric="val_f1")
    assert [path.name for path in tmp_path.iterdir()] == ["rounds.csv"]


# what is refused


def test_a_plain_strategy_is_refused(tmp_path):
    trainer = L.Trainer(
        accelerator="cpu", logger=False, callbacks=[FederatedSummary(tmp_path)], enable_checkpointing=False
    )
    with pytest.raises(ValueError, match=r"SingleDeviceStrategy has no rounds.*strategy=FederatedStrategy\(\.\.\.\)"):
        trainer.fit(Net(), DataLoader(DATA))


def test_a_foreign_trainer_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"FederatedSummary needs a lightning Trainer.*import lightning as L"):
        FederatedSummary(tmp_path).setup(object(), Net(), "fit")
