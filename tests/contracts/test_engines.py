"""A run is the same run, bit for bit, wherever its visits are trained."""

import os
import pickle
import signal
import subprocess
import sys
import threading
from functools import cache
from pathlib import Path

import lightning as L
import pytest
import torch
from algorithms import ALGORITHMS, DISTINCT
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.plugins import Precision
from runs import Net, assert_same, exact, fit, make_strategy, make_trainer, state, train_loader, val_loader

import edgebolt.common.engines.job
from edgebolt.common.engines import Engine, RayEngine, Serial
from edgebolt.common.federated import IID, ClientCallback, FedAvg, Visit


@pytest.fixture(scope="module")
def ray_engine():
    pytest.importorskip("ray", reason='needs Ray: pip install "edgebolt-common[ray]"')
    with RayEngine(2, {"cpu": 0.5}) as engine:
        yield engine


@pytest.fixture(scope="module")
def one_worker(ray_engine):
    """For what ends workers: a new one takes seconds."""
    ray_engine._connect()  # who starts Ray stops it
    with RayEngine(1, {"cpu": 0.5}) as engine:
        yield engine


@cache
def serial(name):
    row = ALGORITHMS[name]
    return fit(*row.make(), rounds=row.rounds)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_ray(name, ray_engine):
    row = ALGORITHMS[name]
    run = fit(*row.make(engine=ray_engine), rounds=row.rounds)
    assert_same(run, serial(name))
    assert exact(run.trainer.callback_metrics) == exact(serial(name).trainer.callback_metrics)


def on_two_ranks(tmp_path, serial, accelerator, *names):
    """Algorithms, or all, in one start of two ranks, which takes longer than the runs."""
    script = Path(__file__).with_name("on_ranks.py")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*torchrun, script, tmp_path, accelerator, *names], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    first, second = (pickle.loads((tmp_path / f"{rank}.pkl").read_bytes()) for rank in range(2))
    assert [*first] == [*second] == [*(names or ALGORITHMS)]
    different = {}
    for name in first:
        expected = {**state(serial(name)), "metrics": exact(serial(name).trainer.callback_metrics)}
        found = {**first[name]["state"], "metrics": first[name]["metrics"]}
        parts = [part for part in expected if found[part] != expected[part]]
        parts += [f"{part} of rank 1" for part in ("module", "metrics") if second[name][part] != first[name][part]]
        assert second[name]["state"] is None, "rank 1 is no server"
        if parts:
            different[name] = parts
    assert not different


def test_ranks(tmp_path):
    on_two_ranks(tmp_path, serial, "cpu")


def serial_on_gpu(name):
    row = ALGORITHMS[name]
    return fit(*row.make(), rounds=row.rounds, accelerator="gpu", devices=1)


@pytest.mark.gpu
def test_ranks_on_a_gpu(tmp_path):
    on_two_ranks(tmp_path, serial_on_gpu, "gpu", *DISTINCT)


@pytest.mark.gpu
@pytest.mark.parametrize("name", DISTINCT)
def test_ray_on_a_gpu(name, ray_engine):
    """Two workers share it."""
    row, engine = ALGORITHMS[name], RayEngine(2, {"cpu": 0.5, "gpu": 0.5})
    run = fit(*row.make(engine=engine), rounds=row.rounds, accelerator="gpu", devices=1)
    assert_same(run, serial_on_gpu(name))


@pytest.mark.parametrize("name", DISTINCT)
@pytest.mark.parametrize("first", ["serial", "ray"])
def test_a_checkpoint_of_one_engine_is_resumed_by_another(name, first, ray_engine, tmp_path):
    row = ALGORITHMS[name]
    engines = ["serial", ray_engine] if first == "serial" else [ray_engine, "serial"]
    save = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    fit(*row.make(engine=engines[0]), rounds=1, callbacks=[save])
    run = fit(*row.make(engine=engines[1]), rounds=row.rounds, ckpt_path=tmp_path / "epoch=0.ckpt")
    assert_same(run, serial(name))


class Dies(ClientCallback):
    """The process of a client's visit is killed, the first ``times``."""

    def __init__(self, folder, client=2, times=1):
        self.folder, self.client, self.times = folder, client, times

    def on_client_start(self, trainer, module, device, visit):
        deaths = len(list(self.folder.iterdir()))
        worker = threading.current_thread() is not threading.main_thread()
        if worker and device.id == self.client and deaths < self.times:
            (self.folder / str(deaths)).touch()
            os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_dies_is_replaced(one_worker, tmp_path):
    run = fit(make_strategy(engine=one_worker, per_round=6), callbacks=[Dies(tmp_path)])
    assert len(list(tmp_path.iterdir())) == 1
    assert_same(run, fit(make_strategy(per_round=6), callbacks=[Dies(tmp_path)]))


def test_a_visit_whose_worker_dies_three_times_is_a_failed_client(one_worker, tmp_path):
    with pytest.warns(UserWarning, match="Client 2 counts as failed"):
        run = fit(make_strategy(engine=one_worker, per_round=6), rounds=1, callbacks=[Dies(tmp_path, times=10**6)])
    assert [(row["round/failed"], row["round/delivered"]) for row in run.strategy.history] == [(1, 5)]


def test_a_worker_that_dies_between_fits_is_replaced(one_worker):
    import ray

    fit(make_strategy(engine=one_worker), rounds=1)
    ray.kill(one_worker._workers[0]._actor)
    assert_same(fit(make_strategy(engine=one_worker)), fit(make_strategy()))


class Fails(Net):
    def training_step(self, batch, batch_idx):
        raise ZeroDivisionError("in the module's own code")


def test_what_the_module_raises_is_raised_here(one_worker):
    with pytest.raises(ZeroDivisionError, match="in the module's own code"):
        fit(make_strategy(engine=one_worker), Fails())
    row = ALGORITHMS["fedavg"]
    assert_same(fit(*row.make(engine=one_worker), rounds=row.rounds), serial("fedavg"), "the engine is of no more use")


def test_what_cannot_be_sent_is_named(ray_engine):
    module = Net()
    module.head.lock = threading.Lock()
    with pytest.raises(TypeError, match=r"module\.head\.lock, a lock, cannot be sent to a worker"):
        fit(make_strategy(engine=ray_engine), module)


def test_other_versions_are_refused(ray_engine, monkeypatch):
    fit(make_strategy(engine=ray_engine), rounds=1)  # Ray runs
    monkeypatch.setattr(edgebolt.common.engines.job, "version", lambda name: "0.0.1")
    with pytest.raises(RuntimeError, match=r"The worker has .*, the server .*'torch': '0\.0\.1'"):
        fit(make_strategy(engine=RayEngine(1, {"cpu": 0.1})))


@pytest.mark.parametrize("rows", [range(50), range(55, -1, -1)])
def test_data_that_are_not_those_of_the_server_are_refused(rows, one_worker):
    class Changing(Data):
        """Makes other data in every process."""

        def setup(self, stage):
            super().setup(stage)
            if threading.current_thread() is not threading.main_thread():
                self.train = train_loader(dataset=torch.utils.data.Subset(self.train.dataset, rows))

    with pytest.raises(ValueError, match="data are not those of the server"):
        make_trainer(make_strategy(engine=one_worker, clients=IID(6))).fit(Net(), datamodule=Changing())


def test_a_precision_of_ones_own_is_refused(ray_engine):
    class Own(Precision):
        pass

    with pytest.raises(ValueError, match="precision plugin, Own, that workers cannot make"):
        fit(make_strategy(engine=ray_engine), plugins=[Own()])


def test_a_module_may_ask_for_the_length_of_a_round(ray_engine):
    class Asks(Net):
        def configure_optimizers(self):
            self.length = int(self.trainer.estimated_stepping_batches)  # infinite in a Trainer without end
            return super().configure_optimizers()

        def training_step(self, batch, batch_idx):
            assert self.trainer.max_epochs == 3 and self.length > 0
            return super().training_step(batch, batch_idx)

    assert_same(fit(make_strategy(engine=ray_engine), Asks()), fit(make_strategy(), Asks()))


def test_a_checkpoint_in_mid_round_is_refused(one_worker, tmp_path):
    save = ModelCheckpoint(tmp_path, every_n_train_steps=1)
    with pytest.raises(RuntimeError, match="save at the end of a round"):
        fit(make_strategy(engine=one_worker), callbacks=[save])


def test_after_an_error_no_worker_is_left_busy(one_worker, tmp_path):
    class Raises(L.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            raise ZeroDivisionError("in a callback of the user's")

    save = OnExceptionCheckpoint(tmp_path)
    with pytest.raises(RuntimeError, match="save at the end of a round") as error:
        fit(make_strategy(engine=one_worker), callbacks=[Raises(), save])
    assert isinstance(error.value.__context__, ZeroDivisionError)
    assert not one_worker._threads


def test_a_checkpoint_of_mid_round_is_refused(ray_engine, tmp_path):
    save = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=1)
    fit(rounds=1, callbacks=[save])
    with pytest.raises(ValueError, match=r"written in mid-round.*engine=Serial\(\)"):
        fit(make_strategy(engine=ray_engine), ckpt_path=tmp_path / "step=1.ckpt")


@pytest.mark.parametrize("asks", [False, True], ids=["", "asks for the number of steps"])
def test_a_schedule_of_steps_is_refused(asks, ray_engine):
    class ByStep(Net):
        def configure_optimizers(self):
            optimizer = self.make_optimizer()
            steps = self.trainer.estimated_stepping_batches if asks else 10
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    with pytest.raises(ValueError, match="interval='epoch'"):
        fit(make_strategy(engine=ray_engine), ByStep())


class Data(L.LightningDataModule):
    """Makes its data in ``setup``; what it holds afterwards is not sent."""

    def setup(self, stage):
        self.train, self.lock = train_loader(), threading.Lock()

    def train_dataloader(self):
        return self.train

    def val_dataloader(self):
        return val_loader()


def test_a_datamodule_travels_without_its_data(ray_engine):
    models = []
    for engine in ("serial", ray_engine):
        module = Net()
        make_trainer(make_strategy(engine=engine)).fit(module, datamodule=Data())
        models.append(exact(module.state_dict()))
    assert models[0] == models[1]


def test_a_datamodule_may_make_another_loader_for_each_round(ray_engine, tmp_path):
    class ByRound(Data):
        def train_dataloader(self):
            return train_loader(batch_size=4 * (1 + self.trainer.current_epoch))

    models = []
    save = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    for engine, resumed in (("serial", None), (ray_engine, None), (ray_engine, tmp_path / "epoch=0.ckpt")):
        module = Net()
        callbacks = [] if models else [save]
        trainer = make_trainer(make_strategy(engine=engine), callbacks=callbacks)
        trainer.fit(module, datamodule=ByRound(), ckpt_path=resumed)
        models.append(exact(module.state_dict()))
    assert models[0] == models[1] == models[2]


def test_a_modules_loader_that_changes_is_refused(ray_engine):
    class ByRound(Net):
        def train_dataloader(self):
            return train_loader(batch_size=4 * (1 + self.trainer.current_epoch))

    with pytest.raises(ValueError, match=r"'batch_size': 8.*train_dataloader\(\) of a LightningDataModule"):
        make_trainer(make_strategy(engine=ray_engine)).fit(ByRound())


class Draws(Net):
    """Sets its learning rate late, and draws where nobody seeds."""

    def configure_optimizers(self):
        return self.make_optimizer()

    def on_train_epoch_start(self):
        for group in self.optimizers().param_groups:
            group["lr"] = 0.1 / (1 + self.current_epoch)

    def validation_step(self, batch, batch_idx):
        self.log("drawn", torch.rand(()), batch_size=1)


class Installs(ClientCallback):
    def install(self, device, visit, tensors):
        return {name: tensor + 0.01 * torch.rand_like(tensor) for name, tensor in tensors.items()}


def test_what_is_drawn_and_set_between_visits(ray_engine):
    runs = [fit(make_strategy(engine=engine), Draws(), callbacks=[Installs()]) for engine in ("serial", ray_engine)]
    assert_same(*runs)
    assert exact(runs[0].trainer.callback_metrics) == exact(runs[1].trainer.callback_metrics)


class ManyAtOnce(FedAvg):
    """Client 0 is visited three times at one instant, and an engine has eight visits at once."""

    def plan(self, server):
        between = [Visit(client, 2, lane=f"{client}", stage=2) for client in range(1, 6)]
        of_0 = [Visit(0, 2, lane=f"of 0, {stage}", stage=stage) for stage in (0, 1, 4)]
        return [*of_0[:2], *between, Visit(1, 2, lane="of 1", stage=3), of_0[2]]


def test_visits_of_a_device_at_one_instant_keep_their_order(ray_engine):
    runs = [fit(make_strategy(ManyAtOnce(moments="keep"), engine=engine)) for engine in ("serial", ray_engine)]
    assert ray_engine.ahead == 8
    assert_same(*runs)


@pytest.mark.parametrize(
    ("engine", "error", "match"),
    [
        ("dask", ValueError, "'dask': use one of"),
        (RayEngine, TypeError, "or an Engine such as"),
        ("ranks", RuntimeError, "torchrun --nproc-per-node=2 script.py"),
    ],
)
def test_engines_that_are_none(engine, error, match, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(error, match=match):
        make_strategy(engine=engine)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"num_workers": 0}, "use 1 or more"),
        ({"num_workers": True}, "use 1 or more"),
        ({"resources_per_worker": {"cpu": -1}}, "use amounts"),
        ({"resources_per_worker": {"cpu": 0}}, "use amounts"),
    ],
)
def test_workers_that_are_none(arguments, match):
    with pytest.raises(ValueError, match=match):
        RayEngine(**arguments)


def test_more_workers_than_there_are(ray_engine):
    fit(make_strategy(engine=ray_engine), rounds=1)  # Ray runs
    with pytest.raises(ValueError, match=r"num_workers=1000 with 1 cpu each .*, \d+ cpu in all, which are enough for"):
        fit(make_strategy(engine=RayEngine(1000)))


def test_a_worker_has_to_fit_into_one_machine():
    pytest.importorskip("ray", reason="the engine needs Ray")
    nodes = [{"CPU": 8.0, "GPU": 2.0}, {"CPU": 3.0, "GPU": 1.0}]
    assert RayEngine(resources_per_worker={"cpu": 2})._fitting(nodes) == 5
    assert RayEngine(resources_per_worker={"gpu": 0.6})._fitting(nodes) == 3
    assert RayEngine(resources_per_worker={"cpu": 2, "gpu": 0.25})._fitting(nodes) == 5
    with pytest.raises(ValueError, match=r"2 machine\(s\) of Ray have, 11 cpu in all, which are enough for 0"):
        RayEngine(1, {"cpu": 9})._fitting(nodes)


def test_another_ray_than_the_one_there_is(ray_engine):
    fit(make_strategy(engine=ray_engine), rounds=1)  # Ray runs
    with pytest.raises(ValueError, match=r"address='10.0.0.1:6379', and this process is connected to Ray at"):
        fit(make_strategy(engine=RayEngine(1, address="10.0.0.1:6379")))


def test_the_default_is_serial():
    assert isinstance(make_strategy().engine, Serial)
    assert not isinstance(make_strategy().engine, Engine)
