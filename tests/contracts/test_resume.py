"""A run that is resumed, from wherever, ends as if it had never stopped."""

import signal
import subprocess
import sys
from functools import cache
from pathlib import Path

import lightning as L
import pytest
import torch
from algorithms import ALGORITHMS, DISTINCT, Row, failing
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, OnExceptionCheckpoint, Timer
from lightning.pytorch.loggers import CSVLogger
from runs import Net, assert_same, exact, fit, holds, make_strategy

from edgebolt.common.federated import ClientCallback, FedAvg
from edgebolt.common.federated.device_files import DeviceFiles


def every_step(folder):
    return ModelCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_train_steps=1)


def by_step(folder):
    return sorted(folder.glob("*.ckpt"), key=lambda path: int(path.stem.partition("=")[2]))


FULL_OF_STATE = ["fedavg, kept moments", "interrupted visits", "changing ranks", "buffered"]


class Starts(L.Callback):
    """Global steps at which Lightning begins an epoch."""

    def __init__(self):
        self.steps = []

    def on_train_epoch_start(self, trainer, module):
        self.steps.append(trainer.global_step)


@cache
def round_ends(row):
    """Global steps at which the rounds of a row's run end."""
    ends = []

    class Ends(L.Callback):
        def on_train_epoch_end(self, trainer, module):
            ends.append(trainer.global_step)

    fit(*row.make(), rounds=row.rounds, callbacks=[Ends()])
    return ends


@cache
def uninterrupted(row, max_steps=-1):
    """A row's whole run, with which others are compared: made once, and not touched."""
    return fit(*row.make(), rounds=row.rounds, max_steps=max_steps)


def some_steps(row, every, first=1):
    """The first step of a run, those that end its rounds, and every so many behind the first round.

    Steps differ by whether they begin, go on with or end a visit, and by what visits and rounds before them have left
    behind. Visits have one to four steps: leaps of two to five meet all of that, in each test at other steps.
    """
    ends = round_ends(row)
    return sorted({1, *ends, *range(ends[0] + first, ends[-1], every)})


class Stop(L.Callback):
    """Asks the Trainer to stop after a step, as ``Timer`` does when ``max_time`` is over."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, *args):
        trainer.should_stop = trainer.global_step == self.step


class Raise(L.Callback):
    """Raises in one hook at one step: Ctrl-C, a full disk, a bug."""

    def __init__(self, hook, step, error):
        self.step, self.error = step, error
        setattr(self, hook, self.strike)

    def strike(self, trainer, *args):
        if trainer.global_step == self.step:
            raise self.error


@pytest.mark.parametrize("name", ALGORITHMS)
def test_from_steps(name, tmp_path):
    """The fewest where another row has the same mechanisms, the most where steps have the most to keep."""
    row = ALGORITHMS[name]
    whole = fit(*row.make(), rounds=row.rounds, callbacks=[every_step(tmp_path)])
    checkpoints, starts = by_step(tmp_path), [0, *round_ends(row)[:-1]]
    assert len(checkpoints) == whole.trainer.global_step > 5
    assert whole.trainer.current_epoch == row.rounds
    for step in some_steps(row, every=5 if row.like else 2 if name in FULL_OF_STATE else 3):
        rounds = Starts()
        resumed = fit(*row.make(), rounds=row.rounds, ckpt_path=checkpoints[step - 1], callbacks=[rounds])
        assert_same(resumed, whole, step)
        assert rounds.steps == [start for start in starts if start >= step]


@pytest.mark.parametrize("name", ["fedavg", "all offline", "changing ranks", "buffered"])
def test_from_steps_with_max_steps(name, tmp_path):
    """With ``max_steps``, Lightning counts a finished epoch as one to go on with."""
    row = ALGORITHMS[name]
    best = ModelCheckpoint(tmp_path / "best", filename="{step}", monitor="val_loss", save_top_k=-1)
    last = ModelCheckpoint(tmp_path / "last", filename="{step}", save_top_k=-1, save_on_train_epoch_end=True)
    callbacks = [every_step(tmp_path), best, last]
    whole = fit(*row.make(), rounds=row.rounds, max_steps=10_000, callbacks=callbacks)
    every, best, last = (by_step(tmp_path / folder) for folder in (".", "best", "last"))
    assert (len(every), len(best), len(last)) == (whole.trainer.global_step, row.rounds, row.rounds)
    starts = [0, *round_ends(row)[:-1]]
    for checkpoint in [*(every[step - 1] for step in some_steps(row, every=3)), *best, *last]:
        rounds, step = Starts(), int(checkpoint.stem.partition("=")[2])
        resumed = fit(*row.make(), rounds=row.rounds, max_steps=10_000, ckpt_path=checkpoint, callbacks=[rounds])
        assert_same(resumed, whole, f"{checkpoint.parent.name} {step}")
        assert rounds.steps == [start for start in starts if start >= step], f"{checkpoint.parent.name} {step}"


@pytest.mark.parametrize("name", ["fedavg, kept moments", "interrupted visits"])
def test_from_steps_with_device_memories_in_files(name, tmp_path, monkeypatch):
    monkeypatch.setattr(DeviceFiles.__init__, "__defaults__", (0,))  # every memory is a large one
    test_from_steps(name, tmp_path)
    assert list((tmp_path / "devices").glob("*.safetensors"))


@pytest.mark.parametrize("name", DISTINCT)
def test_stopped_anywhere(name, tmp_path):
    """Whatever ends a fit in mid-round leaves the global weights in the module; the run goes on from there."""
    row = ALGORITHMS[name]
    whole = uninterrupted(row)
    for step in some_steps(row, every=4)[:-1]:
        stopped = fit(*row.make(), rounds=row.rounds, callbacks=[Stop(step)])
        assert stopped.trainer.global_step == step
        assert holds(stopped.module.state_dict(), stopped.model), step
        stopped.trainer.save_checkpoint(tmp_path / "stopped.ckpt")
        resumed = fit(*row.make(), rounds=row.rounds, ckpt_path=tmp_path / "stopped.ckpt")
        assert_same(resumed, whole, f"stopped after step {step}")


@pytest.mark.parametrize("name", DISTINCT)
def test_stopped_again_and_again(name, tmp_path):
    """Each leg of the run is resumed from the end of the former, three steps further on."""
    row = ALGORITHMS[name]
    whole, path = uninterrupted(row), None
    for step in range(2, whole.trainer.global_step, 3):
        leg = fit(*row.make(), rounds=row.rounds, ckpt_path=path, max_steps=step)
        assert leg.trainer.global_step == step and holds(leg.module.state_dict(), leg.model)
        path = tmp_path / f"{step}.ckpt"
        leg.trainer.save_checkpoint(path)
    assert_same(fit(*row.make(), rounds=row.rounds, ckpt_path=path), whole)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_max_steps(optimizer, tmp_path):
    row = Row(lambda: FedAvg(moments="keep"), optimizer=optimizer)
    for step in some_steps(row, every=3)[:-1]:
        stopped = fit(*row.make(), max_steps=step)
        assert stopped.trainer.global_step == step
        assert holds(stopped.module.state_dict(), stopped.model), step
        stopped.trainer.save_checkpoint(tmp_path / "stopped.ckpt")
        assert_same(fit(*row.make(), ckpt_path=tmp_path / "stopped.ckpt"), uninterrupted(row), f"max_steps={step}")


class Hourglass(Timer):
    """Lightning's own ``max_time``, on a clock that ticks with the steps."""

    ticks = 0

    def on_train_batch_end(self, *args):
        self.ticks += 1
        super().on_train_batch_end(*args)

    def time_elapsed(self, *args):
        return float(self.ticks)


def test_max_time(tmp_path):
    stopped = fit(callbacks=[Hourglass({"seconds": 5}), every_step(tmp_path)])
    assert stopped.trainer.global_step == 5
    assert holds(stopped.module.state_dict(), stopped.model)
    assert_same(fit(ckpt_path=by_step(tmp_path)[-1]), fit())


def test_validation_before_a_stop_sees_global_weights():
    """Lightning validates once more when it is asked to stop."""
    seen = []

    class Look(L.Callback):
        def on_validation_batch_start(self, trainer, module, *args):
            seen.append(holds(module.state_dict(), trainer.strategy.server.models["global"]))

    for step in range(1, 8):
        fit(callbacks=[Stop(step), Look()])
    assert all(seen)


HOOKS = ["on_train_batch_start", "on_before_backward", "on_before_optimizer_step", "on_train_batch_end"]
STATELESS = "changing ranks"  # no BatchNorm, whose statistics a repeated forward pass counts twice


@pytest.mark.parametrize("name", FULL_OF_STATE)
@pytest.mark.parametrize("hook", HOOKS)
def test_ctrl_c(hook, name, tmp_path):
    """Each step is struck in two of the hooks: how far a step has come does not depend on which it is."""
    row = ALGORITHMS[name]
    whole = uninterrupted(row)
    for step in ((2, 7, 13), (5, 10))[HOOKS.index(hook) % 2]:
        strategy, module = row.make()
        folder = tmp_path / str(step)
        with pytest.raises(SystemExit):
            interrupt = Raise(hook, step, KeyboardInterrupt())
            fit(strategy, module, rounds=row.rounds, callbacks=[every_step(folder), interrupt])
        assert holds(module.state_dict(), strategy.server.models["global"]), step
        resumed = fit(*row.make(), rounds=row.rounds, ckpt_path=by_step(folder)[-1])
        assert_same(resumed, whole, f"{hook} at step {step}")


@pytest.mark.parametrize(
    ("hook", "name"),
    [(hook, STATELESS) for hook in HOOKS]
    + [(hook, name) for hook in (HOOKS[0], HOOKS[-1]) for name in DISTINCT if name != STATELESS],
)
def test_checkpoint_written_on_an_exception(hook, name, tmp_path):
    """The first and the last hook do not have the same steps."""
    row = ALGORITHMS[name]
    whole = uninterrupted(row)
    for step in some_steps(row, every=5, first=1 + HOOKS.index(hook))[:-1]:
        callbacks = [OnExceptionCheckpoint(tmp_path, "last"), Raise(hook, step, RuntimeError("disk full"))]
        strategy, module = row.make()
        with pytest.raises(RuntimeError, match="disk full"):
            fit(strategy, module, rounds=row.rounds, callbacks=callbacks)
        assert holds(module.state_dict(), strategy.server.models["global"]), step
        resumed = fit(*row.make(), rounds=row.rounds, ckpt_path=tmp_path / "last.ckpt")
        assert_same(resumed, whole, f"{hook} at step {step}")


@pytest.mark.parametrize("hook", ["on_validation_start", "on_validation_batch_start", "on_validation_end"])
@pytest.mark.parametrize("name", ["fedavg", "private heads"])  # whose validation puts other weights into the module
@pytest.mark.parametrize("max_steps", [-1, 10_000])
def test_exception_while_validating(max_steps, name, hook, tmp_path):
    row = ALGORITHMS[name]
    whole = uninterrupted(row, max_steps)
    for step in round_ends(row):
        strategy, module = row.make()
        callbacks = [OnExceptionCheckpoint(tmp_path, "last"), Raise(hook, step, RuntimeError("disk full"))]
        with pytest.raises(RuntimeError, match="disk full"):
            fit(strategy, module, rounds=row.rounds, max_steps=max_steps, callbacks=callbacks)
        assert holds(module.state_dict(), strategy.server.models["global"])
        assert_same(
            fit(*row.make(), rounds=row.rounds, max_steps=max_steps, ckpt_path=tmp_path / "last.ckpt"),
            whole,
            f"{step}",
        )


def test_exception_while_validating_a_module_that_asks_for_its_steps(tmp_path):
    """``trainer.estimated_stepping_batches`` plans the first round before the checkpoint is loaded."""

    class Asks(Net):
        def configure_optimizers(self):
            assert self.trainer.estimated_stepping_batches > 0
            return super().configure_optimizers()

    row = ALGORITHMS["fedavg"]
    whole = fit(row.make()[0], Asks())
    for step in round_ends(row):
        callbacks = [
            OnExceptionCheckpoint(tmp_path, "last"),
            Raise("on_validation_end", step, RuntimeError("disk full")),
        ]
        with pytest.raises(RuntimeError, match="disk full"):
            fit(row.make()[0], Asks(), callbacks=callbacks)
        assert_same(fit(row.make()[0], Asks(), ckpt_path=tmp_path / "last.ckpt"), whole, f"{step}")


def test_an_interrupted_run_goes_on_with_the_same_objects(tmp_path):
    """A second fit of the same module and strategy object, as one does in a notebook."""
    strategy, module = make_strategy(fleet=failing()), Net()
    whole = fit(make_strategy(fleet=failing()))
    with pytest.raises(SystemExit):
        interrupt = Raise("on_train_batch_start", 6, KeyboardInterrupt())
        fit(strategy, module, callbacks=[every_step(tmp_path), interrupt])
    # Lightning refuses accelerator="cpu" beside a strategy object that has got its accelerator already
    assert_same(fit(strategy, module, ckpt_path=by_step(tmp_path)[-1], accelerator="auto"), whole)


@pytest.mark.parametrize("name", DISTINCT)
def test_round_end_checkpoints(name, tmp_path):
    row = ALGORITHMS[name]
    best = ModelCheckpoint(tmp_path / "best", filename="{step}", monitor="val_loss", save_top_k=-1)
    last = ModelCheckpoint(tmp_path / "last", filename="{step}", save_top_k=-1, save_on_train_epoch_end=True)
    whole = fit(*row.make(), rounds=row.rounds, callbacks=[best, last])
    for folder in ("best", "last"):
        checkpoints = by_step(tmp_path / folder)
        assert len(checkpoints) == row.rounds
        for checkpoint in checkpoints:
            assert_same(
                fit(*row.make(), rounds=row.rounds, ckpt_path=checkpoint), whole, f"{folder} {checkpoint.stem}"
            )


def test_a_longer_run_goes_on_from_a_finished_one(tmp_path):
    short = fit(make_strategy(fleet=failing()), rounds=2)
    short.trainer.save_checkpoint(tmp_path / "short.ckpt")
    whole = fit(make_strategy(fleet=failing()), rounds=4)
    assert_same(fit(make_strategy(fleet=failing()), rounds=4, ckpt_path=tmp_path / "short.ckpt"), whole)


@pytest.mark.parametrize("max_steps", [-1, 10_000])
def test_resuming_keeps_validating_logging_and_stopping(max_steps, tmp_path):
    """What follows the resumed step is the same for callbacks and loggers too."""

    def callbacks():
        return [EarlyStopping("val_loss", patience=2, min_delta=100.0)]

    row, log = ALGORITHMS["fedavg"], CSVLogger(tmp_path / "whole")
    whole = fit(*row.make(), rounds=9, max_steps=max_steps, callbacks=[*callbacks(), every_step(tmp_path)], logger=log)
    assert whole.trainer.current_epoch == 3
    checkpoints = by_step(tmp_path)
    for step in some_steps(row, every=4):
        checkpoint, log = checkpoints[step - 1], CSVLogger(tmp_path / str(step))
        resumed = fit(
            *row.make(), rounds=9, max_steps=max_steps, callbacks=callbacks(), ckpt_path=checkpoint, logger=log
        )
        if step not in round_ends(row):  # Lightning does not validate again what ended with the checkpoint's own step
            assert_same(resumed, whole, step)
            expected = (tmp_path / "whole/lightning_logs/version_0/metrics.csv").read_text().splitlines()
            found = (tmp_path / f"{step}/lightning_logs/version_0/metrics.csv").read_text().splitlines()
            assert found[-1] == expected[-1]


@pytest.mark.parametrize("weights_only", [None, True])
def test_weights_only_loading(weights_only, tmp_path):
    row = ALGORITHMS["interrupted visits"]
    whole = fit(*row.make(), rounds=row.rounds, callbacks=[every_step(tmp_path)])
    for checkpoint in by_step(tmp_path)[4::6]:
        resumed = fit(*row.make(), rounds=row.rounds, ckpt_path=checkpoint, weights_only=weights_only)
        assert_same(resumed, whole, checkpoint.stem)


@pytest.mark.parametrize("name", DISTINCT)
def test_mid_round_checkpoints_hold_the_global_weights(name, tmp_path):
    """As of the round's start, or of the last aggregation inside it, for the plain module to load."""
    row = ALGORITHMS[name]
    held = []

    class Held(L.Callback):
        def on_train_batch_end(self, trainer, module, *args):
            held.append({n: t.clone() for n, t in trainer.strategy.server.models["global"].items()})

    fit(*row.make(), rounds=row.rounds, callbacks=[Held(), every_step(tmp_path)])
    checkpoints = by_step(tmp_path)
    assert len(checkpoints) == len(held) and len({str(exact(model)) for model in held}) > 1
    names = row.module().state_dict().keys()
    for step in some_steps(row, every=3):
        weights = torch.load(checkpoints[step - 1], weights_only=True)["state_dict"]
        assert holds(weights, held[step - 1])
        assert weights.keys() == names
    # Once, for what it reads is compared above, and Lightning looks through all modules of Python each time.
    loaded = row.module.load_from_checkpoint(checkpoints[len(checkpoints) // 2], weights_only=True)
    assert holds(loaded.state_dict(), held[len(checkpoints) // 2])


def test_mid_round_checkpoint_holds_the_weights_of_the_rounds_start(tmp_path):
    started = []

    class Keep(L.Callback):
        def on_train_epoch_start(self, trainer, module):
            started.append({name: tensor.clone() for name, tensor in module.state_dict().items()})

    row = ALGORITHMS["fedavg"]
    fit(*row.make(), callbacks=[Keep(), every_step(tmp_path)])
    ends = round_ends(row)
    for checkpoint in by_step(tmp_path):
        step = int(checkpoint.stem.partition("=")[2])
        if step not in ends:
            number = sum(step > end for end in ends)
            assert holds(torch.load(checkpoint, weights_only=True)["state_dict"], started[number]), step


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import lightning as L
from algorithms import ALGORITHMS
from runs import fit
from test_resume import every_step
from pathlib import Path

class Kill(L.Callback):
    def on_train_batch_start(self, trainer, *args):
        if trainer.global_step == int(sys.argv[3]):
            os.kill(os.getpid(), signal.SIGKILL)

for name in sys.argv[4:]:  # in a process each; their imports, which take longest, are made once
    if not (child := os.fork()):
        row = ALGORITHMS[name]
        fit(*row.make(), rounds=row.rounds, callbacks=[every_step(Path(sys.argv[2], name)), Kill()])
        os._exit(1)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_sigkill(tmp_path):
    names, step = ["fedavg, kept moments", "interrupted visits"], 11
    command = [sys.executable, "-c", KILLED, str(Path(__file__).parent), str(tmp_path), str(step), *names]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == [str(int(-signal.SIGKILL))] * 2, done.stderr
    for name in names:
        row, checkpoints = ALGORITHMS[name], by_step(tmp_path / name)
        assert len(checkpoints) == step
        assert_same(fit(*row.make(), rounds=row.rounds, ckpt_path=checkpoints[-1]), uninterrupted(row), name)


@pytest.mark.parametrize("max_steps", [-1, 10_000])
@pytest.mark.parametrize("name", ["fedavg", "changing ranks", "all offline"])
def test_from_the_start_of_every_epoch(name, max_steps, tmp_path):
    class Save(L.Callback):
        def on_train_epoch_start(self, trainer, module):
            trainer.save_checkpoint(tmp_path / f"{trainer.current_epoch}.ckpt")

    row = ALGORITHMS[name]
    whole = fit(*row.make(), rounds=row.rounds, max_steps=max_steps, callbacks=[Save()])
    for epoch in range(row.rounds):
        path = tmp_path / f"{epoch}.ckpt"
        assert_same(fit(*row.make(), rounds=row.rounds, max_steps=max_steps, ckpt_path=path), whole, f"epoch {epoch}")


class Breaks(ClientCallback):
    """An error in the code of a device, once."""

    def __init__(self, where, visits=4):
        self.where, self.left = where, visits

    def at(self, where):
        if where == self.where:
            self.left -= 1
            if not self.left:
                raise RuntimeError("sensor unplugged")

    def install(self, device, visit, tensors):
        self.at("install")
        return tensors

    def on_client_end(self, trainer, module, device, visit):
        self.at("end")

    def upload(self, device, visit, update):
        self.at("upload")
        return update


@pytest.mark.parametrize("where", ["install", "end", "upload"])
def test_error_between_steps(where, tmp_path):
    """What was saved before goes on exactly; what was saved in the middle of a message is refused."""
    whole = fit()
    callbacks = [every_step(tmp_path), OnExceptionCheckpoint(tmp_path / "exception", "last"), Breaks(where)]
    with pytest.raises(RuntimeError, match="sensor unplugged"):
        fit(callbacks=callbacks)
    with pytest.raises(ValueError, match="resume from the last checkpoint before it"):
        fit(ckpt_path=tmp_path / "exception" / "last.ckpt")
    assert_same(fit(ckpt_path=by_step(tmp_path)[-1]), whole)


@pytest.mark.parametrize("where", ["install", "end", "upload"])
def test_error_at_enrolment(where, tmp_path):
    """What some devices have sent would be sent, and paid for, twice."""
    row = ALGORITHMS["measured speeds"]
    with pytest.raises(RuntimeError, match="sensor unplugged"):
        fit(*row.make(), callbacks=[OnExceptionCheckpoint(tmp_path, "last"), Breaks(where)])
    with pytest.raises(ValueError, match="begin anew if it broke off the enrolment"):
        fit(*row.make(), ckpt_path=tmp_path / "last.ckpt")
