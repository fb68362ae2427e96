"""One epoch is one round: bars, logs, validation, early stopping and schedules all count rounds."""

import csv
import re
from dataclasses import replace

import lightning as L
import pytest
import torch
from algorithms import ALGORITHMS, failing
from lightning.pytorch.callbacks import EarlyStopping, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from runs import BATCH, SAMPLES, Net, fit, holds, make_strategy, train_loader

from edgebolt.common.federated import Algorithm, Sizes


class Watch(L.Callback):
    """What Lightning shows to any callback, by the round."""

    def __init__(self):
        self.announced, self.steps, self.rates, self.validated = [], [], [], []

    def on_train_epoch_start(self, trainer, module):
        self.announced.append(trainer.num_training_batches)
        self.steps.append(0)
        self.rates.append(set())

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.rates[-1].add(trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.steps[-1] += 1

    def on_validation_start(self, trainer, module):
        self.validated.append(
            (trainer.current_epoch, holds(module.state_dict(), trainer.strategy.server.models["global"]))
        )


class Bar(TQDMProgressBar):
    totals: list[int]

    def on_train_epoch_start(self, trainer, *args):
        super().on_train_epoch_start(trainer, *args)
        self.totals = [*getattr(self, "totals", []), self.train_progress_bar.total]


def planned(name, module=None, **trainer):
    """A run of a row of the table, and the steps of each round's plan, cuts included."""
    row = ALGORITHMS[name]
    strategy, module = row.make()
    plan, cut, plans = strategy.algorithm.plan, strategy.fleet.cut, []

    def recorded_plan(server):
        visits = plan(server)
        plans.append(sum(visit.steps for visit in visits))
        return visits

    def recorded_cut(client, steps, *args, **kwargs):
        dies_at = cut(client, steps, *args, **kwargs)
        plans[-1] -= 0 if dies_at is None else steps - dies_at.steps
        return dies_at

    strategy.algorithm.plan, strategy.fleet.cut = recorded_plan, recorded_cut
    return fit(strategy, module, rounds=row.rounds, **trainer), plans


@pytest.mark.parametrize("name", ALGORITHMS)
def test_steps_bars_and_rounds_agree_with_the_plan(name, tmp_path, capsys):
    watch, bar = Watch(), Bar()
    run, plans = planned(name, callbacks=[watch, bar], enable_progress_bar=True, logger=CSVLogger(tmp_path))
    expected = [max(1, steps) for steps in plans]  # a round in which nobody trains takes an idle batch
    assert len(plans) == ALGORITHMS[name].rounds == run.trainer.current_epoch == run.strategy.server.round
    assert watch.announced == watch.steps == bar.totals == expected
    assert run.trainer.global_step == sum(expected)
    assert watch.validated == [(number, True) for number in range(len(plans))]

    with open(tmp_path / "lightning_logs" / "version_0" / "metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["round/visits"]]
    assert len(rows) == len(plans)
    for number, (row, figures) in enumerate(zip(rows, run.strategy.history, strict=True)):
        logged = {key: float(row[key]) for key in figures if key != "round"}
        assert logged == {key: value for key, value in figures.items() if key != "round"}, number
        assert (int(float(row["epoch"])), figures["round"]) == (number, number)


def test_history_agrees_with_ledger_and_clock():
    run = fit(make_strategy(fleet=failing()), rounds=4)
    history, ledger = run.strategy.history, run.strategy.ledger
    traffic = [(figures["round/bytes_up"], figures["round/bytes_down"]) for figures in history]
    assert dict(enumerate(traffic)) == ledger.by_round()
    assert history[-1]["round/sim_time"] == run.strategy.clock.now > history[0]["round/sim_time"] > 0
    assert sum(figures["round/energy"] for figures in history) == pytest.approx(run.strategy.clock.energy_joules)
    assert all(f["round/visits"] == f["round/delivered"] + f["round/failed"] == 3 for f in history)
    assert sum(f["round/failed"] for f in history) > 0
    assert (~ledger.entries()["up"]).sum() == 4 * 3


def test_progress_bar_shows_round_visit_and_simulated_time(capsys):
    fit(rounds=2, callbacks=[TQDMProgressBar()], enable_progress_bar=True)
    shown = capsys.readouterr()
    text = shown.out + shown.err
    assert "round=1" in text and "visit=3/3" in text and re.search(r"sim(_time)?=[\d.]+ ?s", text)


def test_early_stopping_counts_rounds():
    never = EarlyStopping("val_loss", patience=2, min_delta=100.0)
    run = fit(rounds=9, callbacks=[never])
    assert run.trainer.current_epoch == len(run.strategy.history) == 3


def test_early_stopping_on_a_round_figure():
    run = fit(rounds=9, callbacks=[EarlyStopping("round/sim_time", patience=1, mode="min", verbose=False)])
    assert run.trainer.current_epoch == 2  # time only grows, so the second round is no better than the first


def test_epoch_schedules_count_rounds():
    watch = Watch()
    run = fit(make_strategy(fleet=failing()), rounds=4, callbacks=[watch])
    assert watch.rates == [{0.1}, {0.05}, {0.025}, {0.0125}]
    assert run.trainer.optimizers[0].param_groups[0]["lr"] == 0.1 * 0.5**4


def test_step_schedules_count_local_steps():
    class PerStep(Net):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), 0.1)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    run = fit(module=PerStep(), rounds=2)
    assert run.trainer.optimizers[0].param_groups[0]["lr"] == 0.1 * 0.5**run.trainer.global_step


def test_a_plateau_schedule_sees_each_round():
    class Plateau(Net):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), 0.1)
            schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(
                optimizer, patience=0, factor=0.5, threshold_mode="abs", threshold=9.0
            )
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": "val_loss"}}

    watch = Watch()
    fit(module=Plateau(), rounds=4, callbacks=[watch])
    assert watch.rates == [{0.1}, {0.1}, {0.05}, {0.025}]


def test_visits_may_set_optimizer_values():
    def slower(server, visits):
        return [replace(visit, optimizer={"lr": 0.01 * (1 + visit.client)}) for visit in visits]

    seen = {}

    class Look(L.Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            visit = trainer.strategy.loop.visit
            seen.setdefault(visit.client, set()).add(optimizer.param_groups[0]["lr"])

    watch = Watch()
    fit(make_strategy(Algorithm(configure=[slower]), per_round=6), callbacks=[Look(), watch])
    assert seen == {client: {0.01 * (1 + client)} for client in range(6)}
    assert watch.rates == [{0.1}, {0.05}, {0.025}]  # the groups themselves stay the schedule's


@pytest.mark.parametrize("drop_last", [False, True])
def test_steps_of_a_visit_follow_the_loader(drop_last):
    watch = Watch()
    fit(make_strategy(per_round=6), train=train_loader(drop_last=drop_last), rounds=1, callbacks=[watch])
    assert watch.steps == [sum(n // BATCH if drop_last else -(-n // BATCH) for n in SAMPLES)]


def test_local_steps_may_exceed_an_epoch():
    watch = Watch()
    fit(make_strategy(clients=Sizes(SAMPLES, seed=0), per_round=2, local_steps=5), callbacks=[watch], rounds=2)
    assert watch.steps == [10, 10]
