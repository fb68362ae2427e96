"""For any Trainer: a run that is killed and started again ends as if nothing had happened."""

from __future__ import annotations

import hashlib
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.callbacks import (
    Callback,
    GradientAccumulationScheduler,
    ModelCheckpoint,
    OnExceptionCheckpoint,
)
from lightning.pytorch.plugins import AsyncCheckpointIO
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader

from edgebolt.common.federated.device_files import DeviceFiles, remove_unlisted
from edgebolt.common.federated.round_loader import RoundLoader
from edgebolt.flude.resumable_loader import RandomStates, ResumableLoader
from edgebolt.flude.snapshot_file import read_snapshot, write_snapshot

__all__ = ["TrainingCache"]

_KEY = "edgebolt.training_cache"
_NOT_NEEDED = ("hyper_parameters", "hparams_name", "hparams_type")


class TrainingCache(OnExceptionCheckpoint):
    """Keeps one snapshot of the training up to date; the same job, started again, goes on from it by itself.

    Killed at any instant (SIGKILL, power cut) and started again with the same script, a run ends bit for bit as the
    uninterrupted one: weights, moments, schedules, callbacks, shuffling, dropout. A snapshot is one safetensors file
    with a JSON header, no pickle, that replaces the former one atomically. It is FLUDE's rolling cache (arXiv
    2412.19991) for a device that is its own master.

    Started again after it has ended, a job ends at once with the same weights; delete the folder to train anew. With
    more epochs than before it goes on. A job that has changed is refused: another model, other optimizers or their
    settings, other loaders, and other samples where the next batch shows it, or the first one of the last epoch when
    the job has ended.

    It is one of Lightning's ``Checkpoint`` callbacks: with ``Trainer(enable_checkpointing=False)`` Lightning refuses
    it, and beside it Lightning adds no ``ModelCheckpoint`` of its own. A path that is given to ``fit(ckpt_path=...)``
    comes before the snapshot, but for the ``save_last`` file of a ``ModelCheckpoint`` of the Trainer.

    What Lightning keeps in no checkpoint is lost here too: running means of ``self.log(..., on_epoch=True)`` in
    training and the states of metrics in the epoch under way; who monitors such a mean (``EarlyStopping``,
    ``ReduceLROnPlateau``) may decide otherwise after a kill in mid-epoch. ``on_train_epoch_start`` is not called again
    for the epoch under way, so what it sets must be in the state of the module or callback; the factor of
    ``GradientAccumulationScheduler`` is set. Where it left files before the kill, ``ModelCheckpoint`` writes others
    beside them (``-v1``): ``enable_version_counter=False`` keeps their names. A job that ``max_steps`` has ended and
    that goes on with more of them counts one epoch more and leaves out one step on a plateau. One process; datasets
    and samplers that draw from generators of their own cannot be repeated, and are noticed by their batches.

    A ``FederatedStrategy`` keeps large memories of devices in files in ``devices`` beside the snapshot. Those that the
    snapshot does not need are deleted, if nothing else lies in the folder.

    Args:
        folder: where the snapshot lies, one folder a job.
        every_n_steps: optimizer steps between two snapshots; after a kill, as many at most are trained again.
        job: what else must not change, such as your own settings; numbers, texts, and dicts and lists of them.

    Raises:
        ValueError: for ``every_n_steps`` below 1; when ``fit`` begins, for a changed job.
        TypeError: if the state of a module or a callback is not made of tensors and built-ins.

    Example::

        >>> import lightning as L
        >>> cache = TrainingCache("runs/digits", every_n_steps=20)
        >>> trainer = L.Trainer(max_epochs=3, callbacks=[cache], accelerator="cpu", logger=False)
    """

    FILE_EXTENSION = ".safetensors"
    best_model_path = ""  # `trainer.test(ckpt_path="best")` asks the first Checkpoint for it

    def __init__(self, folder: str | os.PathLike[str], every_n_steps: int = 50, job: Any = None) -> None:
        if type(every_n_steps) is not int or every_n_steps < 1:
            raise ValueError(f"every_n_steps={every_n_steps!r}: use a whole number of optimizer steps, 1 or more.")
        super().__init__(Path(folder).resolve(), "snapshot")
        self.every_n_steps, self.job = every_n_steps, job
        self.path = Path(self.ckpt_path)
        self.restored_step: int | None = None
        self._places: list[Any] = []  # of a snapshot, until there are loaders to take them
        self._restored: dict[str, Any] | None = None
        self._random: dict[str, Any] | None = None  # states that the first step after a restart begins with
        self._optimizers: list[Any] = []
        self._saved_at = -1
        self._in_mid_epoch = False  # of a restart, until that epoch ends
        # Lightning looks for this callback's file as it does for one that it wrote on an exception, and says so.
        warnings.filterwarnings("ignore", r".*was called without a model\. The last model of the previous `fit`")
        warnings.filterwarnings("ignore", r".*is set, but there is no last checkpoint available")

    # ------------------------------------------------------------------------------------------------ set-up

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Stand between the Trainer and its files, and between it and its training loaders."""
        self.teardown(trainer)  # an exception may have left the last fit without one
        strategy, holder = cast(Any, trainer.strategy), cast(Any, trainer)
        strategy.checkpoint_io = _SnapshotIO(strategy.checkpoint_io, self, trainer)
        if trainer.state.fn != TrainerFn.FITTING:
            return
        if trainer.world_size > 1:
            raise ValueError(f"TrainingCache serves one process and there are {trainer.world_size}: use devices=1.")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._places, self._restored, self._random, self._saved_at, self.restored_step = [], None, None, -1, None
        self._in_mid_epoch = False
        process = strategy.process_dataloader
        strategy.process_dataloader = lambda loader: self._wrapped(trainer, process(loader))
        # The user's first, so that `trainer.checkpoint_callback` is theirs; but the snapshot comes before any of their
        # hooks has begun a step. A new list: Lightning walks the old one.
        others = [callback for callback in holder.callbacks if callback is not self]
        holder.callbacks = [_BeforeOthers(self), *others, self]

    def teardown(self, trainer: pl.Trainer, *_: Any, **__: Any) -> None:
        """Give the strategy its own back. The snapshot stays."""
        strategy: Any = trainer.strategy
        if isinstance(strategy.checkpoint_io, _SnapshotIO):
            strategy.checkpoint_io = strategy.checkpoint_io.inner
            vars(strategy).pop("process_dataloader", None)
        holder = cast(Any, trainer)
        holder.callbacks = [callback for callback in holder.callbacks if not isinstance(callback, _BeforeOthers)]

    def on_exception(self, trainer: pl.Trainer, *_: Any, **__: Any) -> None:
        """Nothing: the last snapshot was whole, this instant may not be."""

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compare the optimizers, which are new as yet."""
        self._optimizers = [_described(optimizer) for optimizer in trainer.optimizers]
        if self._restored is not None:
            self._check("optimizers", self._optimizers, self._restored["optimizers"])
            if self._restored["stopped"]:
                trainer.should_stop = True
            rank_zero_info(f"TrainingCache: going on from step {self.restored_step}, {self.path}")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count the loaders; and Lightning begins no epoch anew, so do what a callback of its own does there."""
        if self._restored is not None:
            loaders = len(list(_resumable(trainer.train_dataloader)))
            self._check("number of training loaders", loaders, len(self._restored["places"]))
        for callback in trainer.callbacks if self._in_mid_epoch else []:  # type: ignore[attr-defined]
            if isinstance(callback, GradientAccumulationScheduler):
                callback.on_train_epoch_start(trainer)

    def _wrapped(self, trainer: pl.Trainer, loader: Any) -> Any:
        if not trainer.training or isinstance(loader, RoundLoader):
            return loader
        if not _sized(loader) or (hasattr(loader, "state_dict") and not isinstance(loader, DataLoader)):
            raise ValueError(
                f"TrainingCache cannot come back to a place in a {type(loader).__name__}: use a DataLoader with a "
                "length."
            )
        wrapped = ResumableLoader(loader, lambda: self._due(trainer), cuda=self._states(trainer).cuda)
        self._place(wrapped)
        return wrapped

    def _place(self, loader: ResumableLoader) -> None:
        if self._places:
            place = self._places.pop(0)
            self._check("lengths", len(loader), place["length"])
            loader.resume_at(place)

    def _check(self, name: str, here: Any, there: Any) -> None:
        if there != here:
            what = {"lengths": "batches of the training loader", "job": "job=", "module": "module and its tensors"}
            raise ValueError(
                f"The snapshot in {self.path.parent} belongs to another job: {what.get(name, name)} there {there!r}, "
                f"here {here!r}. Put it back as it was, give this job a folder of its own, or delete that one to "
                "begin anew."
            )

    # ------------------------------------------------------------------------------------------- snapshots

    def _due(self, trainer: pl.Trainer) -> bool:
        return self._saved_at < 0 or trainer.global_step - self._saved_at >= self.every_n_steps

    def _before_step(self, trainer: pl.Trainer, batch_idx: int) -> None:
        """Take a snapshot between two steps, when all that follows the former one is done, validation too."""
        if self._random is not None:
            self._states(trainer).write(self._random)
            self._random = None
        if self._due(trainer) and batch_idx % trainer.accumulate_grad_batches == 0:
            self._save(trainer, ended=False)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The last one: the job has ended."""
        self._save(trainer, ended=True)

    @staticmethod
    def _states(trainer: pl.Trainer) -> RandomStates:
        return RandomStates(cuda=trainer.strategy.root_device.type == "cuda")

    def _save(self, trainer: pl.Trainer, ended: bool) -> None:
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._ended = ended
            trainer.save_checkpoint(self.path)
            self._saved_at = trainer.global_step

    def packed(self, trainer: pl.Trainer, checkpoint: Mapping[str, Any]) -> dict[str, Any]:
        """A checkpoint with what it lacks: places in the loaders, random states, what the job is."""
        state = {key: value for key, value in checkpoint.items() if not key.endswith(_NOT_NEEDED)}
        loaders, last = list(_resumable(trainer.train_dataloader)), (trainer.is_last_batch, trainer.current_epoch - 1)
        state[_KEY] = {
            "places": [loader.place_after(*last) if self._ended else loader.place() for loader in loaders],
            "module": _described_module(trainer.lightning_module),
            "optimizers": self._optimizers,
            "job": self.job,
            "step": trainer.global_step,
            "stopped": bool(trainer.should_stop),
            "metrics": dict(trainer.callback_metrics),  # who monitors may look at one of an earlier epoch
            "random": None if self._ended else self._states(trainer).read(),
        }
        if not self._ended:
            _before_this_batch(state["loops"]["fit_loop"])
        return state

    def restored(self, trainer: pl.Trainer, state: dict[str, Any]) -> dict[str, Any]:
        """The checkpoint of a snapshot, once it is known to be this job's."""
        about = state.pop(_KEY)
        if trainer.state.fn == TrainerFn.FITTING:  # else its weights are wanted, no more
            self._check("module", _described_module(trainer.lightning_module), about["module"])
            self._check("job", self.job, about["job"])
            self._restored, self._places = about, list(about["places"])
            self.restored_step, self._random = about["step"], about["random"]
            self._saved_at, self._in_mid_epoch = about["step"], about["random"] is not None
            for loader in _resumable(trainer.train_dataloader):  # the module has asked for them in its setup
                self._place(loader)
        return state


class _BeforeOthers(Callback):
    """The cache's hooks that come before those of all other callbacks."""

    def __init__(self, cache: TrainingCache) -> None:
        self.cache = cache
        self._plateau: int | None = None  # number of an epoch whose plateau schedules are to step

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.cache._restored is not None:
            trainer.callback_metrics.update(self.cache._restored["metrics"])

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.cache._before_step(trainer, batch_idx)

    # At the end of an epoch that it has restarted in the middle, Lightning leaves out the plateau schedules. They are
    # made to step at the next instant at which a callback is asked: what others log at the end is known by then.

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.cache._in_mid_epoch and trainer.is_last_batch and pl_module.automatic_optimization:
            self._plateau = trainer.current_epoch + 1
        self.cache._in_mid_epoch = False

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._step_plateaus(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._step_plateaus(trainer, pl_module)

    def _step_plateaus(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        epoch, self._plateau = self._plateau, None
        for config in trainer.lr_scheduler_configs if epoch is not None else []:
            if config.reduce_on_plateau and config.interval == "epoch" and cast(int, epoch) % config.frequency == 0:
                value = trainer.callback_metrics.get(str(config.monitor))
                if value is not None:
                    pl_module.lr_scheduler_step(config.scheduler, value)
                elif config.strict:
                    raise ValueError(
                        f"ReduceLROnPlateau monitors {config.monitor!r}, and there is only "
                        f"{sorted(trainer.callback_metrics)}."
                    )


class _SnapshotIO(CheckpointIO):
    """Writes and reads the snapshot; other files go through the Trainer's own."""

    def __init__(self, inner: CheckpointIO, cache: TrainingCache, trainer: pl.Trainer) -> None:
        self.inner, self.cache, self.trainer = inner, cache, trainer

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        if Path(path) == self.cache.path:
            write_snapshot(self.cache.path, self.cache.packed(self.trainer, checkpoint))
            if not isinstance(self.inner, AsyncCheckpointIO):  # else a checkpoint may be on its way to this folder
                remove_unlisted(self.cache.path, checkpoint)
        else:
            self.inner.save_checkpoint(checkpoint, path, storage_options)

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        last = self.trainer.state.fn == TrainerFn.FITTING and self._is_last(Path(path))
        if Path(path) == self.cache.path or (last and self.cache.path.exists()):
            # Large memories of devices lie beside the snapshot, whatever the path is called.
            state = DeviceFiles().get({0: read_snapshot(self.cache.path)}, self.cache.path)[0]
            return self.cache.restored(self.trainer, state)
        return self.inner.load_checkpoint(path, *args, **kwargs)

    def remove_checkpoint(self, path: Any) -> None:
        self.inner.remove_checkpoint(path)

    def _is_last(self, path: Path) -> bool:
        """Whether a ``ModelCheckpoint`` of this Trainer has written it with ``save_last``: ``"last"`` may mean it."""
        return any(
            isinstance(callback, ModelCheckpoint)
            and callback.dirpath is not None
            and Path(callback.dirpath).resolve() == path.parent.resolve()
            and re.fullmatch(rf"{re.escape(callback.CHECKPOINT_NAME_LAST)}(-v?\d+)?", path.stem) is not None
            and path.suffix == callback.FILE_EXTENSION
            for callback in self.trainer.checkpoint_callbacks
        )


def _sized(loader: Any) -> bool:
    try:
        len(loader)
    except (TypeError, NotImplementedError):  # a DataLoader of an IterableDataset has a __len__ that raises
        return False
    return True


def _resumable(node: Any) -> Iterator[ResumableLoader]:
    """The loaders of a nested structure, in the order in which Lightning has them."""
    if isinstance(node, ResumableLoader):
        yield node
    elif isinstance(node, Mapping | list | tuple):
        for item in node.values() if isinstance(node, Mapping) else node:
            yield from _resumable(item)


def _before_this_batch(fit_loop: dict[str, Any]) -> None:
    """Lightning's counters as they were before the batch that was drawn: it is drawn again.

    They are a file format rather than an interface; the tests resume from every step. ``started`` one too high says
    that a restart has nothing to make up for: neither a validation nor the end of an epoch.
    """
    batches = fit_loop["epoch_loop.batch_progress"]
    for tracker in ("current", "total"):
        batches[tracker] = dict.fromkeys(batches[tracker], batches[tracker]["completed"])
    batches["total"]["started"] += 1
    batches["is_last_batch"] = False
    fit_loop["epoch_loop.state_dict"]["_batches_that_stepped"] -= 1  # Lightning adds it at the restart


def _described_module(module: pl.LightningModule) -> dict[str, str]:
    lines = [f"{name} {tuple(t.shape)} {t.dtype}" for name, t in module.state_dict().items()]
    shape = hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
    return {"class": type(module).__qualname__, "tensors": f"{len(lines)}, sha256 {shape}"}


def _described(optimizer: Any) -> dict[str, Any]:
    plain = (str, int, float, bool, tuple)
    groups = [{k: v for k, v in group.items() if isinstance(v, plain)} for group in optimizer.param_groups]
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    return {"class": type(optimizer).__qualname__, "groups": groups, "sizes": sizes}
